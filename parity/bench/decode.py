"""Decoding timed side by side: the twins in each of their forms, baselines, and peers.

The contenders take turns, so that whatever slows the machine down slows all of them, and ratios
are taken inside a round. What does not write the same tokens is not timed.
"""

import contextlib
import dataclasses
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

import flax_gpt
import torch_gpt
from parity.bench.agreement import LOGITS, Reference, agree
from parity.bench.baselines import FlaxNaive, TorchInPlace
from parity.bench.complexity import MIN_CONTEXTS, Law, Traffic
from parity.bench.decode_times import (
    CacheAccount,
    CapacityTest,
    DecodeBench,
    DecodeCell,
    Decoding,
    Tie,
)
from parity.bench.decoders import (
    Cell,
    Contender,
    FlaxLoop,
    FlaxSteps,
    FlaxUncached,
    TorchSteps,
    TorchUncached,
)
from parity.bench.machine import Bandwidth, Compilations, MemoryGrowth, load_average
from parity.bench.peers import CTranslate2, Transformers
from parity.bench.programs import costs, uncached_costs
from parity.bench.steps import Unavailable
from parity.bench.structure import remade_caches
from parity.environment import Devices, fingerprint, jax_scope, pinned_precision
from parity.leaves import flax_leaves, load_flax
from parity.rules import TWINS
from parity.subject import randomized
from parity.transplant import transplant

CONTENDERS = (
    "flax step", "flax loop", "flax uncached", "flax naive", "torch step", "torch uncached",
    "torch in place", "transformers", "transformers static", "ctranslate2",
)  # fmt: skip
_TWINS = "flax step", "torch step"

# Slots of a small and of a large cache, and how many of them hold tokens.
CAPACITIES, VALID = (256, 8192), 128
# Without a cache a token is a whole prefill, so a turn is as short as it can be.
_UNCACHED_STEPS = 1
# A turn has fewer steps where it would take longer than this, in seconds, and a contender sits out
# the rounds behind these many seconds, but not the first two.
_TURN_S = 2.5
_ALL_TURNS_S = 15.0
_MIN_ROUNDS = 2
# The prompt is read again until this is over, in seconds, but so often at most.
_PREFILLS_S, _PREFILLS = 2.0, 3
_LOUD = 16.0  # times the size of other embeddings
_VARIABLES = "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "XLA_FLAGS"
_PEERS = "transformers", "ctranslate2"


@dataclasses.dataclass(frozen=True)
class _Subject:
    """The twins with the same weights, and where they run."""

    config: flax_gpt.GPTConfig
    flax: nnx.Module
    torch: torch.nn.Module
    devices: Devices


@dataclasses.dataclass
class _Entry:
    """A contender that has run once, and what is known of it so far."""

    contender: Contender
    fields: dict[str, Any]
    num_steps: int
    warm_BG: np.ndarray
    turns_s: list[float] = dataclasses.field(default_factory=list)
    ties: dict[tuple[int, int], Tie] = dataclasses.field(default_factory=dict)
    recompiled: int = 0
    spent_s: float = 0.0

    def timing(self) -> Decoding:
        """All of it."""
        return Decoding(
            **self.fields,
            num_steps=self.num_steps,
            turns_s=tuple(self.turns_s),
            num_tokens=self.warm_BG.size,
            ties=tuple(self.ties.values()),
            recompiled=self.recompiled,
        )


def decode_phases(
    dtypes: Sequence[str], batch_sizes: Sequence[int], contexts: Sequence[int]
) -> tuple[str, ...]:
    """What `bench_decode` tells `progress` about, in order."""
    phases = []
    for number, dtype in enumerate(dict.fromkeys(dtypes)):
        for rows in dict.fromkeys(batch_sizes):
            for context in dict.fromkeys(contexts):
                phases += _phases(dtype, rows, context)
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
            for rows in batch_sizes:
                for context in contexts:
                    prompt_BT = _prompt(config, rows, context - num_steps, seed)
                    cell = Cell(subject.config, prompt_BT, num_steps, devices)
                    cells.append(_cell(subject, cell, names, rounds, roof, progress))
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


