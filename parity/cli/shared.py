"""What every command does alike: options that recur, errors in one line, exit codes."""

import contextlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

# The names of flax_gpt.PRESETS and parity.twins.TASKS; a test holds them equal.
PRESETS = "tiny", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"
TASKS = "next-token", "token-class", "sequence-class"

Data = Annotated[
    Path | None,
    typer.Option(help="UTF-8 text; without it, Python's own language reference."),
]
Task = Annotated[
    str,
    typer.Option(
        help="next-token, or a classifier's head on the GPT: token-class (what kind of character "
        "came before), sequence-class (how many of a passage's characters are letters)."
    ),
]
Device = Annotated[str, typer.Option(help="auto (GPUs if both frameworks have one), cpu or cuda.")]


def unwrapped(command: Callable) -> str:
    """A command's docstring with the lines of each paragraph joined, but not those of a table."""
    paragraphs = inspect.cleandoc(command.__doc__).split("\n\n")
    return "\n\n".join(x if x.startswith("[") else x.replace("\n", " ") for x in paragraphs)


@contextlib.contextmanager
def in_one_line(errors: Console, interrupted: str = "nothing was written") -> Iterator[None]:
    """Bad input ends with one line and exit code 2, an interrupt with one line and 130.

    Args:
        errors: the error stream.
        interrupted: what an interrupt leaves behind, in words.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        errors.print(f"parity: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        errors.print(f"parity: interrupted, {interrupted}.", style="red", soft_wrap=True)
        sys.stdout.flush()
        sys.stderr.flush()
        # Not by an exception: a Python that was interrupted inside exec(), as in an import, kills
        # itself with the signal at its end, whatever exit code was asked for.
        os._exit(130)


def check_data(data: Path | None) -> None:
    """Refuses a text that is not there before anything heavy is loaded.

    Raises:
        ValueError: when there is no such file.
    """
    if data is not None and not data.is_file():
        raise ValueError(f"data file {data}: no such file. Give a UTF-8 text file.")


def check_outputs(files: dict[str, str | None]) -> None:
    """Refuses output files, by option, that could not be written after all the work.

    Raises:
        ValueError: for a folder, or a file in a folder that does not exist.
    """
    for option, name in files.items():
        if name in (None, "-"):
            continue
        if Path(name).is_dir():
            raise ValueError(f"{option} {name}: that is a folder. Name a file in it.")
        if not Path(name).parent.is_dir():
            folder = Path(name).parent
            raise ValueError(f"{option} {name}: no folder {folder}. Make it or name another.")
