"""The numbers that the project has targets for, from what was timed."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from parity.bench.decode_times import REFERENCE, DecodeCell
from parity.bench.step_pairs import StepPairs

HANDLE = "torch handle over in place"
# For gpt2 in float32 on two CPU cores: at least this, or at most.
AT_LEAST = {
    "flax over transformers": 1.9,
    "torch over transformers": 1.9,
    "flax share of bandwidth": 0.65,
    "torch share of bandwidth": 0.65,
    "flax over naive": 4.0,
    "flax over ctranslate2": 1.2,
    "batch 8 over batch 1": 3.5,
    "batch 16 over batch 1": 4.5,
}
AT_MOST = {
    "torch step over flax step": 1.15,
    "8192 slots over 256, flax": 1.1,
    "8192 slots over 256, torch": 1.1,
    HANDLE: 1.05,
    "cache-shaped copies": 0,
    "programs after warm-up": 0,
    "flax step compile s": 5.0,
}
# Where a target holds; elsewhere the number is given without one.
SHARE_CONTEXTS = 512, 2048
NAIVE_CONTEXT = 2048
IN_PLACE_CONTEXTS = range(4097)


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A number that the project has a target for.

    Attributes:
        name: a key of AT_LEAST or AT_MOST, or what else it is.
        cell: where it was found.
        context: tokens of a row there; None where that says nothing.
        found: the number.
        target: None where none was set.
        at_most: whether the target is from above.
    """

    name: str
    cell: str
    context: int | None
    found: float
    target: float | None
    at_most: bool

    @property
    def met(self) -> bool | None:
        """None without a target."""
        if self.target is None:
            return None
        return self.found <= self.target if self.at_most else self.found >= self.target

    def to_dict(self) -> dict[str, Any]:
        """The ratio as JSON has it."""
        return dataclasses.asdict(self) | {"met": self.met}


def ratios_of_cell(cell: DecodeCell) -> Iterator[Ratio]:
    """Those that one cell holds; targets hold in float32 and, but for one, for a single row."""
    wide = cell.dtype == "float32"
    single = wide and cell.batch_size == 1

    def of(name: str, found: float | None, holds: bool) -> Iterator[Ratio]:
        if found is not None:
            where = f"{cell.dtype}, batch {cell.batch_size}"
            yield _ratio(name, where, cell.context, found, holds)

    for twin in ("flax", "torch"):
        yield from of(f"{twin} over transformers", cell.speed(f"{twin} step", REFERENCE), single)
    yield from of("torch step over flax step", cell.speed("flax step", "torch step"), wide)
    for twin in ("flax", "torch"):
        there = single and cell.context in SHARE_CONTEXTS
        yield from of(f"{twin} share of bandwidth", cell.share(f"{twin} step"), there)
    there = single and cell.context == NAIVE_CONTEXT
    yield from of("flax over naive", cell.speed("flax step", "flax naive"), there)
    there = single and cell.context in IN_PLACE_CONTEXTS
    yield from of(HANDLE, cell.handle and cell.handle.ratio, there)
    yield from of("flax over ctranslate2", cell.speed("flax step", "ctranslate2"), single)
    yield from of("cache-shaped copies", cell.cache_copies, True)
    step = cell.get("flax step")
    if step is not None:
        compiled = sum(x.recompiled for x in cell.contenders if x.framework == "flax")
        yield from of("programs after warm-up", compiled, True)
        yield from of("flax step compile s", step.compile_s, wide)


def ratios_of_batches(cells: Sequence[DecodeCell]) -> Iterator[Ratio]:
    """Tokens per second of several rows over those of one; medians, for their rounds differ."""
    for cell in cells:
        alone = (
            x for x in cells if (x.dtype, x.context, x.batch_size) == (cell.dtype, cell.context, 1)
        )
        single = next(alone, None)
        if cell.batch_size == 1 or single is None:
            continue
        for name in ("flax step", "torch step"):
            many, one = cell.get(name), single.get(name)
            if many is not None and one is not None:
                found = cell.batch_size * one.step_s / many.step_s
                key = f"batch {cell.batch_size} over batch 1"
                wide = cell.dtype == "float32"
                yield _ratio(key, f"{name.split()[0]}, {cell.dtype}", cell.context, found, wide)


def ratio_of_pairs(pairs: StepPairs) -> Ratio:
    """What a large cache costs."""
    return _ratio(pairs.name, "float32, batch 1", pairs.context, pairs.ratio)


def order(ratio: Ratio) -> int:
    """Its place in a table: as the targets are written, and what has none behind them."""
    names = [*AT_LEAST, *AT_MOST]
    return names.index(ratio.name) if ratio.name in names else len(names)


def _ratio(name: str, cell: str, context: int | None, found: float, holds: bool = True) -> Ratio:
    target = AT_LEAST.get(name, AT_MOST.get(name)) if holds else None
    return Ratio(name, cell, context, float(found), target, name in AT_MOST)
