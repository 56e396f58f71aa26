"""Decoding timed side by side: the twins in each of their forms, baselines, and peers.

A grid of cells, and beside it the cost of a large cache and the powers of the context.
"""

import contextlib
import dataclasses
import importlib.metadata
import itertools
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

import flax_gpt
import torch_gpt
from parity.bench.agreement import LOGITS
from parity.bench.complexity import MIN_CONTEXTS, Law
from parity.bench.contenders import Cell
from parity.bench.decode_cell import TWIN_STEPS, Subject, cell_phases, time_cell
from parity.bench.decode_outcome import DecodeBench
from parity.bench.decode_times import DecodeCell
from parity.bench.flax_decoders import FlaxSteps
from parity.bench.machine import Bandwidth, load_average
from parity.bench.peers import LIBRARIES, Peers
from parity.bench.programs import uncached_costs
from parity.bench.step_pairs import StepPairs, pair_steps
from parity.bench.torch_decoders import TorchSteps
from parity.frameworks.flax.leaves import flax_leaves, load_flax
from parity.frameworks.flax.scope import jax_scope
from parity.system.devices import Devices, fingerprint, pinned_precision
from parity.weights.randomize import randomized
from parity.weights.tables import TWINS
from parity.weights.transplant import transplant

CONTENDERS = (
    "flax step", "flax loop", "flax uncached", "flax naive", "torch step", "torch uncached",
    "torch in place", "transformers", "transformers static", "ctranslate2",
)  # fmt: skip

# Slots of a small and of a large cache, and how many of them hold tokens.
CAPACITIES, VALID = (256, 8192), 128
_LOUD = 16.0  # times the size of other embeddings
_VARIABLES = "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "XLA_FLAGS"


def decode_phases(
    dtypes: Sequence[str], batch_sizes: Sequence[int], contexts: Sequence[int]
) -> tuple[str, ...]:
    """What `bench_decode` tells `progress` about, in order."""
    phases = []
    for number, dtype in enumerate(dict.fromkeys(dtypes)):
        for rows in dict.fromkeys(batch_sizes):
            for context in dict.fromkeys(contexts):
                phases += cell_phases(dtype, rows, context)
        phases += ["large cache", "exponents"] if number == 0 else []
    return tuple(phases)


def bench_decode(
    preset: str,
    devices: Devices,
    *,
    batch_sizes: Sequence[int] = (1,),
    contexts: Sequence[int] = (128, 512, 2048),
    dtypes: Sequence[str] = ("float32",),
    rounds: int = 5,
    num_steps: int = 32,
    names: Sequence[str] = CONTENDERS,
    changes: Mapping[str, Any] | None = None,
    seed: int = 0,
    bandwidth: Callable[[Devices], Bandwidth] = Bandwidth,
    progress: Callable[[str, float], None] = lambda phase, fraction: None,
) -> DecodeBench:
    """Times one token of every contender in every cell of a grid.

    Args:
        preset: name of the model's size; its position table is made longer where it has to be.
        devices: where to decode.
        batch_sizes: rows.
        contexts: tokens that a row holds when a turn ends; it begins `num_steps` before.
        dtypes: of weights, cache and computation. The first is also tried with a large cache, and
            with the first batch size costs are held against contexts.
        rounds: turns of each contender.
        num_steps: tokens that a turn appends to each row.
        names: of the contenders.
        changes: fields of the preset that are to be others.
        seed: of weights and prompts.
        bandwidth: makes what measures how fast memory is read.
        progress: told the phase and how far it is.

    Raises:
        ValueError: for what cannot be decoded, and when the logits of the twins or the tokens of
            two contenders are not the same.
    """
    batch_sizes, contexts, dtypes, names = (
        tuple(dict.fromkeys(x)) for x in (batch_sizes, contexts, dtypes, names)
    )
    _check_request(batch_sizes, contexts, dtypes, rounds, num_steps, names)
    config = flax_gpt.GPTConfig.preset(preset, **(changes or {}))
    # The large cache too has a position for each slot, and the last token one more.
    longest = max(*contexts, CAPACITIES[1] - 1) + 1
    config = dataclasses.replace(config, context_length=max(config.context_length, longest))
    before = load_average()
    cells, tests, laws = [], (), ()
    with pinned_precision():
        roof = bandwidth(devices)
        for dtype in dtypes:
            subject = _subject(dataclasses.replace(config, dtype=dtype), devices, seed)
            with Peers(subject.flax) as peers:
                for rows, context in itertools.product(batch_sizes, contexts):
                    prompt_BT = _prompt(config, rows, context - num_steps, seed)
                    cell = Cell(subject.config, prompt_BT, num_steps, devices)
                    cells.append(time_cell(subject, peers, cell, names, rounds, roof, progress))
                    peers.clear()
            if dtype == dtypes[0]:
                tests = _capacity_tests(subject, names, rounds, num_steps, seed, progress)
                laws = _laws(subject, cells, batch_sizes[0], progress)
    return DecodeBench(
        environment=_environment(devices) | {"load_before": before, "load_after": load_average()},
        preset=preset,
        config=dataclasses.asdict(config),
        seed=seed,
        cells=tuple(cells),
        capacity_tests=tests,
        laws=laws,
    )


