"""The training loop: the same batches for every twin, watched step by step."""

import dataclasses
import os
import time
from collections.abc import Callable, Mapping

import numpy as np

from parity.check import bounds
from parity.check.levels.trajectory import rounding_or_bug
from parity.frameworks.batch import Batch
from parity.frameworks.leaves import Leaves, cast, neighbours
from parity.pair.text import Corpus
from parity.system.devices import Devices, pinned_precision
from parity.training.diagnose import first_non_finite
from parity.training.run import Run, RunConfig, as_line
from parity.twins.both import build_twins
from parity.twins.flax import FlaxTwin

# Windows of the held-out text that an evaluation reads at most.
_HELD_OUT = 512


class NonFinite(ValueError):
    """Training met a loss or gradient that is not finite.

    Attributes:
        in_one_twin: whether the other twin's was finite, so that the two differ.
    """

    def __init__(self, message: str, in_one_twin: bool):
        super().__init__(message)
        self.in_one_twin = in_one_twin


@dataclasses.dataclass(frozen=True)
class Reading:
    """What one step of every twin measured.

    Attributes:
        step: from 1.
        losses: by framework, before the update.
        gradient_norms: by framework, before clipping.
        applied: by framework, whether the gradient was finite.
        gap: largest difference between two losses so far; 0 for one framework.
        rates: tokens per second by framework, of all steps but the first, which compiles.
    """

    step: int
    losses: dict[str, float]
    gradient_norms: dict[str, float]
    applied: dict[str, bool]
    gap: float
    rates: dict[str, float]


class Trainers:
    """The trainers of a run, which start from the same weights.

    Args:
        config: of the run.
        devices: where they train.
        perturbed: start one rounding away from these weights, to see what rounding does.

    Attributes:
        by_framework: each trainer.
    """

    def __init__(self, config: RunConfig, devices: Devices, perturbed: bool = False):
        self.config, self.devices = config, devices
        # Drawn once: in another dtype the draws would differ.
        drawn = FlaxTwin.build(
            dataclasses.replace(config.model, dtype="float32"), devices.flax, seed=config.seed
        )
        leaves = cast(drawn.leaves(), config.model.dtype)
        if perturbed:
            leaves = neighbours(leaves, config.seed)
        seed = config.seed if config.model.dropout else None
        twins = build_twins(config.model, devices, leaves.items, config.frameworks)
        constants = dataclasses.asdict(config.training)
        self.by_framework = {name: x.trainer(constants, seed=seed) for name, x in twins.items()}

    def save(self) -> dict[str, Leaves]:
        """Return the state of each trainer."""
        return {name: trainer.save() for name, trainer in self.by_framework.items()}

    def restore(self, states: Mapping[str, Leaves]) -> None:
        """Go on from what `save` returned.

        Raises:
            ValueError: when the states are not these trainers'.
        """
        if states.keys() != self.by_framework.keys():
            raise ValueError(
                f"states of {', '.join(states)} for trainers of {', '.join(self.by_framework)}. "
                "Each goes on from its own. Resume with the same --only."
            )
        for name, trainer in self.by_framework.items():
            trainer.restore(states[name])


