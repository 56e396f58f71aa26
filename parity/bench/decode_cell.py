"""One prompt for all contenders: they write the same, and then take turns.

Whatever slows the machine down slows all of them, and ratios are taken inside a round.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

import flax_gpt
import torch_gpt
from parity.bench.agreement import Reference, agree
from parity.bench.baselines import FlaxNaive, TorchInPlace
from parity.bench.complexity import Traffic
from parity.bench.contenders import Cell, Contender
from parity.bench.decode_times import CacheAccount, DecodeCell, Decoding, Tie
from parity.bench.flax_decoders import FlaxLoop, FlaxSteps, FlaxUncached
from parity.bench.machine import Bandwidth, Compilations, MemoryGrowth
from parity.bench.peers import LIBRARIES, Peers
from parity.bench.programs import costs
from parity.bench.ratios import HANDLE
from parity.bench.step_pairs import pair_steps
from parity.bench.steps import Unavailable
from parity.bench.structure import remade_caches
from parity.bench.torch_decoders import TorchSteps, TorchUncached
from parity.system.devices import Devices

TWIN_STEPS = "flax step", "torch step"
HANDLE_PAIR = "torch step", "torch in place"
# Without a cache a token is a whole prefill, so a turn is as short as it can be.
_UNCACHED_STEPS = 1
# A turn has fewer steps where it would take longer than this, in seconds, and a contender sits out
# the rounds behind these many seconds, but not the first two.
_TURN_S = 2.5
_ALL_TURNS_S = 15.0
_MIN_ROUNDS = 2
# The prompt is read again until this is over, in seconds, but so often at most.
_PREFILLS_S, _PREFILLS = 2.0, 3


@dataclasses.dataclass(frozen=True)
class Subject:
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


def time_cell(
    subject: Subject,
    peers: Peers,
    cell: Cell,
    names: Sequence[str],
    rounds: int,
    bandwidth: Bandwidth,
    progress: Callable[[str, float], None],
) -> DecodeCell:
    """Agreement first, then the turns."""
    agreeing, timing = cell_phases(cell.config.dtype, cell.batch_size, cell.context)
    progress(agreeing, 0.0)
    # The twins are set up in any case: nothing is timed where they were not compared.
    wanted = [*TWIN_STEPS, *(name for name in names if name not in TWIN_STEPS)]
    entries: dict[str, _Entry] = {}
    absent: dict[str, Decoding] = {}
    for number, name in enumerate(wanted, 1):
        try:
            entries[name] = _set_up(name, subject, peers, cell, entries)
        except Unavailable as error:
            absent[name] = Decoding(
                name=name, framework=name.split()[0], form="cached", ran="", unavailable=str(error)
            )
        if name == TWIN_STEPS[-1]:
            flax_steps, torch_steps = (entries[x].contender for x in TWIN_STEPS)
            tokens_BG = entries[TWIN_STEPS[0]].warm_BG
            reference, agreement = agree(cell, flax_steps, torch_steps, tokens_BG)
            _note_ties(entries[name], reference, entries[name].warm_BG)
        elif name in entries and number > len(TWIN_STEPS):
            _note_ties(entries[name], reference, entries[name].warm_BG)
        progress(agreeing, number / len(wanted))
    accounts = (
        _account("flax", cell, flax_steps.cache, flax_gpt),
        _account("torch", cell, torch_steps.cache, torch_gpt),
    )
    program, keys_BKSH = flax_steps.program(), flax_steps.cache.layers[0].keys_BKSH
    timed = [entries[name] for name in names if name in entries]
    bandwidths = _rounds(timed, reference, rounds, bandwidth, lambda done: progress(timing, done))
    handle = None
    if all(name in names for name in HANDLE_PAIR):
        one, other = ((name, entries[name].contender) for name in HANDLE_PAIR)
        num_steps = min(entries[name].num_steps for name in HANDLE_PAIR)
        handle = pair_steps(HANDLE, cell.context, one, other, rounds, num_steps)
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
        handle=handle,
        cache_copies=len(remade_caches(program.as_text(), keys_BKSH.shape)),
        step_costs=costs(program),
    )


def _set_up(
    name: str, subject: Subject, peers: Peers, cell: Cell, entries: Mapping[str, _Entry]
) -> _Entry:
    """A contender that has run once, watched while it did.

    Raises:
        Unavailable: when it cannot run here.
    """
    pid = peers.room(name).pid if name.split()[0] in LIBRARIES else None
    with MemoryGrowth(subject.devices, pid) as memory:
        contender = _made(name, subject, peers, cell, entries)
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


def _made(
    name: str, subject: Subject, peers: Peers, cell: Cell, entries: Mapping[str, _Entry]
) -> Contender:
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
    return peers.make(name, cell)


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
    longest = int(package.cache.host_values(cache.lengths_B).max())
    sizes, _ = package.fast_attention.slots_to_read(num_slots, longest)
    read = int(traffic.layer_cache(sizes[-1]))
    return CacheAccount(framework, cache.capacity, given[0] // layers, given[1] // layers, read)


def _traffic(cell: Cell) -> Traffic:
    return Traffic(cell.config, cell.batch_size, jnp.dtype(cell.config.dtype).itemsize)


def cell_phases(dtype: str, rows: int, context: int) -> tuple[str, str]:
    """What `time_cell` tells `progress` about."""
    cell = f"{dtype}, {rows} x {context}"
    return f"{cell}, agreeing", f"{cell}, timing"
