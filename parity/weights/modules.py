"""Find which module of one model is which of the other, by the weights below it."""

import torch
from flax import nnx

from parity.frameworks.leaves import dotted
from parity.weights.weight_map import WeightMap

# Modules that share at least this many of all their weights may be counterparts.
_SHARED = 0.6
# They hold modules and are never called.
_CONTAINERS = torch.nn.ModuleList | torch.nn.ModuleDict


def module_map(
    torch_module: torch.nn.Module, flax_module: nnx.Module, weights: WeightMap
) -> dict[str, str]:
    """Return the torch path of each flax module that has a counterpart; "" for the models.

    Two modules correspond when the same links of the weight map lie below them. Nested modules that
    hold the same weights are paired from the outside in, but those that own leaves with each other:
    a linear layer is none with an activation around it. Of those left, two correspond that share
    most of their weights, as where one of them holds a table that the other is given; each must be
    the best for the other. A module without weights is paired with one of the same name in the same
    place.
    """
    torch_paths = [
        path
        for path, part in torch_module.named_modules()
        if not isinstance(part, _CONTAINERS) and "parametrizations" not in path.split(".")
    ]
    flax_paths = [
        dotted(path)
        for path, part in nnx.iter_modules(flax_module)
        if not isinstance(part, nnx.List | nnx.Dict)
    ]
    ours = _by_content(torch_paths, [link.torch for link in weights.links])
    theirs = _by_content(flax_paths, [link.flax for link in weights.links])
    paths = {*torch_paths, *flax_paths}
    leaves = (leaf for link in weights.links for leaf in (*link.torch, *link.flax))
    owners = {max(paths.intersection(_ancestors(leaf)), key=len) for leaf in leaves}
    found = {"": ""}
    for content in (x for x in ours if x and x in theirs):
        inner, outer = ([path for path in side[content] if path] for side in (theirs, ours))
        while inner and outer and {inner[-1], outer[-1]} <= owners:
            found[inner.pop()] = outer.pop()
        found |= dict(zip(inner, outer, strict=False))
    found |= _nearest(
        {path: x for x, paths in theirs.items() for path in paths if path not in found},
        {path: x for x, paths in ours.items() for path in paths if path not in found.values()},
    )
    empty = set(ours.get(frozenset(), []))
    for path in sorted(theirs.get(frozenset(), []), key=_depth):
        parent, _, name = path.rpartition(".")
        twin = f"{found[parent]}.{name}".lstrip(".") if parent in found else None
        if twin in empty:
            found[path] = twin
    return found


def _nearest(flax: dict[str, frozenset[int]], torch: dict[str, frozenset[int]]) -> dict[str, str]:
    """Pair modules by path that share most of their links, each the best for the other."""

    def best(content: frozenset[int], others: dict[str, frozenset[int]]) -> str | None:
        shares = {x: len(content & y) / len(content | y) for x, y in others.items() if content & y}
        found = max(shares, key=lambda x: shares[x], default=None)
        return found if found is not None and shares[found] >= _SHARED else None

    pairs = {path: best(content, torch) for path, content in flax.items() if len(content) > 1}
    return {a: b for a, b in pairs.items() if b is not None and best(torch[b], flax) == a}


def _by_content(paths: list[str], links: list[tuple[str, ...]]) -> dict[frozenset[int], list[str]]:
    """Group paths by the links all of whose leaves lie below them, from the outside in."""
    below: dict[str, set[int]] = {path: set() for path in paths}
    for number, leaves in enumerate(links):
        owners = [set(_ancestors(leaf)) for leaf in leaves]
        for path in set.intersection(*owners) & below.keys():
            below[path].add(number)
    found: dict[frozenset[int], list[str]] = {}
    for path in sorted(paths, key=_depth):
        found.setdefault(frozenset(below[path]), []).append(path)
    return found


def _ancestors(leaf: str) -> list[str]:
    """Return the paths of the modules that a leaf lies in, the model among them.

    A leaf of torch's parametrizations, as of a weight norm, lies in the module that has them.
    """
    parts = leaf.partition(".parametrizations.")[0].split(".")
    if ".parametrizations." not in leaf:
        parts.pop()
    return [".".join(parts[:end]) for end in range(len(parts) + 1)]


def _depth(path: str) -> tuple[int, str]:
    return (path.count(".") + 1 if path else 0), path