def train(
    run: Run,
    corpus: Corpus,
    trainers: Trainers,
    num_steps: int,
    *,
    save_every: int = 100,
    target: float | None = None,
    watch: Callable[[Reading], None] = lambda reading: None,
    stopped: Callable[[], bool] = lambda: False,
) -> int:
    """Train from the newest checkpoint, or from the start, to `num_steps`.

    Args:
        run: the folder that keeps it.
        corpus: the text to learn from.
        trainers: the trainers, fresh.
        num_steps: to stop after, counted from the start of the run.
        save_every: steps between checkpoints; there is one at the end too.
        target: loss to stop below.
        watch: called with every step's reading.
        stopped: asked after every step whether to stop; the checkpoint is then written.

    Returns:
        The number of the last step.

    Raises:
        ValueError: for a checkpoint that cannot be resumed from, or a folder in use.
        NonFinite: for a loss or gradient that is not finite; the checkpoints are from before it.
    """
    with run.locked(), pinned_precision():
        start = last = _resume(run, trainers)
        rows = run.metrics()
        if rows and any(_reached(row["losses"], target) for row in rows):
            return start
        gap = float(np.max([0.0, *(row["gap"] for row in rows)]))  # NaN if there is one
        clocks, timed = dict.fromkeys(trainers.by_framework, 0.0), 0
        with (run.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            for last in range(start + 1, num_steps + 1):
                inputs, losses = batch(run.config, corpus, last - 1), {}
                for name, trainer in trainers.by_framework.items():
                    before = time.perf_counter()
                    losses[name] = trainer.step(*inputs)
                    clocks[name] += time.perf_counter() - before
                gap = float(np.max([gap, np.ptp(list(losses.values()))]))
                reading = Reading(
                    last,
                    losses,
                    {name: x.gradient_norm for name, x in trainers.by_framework.items()},
                    {name: x.applied for name, x in trainers.by_framework.items()},
                    gap,
                    {name: timed / clock if timed else 0.0 for name, clock in clocks.items()},
                )
                if not timed:  # the first step compiles
                    clocks = dict.fromkeys(clocks, 0.0)
                timed += inputs[0].size
                _check_finite(reading, trainers, inputs)
                row = dataclasses.asdict(reading)
                del row["rates"]
                file.write(as_line(row))
                watch(reading)
                done = last == num_steps or _reached(losses, target) or stopped()
                if done or last % save_every == 0:
                    file.flush()
                    os.fsync(file.fileno())  # no checkpoint without the lines that led to it
                    run.save(last, trainers.save())
                if done:
                    break
    return last


def judge_gap(run: Run, corpus: Corpus, trainers: Trainers) -> tuple[bool, str]:
    """Return whether the twins' losses diverge as two programs do, and not as rounding does.

    A training can be chaotic: then rounding grows, between twins as between two runs of one. Where
    a gap is past its bound, the perturbed run shows how much of it rounding explains.

    Returns:
        Whether it is a bug, and the gap with its bound as text; empty for one twin.
    """
    if len(trainers.by_framework) < 2:
        return False, ""
    config, metrics = run.config, run.metrics()
    gap, narrow = metrics[-1]["gap"], config.training.compute_dtype
    if narrow:
        return False, f"{gap:.1e}; not judged in {narrow}, see parity precision"
    bound = bounds.LOSS.get(config.model.dtype, bounds.LOSS["float32"])
    if gap <= bound:
        return False, f"{gap:.1e}, bound {bound:.0e}"
    first = next(row["step"] for row in metrics if not row["gap"] <= bound)
    again = Trainers(config, trainers.devices).by_framework
    alone = dataclasses.replace(config, frameworks=("torch",))
    perturbed = Trainers(alone, trainers.devices, perturbed=True).by_framework
    with pinned_precision():
        is_bug, explanation = rounding_or_bug(
            (again["flax"], again["torch"], perturbed["torch"]),
            lambda step: Batch(batch(config, corpus, step)),
            first,
            "torch_gpt",
        )
    return is_bug, f"{gap:.1e}, past the bound {bound:.0e} from step {first}. {explanation}"


def batch(config: RunConfig, corpus: Corpus, step: int) -> tuple[np.ndarray]:
    """Return the inputs of the step after `step` others: tokens (B, T)."""
    number = 0 if config.one_batch else step
    return (corpus.windows(config.rows, config.width, config.seed, number),)


def evaluate(
    config: RunConfig, held_out: Corpus, trainers: Trainers
) -> dict[str, dict[str, float]]:
    """Return loss, perplexity, accuracy and number of tokens on a text, by framework."""
    pieces = held_out.pieces(config.width, _HELD_OUT)
    batches = [(pieces[i : i + config.rows],) for i in range(0, len(pieces), config.rows)]
    with pinned_precision():
        return {name: trainer.evaluate(batches) for name, trainer in trainers.by_framework.items()}


def _resume(run: Run, trainers: Trainers) -> int:
    """Restore the newest checkpoint and drop later metrics; return its step."""
    step, states = run.load() or (0, None)
    if states is not None:
        trainers.restore(states)
    run.cut_metrics(step)
    if step == 0:
        run.save(0, trainers.save())
    return step


def _reached(losses: Mapping[str, float], target: float | None) -> bool:
    return target is not None and all(loss < target for loss in losses.values())


def _check_finite(reading: Reading, trainers: Trainers, inputs: tuple[np.ndarray]) -> None:
    """Refuse numbers that are not finite; loss scaling may skip a step of float16.

    Raises:
        NonFinite: with the step, the first tensor and the remedy.
    """
    config = trainers.config
    for name, trainer in trainers.by_framework.items():
        # With a scale below one, halving it further will not bring the gradient back.
        if reading.applied[name] or (trainer.loss_scale or 0.0) >= 1.0:
            continue
        where = first_non_finite(config, name, trainer.parameters(), inputs, trainers.devices)
        others = [other for other, applied in reading.applied.items() if applied]
        remedy = (
            "Nothing can be learned from that. Lower --learning-rate or --clip, or lengthen "
            "--warmup"
        )
        if config.training.compute_dtype == "float16":
            remedy = "float16 ends at 65504. Use --dtype bfloat16, which has the range of float32"
        if others:
            remedy = f"{others[0]} is finite, so the twins differ. Run parity check"
        raise NonFinite(
            f"step {reading.step}: {name} has a loss of {reading.losses[name]:.3g} and a gradient "
            f"norm of {reading.gradient_norms[name]:.3g}. First not finite: {where}. {remedy}.",
            bool(others),
        )
