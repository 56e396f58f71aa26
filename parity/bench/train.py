"""Time one training step of both frameworks side by side, and compare it with the machine's best.

The steps take turns, so that whatever slows the machine down slows all of them, and ratios are
taken inside a round. Steps whose losses differ are not timed.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

import flax_gpt
from parity.bench.machine import Matmul, Unavailable, best_matmul, environment, load_average
from parity.bench.result import Timing, TrainBench, TrainingResult
from parity.bench.roofline import flop_per_step
from parity.bench.training_steps import TrainingStep, training_steps
from parity.check import bounds
from parity.frameworks.flax.scope import jax_scope
from parity.pair.text import Corpus
from parity.system.devices import Devices, pinned_precision
from parity.twins.pair import preset_config

# Largest gap between the losses of two steps.
LOSSES = {"float32": bounds.LOSS["float32"], "bfloat16": bounds.LOSS_BFLOAT16}
# Small steps are repeated in a round: one alone would be timed with another framework's caches.
ROUND_S = 0.25
_NUM_BATCHES = 8
_NUM_STEPS = 4
# Rows, tokens of a row, and rounds: a step of a preset other than tiny takes seconds on a CPU.
_TINY = 8, 64, 15
_OTHERS = 1, 128, 5


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """What to train.

    Attributes:
        preset: name of the model's size.
        config: of the model.
        batch_size: rows.
        width: tokens of a row.
        rounds: turns of each step.
    """

    preset: str
    config: flax_gpt.GPTConfig
    batch_size: int
    width: int
    rounds: int

    def __post_init__(self):
        """Refuse a width that cannot be trained."""
        if not 2 <= self.width <= self.config.context_length:
            raise ValueError(
                f"bench: {self.width} tokens in a row, context length "
                f"{self.config.context_length} of {self.preset}. A row has from 2 tokens to the "
                "context. Choose another width."
            )

    @classmethod
    def of_preset(
        cls,
        corpus: Corpus,
        preset: str,
        batch_size: int | None = None,
        width: int | None = None,
        rounds: int | None = None,
    ) -> "TrainOptions":
        """Fill in the defaults of a preset: 8 x 64 tokens of tiny, 1 x 128 of others."""
        rows, columns, times = _TINY if preset == "tiny" else _OTHERS
        config = preset_config(corpus, preset)
        return cls(preset, config, batch_size or rows, width or columns, rounds or times)

    def phases(self) -> tuple[str, str]:
        """Return the phases that `bench_train` passes to `progress`, in order."""
        return f"{self.preset}, compiling", f"{self.preset}, timing"


def bench_train(
    corpus: Corpus,
    options: Sequence[TrainOptions],
    dtype: str,
    devices: Devices,
    progress: Callable[[str, float], None],
) -> TrainBench:
    """Return the time of one training step in each of its forms on every preset.

    Args:
        corpus: the text to train on.
        options: one per preset.
        dtype: of forward and backward pass; weights and optimizer stay in float32.
        devices: where to train.
        progress: called with a phase and its fraction done.

    Raises:
        ValueError: if the losses of two steps on the same batches from the same weights differ.
    """
    training = flax_gpt.TrainConfig(compute_dtype=None if dtype == "float32" else dtype)
    before = load_average()
    with jax_scope("float32", devices.flax), pinned_precision():
        results = tuple(_bench(corpus, x, training, devices, progress) for x in options)
    load = {"load_before": before, "load_after": load_average()}
    return TrainBench(
        environment=environment(devices) | load,
        dtype=dtype,
        training=training,
        presets=results,
    )


def _bench(
    corpus: Corpus,
    options: TrainOptions,
    training: flax_gpt.TrainConfig,
    devices: Devices,
    progress: Callable[[str, float], None],
) -> TrainingResult:
    """Check agreement first, then time the rounds."""
    compiling, timing = options.phases()
    dtype = training.compute_dtype or "float32"
    rows, width = options.batch_size, options.width
    batches = [corpus.windows(rows, width, 0, number) for number in range(_NUM_BATCHES)]
    steps: list[TrainingStep] = []
    timings: dict[str, Timing] = {}
    losses: dict[str, list[float]] = {}
    progress(compiling, 0.0)
    for number, step in enumerate(training_steps(options.config, training, batches, devices), 1):
        found = Timing(name=step.name, ran=step.ran)
        try:
            # The first loss judges the forward pass, the second the gradient and the update too.
            losses[step.name] = step.losses()
            _check_agreement(options.preset, losses, dtype)
            numbers = dict(compile_s=step.compile_s, memory_bytes=step.memory_bytes)
            found = dataclasses.replace(found, **numbers)
            steps.append(step)
        except Unavailable as error:
            found = dataclasses.replace(found, unavailable=str(error))
        timings[step.name] = found
        progress(compiling, number / (_NUM_STEPS + 1))
    matmuls = {name: best_matmul(name, dtype, devices.torch) for name in ("flax", "torch")}
    progress(compiling, 1.0)
    rates = _time_rounds(
        steps, timings, matmuls, options.rounds, lambda done: progress(timing, done)
    )
    return TrainingResult(
        timings=tuple(timings.values()),
        rates=rates,
        preset=options.preset,
        config=options.config,
        batch_size=rows,
        width=width,
        flop_per_step=flop_per_step(options.config, rows, width),
        losses=losses,
        bound=LOSSES[dtype],
        matmul_sizes={name: matmul.size for name, matmul in matmuls.items()},
    )


def _time_rounds(
    steps: Sequence[TrainingStep],
    timings: dict[str, Timing],
    matmuls: Mapping[str, Matmul],
    rounds: int,
    progress: Callable[[float], None],
) -> dict[str, list[float]]:
    """Let every step and product take its turn in each round; fill in the timings.

    Returns:
        FLOP/s of products by framework.
    """
    per_round = {step.name: max(1, math.ceil(ROUND_S / step.seconds(1))) for step in steps}
    seconds: dict[str, list[float]] = {step.name: [] for step in steps}
    rates: dict[str, list[float]] = {name: [] for name in matmuls}
    for number in range(rounds):
        # The first becomes the last next time, so that nobody always follows the same one.
        first = number % len(steps)
        for step in (*steps[first:], *steps[:first]):
            seconds[step.name].append(step.seconds(per_round[step.name]))
        for name, matmul in matmuls.items():
            rates[name].append(matmul.rate())
        progress((number + 1) / rounds)
    for name, times in seconds.items():
        timings[name] = dataclasses.replace(
            timings[name], steps_per_round=per_round[name], rounds_s=tuple(times)
        )
    return rates


def _check_agreement(preset: str, losses: Mapping[str, Sequence[float]], dtype: str) -> None:
    """Refuse to time steps that do not compute the same.

    Raises:
        ValueError: if two losses of a step differ; NaN differs from everything.
    """
    for number, of_step in enumerate(zip(*losses.values(), strict=True), 1):
        gap = np.ptp(of_step)
        if not gap <= LOSSES[dtype]:
            found = (f"{name} {x:.7g}" for name, x in zip(losses, of_step, strict=True))
            raise ValueError(
                f"bench: loss of step {number} on {preset}: {', '.join(found)}, {gap:.1e} apart > "
                f"{LOSSES[dtype]:.0e} in {dtype}. Only steps that compute the same are worth "
                "timing. Find out where they diverge by `parity check --level trajectory`."
            )
