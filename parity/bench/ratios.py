"""The numbers that sum up a decode bench: speeds over peers, shares of bandwidth, counts."""

from collections.abc import Iterator, Sequence

from parity.bench.pairs import StepPairs
from parity.bench.result import DecodeCell, Ratio

HANDLE = "torch handle over in place"


def ratios(cells: Sequence[DecodeCell], capacity: Sequence[StepPairs]) -> tuple[Ratio, ...]:
    """Return every ratio for which the decoders ran, those of one name together."""
    found = [ratio for cell in cells for ratio in _of_cell(cell)]
    found += _of_batches(cells)
    found += (Ratio(x.name, "float32, batch 1", x.context, x.ratio) for x in capacity)
    order = {name: place for place, name in enumerate(dict.fromkeys(x.name for x in found))}
    return tuple(sorted(found, key=lambda ratio: order[ratio.name]))


def _of_cell(cell: DecodeCell) -> Iterator[Ratio]:
    found: dict[str, float | None] = {
        "flax over transformers": cell.speed("flax step", "transformers"),
        "torch over transformers": cell.speed("torch step", "transformers"),
        "flax over best peer": cell.speed_over_best_peer("flax step"),
        "torch over best peer": cell.speed_over_best_peer("torch step"),
        "torch step over flax step": cell.speed("flax step", "torch step"),
    }
    for name in ("flax", "torch"):
        if (step := cell.get(f"{name} step")) is not None:
            found[f"{name} share of bandwidth"] = cell.numbers(step)["share_of_bandwidth"]
    found |= {
        "flax over naive": cell.speed("flax step", "flax naive"),
        HANDLE: None if cell.handle is None else cell.handle.ratio,
        "flax over ctranslate2": cell.speed("flax step", "ctranslate2"),
        "cache-shaped copies": cell.cache_copies,
    }
    if (step := cell.get("flax step")) is not None:
        compiled = sum(
            x.programs_compiled_after_warm_up for x in cell.timings if x.framework == "flax"
        )
        found |= {"programs after warm-up": compiled, "flax step compile s": step.compile_s}
    where = f"{cell.dtype}, batch {cell.batch_size}"
    for name, value in found.items():
        if value is not None:
            yield Ratio(name, where, cell.context, float(value))


def _of_batches(cells: Sequence[DecodeCell]) -> Iterator[Ratio]:
    """Compare tokens per second of several rows with those of one, by medians over rounds."""
    single = {(cell.dtype, cell.context): cell for cell in cells if cell.batch_size == 1}
    for cell in cells:
        alone = single.get((cell.dtype, cell.context), cell)
        for name in ("flax step", "torch step"):
            many, one = cell.get(name), alone.get(name)
            if alone is not cell and many is not None and one is not None:
                found = cell.batch_size * one.step_s / many.step_s
                where = f"{name.split()[0]}, {cell.dtype}"
                yield Ratio(f"batch {cell.batch_size} over batch 1", where, cell.context, found)