def _capacity_tests(
    subject: Subject,
    names: Sequence[str],
    rounds: int,
    num_steps: int,
    seed: int,
    progress: Callable[[str, float], None],
) -> tuple[StepPairs, ...]:
    """Steps with few valid slots in a large and in a small cache, in turns, one row."""
    cell = Cell(subject.config, _prompt(subject.config, 1, VALID, seed), num_steps, subject.devices)
    makers = {"flax step": FlaxSteps, "torch step": TorchSteps}
    models = {"flax step": subject.flax, "torch step": subject.torch}
    wanted = [name for name in TWIN_STEPS if name in names]
    progress("large cache", 0.0)
    found = []
    for place, name in enumerate(wanted, 1):
        both = []
        for slots in reversed(CAPACITIES):
            steps = makers[name](models[name], cell, slots)
            steps.prefill()
            steps.turn(num_steps)
            both.append((f"{slots} slots", steps))
        words = f"{CAPACITIES[1]} slots over {CAPACITIES[0]}, {name.split()[0]}"
        found.append(pair_steps(words, VALID, *both, rounds, num_steps))
        progress("large cache", place / len(wanted))
    return tuple(found)


def _laws(
    subject: Subject,
    cells: Sequence[DecodeCell],
    rows: int,
    progress: Callable[[str, float], None],
) -> tuple[Law, ...]:
    """How a token's time, work and memory grow with the context; none for too few contexts."""
    cells = [cell for cell in cells if cell.batch_size == rows]
    progress("exponents", 0.0)
    if len(cells) < MIN_CONTEXTS:
        return ()
    laws = []
    for framework, form, name in (
        ("flax", "cached", "flax step"),
        ("torch", "cached", "torch step"),
        ("flax", "uncached", "flax uncached"),
        ("torch", "uncached", "torch uncached"),
    ):
        timings = [(cell, cell.get(name)) for cell in cells]
        if all(timing is not None for _, timing in timings):
            points = [(cell.mean_length(x), s) for cell, x in timings for s in x.turns_s]
            laws.append(_law(framework, form, "time", f"{name}, measured", points))
    for index, framework in enumerate(("flax", "torch")):
        points = [
            (cell.prompt_length, cell.accounts[index].valid * subject.config.num_layers)
            for cell in cells
        ]
        laws.append(_law(framework, "cached", "memory", "valid slots by num_bytes", points))
    by_program: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for number, cell in enumerate(cells, 1):
        for quantity, cost in cell.step_costs.items():
            key = "cached", quantity, "XLA's account of the step, by capacity"
            by_program.setdefault(key, []).append((cell.accounts[0].capacity, cost))
        with jax_scope(subject.config.dtype, subject.devices.flax):
            found = uncached_costs(subject.flax, rows, cell.context)
        for quantity, cost in found.items():
            key = "uncached", quantity, "XLA's account of a forward pass"
            by_program.setdefault(key, []).append((cell.context, cost))
        progress("exponents", number / len(cells))
    for (form, quantity, source), points in by_program.items():
        laws.append(_law("flax", form, quantity, source, points))
    return tuple(sorted(laws, key=lambda law: law.form))


def _law(
    framework: str, form: str, quantity: str, source: str, points: Sequence[tuple[float, float]]
) -> Law:
    return Law(
        framework=framework, form=form, quantity=quantity, source=source,
        points=tuple((float(length), float(cost)) for length, cost in points),
    )  # fmt: skip


def _subject(config: flax_gpt.GPTConfig, devices: Devices, seed: int) -> Subject:
    """The twins with weights of which every one matters.

    Positions are made loud, or else one token would follow itself for ever, whatever the cache
    holds, and equal tokens would say little.
    """
    with jax_scope(config.dtype, devices.flax):
        flax_model = flax_gpt.GPT(config)
        leaves = randomized(flax_leaves(flax_model), seed)
        table = leaves["position_embedding.embedding"]
        leaves["position_embedding.embedding"] = (table * _LOUD).astype(table.dtype)
        load_flax(flax_model, leaves)
    torch_model = torch_gpt.GPT(torch_gpt.GPTConfig(**dataclasses.asdict(config)))
    transplant(flax_model, torch_model, TWINS)
    return Subject(config, flax_model, torch_model.to(devices.torch), devices)


def _prompt(config: flax_gpt.GPTConfig, rows: int, length: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng((seed, 1))
    return rng.integers(0, config.vocab_size, (rows, length), dtype=np.int32)


def _check_request(
    batch_sizes: Sequence[int],
    contexts: Sequence[int],
    dtypes: Sequence[str],
    rounds: int,
    num_steps: int,
    names: Sequence[str],
) -> None:
    """Refuses what cannot be decoded, all problems in one message.

    Raises:
        ValueError: with the numbers.
    """
    problems = [
        f"there is no contender {x!r}, but {', '.join(CONTENDERS)}"
        for x in names
        if x not in CONTENDERS
    ]
    problems += [
        f"there is no dtype {x!r}, but {', '.join(LOGITS)}" for x in dtypes if x not in LOGITS
    ]
    if not all((batch_sizes, contexts, dtypes, names)):
        problems.append("nothing is left to time without a batch, context, dtype or contender")
    if min(*batch_sizes, rounds, num_steps, 1) < 1:
        problems.append(
            f"batch {', '.join(map(str, batch_sizes))}, {rounds} rounds, {num_steps} tokens of a "
            "turn: each is at least 1"
        )
    short = [context for context in contexts if context - num_steps < 2]
    if short:
        problems.append(
            f"context {', '.join(map(str, short))} with {num_steps} tokens of a turn: at least 2 "
            "must be left for the prompt"
        )
    if problems:
        raise ValueError(f"bench: {'; '.join(problems)}. Choose others.")


def _environment(devices: Devices) -> dict[str, Any]:
    """The fingerprint, and what else can change a time."""
    versions = {}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return (
        fingerprint(devices)
        | versions
        | {name: os.environ[name] for name in _VARIABLES if name in os.environ}
        | {"system": platform.platform(), "cores": os.cpu_count()}
    )
