"""Alternatives to a module's weights: transposed, left out, swapped, reordered."""

import itertools
from collections.abc import Iterator, Mapping

import torch

Weights = dict[str, torch.Tensor]


def readings(
    module: torch.nn.Module, others: Mapping[str, torch.nn.Module]
) -> Iterator[tuple[str, Weights]]:
    """Yield other weights for a module, each with a description and by the names that change."""
    own = _floats(module)
    for path, other in others.items():
        theirs = _floats(other)
        if own and {n: x.shape for n, x in own.items()} == {n: x.shape for n, x in theirs.items()}:
            yield f"the weights of {path}", theirs
    for name, weight in own.items():
        if weight.ndim == 2 and weight.shape[0] == weight.shape[1]:
            yield f"{name} transposed", {name: weight.T.contiguous()}
    for name, weight in own.items():
        if name.rpartition(".")[2].startswith(("bias", "in_proj_bias")):
            yield f"{name} left out", {name: torch.zeros_like(weight)}
    yield from _exchanged(own)
    yield from _paired_otherwise(own)
    tables = {
        f"{path}.weight".lstrip(".")
        for path, part in module.named_modules()
        if isinstance(part, torch.nn.Embedding | torch.nn.EmbeddingBag)
    }
    # The rows of a table are no fused parts.
    yield from _reordered({name: x for name, x in own.items() if name not in tables})
    yield from _with_one_added(own)
    yield from _rolled(own)
    for name, weight in own.items():
        if weight.ndim == 1 and name.endswith("weight"):
            yield f"{name} as 1 + w", {name: 1 + weight}
            yield f"{name} left out", {name: torch.ones_like(weight)}
        if weight.ndim > 2:
            flipped = weight.flip(tuple(range(2, weight.ndim)))
            yield f"the window of {name} back to front", {name: flipped}
            if weight.shape[-1] == weight.shape[-2]:
                yield f"the window of {name} turned", {name: weight.swapaxes(-1, -2).contiguous()}
            if weight.shape[0] == weight.shape[1]:
                swapped = weight.swapaxes(0, 1).contiguous()
                yield f"inputs and outputs of {name} swapped", {name: swapped}


def _floats(module: torch.nn.Module) -> Weights:
    """Return float parameters and buffers."""
    found = itertools.chain(module.named_parameters(), module.named_buffers())
    return {name: x.detach() for name, x in found if x.is_floating_point()}


def _exchanged(own: Weights) -> Iterator[tuple[str, Weights]]:
    """Swap modules or leaves of the same shapes, or put one in both places."""
    owners: dict[str, Weights] = {}
    for name, weight in own.items():
        path, _, leaf = name.rpartition(".")
        if path:
            owners.setdefault(path, {})[leaf] = weight
    for a, b in itertools.combinations(owners, 2):
        shapes = [{leaf: x.shape for leaf, x in owners[path].items()} for path in (a, b)]
        if shapes[0] != shapes[1]:
            continue
        of_a = {f"{a}.{leaf}": x for leaf, x in owners[b].items()}
        of_b = {f"{b}.{leaf}": x for leaf, x in owners[a].items()}
        yield f"{a} and {b} swapped", of_a | of_b
        yield f"{b} in place of {a} too", of_a
        yield f"{a} in place of {b} too", of_b
    for a, b in itertools.combinations(own, 2):
        if own[a].shape == own[b].shape:
            yield f"{a} and {b} swapped", {a: own[b], b: own[a]}


def _paired_otherwise(own: Weights) -> Iterator[tuple[str, Weights]]:
    """Reorder queries and keys for a rotation that pairs neighbours, not halves, or back."""
    owners = {name: name.rpartition(".")[0] for name in own}
    for a, b in itertools.combinations(sorted({*owners.values()} - {""}), 2):
        group = {name: x for name, x in own.items() if owners[name] in (a, b) and x.ndim in (1, 2)}
        rows = {x.shape[0] for x in group.values()}
        for width in range(4, min(rows, default=0) + 1, 2):
            if any(size % width for size in rows):
                continue
            halves = torch.arange(width).reshape(2, -1).T.reshape(-1)
            for words, order in (("neighbours", torch.argsort(halves)), ("halves", halves)):
                parts = {name: x.unflatten(0, (-1, width))[:, order] for name, x in group.items()}
                changed = {name: x.flatten(0, 1) for name, x in parts.items()}
                yield f"{words} paired in the rotation of {a} and {b}, {width} wide", changed


def _reordered(own: Weights) -> Iterator[tuple[str, Weights]]:
    """Reorder parts that are fused along an axis, such as q, k, v or the gates of a cell."""
    for axis, count in itertools.product((0, -1), (3, 4)):
        widths = {name: x.shape[axis] for name, x in own.items() if x.ndim}
        fused = {x: own[x] for x, n in widths.items() if n % count == 0 and n >= 2 * count}
        groups = [[x for x in fused if widths[x] == n] for n in {widths[x] for x in fused}]
        # All that have such parts together, those of a word such as "ih", and each alone.
        groups += [
            [name for name in group if word in _words(name)]
            for group in groups
            for word in sorted({word for name in group for word in _words(name)})
        ]
        for names in dict.fromkeys(map(tuple, [*groups, *([name] for name in fused)])):
            words = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
            for order in itertools.permutations(range(count)):
                if order != tuple(range(count)):
                    numbers = ", ".join(str(place + 1) for place in order)
                    parts = {name: fused[name].chunk(count, axis) for name in names}
                    changed = {n: torch.cat([parts[n][p] for p in order], axis) for n in names}
                    yield f"{count} fused parts of {words} in the order {numbers}", changed
            # Parts that alternate head by head, or no longer do.
            width = widths[names[0]] // count
            for heads in (n for n in range(2, width + 1) if width % n == 0):
                for shape in ((count, heads, -1), (heads, count, -1)):
                    changed = {name: _swapped(fused[name], axis, shape) for name in names}
                    yield f"{count} fused parts of {words} alternating over {heads} heads", changed


def _words(name: str) -> set[str]:
    return set(name.replace("_", ".").split("."))


def _with_one_added(own: Weights) -> Iterator[tuple[str, Weights]]:
    """Add one to a gate's bias, as some cells do to forget less."""
    for name, x in own.items():
        if x.ndim == 1 and "bias" in name and len(x) % 4 == 0:
            for place in range(4):
                one = torch.zeros_like(x).reshape(4, -1)
                one[place] = 1
                yield f"1 added to part {place + 1} of 4 of {name}", {name: x + one.flatten()}


def _rolled(own: Weights) -> Iterator[tuple[str, Weights]]:
    """Shift the rows of a table of positions, or of another array, by one."""
    for name, x in own.items():
        for axis in range(x.ndim - 1) if x.ndim >= 2 else ():
            for by in (-1, 1) if x.shape[axis] > 2 else ():
                yield f"{name} shifted by {by:+d} along axis {axis}", {name: x.roll(by, axis)}


def _swapped(x: torch.Tensor, axis: int, shape: tuple[int, int, int]) -> torch.Tensor:
    """Split an axis into three and swap the first two."""
    start = axis % x.ndim
    return x.unflatten(start, shape).swapaxes(start, start + 1).flatten(start, start + 2)
