"""Moves weights between the frameworks by rules: strict, in both directions, bit for bit."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from flax import nnx

from parity.leaves import Leaves, flax_leaves, load_flax, load_torch, torch_leaves
from parity.rules import Layout, Rules


class TransplantError(ValueError):
    """The rules do not map one set of leaves onto the other; every problem is listed.

    Attributes:
        problems: one sentence each.
    """

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__(
            f"transplant: {'; '.join(problems)}. Every leaf must be used exactly once. Mend the "
            "rules or the model."
        )


@dataclasses.dataclass(frozen=True)
class Link:
    """One torch leaf and the flax leaves it is made of.

    Attributes:
        torch: its name.
        flax: theirs, in the order in which they are fused.
        layout: how one lies in the other.
        heads: see `Rule`.
    """

    torch: str
    flax: tuple[str, ...]
    layout: Layout
    heads: int = 1

    def to_torch(self, parts: list[np.ndarray]) -> np.ndarray:
        """The torch leaf, from its flax parts."""
        joined = parts[0]
        if len(parts) > 1:
            by_head = [part.reshape(*part.shape[:-1], self.heads, -1) for part in parts]
            joined = np.concatenate(by_head, axis=-1).reshape(*joined.shape[:-1], -1)
        return np.ascontiguousarray(joined.T if self.layout is Layout.TRANSPOSED else joined)

    def to_flax(self, leaf: np.ndarray, widths: list[int]) -> list[np.ndarray]:
        """The flax parts of a torch leaf, each `widths` wide along the last axis."""
        joined = leaf.T if self.layout is Layout.TRANSPOSED else leaf
        if len(widths) == 1:
            return [np.ascontiguousarray(joined)]
        by_head = joined.reshape(*joined.shape[:-1], self.heads, -1)
        ends = np.cumsum(widths)[:-1] // self.heads
        parts = np.split(by_head, ends, axis=-1)
        return [np.ascontiguousarray(x.reshape(*joined.shape[:-1], -1)) for x in parts]


@dataclasses.dataclass(frozen=True)
class WeightMap:
    """Rules resolved for one pair of models: the proof that every leaf is used exactly once.

    Attributes:
        links: one per torch leaf.
        ties: pairs of torch names (alias, original) of one tensor.
        ignored: torch leaves that are left out.
        widths: of the last axis of every flax leaf.
    """

    links: tuple[Link, ...]
    ties: tuple[tuple[str, str], ...]
    ignored: tuple[str, ...]
    widths: Mapping[str, int]

    def to_torch(self, leaves: Mapping[str, np.ndarray]) -> Leaves:
        """Torch leaves from flax leaves: weights, or anything shaped like them, as gradients."""
        moved = {link.torch: link.to_torch([leaves[x] for x in link.flax]) for link in self.links}
        return moved | {alias: moved[original] for alias, original in self.ties}

    def to_flax(self, leaves: Mapping[str, np.ndarray]) -> Leaves:
        """Flax leaves from torch leaves."""
        return {
            name: part
            for link in self.links
            for name, part in zip(
                link.flax,
                link.to_flax(leaves[link.torch], [self.widths[x] for x in link.flax]),
                strict=True,
            )
        }


def links_of(rules: Rules, torch_names: Iterable[str]) -> Iterator[Link]:
    """The links of torch leaves by their names alone; `resolve` is what proves that they fit."""
    for name in torch_names:
        for rule in rules.rules:
            if names := rule.flax_names(name):
                yield Link(name, names, rule.layout, rule.heads)


def resolve(
    rules: Rules, torch_leaves: Mapping[str, np.ndarray], flax_leaves: Mapping[str, np.ndarray]
) -> WeightMap:
    """Applies the rules to the leaves of two models.

    Raises:
        TransplantError: unless every leaf on both sides is used exactly once and fits.
    """
    problems: list[str] = []
    links: list[Link] = []
    aliases = {alias: original for alias, original in rules.ties if alias in torch_leaves}
    ignored = tuple(name for name in torch_leaves if rules.is_ignored(name))
    used_rules = Counter()
    for name in torch_leaves:
        if name in aliases or name in ignored:
            continue
        matches = [(rule, names) for rule in rules.rules if (names := rule.flax_names(name))]
        used_rules.update(rule for rule, _ in matches)
        if len(matches) != 1:
            count = "no rule" if not matches else f"{len(matches)} rules"
            problems.append(f"{count} for torch leaf {name}")
            continue
        (rule, names), *_ = matches
        absent = [x for x in names if x not in flax_leaves]
        problems += [f"torch leaf {name} wants flax leaf {x}, which does not exist" for x in absent]
        if not absent:
            links.append(Link(name, names, rule.layout, rule.heads))
    uses = Counter(name for link in links for name in link.flax)
    problems += [
        f"flax leaf {name} is used by {n} torch leaves" for name, n in uses.items() if n > 1
    ]
    problems += [f"no torch leaf for flax leaf {name}" for name in flax_leaves if name not in uses]
    problems += [
        f"rule {rule} matches nothing"
        for rule in rules.rules
        if not rule.optional and not used_rules[rule]
    ]
    for alias, original in aliases.items():
        if original not in torch_leaves:
            problems.append(f"torch leaf {alias} is tied to {original}, which does not exist")
        elif not np.array_equal(torch_leaves[alias], torch_leaves[original], equal_nan=True):
            problems.append(f"torch leaf {alias} is not equal to {original}, its declared tie")
    for link in links:
        problems += _misfits(link, torch_leaves[link.torch], [flax_leaves[x] for x in link.flax])
    if problems:
        raise TransplantError(problems)
    widths = {name: array.shape[-1] if array.ndim else 1 for name, array in flax_leaves.items()}
    return WeightMap(tuple(links), tuple(aliases.items()), ignored, widths)


def transplant(
    source: torch.nn.Module | nnx.Module, target: torch.nn.Module | nnx.Module, rules: Rules
) -> WeightMap:
    """Copies all weights of one model into its port in the other framework.

    Returns:
        The map by which they went.

    Raises:
        TransplantError: unless every leaf on both sides is used exactly once and fits; the target
            is then as it was.
    """
    if isinstance(source, nnx.Module):
        weight_map = resolve(rules, torch_leaves(target), flax_leaves(source))
        kept = {name: torch_leaves(target)[name] for name in weight_map.ignored}
        load_torch(target, weight_map.to_torch(flax_leaves(source)) | kept)
    else:
        weight_map = resolve(rules, torch_leaves(source), flax_leaves(target))
        load_flax(target, weight_map.to_flax(torch_leaves(source)))
    return weight_map


def _misfits(link: Link, leaf: np.ndarray, parts: list[np.ndarray]) -> list[str]:
    """What keeps a link from working: dtypes, axes, shapes."""
    names = ", ".join(link.flax)
    if {part.dtype for part in parts} != {leaf.dtype}:
        return [f"torch leaf {link.torch} is {leaf.dtype}, flax {names} is {parts[0].dtype}"]
    if any(part.ndim != leaf.ndim or part.shape[:-1] != parts[0].shape[:-1] for part in parts):
        return [f"torch leaf {link.torch} {list(leaf.shape)} does not line up with flax {names}"]
    shape = [*parts[0].shape[:-1], sum(part.shape[-1] for part in parts)] if leaf.ndim else []
    shape = shape[::-1] if link.layout is Layout.TRANSPOSED else shape
    if shape != list(leaf.shape):
        return [f"torch leaf {link.torch} is {list(leaf.shape)}, flax {names} makes {shape}"]
    return []
