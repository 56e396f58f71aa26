"""`parity train`: the twins trained side by side."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from parity.cli.options import (
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
from parity.twins.names import DTYPES

if TYPE_CHECKING:
    from parity.pair.text import Corpus
    from parity.training import Run, RunConfig, Trainers
    from parity.twins.twin import Constants

# The names of flax_gpt.config.SCHEDULES; a test holds them equal.
SCHEDULES = "constant", "linear", "cosine"
_TARGET = 0.01  # nats per token of a batch that is learned by heart


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """The options of `parity train`, by the names of its parameters."""

    out: Path
    data: Path | None
    preset: str
    steps: int
    only: str | None
    dtype: str
    batch_size: int
    width: int
    learning_rate: float
    schedule: str
    warmup: int | None
    weight_decay: float
    decay_all: bool
    clip: float
    label_smoothing: float
    accumulate: int
    dropout: float
    seed: int
    overfit_one_batch: bool
    save_every: int
    device: str

    def check(self) -> None:
        """Refuse what can be refused before anything heavy is loaded.

        Raises:
            ValueError: for options that are unknown or exclude each other.
        """
        frameworks(self.only)
        check_dtype(self.dtype)
        check_data(self.data)
        if self.overfit_one_batch and (self.label_smoothing or self.dropout):
            raise ValueError(
                "--overfit-one-batch with --label-smoothing or --dropout: a batch cannot be "
                "learned by heart through either. Leave them out."
            )

    def run_config(self, corpus: "Corpus") -> "RunConfig":
        """Return the config of the run; one batch is learned at a constant rate without decay."""
        narrow = self.dtype in ("bfloat16", "float16")
        schedule = "constant" if self.overfit_one_batch else self.schedule
        warmup = 0 if self.overfit_one_batch else self.steps // 20
        training: Constants = dict(
            learning_rate=self.learning_rate,
            schedule=schedule,
            warmup_steps=warmup if self.warmup is None else self.warmup,
            total_steps=None if schedule == "constant" else self.steps,
            weight_decay=0.0 if self.overfit_one_batch else self.weight_decay,
            decay_all=self.decay_all,
            clip_norm=self.clip or None,
            label_smoothing=self.label_smoothing,
            accumulation_steps=self.accumulate,
            compute_dtype=self.dtype if narrow else None,
        )
        return run_config(
            corpus,
            self.preset,
            dict(dropout=self.dropout, dtype="float32" if narrow else self.dtype),
            training,
            rows=self.batch_size,
            width=self.width,
            seed=self.seed,
            frameworks=frameworks(self.only),
            one_batch=self.overfit_one_batch,
        )


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
    """Train both twins side by side on the same batches, and check that they stay one function.

    The folder gets config.json, metrics.jsonl (a line per step), checkpoints (the newest two) and,
    at the end, curves.png. Ctrl-C writes a checkpoint; the same command goes on from it, bit for
    bit. A tenth of the text is held out, and both are judged on it at the end.

    Exit codes: 0 trained, 1 the twins diverged further than rounding explains (judged in float64
    and float32) or the one batch was not learned, 2 bad input or numbers that are not finite, 130
    interrupted.

    Examples:

    parity train --out runs/a --steps 500

    parity train --out runs/b --data shakespeare.txt --dropout 0.1 --accumulate 2

    parity train --out runs/c --overfit-one-batch --only torch
    """
    options = TrainOptions(**locals())
    errors = Console(stderr=True)
    with in_one_line(errors, "the run goes on from its newest checkpoint"):
        options.check()
        with errors.status("loading jax and torch"):
            from parity.pair.text import Corpus
            from parity.system.devices import choose_devices
            from parity.training import Run, Trainers

            devices = choose_devices(options.device)
            corpus = Corpus.load(options.data)
            config = options.run_config(corpus)
        learn, held_out = corpus.split()
        run = Run.start(options.out, config)
        trainers = Trainers(config, devices)
        last = _train(errors, run, learn, trainers, options)
        failed = _report(run, learn, held_out, trainers, last)
    raise typer.Exit(1 if failed else 0)


def _train(
    errors: Console, run: "Run", learn: "Corpus", trainers: "Trainers", options: TrainOptions
) -> int:
    """Train with a live line; return the number of the last step."""
    from parity.system.progress import stoppable
    from parity.training import NonFinite
    from parity.training import train as train_run
    from parity.training.watch import watched

    before, steps = run.checkpoints(), options.steps
    if before and before[-1][0]:
        errors.print(f"goes on from step {before[-1][0]}", style="dim", highlight=False)
    try:
        with watched(errors, steps) as watch, stoppable() as stopped:
            last = train_run(
                run,
                learn,
                trainers,
                steps,
                save_every=options.save_every,
                target=_TARGET if options.overfit_one_batch else None,
                watch=watch,
                stopped=stopped,
            )
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
    return last


def _report(
    run: "Run", learn: "Corpus", held_out: "Corpus", trainers: "Trainers", last: int
) -> bool:
    """Draw the curves and print how the run ended; return whether it failed."""
    from parity.training import draw_training, evaluate, judge_gap

    console, config = Console(highlight=False, soft_wrap=True), run.config
    metrics, failed = run.metrics(last), False
    draw_training(run.path / "curves.png", metrics, f"{config.source}, {last} steps")
    for name, loss in metrics[-1]["losses"].items():
        skipped = sum(not row["applied"][name] for row in metrics)
        note = f", {skipped} steps skipped by loss scaling" if skipped else ""
        console.print(f"{name}_gpt: loss {loss:.6f} at step {last}{note}")
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
    is_bug, gap = judge_gap(run, learn, trainers)
    if gap:
        judged = config.training.compute_dtype is None
        style = "bold red" if is_bug else "green" if judged else "yellow"
        console.print(f"largest gap between the losses {gap}", style=style)
    console.print(f"wrote {run.path}: curves.png, metrics.jsonl, checkpoints")
    return failed or is_bug