def _cell(
    subject: _Subject,
    cell: Cell,
    names: Sequence[str],
    rounds: int,
    bandwidth: Bandwidth,
    progress: Callable[[str, float], None],
) -> DecodeCell:
    """Agreement first, then the turns."""
    agreeing, timing = _phases(cell.config.dtype, cell.batch_size, cell.context)
    progress(agreeing, 0.0)
    # The twins are set up in any case: nothing is timed where they were not compared.
    wanted = [*_TWINS, *(name for name in names if name not in _TWINS)]
    entries: dict[str, _Entry] = {}
    absent: dict[str, Decoding] = {}
    for number, name in enumerate(wanted, 1):
        try:
            entries[name] = _set_up(name, subject, cell, entries)
        except Unavailable as error:
            absent[name] = Decoding(
                name=name, framework=name.split()[0], form="cached", ran="", unavailable=str(error)
            )
        if name == _TWINS[-1]:
            flax_steps, torch_steps = (entries[x].contender for x in _TWINS)
            tokens_BG = entries[_TWINS[0]].warm_BG
            reference, agreement = agree(cell, flax_steps, torch_steps, tokens_BG)
            _note_ties(entries[name], reference, entries[name].warm_BG)
        elif name in entries and number > len(_TWINS):
            _note_ties(entries[name], reference, entries[name].warm_BG)
        progress(agreeing, number / len(wanted))
    accounts = (
        _account("flax", cell, flax_steps.cache, flax_gpt),
        _account("torch", cell, torch_steps.cache, torch_gpt),
    )
    program, keys_BKSH = flax_steps.program(), flax_steps.cache.layers[0].keys_BKSH
    timed = [entries[name] for name in names if name in entries]
    bandwidths = _rounds(timed, reference, rounds, bandwidth, lambda done: progress(timing, done))
    return DecodeCell(
        dtype=cell.config.dtype,
        batch_size=cell.batch_size,
        context=cell.context,
        prompt_length=cell.prompt_length,
        traffic=_traffic(cell),
        agreement=agreement,
        accounts=accounts,
        contenders=tuple(absent.get(name) or entries[name].timing() for name in names),
        bandwidths=bandwidths,
        cache_copies=len(remade_caches(program.as_text(), keys_BKSH.shape)),
        step_costs=costs(program),
    )


def _set_up(name: str, subject: _Subject, cell: Cell, entries: Mapping[str, _Entry]) -> _Entry:
    """A contender that has run once, watched while it did.

    Raises:
        Unavailable: when it cannot run here.
    """
    with MemoryGrowth(subject.devices) as memory:
        contender = _made(name, subject, cell, entries)
        with Compilations() as reading:
            contender.prefill()
        num_steps = _UNCACHED_STEPS if contender.form == "uncached" else cell.num_steps
        with Compilations() as writing:
            warm = contender.turn(num_steps)
    compile_s = writing.seconds if contender.framework == "flax" else None
    prefills_s = _prefills(contender) if contender.reads else ()
    if contender.form != "uncached":
        few = min(2, num_steps)
        step_s = contender.turn(few).seconds / few
        if contender.name == "torch step" and subject.devices.torch.type != "cpu":
            compile_s = max(0.0, warm.seconds - num_steps * step_s)
        num_steps = max(1, min(num_steps, int(_TURN_S / step_s)))
        if num_steps < cell.num_steps:
            contender.turn(num_steps)  # what it compiles for another number is not to be timed
    return _Entry(
        contender=contender,
        warm_BG=warm.tokens_BG,
        num_steps=num_steps,
        fields=dict(
            name=name,
            framework=contender.framework,
            form=contender.form,
            ran=contender.ran,
            compile_s=compile_s,
            prefill_compile_s=reading.seconds if reading.count else None,
            prefills_s=prefills_s,
            memory_bytes=memory.num_bytes,
            extra_bytes=contender.extra_bytes,
        ),
    )


def _made(name: str, subject: _Subject, cell: Cell, entries: Mapping[str, _Entry]) -> Contender:
    """A contender by its name."""
    match name:
        case "flax step":
            return FlaxSteps(subject.flax, cell)
        case "flax loop":
            return FlaxLoop(cell, entries["flax step"].contender)
        case "flax uncached":
            return FlaxUncached(subject.flax, cell)
        case "flax naive":
            return FlaxNaive(subject.flax, cell, entries["flax step"].contender)
        case "torch step":
            return TorchSteps(subject.torch, cell)
        case "torch uncached":
            return TorchUncached(subject.torch, cell)
        case "torch in place":
            return TorchInPlace(cell, entries["torch step"].contender)
        case "transformers" | "transformers static":
            return Transformers(subject.flax, cell, static=name.endswith("static"))
        case "ctranslate2":
            return CTranslate2(subject.flax, cell)
    raise ValueError(name)


def _prefills(contender: Contender) -> tuple[float, ...]:
    """Seconds of a few more readings of the prompt."""
    found: list[float] = []
    while len(found) < _PREFILLS and sum(found) < _PREFILLS_S:
        start = time.perf_counter()
        contender.prefill()
        found.append(time.perf_counter() - start)
    return tuple(found)


def _note_ties(entry: _Entry, reference: Reference, tokens_BG: np.ndarray) -> None:
    """Compares tokens, and keeps where they part by a tie."""
    for tie in reference.compare(entry.contender.name, tokens_BG):
        entry.ties[tie.row, tie.number] = tie


