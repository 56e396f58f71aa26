"""Options that several commands share, and how each command ends: in one line, with a code."""

import contextlib
import copy
import inspect
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from parity.system.files import check_writable, write_file
from parity.twins.names import DTYPES, FRAMEWORKS, PRESETS

if TYPE_CHECKING:
    from parity.pair.text import Corpus
    from parity.training import RunConfig
    from parity.twins.twin import Constants

# Without help of their own: a command describes them under `Options:`.
Natural = Annotated[int, typer.Option(min=0)]
Positive = Annotated[int, typer.Option(min=1)]
PositiveOrNone = Annotated[int | None, typer.Option(min=1)]
AtLeastTwoOrNone = Annotated[int | None, typer.Option(min=2)]

Data = Annotated[
    Path | None, typer.Option(help="UTF-8 text; without it, Python's own language reference.")
]
Preset = Annotated[str, typer.Option(help=f"Model size: {', '.join(PRESETS)}.")]
Rows = Annotated[int, typer.Option(min=1, help="Rows of a batch.")]
Width = Annotated[int, typer.Option(min=2, help="Tokens of a row.")]
Rate = Annotated[float, typer.Option(help="Learning rate at the end of the warm-up.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of weights, batches and dropout.")]
Dropout = Annotated[float, typer.Option(help="Dropout, with the same masks in both.")]
Only = Annotated[str | None, typer.Option(help="One twin alone: flax or torch. Default: both.")]
Device = Annotated[str, typer.Option(help="auto (GPUs if both frameworks have one), cpu or cuda.")]


def register(add: Callable[..., Any], command: Callable[..., None], **settings: Any) -> None:
    """Register a command by typer's `add`; its docstring is the help of it and of its options.

    Lines of a paragraph are joined, except in tables, and each example is a paragraph. What stands
    under `Options:` describes the options that have no help of their own. A switch that is off by
    default gets no opposite.
    """
    shown, defaults = [], inspect.signature(command).parameters
    for paragraph in inspect.cleandoc(command.__doc__ or "").split("\n\n"):
        title, _, rest = paragraph.partition("\n    ")
        entries = [re.sub(r"\s+", " ", entry) for entry in re.split(r"\n    (?! )", rest)]
        if title == "Options:":
            for name, _, about in (entry.partition(": ") for entry in entries):
                kind, default = command.__annotations__[name], defaults[name].default
                if hasattr(kind, "__metadata__"):
                    kind, option = kind.__origin__, copy.copy(kind.__metadata__[0])
                elif default is inspect.Parameter.empty:
                    option = typer.Argument()
                else:
                    names = [f"--{name.replace('_', '-')}"] if default is False else []
                    option = typer.Option(*names)
                option.help = about
                command.__annotations__[name] = Annotated[kind, option]
        elif rest:
            shown += [title, *entries]
        else:
            shown.append(title if title.startswith("[") else title.replace("\n", " "))
    add(help="\n\n".join(shown), **settings)(command)


@contextlib.contextmanager
def in_one_line(errors: Console, interrupted: str = "nothing was written") -> Iterator[Console]:
    """Yield the error stream; end bad input with one line and code 2, an interrupt with 130.

    A reader of standard output that has seen enough ends it without a line, with 141. `interrupted`
    describes what an interrupt leaves.
    """
    try:
        yield errors
    except BrokenPipeError as error:
        # Python, too, writes what is left at its end, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(128 + signal.SIGPIPE) from error
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
    """Refuse a text that does not exist, before anything heavy is loaded."""
    if data is not None and not data.is_file():
        raise ValueError(f"data file {data}: no such file. Give a UTF-8 text file.")


def check_outputs(files: dict[str, str | None]) -> None:
    """Refuse output files, by option, that could not be written after all the work."""
    for option, name in files.items():
        if name not in (None, "-"):
            try:
                check_writable(Path(name))
            except ValueError as error:
                raise ValueError(f"{option} {error}") from error


def write_output(name: str | None, text: Callable[[], str]) -> None:
    """Write a text where an option asks for it: nowhere, standard output for -, or a file."""
    if str(name) == "-":
        typer.echo(text(), nl=False)
    elif name is not None:
        write_file(Path(name), text())


def check_dtype(dtype: str) -> None:
    """Refuse an unknown dtype."""
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype}: there are {', '.join(DTYPES)}. Choose from them.")


def run_config(
    corpus: "Corpus", preset: str, model: "Constants", training: "Constants", **fields: object
) -> "RunConfig":
    """Return the config of a run with these fields of each config; refuse what clashes."""
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
    """Return the frameworks that --only leaves."""
    if only not in (None, *FRAMEWORKS):
        raise ValueError(f"--only {only}: there are flax and torch. Choose one or leave it out.")
    return FRAMEWORKS if only is None else (only,)
