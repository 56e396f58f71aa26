"""Options that several commands share, and how each command ends: in one line, with a code."""

import contextlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from parity.twins.names import DTYPES, FRAMEWORKS, PRESETS

if TYPE_CHECKING:
    from parity.pair.text import Corpus
    from parity.training import RunConfig
    from parity.twins.twin import Constants

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
Preset = Annotated[str, typer.Option(help=f"Model size: {', '.join(PRESETS)}.")]
Rows = Annotated[int, typer.Option(min=1, help="Rows of a batch.")]
Width = Annotated[int, typer.Option(min=2, help="Tokens of a row.")]
Rate = Annotated[float, typer.Option(help="Learning rate at the end of the warm-up.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of weights, batches and dropout.")]
Dropout = Annotated[float, typer.Option(help="Dropout, with the same masks in both.")]
Only = Annotated[str | None, typer.Option(help="One twin alone: flax or torch. Default: both.")]
Device = Annotated[str, typer.Option(help="auto (GPUs if both frameworks have one), cpu or cuda.")]


def unwrapped(command: Callable) -> str:
    """Return a command's docstring with the lines of each paragraph joined, except in tables."""
    paragraphs = inspect.cleandoc(command.__doc__ or "").split("\n\n")
    return "\n\n".join(x if x.startswith("[") else x.replace("\n", " ") for x in paragraphs)


@contextlib.contextmanager
def in_one_line(errors: Console, interrupted: str = "nothing was written") -> Iterator[None]:
    """End bad input with one line and exit code 2, an interrupt with one line and 130.

    Args:
        errors: the error stream.
        interrupted: describes what an interrupt leaves.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        text = f"parity: {error}"
        errors.print(text, style="red", markup=False, highlight=False, emoji=False, soft_wrap=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        errors.print(f"parity: interrupted, {interrupted}.", style="red", soft_wrap=True)
        sys.stdout.flush()
        sys.stderr.flush()
        # Not by an exception: a Python that was interrupted inside exec(), as in an import, kills
        # itself with the signal at its end, whatever exit code was asked for.
        os._exit(130)


def check_data(data: Path | None) -> None:
    """Refuse a text that does not exist, before anything heavy is loaded.

    Raises:
        ValueError: when there is no such file.
    """
    if data is not None and not data.is_file():
        raise ValueError(f"data file {data}: no such file. Give a UTF-8 text file.")


def check_outputs(files: dict[str, str | None]) -> None:
    """Refuse output files, by option, that could not be written after all the work.

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


def write_output(name: str | None, text: Callable[[], str]) -> None:
    """Write a text where an option asks for it: nowhere, standard output for -, or a file."""
    from parity.system.files import write_atomically

    if str(name) == "-":
        typer.echo(text(), nl=False)
    elif name is not None:
        write_atomically(Path(name), text())


def check_dtype(dtype: str) -> None:
    """Refuse an unknown dtype.

    Raises:
        ValueError: with the known ones.
    """
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype}: there are {', '.join(DTYPES)}. Choose from them.")


def run_config(
    corpus: "Corpus", preset: str, model: "Constants", training: "Constants", **fields: object
) -> "RunConfig":
    """Return the config of a run, after a look for numbers that clash.

    Args:
        corpus: the text to learn from.
        preset: size of the twins.
        model: fields of GPTConfig that differ from the preset.
        training: fields of TrainConfig.
        fields: of RunConfig, rows and width among them.

    Raises:
        ValueError: for what cannot be trained.
    """
    from flax_gpt import TrainConfig
    from parity.training import RunConfig
    from parity.twins.pair import preset_config

    run = RunConfig.of(
        corpus,
        model=preset_config(corpus, preset, **model),
        training=TrainConfig(**training),
        **fields,
    )
    parts = run.training.accumulation_steps
    if run.width > run.model.context_length:
        raise ValueError(
            f"--width {run.width} > context length {run.model.context_length} of {preset}. A row "
            "fits into the context. Choose a smaller one."
        )
    if run.rows % parts:
        raise ValueError(
            f"--batch-size {run.rows} in {parts} parts. Parts have the same number of rows. Choose "
            "an --accumulate that divides the batch."
        )
    return run


def frameworks(only: str | None) -> tuple[str, ...]:
    """Return the frameworks that --only leaves.

    Raises:
        ValueError: for an unknown framework.
    """
    if only not in (None, *FRAMEWORKS):
        raise ValueError(f"--only {only}: there are flax and torch. Choose one or leave it out.")
    return FRAMEWORKS if only is None else (only,)
