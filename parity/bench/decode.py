"""Time one token of the twins in each of their forms, of baselines, and of peers.

A grid of cells, and beside it the cost of a large cache and how costs grow with the context. In a
cell all decoders continue one prompt: first they must write the same, then they take turns, so
that whatever slows the machine down slows all of them, and ratios are taken inside a round.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import jax.numpy as jnp

import flax_gpt
import torch_gpt
from flax_gpt.fast_attention import slots_to_read as flax_slots_to_read
from parity.bench.agreement import Reference, agree
from parity.bench.decoders.flax import FlaxStep, flax_step, step_program
from parity.bench.decoders.peers import Peers
from parity.bench.decoders.protocol import DecodeTask
from parity.bench.decoders.torch import TorchStep, torch_step
from parity.bench.entry import SEED, Decoders, Entry, TwinModels, twin_models
from parity.bench.hlo import remade_caches
from parity.bench.machine import Bandwidth, Unavailable, environment, load_average
from parity.bench.names import DECODERS, DTYPES, LIBRARIES
from parity.bench.pairs import StepPairs, pair_steps
from parity.bench.ratios import HANDLE, ratios
from parity.bench.result import DecodeBench, DecodeCell, Decoding, KernelChoice
from parity.bench.roofline import BytesMoved
from parity.bench.scaling import ScalingFit, fit_exponent
from parity.frameworks.flax.scope import jax_scope
from parity.system.devices import Devices, pinned_precision
from torch_gpt.fast_attention import slots_to_read as torch_slots_to_read

Progress = Callable[[str, float], None]

TWIN_STEPS = "flax step", "torch step"
# Slots of a small and of a large cache, and how many of them hold tokens.
CAPACITIES, VALID = (256, 8192), 128
# A decoder sits out the rounds after its total, in seconds, but not the first ones.
ALL_ROUNDS_S = 15.0
MIN_ROUNDS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """What to time.

    Attributes:
        preset: name of the model's size.
        config: of the model; its position table is made longer where it has to be.
        batch_sizes: rows.
        contexts: tokens that a row holds at the end of a round; it begins `num_steps` before.
        dtypes: of weights, cache and computation. The first is also tried with a large cache, and
            with the first batch size costs are fitted to contexts.
        rounds: turns of each decoder.
        num_steps: tokens that a round appends to each row.
        names: of the decoders.
        large_cache: whether to time steps in a large cache too.
    """

    preset: str
    config: flax_gpt.GPTConfig
    batch_sizes: tuple[int, ...] = (1,)
    contexts: tuple[int, ...] = (128, 512, 2048)
    dtypes: tuple[str, ...] = ("float32",)
    rounds: int = 5
    num_steps: int = 32
    names: tuple[str, ...] = DECODERS
    large_cache: bool = True

    def __post_init__(self):
        """Refuse what cannot be decoded, all problems in one message."""
        problems = [f"there is no decoder {x!r}" for x in self.names if x not in DECODERS]
        problems += [f"there is no dtype {x!r}" for x in self.dtypes if x not in DTYPES]
        if not all((self.batch_sizes, self.contexts, self.dtypes, self.names)):
            problems.append("nothing is left to time without a batch, context, dtype or decoder")
        if min(*self.batch_sizes, self.rounds, self.num_steps, 1) < 1:
            problems.append("rows, rounds and tokens of a round are at least 1")
        short = [context for context in self.contexts if context - self.num_steps < 2]
        if short:
            problems.append(
                f"context {', '.join(map(str, short))} with {self.num_steps} tokens of a round: at "
                "least 2 must be left for the prompt"
            )
        if problems:
            raise ValueError(f"bench: {'; '.join(problems)}. Choose others.")

    def phases(self) -> tuple[str, ...]:
        """Return the phases that `bench_decode` passes to `progress`, in order."""
        found = []
        for number, dtype in enumerate(self.dtypes):
            for rows, context in itertools.product(self.batch_sizes, self.contexts):
                found += _cell_phases(dtype, rows, context)
            found += ["large cache"] if number == 0 and self.large_cache else []
        return tuple(found)


def bench_decode(
    options: DecodeOptions,
    devices: Devices,
    progress: Progress,
    on_cell: Callable[[DecodeCell], None] = lambda cell: None,
) -> DecodeBench:
    """Return the time of one token of every decoder in every cell of a grid.

    Args:
        options: what to time.
        devices: where to decode.
        progress: called with a phase and its fraction done.
        on_cell: called with each cell as soon as it is measured.

    Raises:
        ValueError: if the logits of the twins or the tokens of two decoders are not the same.
    """
    # The large cache too has a position for each slot, and the last token one more.
    longest = max(*options.contexts, CAPACITIES[1] - 1) + 1
    config = options.config
    config = dataclasses.replace(config, context_length=max(config.context_length, longest))
    before = load_average()
    cells: list[DecodeCell] = []
    capacity: tuple[StepPairs, ...] = ()
    complexity: tuple[ScalingFit, ...] = ()
    # All types are narrower than float64, so one scope serves them.
    with jax_scope("float32", devices.flax), pinned_precision():
        bandwidth = Bandwidth(devices.torch)
        for dtype in options.dtypes:
            twins = twin_models(dataclasses.replace(config, dtype=dtype), devices)
            with Peers(twins.flax) as peers:
                for rows, context in itertools.product(options.batch_sizes, options.contexts):
                    task = twins.task(rows, context - options.num_steps, options.num_steps)
                    cells.append(_time_cell(twins, peers, task, options, bandwidth, progress))
                    on_cell(cells[-1])
                    peers.clear()
            if dtype == options.dtypes[0]:
                if options.large_cache:
                    capacity = _pair_capacities(twins, options, progress)
                alike = [cell for cell in cells if cell.batch_size == options.batch_sizes[0]]
                complexity = _scaling_fits(alike)
    load = {"load_before": before, "load_after": load_average()}
    return DecodeBench(
        environment=environment(devices, LIBRARIES) | load,
        preset=options.preset,
        config=config,
        seed=SEED,
        cells=tuple(cells),
        capacity=capacity,
        ratios=ratios(cells, capacity),
        complexity=complexity,
    )


def _time_cell(
    twins: TwinModels,
    peers: Peers,
    task: DecodeTask,
    options: DecodeOptions,
    bandwidth: Bandwidth,
    progress: Progress,
) -> DecodeCell:
    """Check agreement first, then time the rounds."""
    agreeing, timing = _cell_phases(task.config.dtype, task.batch_size, task.context)
    progress(agreeing, 0.0)
    decoders = Decoders(twins, peers, task)
    # The twins are set up in any case: nothing is timed where they were not compared.
    entries = {name: decoders.set_up(name) for name in TWIN_STEPS}
    tokens_BG = entries["flax step"].tokens_BG
    reference, agreement = agree(decoders.flax_step, decoders.torch_step, tokens_BG)
    entries["torch step"].compare(reference, entries["torch step"].tokens_BG)
    absent: dict[str, Decoding] = {}
    others = [name for name in options.names if name not in TWIN_STEPS]
    for number, name in enumerate(others):
        progress(agreeing, (number + 2) / (len(others) + 2))
        try:
            entries[name] = decoders.set_up(name)
            entries[name].compare(reference, entries[name].tokens_BG)
        except Unavailable as error:
            absent[name] = Decoding(name=name, unavailable=str(error))
    progress(agreeing, 1.0)
    cache, torch_cache = decoders.flax_step.after_prompt[1], decoders.torch_step.after_prompt[1]
    layers = {"flax": _account("flax", task, cache), "torch": _account("torch", task, torch_cache)}
    program = step_program(decoders.flax_decoder, cache)
    copies = remade_caches(str(program.as_text()), cache.layers[0].keys_BKSH.shape)
    timed = [entries[name] for name in options.names if name in entries]
    rates = _time_rounds(
        timed, reference, options.rounds, bandwidth, lambda done: progress(timing, done)
    )
    handle = None
    if {"torch step", "torch in place"} <= set(options.names):
        both = {"torch step": decoders.torch_step, "torch in place": decoders.torch_in_place}
        num_steps = min(entries[name].num_steps for name in both)
        handle = pair_steps(HANDLE, task.context, both, options.rounds, num_steps)
    return DecodeCell(
        timings=tuple(absent.get(name) or entries[name].result() for name in options.names),
        rates=rates,
        dtype=task.config.dtype,
        batch_size=task.batch_size,
        context=task.context,
        prompt_length=task.prompt_length,
        bytes_moved=_bytes_moved(task),
        agreement=agreement,
        cache_layers=layers,
        handle=handle,
        cache_copies=len(copies),
        kernels={
            "flax": _kernels(decoders.flax_decoder.kernels),
            "torch": _kernels(decoders.torch_decoder.kernels),
        },
    )


def _kernels(
    choices: Sequence[flax_gpt.Choice] | Sequence[torch_gpt.Choice],
) -> dict[str, KernelChoice]:
    return {str(choice.product): KernelChoice(choice.kernel, choice.ratios) for choice in choices}


def _time_rounds(
    timed: Sequence[Entry],
    reference: Reference,
    rounds: int,
    bandwidth: Bandwidth,
    progress: Callable[[float], None],
) -> dict[str, tuple[float, ...]]:
    """Let every decoder take its turn in each round.

    Returns:
        Bytes per second of the programs that read memory, by round.
    """
    rates = []
    for number in range(rounds):
        # The first becomes the last next time, so that nobody always follows the same one.
        first = number % len(timed)
        for place, entry in enumerate((*timed[first:], *timed[:first])):
            progress((number + place / len(timed)) / rounds)
            if number < MIN_ROUNDS or entry.spent_s <= ALL_ROUNDS_S:
                entry.time_round(reference)
        rates.append(bandwidth.rates())
    progress(1.0)
    return {name: tuple(of_round[name] for of_round in rates) for name in rates[0]}


def _account(
    framework: str, task: DecodeTask, cache: flax_gpt.KVCache | torch_gpt.KVCache
) -> dict[str, int]:
    """Return the bytes of a cache after the prompt, checked by the formula.

    Raises:
        ValueError: if the cache counts otherwise.
    """
    moved, layers = _bytes_moved(task), task.config.num_layers
    formula = moved.cache(cache.capacity), moved.cache(task.prompt_length)
    given = cache.num_bytes.allocated, cache.num_bytes.valid
    if formula != given:
        raise ValueError(
            f"bench: a cache of {framework} in {task}: {given[0]} bytes allocated and "
            f"{given[1]} valid, by its own account; 2 B K S H x itemsize in {layers} layers is "
            f"{formula[0]:.0f} and {formula[1]:.0f}. One of them is wrong. Look into num_bytes."
        )
    slots_to_read = flax_slots_to_read if framework == "flax" else torch_slots_to_read
    sizes, _ = slots_to_read(cache.capacity, task.prompt_length)
    read = int(moved.layer_cache(sizes[-1]))
    found = {"allocated": given[0] // layers, "valid": given[1] // layers, "read": read}
    return {"capacity": cache.capacity} | found


def _pair_capacities(
    twins: TwinModels, options: DecodeOptions, progress: Progress
) -> tuple[StepPairs, ...]:
    """Time steps with few valid slots in a large and in a small cache, in turns, one row."""
    task = twins.task(1, VALID, options.num_steps)
    small, large = CAPACITIES
    flax_decoder = flax_gpt.Decoder(twins.flax.model, 1)
    torch_decoder = torch_gpt.Decoder(twins.torch.model, 1)
    makers: dict[str, Callable[[int], FlaxStep | TorchStep]] = {
        "flax step": lambda slots: flax_step(flax_decoder, task, slots),
        "torch step": lambda slots: torch_step(torch_decoder, task, slots),
    }
    found = []
    wanted = [name for name in TWIN_STEPS if name in options.names]
    progress("large cache", 0.0)
    for place, name in enumerate(wanted, 1):
        both = {f"{slots} slots": makers[name](slots) for slots in (large, small)}
        for step in both.values():
            step.prefill()
            step.timed_steps(options.num_steps)
        title = f"{large} slots over {small}, {name.split()[0]}"
        found.append(pair_steps(title, VALID, both, options.rounds, options.num_steps))
        progress("large cache", place / len(wanted))
    return tuple(found)


def _scaling_fits(cells: Sequence[DecodeCell]) -> tuple[ScalingFit, ...]:
    """Fit the time of a token to the context, in either form of either twin."""
    found = []
    for name in ("flax step", "torch step", "flax uncached", "torch uncached"):
        timings = [(cell, cell.get(name)) for cell in cells]
        points = tuple(
            (cell.mean_length(timing), seconds)
            for cell, timing in timings
            if timing is not None
            for seconds in timing.rounds_s
        )
        form = "uncached" if name.endswith("uncached") else "cached"
        found += [ScalingFit(name, form, points, fit_exponent(points))] if points else []
    return tuple(found)


def _bytes_moved(task: DecodeTask) -> BytesMoved:
    return BytesMoved(task.config, task.batch_size, jnp.dtype(task.config.dtype).itemsize)


def _cell_phases(dtype: str, rows: int, context: int) -> tuple[str, str]:
    """Return the phases of one cell."""
    cell = f"{dtype}, {rows} x {context}"
    return f"{cell}, agreeing", f"{cell}, timing"
