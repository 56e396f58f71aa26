"""`parity train` and `parity precision`: the twins trained side by side."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from parity.cli.shared import PRESETS, Data, Device, check_data, in_one_line

# The names of parity.training.precision.DTYPES; a test holds them equal.
DTYPES = "float64", "float32", "bfloat16", "float16"
SCHEDULES = "constant", "linear", "cosine"

Preset = Annotated[str, typer.Option(help=f"Model size: {', '.join(PRESETS)}.")]
Rows = Annotated[int, typer.Option(min=1, help="Rows of a batch.")]
Width = Annotated[int, typer.Option(min=2, help="Tokens of a row.")]
Rate = Annotated[float, typer.Option(help="Learning rate at the end of the warm-up.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of weights, batches and dropout.")]
Dropout = Annotated[float, typer.Option(help="Dropout, with the same masks in both.")]


def train(
    out: Annotated[
        Path,
        typer.Option(
            help="Folder of the run. If it holds this run already, training goes on from its "
            "newest checkpoint."
        ),
    ],
    data: Data = None,
    preset: Preset = "tiny",
    steps: Annotated[int, typer.Option(min=1, help="Steps in all.")] = 500,
    only: Annotated[
        str | None, typer.Option(help="Train one twin alone: flax or torch. Default: both.")
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(DTYPES)}. The 16-bit types compute in it with weights in float32; "
            "float16 scales the loss."
        ),
    ] = "float32",
    batch_size: Rows = 8,
    width: Width = 64,
    learning_rate: Rate = 1e-3,
    schedule: Annotated[str, typer.Option(help=f"Of the rate: {', '.join(SCHEDULES)}.")] = "cosine",
    warmup: Annotated[
        int | None, typer.Option(min=0, help="Steps of warm-up. Default: a twentieth.")
    ] = None,
    weight_decay: Annotated[float, typer.Option(help="Decoupled, on matrices.")] = 0.1,
    decay_all: Annotated[
        bool, typer.Option(help="Also decay embeddings, biases and norms.")
    ] = False,
    clip: Annotated[float, typer.Option(help="Largest gradient norm; 0 for no clipping.")] = 1.0,
    label_smoothing: Annotated[float, typer.Option(help="Share of each target.")] = 0.0,
    accumulate: Annotated[
        int, typer.Option(min=1, help="Parts that a batch is cut into, one after the other.")
    ] = 1,
    dropout: Dropout = 0.0,
    seed: Seed = 0,
    overfit_one_batch: Annotated[
        bool,
        typer.Option(
            help="Learn one batch by heart, at a constant rate without decay, and stop below a "
            "loss of 0.01: what a correct model can always do."
        ),
    ] = False,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 100,
    device: Device = "auto",
) -> None:
    """Train both twins side by side on the same batches, and watch that they stay one function.

    The folder gets config.json, metrics.jsonl (a line per step), checkpoints (the newest two) and,
    at the end, curves.png. Ctrl-C writes a checkpoint; the same command goes on from it, bit for
    bit. A tenth of the text is held out, and both are judged on it at the end.

    Exit codes: 0 trained, 1 the losses of the twins parted further than rounding explains, 2 bad
    input or numbers that are not finite, 130 interrupted.

    Examples:

    parity train --out runs/a --steps 500

    parity train --out runs/b --data shakespeare.txt --dropout 0.1 --accumulate 2

    parity train --out runs/c --overfit-one-batch --only torch
    """
    errors = Console(stderr=True)
    with in_one_line(errors, "the run goes on from its newest checkpoint"):
        if only not in (None, "flax", "torch"):
            raise ValueError(
                f"--only {only}: there are flax and torch. Choose one or leave it out."
            )
        _check_dtype(dtype)
        check_data(data)
        if overfit_one_batch:
            schedule, warmup, weight_decay = "constant", warmup or 0, 0.0
        narrow = dtype in ("bfloat16", "float16")
        constants = dict(
            learning_rate=learning_rate,
            schedule=schedule,
            warmup_steps=steps // 20 if warmup is None else warmup,
            total_steps=None if schedule == "constant" else steps,
            weight_decay=weight_decay,
            decay_all=decay_all,
            clip_norm=clip or None,
            label_smoothing=label_smoothing,
            accumulation_steps=accumulate,
            compute_dtype=dtype if narrow else None,
        )
        with errors.status("loading jax and torch"):
            from parity.corpus import Corpus
            from parity.environment import choose_devices
            from parity.training import RunConfig

            devices = choose_devices(device)
            corpus = Corpus.load(data)
            config = _run_config(
                RunConfig, corpus, preset, constants, dropout, batch_size, width, seed,
                dtype="float32" if narrow else dtype,
                frameworks=("flax", "torch") if only is None else (only,),
                one_batch=overfit_one_batch,
            )  # fmt: skip
        is_bug = _train(errors, out, corpus, config, devices, steps, save_every)
    raise typer.Exit(1 if is_bug else 0)


def precision(
    out: Annotated[Path, typer.Option(help="Folder for precision.png and precision.json.")],
    data: Data = None,
    preset: Preset = "tiny",
    steps: Annotated[int, typer.Option(min=1, help="Steps of every training.")] = 200,
    dtype: Annotated[
        str, typer.Option(help=f"float64, then any of {', '.join(DTYPES[1:])}, by commas.")
    ] = "float64,float32,bfloat16",
    batch_size: Rows = 8,
    width: Width = 64,
    learning_rate: Rate = 1e-3,
    dropout: Dropout = 0.0,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Train both twins in several types and judge each by its distance from float64.

    Rounding differs between frameworks and neither is more right, so what counts is the ratio of
    the two errors: 1 is a fair draw, and beyond 4 one side computes in another way.

    Exit codes: 0 all ratios end within 4, 1 one does not, 2 bad input.

    Example:

    parity precision --out reports/precision --dtype float64,float32,bfloat16,float16
    """
    errors = Console(stderr=True)
    with in_one_line(errors):
        check_data(data)
        dtypes = tuple(name.strip() for name in dtype.split(","))
        for name in dtypes:
            _check_dtype(name)
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out {out}: that is a file. Name a folder.")
        constants = dict(
            learning_rate=learning_rate,
            schedule="cosine",
            warmup_steps=max(steps // 20, 0),
            total_steps=steps,
        )
        with errors.status("loading jax and torch"):
            from parity.corpus import Corpus
            from parity.environment import choose_devices
            from parity.report import write_atomically
            from parity.training import RunConfig, draw_precision, precision_report

            devices = choose_devices(device)
            corpus = Corpus.load(data)
            config = _run_config(
                RunConfig, corpus, preset, constants, dropout, batch_size, width, seed,
                dtype="float64",
            )  # fmt: skip
        from parity.progress import interruptible, shown

        with shown(errors, dtypes) as show, interruptible(show) as progress:
            report = precision_report(config, corpus, devices, steps, dtypes, progress)
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "precision.json", json.dumps(report) + "\n")
        draw_precision(out / "precision.png", report)
        console = Console()
        gap, verdict = report["float64_gap"], report["verdicts"]["float64"]
        console.print(f"float64: gap between the losses {gap:.1e}: {verdict}", highlight=False)
        for name in dtypes[1:]:
            ratio, verdict = report["ratios"][name][-1], report["verdicts"][name]
            line = (
                f"{name}: error of flax_gpt over that of torch_gpt {ratio:.2f}, allowed 0.25 to 4"
            )
            console.print(f"{line}: {verdict}", highlight=False, soft_wrap=True)
        console.print(f"wrote {out / 'precision.png'} and precision.json", soft_wrap=True)
    raise typer.Exit(0 if report["verdict"] == "PASS" else 1)


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype}: there are {', '.join(DTYPES)}. Choose from them.")


