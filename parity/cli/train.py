"""`parity train`: the twins trained side by side."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from parity.cli.options import (
    DTYPES,
    Data,
    Device,
    Dropout,
    Only,
    Preset,
    Rate,
    Rows,
    Seed,
    Width,
    check_data,
    check_dtype,
    frameworks,
    in_one_line,
    run_config,
)

# The names of flax_gpt.config.SCHEDULES; a test holds them equal.
SCHEDULES = "constant", "linear", "cosine"
_TARGET = 0.01  # nats per token of a batch that is learned by heart


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
    only: Only = None,
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

    Exit codes: 0 trained, 1 the twins parted further than rounding explains (judged in float64 and
    float32) or the one batch was not learned, 2 bad input or numbers that are not finite, 130
    interrupted.

    Examples:

    parity train --out runs/a --steps 500

    parity train --out runs/b --data shakespeare.txt --dropout 0.1 --accumulate 2

    parity train --out runs/c --overfit-one-batch --only torch
    """
    errors = Console(stderr=True)
    with in_one_line(errors, "the run goes on from its newest checkpoint"):
        twins = frameworks(only)
        check_dtype(dtype)
        check_data(data)
        if overfit_one_batch:
            if label_smoothing or dropout:
                raise ValueError(
                    "--overfit-one-batch with --label-smoothing or --dropout: a batch cannot be "
                    "learned by heart through either. Leave them out."
                )
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
            from parity.pair.text import Corpus
            from parity.system.devices import choose_devices

            devices = choose_devices(device)
            corpus = Corpus.load(data)
            config = run_config(
                corpus, preset, constants, dropout, batch_size, width, seed,
                dtype="float32" if narrow else dtype,
                frameworks=twins,
                one_batch=overfit_one_batch,
            )  # fmt: skip
        failed = _train(errors, out, corpus, config, devices, steps, save_every)
    raise typer.Exit(1 if failed else 0)


def _train(
    errors: Console, out: Path, corpus, config, devices, steps: int, save_every: int
) -> bool:
    """Trains with a live line; whether it failed."""
    from parity.system.progress import stoppable, watched
    from parity.training import NonFinite, Run, Trainers, draw_training, evaluate, parted, train

    learn, held_out = corpus.split()
    run = Run.start(out, config)
    trainers = Trainers(config, devices)
    console = Console(highlight=False, soft_wrap=True)
    before = run.checkpoints()
    if before and before[-1][0]:
        errors.print(f"goes on from step {before[-1][0]}", style="dim", highlight=False)
    target = _TARGET if config.one_batch else None
    try:
        with watched(errors, steps) as watch, stoppable() as stopped:
            last = train(
                run, learn, trainers, steps, save_every=save_every, target=target, watch=watch,
                stopped=stopped,
            )  # fmt: skip
            interrupted = stopped()
    except NonFinite as error:
        errors.print(f"parity: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1 if error.in_one_twin else 2) from error
    if interrupted and last < steps:
        errors.print(
            f"parity: interrupted at step {last} of {steps}, checkpoint written. The same command "
            "goes on from it.",
            style="red",
            soft_wrap=True,
        )
        raise typer.Exit(130)
    metrics, failed = run.metrics(last), False
    draw_training(run.path / "curves.png", metrics, f"{config.source}, {last} steps")
    for name, loss in metrics[-1]["losses"].items():
        skipped = sum(not row["applied"][name] for row in metrics)
        words = f", {skipped} steps skipped by loss scaling" if skipped else ""
        console.print(f"{name}_gpt: loss {loss:.6f} at step {last}{words}")
    if config.one_batch:
        failed = not max(metrics[-1]["losses"].values()) < _TARGET
        outcome = f"not learned: the loss is not below {_TARGET} after" if failed else "learned in"
        style = "bold red" if failed else "green"
        console.print(f"one batch {outcome} {last} steps", style=style)
    else:
        for name, found in evaluate(config, held_out, trainers).items():
            console.print(
                f"{name}_gpt: held-out loss {found['loss']:.6f}, perplexity "
                f"{found['perplexity']:.4f}, accuracy {found['accuracy']:.4f} over "
                f"{found['tokens']:,} tokens"
            )
    is_bug, words = parted(run, learn, trainers)
    if words:
        judged = config.training["compute_dtype"] is None
        style = "bold red" if is_bug else "green" if judged else "yellow"
        console.print(f"largest gap between the losses {words}", style=style)
    console.print(f"wrote {run.path}: curves.png, metrics.jsonl, checkpoints")
    return failed or is_bug
