"""`parity bench`: how fast the twins are, side by side in one run."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from parity.cli.options import PRESETS, Device, check_outputs, in_one_line, unwrapped

# The names of parity.bench.DTYPES; a test holds them equal.
DTYPES = "float32", "bfloat16"

bench = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="How fast the twins are, side by side in one run.",
)


@bench.callback()
def _bench() -> None:
    """Keeps `training` a word of its own while it is the only benchmark."""


def training(
    preset: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Model size, repeat for more: {', '.join(PRESETS)}. Default: tiny and gpt2."
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows of a batch. Default: 8 of tiny, 1 of others.")
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of a row. Default: 64 of tiny, 128 of others."),
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Rounds. Default: 15 of tiny, 5 of others.")
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help=f"{' or '.join(DTYPES)}; the second computes in it with weights in float32."
        ),
    ] = "float32",
    device: Device = "auto",
    json: Annotated[
        str | None, typer.Option(help="Write the times to this file; - for standard output.")
    ] = None,
) -> None:
    """Time one training step: flax jit, flax donated, torch eager, torch compiled.

    All start from the same weights, and nothing is timed before their losses have agreed over two
    steps. Then they take turns, and in the same rounds each framework multiplies matrices, which
    is the roof that their FLOP/s are a share of. Compilation is timed apart, from nothing. On two
    CPU cores this takes a few minutes and, for gpt2, 10 GB of memory.

    Exit codes: 0 timed, 2 bad input, or steps that do not compute the same.

    Examples:

    parity bench training

    parity bench training --preset tiny --batch-size 32 --json times.json

    parity bench training --preset gpt2 --dtype bfloat16 --device cuda
    """
    errors = Console(stderr=True)
    with in_one_line(errors):
        check_outputs({"--json": json})
        if dtype not in DTYPES:
            raise ValueError(f"--dtype {dtype}: there are {', '.join(DTYPES)}. Choose one of them.")
        presets = list(dict.fromkeys(preset or ("tiny", "gpt2")))
        with errors.status("loading jax and torch"):
            from parity.bench import bench_training, phases
            from parity.corpus import Corpus
            from parity.environment import choose_devices
            from parity.files import write_atomically
            from parity.progress import interruptible, shown

            devices = choose_devices(device)
            corpus = Corpus.load()
        names = [phase for name in presets for phase in phases(name)]
        with shown(errors, names) as show, interruptible(show) as progress:
            times = bench_training(
                corpus, presets, devices, dtype=dtype, batch_size=batch_size, width=width,
                repeats=repeats, progress=progress,
            )  # fmt: skip
        Console(stderr=json == "-").print(times)
        if json == "-":
            typer.echo(times.to_json(), nl=False)
        elif json is not None:
            write_atomically(Path(json), times.to_json())


bench.command(help=unwrapped(training))(training)
