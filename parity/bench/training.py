"""Training steps of both frameworks timed side by side, and held against what the machine can do.

The contenders take turns, so that whatever slows the machine down slows all of them, and ratios
are taken inside a round. Twins that do not agree are not timed.
"""

import copy
import dataclasses
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

import flax_gpt
import torch_gpt
from parity.bench.machine import Matmul, best_matmul, load_average
from parity.bench.steps import FlaxStep, TorchStep, Unavailable
from parity.bench.times import Contest, Timing, TrainingBench
from parity.check import bounds
from parity.frameworks.flax.scope import jax_scope
from parity.pair.text import Corpus
from parity.system.devices import Devices, fingerprint, pinned_precision
from parity.twins.pair import preset_config
from parity.weights.tables import TWINS
from parity.weights.transplant import transplant

# Largest gap between the losses of two contenders.
DTYPES = {"float32": bounds.LOSS["float32"], "bfloat16": bounds.LOSS_BFLOAT16}
# The first loss judges the forward pass, the second the gradient and the update too.
_AGREEING_STEPS = 2
_NUM_BATCHES = 8
_NUM_CONTENDERS = 4
# Small steps are repeated in a turn: one alone would be timed with another framework's caches.
_TURN_S = 0.25
# Rows and tokens of a batch, and turns: a step of a preset other than tiny takes seconds on a CPU.
_SIZES = {"tiny": (8, 64)}
_OTHER_SIZES = 1, 128
_REPEATS = {"tiny": 15}
_OTHER_REPEATS = 5


def flop_per_step(config: flax_gpt.GPTConfig, batch_size: int, width: int) -> int:
    """Floating-point operations of the matrix products of one training step.

    6 N + 12 L K H T per token: each of N weights multiplies and adds in the forward pass and twice
    in the backward pass, and so do queries with keys and attention weights with values over T
    slots, masked or not. N counts what multiplies: the matrices of the linear layers and, once,
    the tied table as the head; not biases, norms or rows that are looked up. Chowdhery et al.,
    "PaLM", 2022, appendix B.
    """
    attention, mlp = 4 * config.embed_dim**2, 2 * config.embed_dim * config.mlp_dim
    multiplied = config.num_layers * (attention + mlp) + config.vocab_size * config.embed_dim
    scores = config.num_layers * config.num_heads * config.head_width * width
    return batch_size * width * (6 * multiplied + 12 * scores)


def phases(preset: str) -> tuple[str, str]:
    """What `bench_training` tells `progress` about a preset, in order."""
    return f"{preset}, compiling", f"{preset}, timing"


def bench_training(
    corpus: Corpus,
    presets: Sequence[str],
    devices: Devices,
    *,
    dtype: str = "float32",
    batch_size: int | None = None,
    width: int | None = None,
    repeats: int | None = None,
    changes: Mapping[str, Any] | None = None,
    progress: Callable[[str, float], None] = lambda phase, fraction: None,
) -> TrainingBench:
    """Times one training step of every contender on every preset.

    Args:
        corpus: the text to train on.
        presets: names of model sizes.
        devices: where to train.
        dtype: of forward and backward pass; weights and optimizer stay in float32.
        batch_size: rows; None for 8 of tiny and 1 of others.
        width: tokens of a row; None for 64 of tiny and 128 of others.
        repeats: rounds; None for 15 of tiny and 5 of others.
        changes: fields of the presets that are to be others.
        progress: told the phase and how far it is.

    Raises:
        ValueError: for sizes that cannot be trained, and when the losses of two contenders on the
            same batches from the same weights are not the same.
    """
    if dtype not in DTYPES:
        raise ValueError(f"bench: dtype {dtype}. There are {', '.join(DTYPES)}. Choose one.")
    entries = []
    for preset in dict.fromkeys(presets):
        config = preset_config(corpus, preset, **(changes or {}))
        rows, columns = _SIZES.get(preset, _OTHER_SIZES)
        rows, columns = batch_size or rows, width or columns
        _check_width(preset, config, columns)
        entries.append((preset, config, rows, columns))
    training = flax_gpt.TrainConfig(compute_dtype=None if dtype == "float32" else dtype)
    before = load_average()
    contests = tuple(
        _contest(
            corpus, devices, dtype, dataclasses.asdict(training), *entry,
            repeats or _REPEATS.get(entry[0], _OTHER_REPEATS), progress,
        )
        for entry in entries
    )  # fmt: skip
    environment = fingerprint(devices) | {
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "load_before": before,
        "load_after": load_average(),
    }
    return TrainingBench(
        environment=environment,
        dtype=dtype,
        training=dataclasses.asdict(training),
        contests=contests,
    )


