"""`parity bench`: time the twins side by side in one run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from parity.bench.names import DECODERS, DTYPES
from parity.cli.options import (
    PRESETS,
    AtLeastTwoOrNone,
    Device,
    Positive,
    PositiveOrNone,
    Preset,
    check_outputs,
    in_one_line,
    register,
    write_output,
)
from parity.system.progress import interruptible, shown
from parity.system.threads import use_spinning_threads

if TYPE_CHECKING:
    from parity.bench.result import DecodeBench, TrainBench

# What `--quick` leaves out: all contexts but one, most rounds, and what takes a second per token.
_QUICK_CONTEXTS, _QUICK_ROUNDS = (128,), 3
_SLOW = "flax loop", "flax uncached", "flax naive", "torch uncached", "torch in place"

bench = typer.Typer(context_settings={"help_option_names": ["-h", "--help"]})


def decode(
    context: typer.Context,
    preset: Preset = "gpt2",
    batch: str = "1",
    contexts: Annotated[str, typer.Option("--context")] = "128,512,2048",
    dtype: str = "float32",
    rounds: Positive = 5,
    tokens: Positive = 32,
    only: str | None = None,
    without: str | None = None,
    quick: bool = False,
    device: Device = "auto",
    json: str | None = None,
    markdown: str | None = None,
    png: Path | None = None,
) -> None:
    """Time one token: both twins with and without cache, baselines, and peers that are installed.

    Every decoder has the same random weights and the same prompt, and takes its turn in every
    round. A cell of the grid is a dtype, a batch size and a context. A round ends when every row
    holds --context tokens, so its prompt is --tokens shorter. Nothing is timed before the logits
    of the twins agree and every decoder has written the same tokens.

    Decoders: flax step (one compiled program per token), flax loop (all tokens in one), flax
    uncached, flax naive (the same step under a plain jax.jit), torch step, torch uncached, torch
    in place (the same layers without handles), transformers, transformers static (its two caches),
    ctranslate2. The last three need the extra: pip install 'parity-gpt\\[bench]'.

    How to read the table: a token needs every weight and the valid part of the cache once, so its
    time is compared with the time that this machine takes to read as many bytes, measured in the
    same round. The time of a token is the median, its spread that from the fastest to the slowest
    round; x best is the speed against the fastest peer of the cell, round by round; build is
    compiling, which is in no round. Below the cells come ratios, two of them from single steps in
    turns (torch's handle against none, a large cache against a small one), and how time grows with
    the context.

    Close what else computes; the load average is printed. Torch's threads that spin while they
    wait are fastest on idle cores and stall each other on busy ones, so this command sets
    GOMP_SPINCOUNT=30000 and the others OMP_WAIT_POLICY=passive and GOMP_SPINCOUNT=0, unless you
    have set one of them. In programs of your own, set them before torch is imported.

    On two CPU cores the default takes eight to eleven minutes, and --quick two. The table of a cell
    is printed as soon as it is measured. Peers run in processes of their own.

    Options:
        batch: Rows, commas between more: 1,8.
        contexts: Tokens of a row when a round ends, commas between more.
        dtype: Of weights, cache and computation, commas between: float32,bfloat16.
        rounds: Turns of each decoder.
        tokens: Tokens that a round appends to each row.
        only: Decoders to time, commas between. Default: all.
        without: Decoders to leave out, commas between.
        quick: Time steps and peers alone, at context 128, in three rounds.
        json: Write the times to this file; - for standard output.
        markdown: Write the tables to this file; - for standard output.
        png: Draw into this folder, which is made if it is not there.

    Exit codes: 0 timed, 2 bad input, or decoders that do not write the same.

    Examples:
        parity bench
        parity bench --batch 1,8 --context 512 --only 'flax step,torch step,transformers'
        parity bench --dtype float32,bfloat16 --json times.json --png plots
        parity bench --preset gpt2-xl --dtype bfloat16 --device cuda --without ctranslate2
    """
    if context.invoked_subcommand is not None:
        _refuse_options(context)
        return
    with in_one_line(Console(stderr=True)) as errors:
        check_outputs({"--json": json, "--markdown": markdown})
        batch_sizes, lengths = _numbers("--batch", batch), _numbers("--context", contexts)
        dtypes = _words("--dtype", dtype, DTYPES)
        names = _words("--only", only, DECODERS) if only is not None else DECODERS
        left_out = _words("--without", without, DECODERS) if without is not None else ()
        use_spinning_threads()
        with errors.status("loading jax and torch"):
            from flax_gpt import GPTConfig
            from parity.bench.decode import DecodeOptions, bench_decode
            from parity.bench.plots import draw
            from parity.bench.table import cell_table
            from parity.system.devices import choose_devices

            devices = choose_devices(device)
        options = DecodeOptions(
            preset=preset,
            config=GPTConfig.preset(preset),
            batch_sizes=batch_sizes,
            contexts=_QUICK_CONTEXTS if quick else lengths,
            dtypes=dtypes,
            rounds=_QUICK_ROUNDS if quick else rounds,
            num_steps=tokens,
            names=tuple(x for x in names if x not in left_out and not (quick and x in _SLOW)),
            large_cache=not quick,
        )
        if png is not None:
            png.mkdir(parents=True, exist_ok=True)
        with shown(errors, options.phases()) as show, interruptible(show) as progress:
            # Tables go where the last one goes, each as soon as it is measured.
            console = Console(stderr="-" in (json, markdown))
            found = bench_decode(
                options, devices, progress, lambda cell: console.print(cell_table(cell))
            )
        _write(found, json, markdown, len(found.cells))
        for path in draw(found, png) if png is not None else ():
            errors.print(f"{path}", style="dim", highlight=False, soft_wrap=True)


def training(
    preset: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Model size, repeat for more: {', '.join(PRESETS)}. Default: tiny and gpt2."
        ),
    ] = None,
    batch_size: PositiveOrNone = None,
    width: AtLeastTwoOrNone = None,
    rounds: PositiveOrNone = None,
    dtype: str = "float32",
    device: Device = "auto",
    json: str | None = None,
    markdown: str | None = None,
) -> None:
    """Time one training step: flax jit, flax donated, torch eager, torch compiled.

    All start from the same weights, and nothing is timed before their losses have agreed over two
    steps. Then they take turns, and in the same rounds each framework multiplies matrices, which
    is the rate that their FLOP/s are a share of. Compilation is timed apart, from nothing. On two
    CPU cores this takes a few minutes and, for gpt2, 10 GB of memory.

    Options:
        batch_size: Rows of a batch. Default: 8 of tiny, 1 of others.
        width: Tokens of a row. Default: 64 of tiny, 128 of others.
        rounds: Turns of each step. Default: 15 of tiny, 5 of others.
        dtype: float32 or bfloat16; the second computes in it with weights in float32.
        json: Write the times to this file; - for standard output.
        markdown: Write the tables to this file; - for standard output.

    Exit codes: 0 timed, 2 bad input, or steps that do not compute the same.

    Examples:
        parity bench training
        parity bench training --preset tiny --batch-size 32 --json times.json
        parity bench training --preset gpt2 --dtype bfloat16 --device cuda
    """
    with in_one_line(Console(stderr=True)) as errors:
        check_outputs({"--json": json, "--markdown": markdown})
        if dtype not in DTYPES:
            raise ValueError(f"--dtype {dtype}: there are {', '.join(DTYPES)}. Choose one of them.")
        presets = dict.fromkeys(preset or ("tiny", "gpt2"))
        with errors.status("loading jax and torch"):
            from parity.bench.train import TrainOptions, bench_train
            from parity.pair.text import Corpus
            from parity.system.devices import choose_devices

            devices, corpus = choose_devices(device), Corpus.load()
        options = [TrainOptions.of_preset(corpus, x, batch_size, width, rounds) for x in presets]
        names = [phase for option in options for phase in option.phases()]
        with shown(errors, names) as show, interruptible(show) as progress:
            found = bench_train(corpus, options, dtype, devices, progress)
        _write(found, json, markdown)


def _refuse_options(context: typer.Context) -> None:
    """Refuse options before a subcommand, which would be dropped without a word."""
    for name in context.params:
        # By its name, for typer may bring a click of its own.
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(
                f"{name} before {context.invoked_subcommand}: it is an option of `parity bench` "
                f"alone. Put options of {context.invoked_subcommand} after it."
            )


def _write(
    found: "DecodeBench | TrainBench", json: str | None, markdown: str | None, shown: int = 0
) -> None:
    """Print the tables, and write what was asked for; standard output holds one of them."""
    from parity.bench import result, table

    Console(stderr="-" in (json, markdown)).print(table.terminal(found, shown))
    write_output(json, lambda: result.to_json(found))
    write_output(markdown, lambda: table.markdown(found))


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """Read whole numbers of at least 1, with commas between; each counts once."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise ValueError(
            f"{option} {text}: it takes whole numbers of at least 1. Put commas between them."
        )
    return tuple(dict.fromkeys(map(int, parts)))


def _words(option: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """Read some of the known words, with commas between; each counts once."""
    parts = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if not set(parts) <= set(known):
        raise ValueError(
            f"{option} {text}: there are {', '.join(known)}. Put commas between those you want."
        )
    return parts


register(bench.command, training)
register(bench.callback, decode, invoke_without_command=True)