def _run_config(make, corpus, preset, constants, dropout, rows, width, seed, *, dtype, **fields):
    """A run's config, with every clash of numbers found before the work begins."""
    import dataclasses

    from flax_gpt import TrainConfig
    from parity.twins import preset_config

    model = preset_config(corpus, preset, dropout=dropout, dtype=dtype)
    training = TrainConfig(**constants)
    if len(corpus.vocabulary) > model.vocab_size:
        raise ValueError(
            f"data file {corpus.source}: {len(corpus.vocabulary)} different characters > "
            f"vocabulary size {model.vocab_size}. Each needs an id. Give another text or preset."
        )
    if width > model.context_length:
        raise ValueError(
            f"--width {width} > context length {model.context_length} of {preset}. A row fits into "
            "the context. Choose a smaller one."
        )
    if rows % training.accumulation_steps:
        raise ValueError(
            f"--batch-size {rows} in {training.accumulation_steps} parts. Parts have the same "
            "number of rows. Choose an --accumulate that divides the batch."
        )
    return make.of(
        corpus, model=dataclasses.asdict(model), training=dataclasses.asdict(training), rows=rows,
        width=width, seed=seed, **fields,
    )  # fmt: skip


def _train(
    errors: Console, out: Path, corpus, config, devices, steps: int, save_every: int
) -> bool:
    """Trains with a live line; whether the twins parted."""
    from parity.progress import stoppable, watched
    from parity.training import Run, Sides, draw_training, train
    from parity.training.loop import evaluate, parted

    learn, held_out = corpus.split()
    run = Run.start(out, config)
    sides = Sides(config, devices)
    console = Console()
    with watched(errors, steps) as watch, stoppable() as stopped:
        last = train(
            run, learn, sides, steps, save_every=save_every, watch=watch, stopped=stopped,
            target=0.01 if config.one_batch else None,
        )  # fmt: skip
        interrupted = stopped()
    if interrupted and last < steps:
        errors.print(
            f"parity: interrupted at step {last} of {steps}, checkpoint written. The same command "
            "goes on from it.",
            style="red",
            soft_wrap=True,
        )
        raise typer.Exit(130)
    metrics = list(run.metrics())
    draw_training(run.path / "curves.png", metrics, f"{config.source}, {last} steps")
    for name, loss in metrics[-1]["losses"].items():
        console.print(f"{name}_gpt: loss {loss:.6f} at step {last}", highlight=False)
    if not config.one_batch:
        for name, found in evaluate(config, held_out, sides).items():
            console.print(
                f"{name}_gpt: held-out loss {found['loss']:.6f}, perplexity "
                f"{found['perplexity']:.4f}, accuracy {found['accuracy']:.4f} over "
                f"{found['tokens']:,} tokens",
                highlight=False,
                soft_wrap=True,
            )
    is_bug, words = parted(run, learn, sides)
    if words:
        style = "bold red" if is_bug else "green"
        console.print(f"largest gap between the losses {words}", style=style, highlight=False,
                      soft_wrap=True)  # fmt: skip
    console.print(f"wrote {run.path}: curves.png, metrics.jsonl, checkpoints", soft_wrap=True)
    return is_bug