def _contest(
    corpus: Corpus,
    devices: Devices,
    dtype: str,
    training: dict[str, Any],
    preset: str,
    config: flax_gpt.GPTConfig,
    rows: int,
    width: int,
    repeats: int,
    progress: Callable[[str, float], None],
) -> Contest:
    """Agreement first, then the turns."""
    compiling, timing = phases(preset)
    batches = [corpus.windows(rows, width, 0, number) for number in range(_NUM_BATCHES)]
    runners, timings, losses = [], {}, {}
    with pinned_precision():
        progress(compiling, 0.0)
        for number, step in enumerate(_contenders(config, training, batches, devices), 1):
            found = dict(name=step.name, framework=step.framework, ran=step.ran)
            try:
                losses[step.name] = step.losses(_AGREEING_STEPS)
                _check_agreement(preset, losses, dtype)
                found |= dict(compile_s=step.compile_s, memory_bytes=step.memory_bytes)
                runners.append(step)
            except Unavailable as error:
                found |= dict(unavailable=str(error))
            timings[step.name] = Timing(**found)
            progress(compiling, number / (_NUM_CONTENDERS + 1))
        matmuls = [best_matmul(name, dtype, devices) for name in ("flax", "torch")]
        progress(compiling, 1.0)
        turns, rates = _rounds(runners, matmuls, repeats, lambda done: progress(timing, done))
    return Contest(
        preset=preset,
        config=config,
        batch_size=rows,
        width=width,
        flop=flop_per_step(config, rows, width),
        losses=losses,
        bound=DTYPES[dtype],
        timings=tuple(
            dataclasses.replace(x, **turns[name]) if name in turns else x
            for name, x in timings.items()
        ),
        matmul_sizes={matmul.framework: matmul.size for matmul in matmuls},
        matmul_rates=rates,
    )


def _contenders(
    config: flax_gpt.GPTConfig,
    training: dict[str, Any],
    batches: list[np.ndarray],
    devices: Devices,
) -> Iterator[FlaxStep | TorchStep]:
    """Every form of the step, from the same weights."""
    with jax_scope(config.dtype, devices.flax):
        flax_model = flax_gpt.GPT(config, flax_gpt.random.key(0))
    torch_model = torch_gpt.GPT(torch_gpt.GPTConfig(**dataclasses.asdict(config)))
    transplant(flax_model, torch_model, TWINS)
    torch_model.to(devices.torch)
    untouched = copy.deepcopy(torch_model)
    constants = flax_gpt.TrainConfig(**training)
    yield FlaxStep(flax_model, constants, batches, donate=False, device=devices.flax)
    yield FlaxStep(flax_model, constants, batches, donate=True, device=devices.flax)
    constants = torch_gpt.TrainConfig(**training)
    yield TorchStep(torch_model, constants, batches, compiled=False)
    yield TorchStep(untouched, constants, batches, compiled=True)


def _rounds(
    steps: Sequence[FlaxStep | TorchStep],
    matmuls: Sequence[Matmul],
    repeats: int,
    progress: Callable[[float], None],
) -> tuple[dict[str, dict[str, Any]], dict[str, list[float]]]:
    """Seconds per step and FLOP/s of products, a turn of each in every round.

    Returns:
        Fields of `Timing` by contender, and rates by framework.
    """
    per_turn = {}
    for step in steps:
        per_turn[step.name] = max(1, math.ceil(_TURN_S / _seconds(step, 1)))
    turns: dict[str, list[float]] = {step.name: [] for step in steps}
    rates: dict[str, list[float]] = {matmul.framework: [] for matmul in matmuls}
    for number in range(repeats):
        # Whoever comes first comes last next time, so that nobody always follows the same one.
        first = number % len(steps)
        for step in (*steps[first:], *steps[:first]):
            turns[step.name].append(_seconds(step, per_turn[step.name]))
        for matmul in matmuls:
            rates[matmul.framework].append(matmul.rate())
        progress((number + 1) / repeats)
    found = {
        name: dict(steps_per_turn=per_turn[name], turns_s=tuple(seconds))
        for name, seconds in turns.items()
    }
    return found, rates


def _seconds(step: FlaxStep | TorchStep, times: int) -> float:
    """Seconds per step of some steps in a row, with one wait at their end, as a loop has it."""
    step.wait()
    start = time.perf_counter()
    for _ in range(times):
        step.step()
    step.wait()
    return (time.perf_counter() - start) / times


def _check_width(preset: str, config: flax_gpt.GPTConfig, width: int) -> None:
    """Refuses what cannot be trained.

    Raises:
        ValueError: for rows that are too short or too long.
    """
    if not 2 <= width <= config.context_length:
        raise ValueError(
            f"bench: {width} tokens in a row, context length {config.context_length} of {preset}. "
            "A row has from 2 tokens to the context. Choose another width."
        )


def _check_agreement(preset: str, losses: Mapping[str, Sequence[float]], dtype: str) -> None:
    """Refuses to time steps that do not compute the same.

    Raises:
        ValueError: when two losses of a step are apart; NaN is apart from everything.
    """
    for number, of_step in enumerate(zip(*losses.values(), strict=True), 1):
        gap = np.ptp(of_step)
        if not gap <= DTYPES[dtype]:
            found = (f"{name} {x:.7g}" for name, x in zip(losses, of_step, strict=True))
            raise ValueError(
                f"bench: loss of step {number} on {preset}: {', '.join(found)}, {gap:.1e} apart > "
                f"{DTYPES[dtype]:.0e} in {dtype}. Only steps that compute the same are worth "
                "timing. Find out where they part by `parity check --level trajectory`."
            )
