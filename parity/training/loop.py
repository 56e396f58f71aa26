"""The training loop: the same batches for every framework, and all that is worth watching."""

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

import flax_gpt
import torch_gpt
from parity.check.bounds import LOSS
from parity.check.levels.trajectory import rounding_or_bug
from parity.frameworks.flax.leaves import flax_leaves, load_flax
from parity.frameworks.flax.scope import Scoped, jax_scope
from parity.frameworks.leaves import cast, neighbours
from parity.pair.text import Corpus
from parity.system.devices import Devices, pinned_precision
from parity.training.diagnose import first_non_finite
from parity.training.run import Run, RunConfig, as_line
from parity.twins.flax import FlaxTrainer
from parity.twins.torch import TorchTrainer
from parity.weights.tables import TWINS
from parity.weights.transplant import transplant

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
    """What one step of all frameworks gave.

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
    """The trainers of a run, from the same weights, by framework.

    Args:
        config: the run's.
        devices: where they train.
        nudged: starts from neighbouring numbers of the weights, to see what rounding does.
    """

    def __init__(self, config: RunConfig, devices: Devices, nudged: bool = False):
        self.config, self.devices = config, devices
        dtype = config.model["dtype"]
        seed = config.seed if config.model["dropout"] else None
        with jax_scope("float32", devices.flax):
            sizes = flax_gpt.GPTConfig(**config.model | {"dtype": "float32"})
            drawn = flax_leaves(flax_gpt.GPT(sizes, flax_gpt.random.key(config.seed)))
        # In every type and framework the same start: their own draws would differ.
        leaves = cast(drawn, dtype)
        if nudged:
            leaves = neighbours(leaves, config.seed)

        def scope():
            return jax_scope(dtype, devices.flax)

        with scope():
            flax_model = flax_gpt.GPT(flax_gpt.GPTConfig(**config.model))
            load_flax(flax_model, leaves)
        self.by_framework: dict[str, Any] = {}
        if "flax" in config.frameworks:
            with scope():
                trainer = FlaxTrainer(flax_gpt, flax_model, config.training, seed=seed)
            self.by_framework["flax"] = Scoped(trainer, scope)
        if "torch" in config.frameworks:
            model = torch_gpt.GPT(torch_gpt.GPTConfig(**config.model))
            transplant(flax_model, model, TWINS)
            trainer = TorchTrainer(torch_gpt, model.to(devices.torch), config.training, seed=seed)
            self.by_framework["torch"] = trainer

    def save(self) -> dict[str, Any]:
        """The states of all trainers."""
        return {name: trainer.save() for name, trainer in self.by_framework.items()}

    def restore(self, states: dict[str, Any]) -> None:
        """Goes on from what `save` gave.

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
    """Trains from the newest checkpoint, or from the start, to `num_steps`.

    Args:
        run: the folder that keeps it.
        corpus: the text to learn from.
        trainers: the trainers, fresh.
        num_steps: to stop after, counted from the start of the run.
        save_every: steps between checkpoints; there is one at the end too.
        target: loss to stop below.
        watch: told of every step.
        stopped: asked after every step whether to stop; the checkpoint is then written.

    Returns:
        The number of the last step.

    Raises:
        ValueError: for a checkpoint that cannot be resumed from, or a folder in use.
        NonFinite: for a loss or gradient that is not finite; the checkpoints are from before it.
    """
    with run.locked(), pinned_precision():
        step, gap = 0, 0.0
        if (found := run.load()) is not None:
            step, states = found
            trainers.restore(states)
        run.cut_metrics(step)
        if step == 0:
            run.save(0, trainers.save())
        for row in run.metrics():
            gap = _larger(gap, row["gap"])
            if _reached(row["losses"], target):
                return step
        clocks, tokens = dict.fromkeys(trainers.by_framework, 0.0), 0
        with (run.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            while step < num_steps:
                inputs = batch(run.config, corpus, step)
                losses = {}
                for name, trainer in trainers.by_framework.items():
                    start = time.perf_counter()
                    losses[name] = trainer.step(*inputs)
                    clocks[name] += (time.perf_counter() - start) if tokens else 0.0
                timed, tokens = tokens, tokens + inputs[0].size
                step += 1
                gap = _larger(gap, float(np.ptp(list(losses.values()))))
                reading = Reading(
                    step,
                    losses,
                    {name: x.gradient_norm for name, x in trainers.by_framework.items()},
                    {name: x.applied for name, x in trainers.by_framework.items()},
                    gap,
                    {name: timed / clock if clock else 0.0 for name, clock in clocks.items()},
                )
                _check_finite(reading, trainers, inputs)
                row = dataclasses.asdict(reading)
                del row["rates"]
                file.write(as_line(row))
                watch(reading)
                done = step == num_steps or _reached(losses, target) or stopped()
                if done or step % save_every == 0:
                    file.flush()
                    os.fsync(file.fileno())  # no checkpoint without the lines that led to it
                    run.save(step, trainers.save())
                if done:
                    break
    return step


def _larger(a: float, b: float) -> float:
    """The larger of two numbers; NaN if either is."""
    return float(np.max([a, b]))


def _reached(losses: Mapping[str, float], target: float | None) -> bool:
    return target is not None and all(loss < target for loss in losses.values())


def parted(run: Run, corpus: Corpus, trainers: Trainers) -> tuple[bool, str]:
    """Whether the twins' losses parted as two programs do, and not as rounding does; in words.

    A training can be chaotic: then rounding grows, between twins as between two runs of one. Where
    a gap is past its bound, a run from neighbouring weights shows how much of it that explains.
    """
    if len(trainers.by_framework) < 2:
        return False, ""
    config, metrics = run.config, run.metrics()
    gap, narrow = metrics[-1]["gap"], config.training["compute_dtype"]
    if narrow:
        return False, f"{gap:.1e}; not judged in {narrow}, see parity precision"
    bound = LOSS["float64" if config.model["dtype"] == "float64" else "float32"]
    if gap <= bound:
        return False, f"{gap:.1e}, bound {bound:.0e}"
    first = next(row["step"] for row in metrics if not row["gap"] <= bound)
    again = Trainers(config, trainers.devices).by_framework
    alone = dataclasses.replace(config, frameworks=("torch",))
    witness = Trainers(alone, trainers.devices, nudged=True).by_framework
    with pinned_precision():
        is_bug, words = rounding_or_bug(
            (again["flax"], again["torch"], witness["torch"]),
            lambda step: batch(config, corpus, step),
            first,
            "torch_gpt",
        )
    return is_bug, f"{gap:.1e}, past the bound {bound:.0e} from step {first}. {words}"


def batch(config: RunConfig, corpus: Corpus, step: int) -> tuple[np.ndarray, ...]:
    """The inputs of the step after `step` others."""
    number = 0 if config.one_batch else step
    return (corpus.windows(config.rows, config.width, config.seed, number),)


def evaluate(
    config: RunConfig, held_out: Corpus, trainers: Trainers
) -> dict[str, dict[str, float]]:
    """Loss, perplexity, accuracy and number of tokens on a text, by framework."""
    pieces = held_out.pieces(config.width, _HELD_OUT)
    batches = [(pieces[i : i + config.rows],) for i in range(0, len(pieces), config.rows)]
    with pinned_precision():
        return {name: trainer.evaluate(batches) for name, trainer in trainers.by_framework.items()}


def _check_finite(reading: Reading, trainers: Trainers, inputs: tuple[np.ndarray, ...]) -> None:
    """Ends a training whose numbers have left the range; loss scaling may skip a step of float16.

    Raises:
        NonFinite: with the step, the first tensor and the remedy.
    """
    narrow = trainers.config.training["compute_dtype"]
    for name, trainer in trainers.by_framework.items():
        # A scale below one says that halving it further will not bring the gradient back.
        if reading.applied[name] or (trainer.loss_scale or 0.0) >= 1.0:
            continue
        leaves, devices = trainer.parameters(), trainers.devices
        where = first_non_finite(trainers.config, name, leaves, inputs, devices)
        others = [other for other, applied in reading.applied.items() if applied]
        remedy = "Nothing can be learned from that. Lower --learning-rate or --clip, or lengthen "
        remedy += "--warmup"
        if narrow == "float16":
            remedy = "float16 ends at 65504. Use --dtype bfloat16, which has the range of float32"
        if others:
            remedy = f"{others[0]} is finite, so the twins differ. Run parity check"
        raise NonFinite(
            f"step {reading.step}: {name} has a loss of {reading.losses[name]:.3g} and a gradient "
            f"norm of {reading.gradient_norms[name]:.3g}. First not finite: {where}. {remedy}.",
            bool(others),
        )