def _rounds(
    entries: Sequence[_Entry],
    reference: Reference,
    rounds: int,
    bandwidth: Bandwidth,
    progress: Callable[[float], None],
) -> dict[str, tuple[float, ...]]:
    """A turn of each contender in every round, whose tokens are compared again.

    Returns:
        Bytes per second of the programs that read memory, by round.
    """
    rates = []
    for number in range(rounds):
        # Whoever comes first comes last next time, so that nobody always follows the same one.
        first = number % len(entries)
        for place, entry in enumerate((*entries[first:], *entries[:first])):
            progress((number + place / len(entries)) / rounds)
            if number >= _MIN_ROUNDS and entry.spent_s > _ALL_TURNS_S:
                continue
            start = time.perf_counter()
            with Compilations() as compilations:
                turn = entry.contender.turn(entry.num_steps)
            entry.spent_s += time.perf_counter() - start
            entry.recompiled += compilations.count
            entry.turns_s.append(turn.seconds / entry.num_steps)
            _note_ties(entry, reference, turn.tokens_BG)
        rates.append(bandwidth.rates())
    progress(1.0)
    return {name: tuple(of_round[name] for of_round in rates) for name in rates[0]}


def _capacity_tests(
    subject: _Subject,
    names: Sequence[str],
    rounds: int,
    num_steps: int,
    seed: int,
    progress: Callable[[str, float], None],
) -> tuple[CapacityTest, ...]:
    """A step with few valid slots in a small and in a large cache, by turns, one row."""
    cell = Cell(subject.config, _prompt(subject.config, 1, VALID, seed), num_steps, subject.devices)
    makers = {"flax step": FlaxSteps, "torch step": TorchSteps}
    models = {"flax step": subject.flax, "torch step": subject.torch}
    wanted = [name for name in _TWINS if name in names]
    progress("large cache", 0.0)
    found = []
    for place, name in enumerate(wanted, 1):
        steps = [makers[name](models[name], cell, capacity) for capacity in CAPACITIES]
        for step in steps:
            step.prefill()
            step.turn(num_steps)
        turns_s: tuple[list[float], list[float]] = [], []
        for number in range(rounds):
            order = (0, 1) if number % 2 == 0 else (1, 0)
            for which in order:
                turns_s[which].append(steps[which].turn(num_steps).seconds / num_steps)
        small_s, large_s = map(tuple, turns_s)
        found.append(CapacityTest(name.split()[0], VALID, CAPACITIES, small_s, large_s))
        progress("large cache", place / len(wanted))
    return tuple(found)


def _laws(
    subject: _Subject,
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


def _account(framework: str, cell: Cell, cache: Any, package: Any) -> CacheAccount:
    """Bytes of a cache behind the prompt, held against the formula.

    Raises:
        ValueError: when the cache says otherwise.
    """
    traffic, layers = _traffic(cell), cell.config.num_layers
    formula = traffic.cache(cache.capacity), traffic.cache(cell.prompt_length)
    given = cache.num_bytes.allocated, cache.num_bytes.valid
    if formula != given:
        raise ValueError(
            f"bench: a cache of {framework} in {cell.words}: {given[0]} bytes allocated and "
            f"{given[1]} valid, by its own account; 2 B K S H x itemsize in {layers} layers is "
            f"{formula[0]:.0f} and {formula[1]:.0f}. One of them is wrong. Look into num_bytes."
        )
    num_slots = min(cache.capacity, cell.config.context_length)
    rungs, _, _ = package.positions.reach(num_slots, cache.lengths_B)
    read = int(traffic.layer_cache(rungs[-1]))
    return CacheAccount(framework, cache.capacity, given[0] // layers, given[1] // layers, read)


def _traffic(cell: Cell) -> Traffic:
    return Traffic(cell.config, cell.batch_size, jnp.dtype(cell.config.dtype).itemsize)


def _subject(config: flax_gpt.GPTConfig, devices: Devices, seed: int) -> _Subject:
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
    return _Subject(config, flax_model, torch_model.to(devices.torch), devices)


def _prompt(config: flax_gpt.GPTConfig, rows: int, length: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng((seed, 1))
    return rng.integers(0, config.vocab_size, (rows, length), dtype=np.int32)


def _phases(dtype: str, rows: int, context: int) -> tuple[str, str]:
    cell = f"{dtype}, {rows} x {context}"
    return f"{cell}, agreeing", f"{cell}, timing"


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
    for name in _PEERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return (
        fingerprint(devices)
        | versions
        | {name: os.environ[name] for name in _VARIABLES if name in os.environ}
        | {"system": platform.platform(), "cores": os.cpu_count()}
    )
