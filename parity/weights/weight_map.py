"""Rules resolved for two models: which leaf is which, with nothing left over."""

import dataclasses
from collections import Counter
from collections.abc import Collection, Iterator, Mapping

import numpy as np

from parity.frameworks.leaves import Arrays, Leaves
from parity.system.import_target import closest
from parity.weights.layouts import Link, Shapes
from parity.weights.rules import Rules


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
class WeightMap:
    """Rules resolved for two models, so that every leaf is used exactly once.

    Attributes:
        links: which leaves are which.
        ties: pairs of torch names (alias, original) of one tensor.
        ignored: torch leaves that are left out.
        torch_shapes: of every torch leaf.
        flax_shapes: of every flax leaf.
        flax_ties: pairs of flax names (alias, original) of one torch tensor.
        flax_ignored: flax leaves that are left out.
        torch_integers: types of the integer leaves, which are of another width in flax.
        flax_integers: the same of flax.
        sums: pairs of torch names (term, original) of which flax has the sum.
    """

    links: tuple[Link, ...]
    ties: tuple[tuple[str, str], ...]
    ignored: tuple[str, ...]
    torch_shapes: Shapes
    flax_shapes: Shapes
    flax_ties: tuple[tuple[str, str], ...] = ()
    flax_ignored: tuple[str, ...] = ()
    torch_integers: Mapping[str, np.dtype] = dataclasses.field(default_factory=dict)
    flax_integers: Mapping[str, np.dtype] = dataclasses.field(default_factory=dict)
    sums: tuple[tuple[str, str], ...] = ()

    def to_torch(self, leaves: Arrays) -> Leaves:
        """Return torch leaves for flax leaves: weights, or what is shaped like them, as gradients.

        A leaf that is missing, as the gradient of a running mean is, is left out.
        """
        moved: Leaves = {}
        for link in self.links:
            if all(name in leaves for name in link.flax):
                moved |= _typed(link.to_torch(leaves, self.torch_shapes), self.torch_integers)
        for term, original in self.sums:
            if original in moved:  # halves add up to the last bit
                moved[term] = moved[original] = moved[original] / moved[original].dtype.type(2)
        return moved | {a: moved[original] for a, original in self.ties if original in moved}

    def to_flax(self, leaves: Arrays) -> Leaves:
        """Return flax leaves for torch leaves, as `to_torch`."""
        return dict(self.flax_leaves(leaves))

    def flax_leaves(self, leaves: Arrays) -> Iterator[tuple[str, np.ndarray]]:
        """Yield what `to_flax` returns, so that the leaves need not all exist at once."""
        found = ((x, y) for x, y in self.sums if x in leaves and y in leaves)
        leaves = {**leaves, **{y: leaves[x] + leaves[y] for x, y in found}} if self.sums else leaves
        aliases: dict[str, list[str]] = {}
        for alias, original in self.flax_ties:
            aliases.setdefault(original, []).append(alias)
        for link in self.links:
            if all(name in leaves for name in link.torch):
                made = _typed(link.to_flax(leaves, self.flax_shapes), self.flax_integers)
                yield from made.items()
                yield from ((x, made[name]) for name in made for x in aliases.get(name, ()))

    def gradients_to_flax(self, gradients: Arrays) -> Leaves:
        """Return flax gradients for torch gradients: that of a sum is that of either term."""
        found = [(x, y) for x, y in self.sums if x in gradients and y in gradients]
        halves = {name: gradients[name] / 2 for pair in found for name in pair}
        return self.to_flax({**gradients, **halves})

    def mapped(self, leaves: Arrays) -> Leaves:
        """Return the flax leaves that torch has too."""
        return {name: leaf for name, leaf in leaves.items() if name not in self.flax_ignored}

    def own(self, leaves: Arrays) -> Iterator[tuple[str, np.ndarray]]:
        """Yield what `mapped` returns."""
        yield from self.mapped(leaves).items()

    def sum_of_ties(self, gradients: Leaves) -> Leaves:
        """Return flax gradients with the sum for all leaves of one torch tensor: its gradient."""
        summed = self.mapped(gradients)
        for alias, original in self.flax_ties:
            if alias in summed and original in summed:
                summed[original] = summed[original] + gradients[alias]
        return summed | {x: summed[y] for x, y in self.flax_ties if x in summed and y in summed}

    @property
    def trained_apart(self) -> str:
        """Why the two models cannot be trained alike; empty where they can."""
        found = (("flax", self.flax_ties, "torch"), ("torch", self.sums, "flax"))
        listed = (
            (side, ", ".join(f"{one} and {other}" for one, other in pairs), rest)
            for side, pairs, rest in found
        )
        return "; ".join(
            f"{side} trains {names} apart, which are one tensor in {rest}"
            for side, names, rest in listed
            if names
        )


def _typed(leaves: Leaves, types: Mapping[str, np.dtype]) -> Leaves:
    """Return leaves with integers of the given types.

    Raises:
        ValueError: for a number that its type cannot hold.
    """
    for name in leaves.keys() & types.keys():
        typed = leaves[name].astype(types[name])
        if not np.array_equal(typed, leaves[name]):
            raise ValueError(
                f"transplant: {name} is {types[name]} and is to hold {leaves[name].max()}. "
                "Integers are numbers in both models. Widen it."
            )
        leaves[name] = typed
    return leaves


def links_of(rules: Rules, torch_names: Collection[str]) -> Iterator[Link]:
    """Yield the links of torch leaves by their names alone, without a proof that they fit."""
    for rule in rules.rules:
        yield from rule.links(torch_names)


def resolve(rules: Rules, torch_leaves: Arrays, flax_leaves: Arrays) -> WeightMap:
    """Apply rules to the leaves of two models.

    Returns:
        The links in the order of the torch model, which is the one that people read.

    Raises:
        TransplantError: unless every leaf on both sides is used exactly once and fits.
    """
    aliases = {alias: original for alias, original in rules.ties if alias in torch_leaves}
    terms = dict(rules.sums)
    ignored = tuple(name for name in torch_leaves if rules.is_ignored(name))
    mapped = [x for x in torch_leaves if x not in aliases and x not in terms and x not in ignored]
    flax_aliases = {alias: original for alias, original in rules.flax_ties if alias in flax_leaves}
    flax_ignored = tuple(name for name in flax_leaves if rules.is_flax_ignored(name))
    flax_mapped = [x for x in flax_leaves if x not in flax_aliases and x not in flax_ignored]
    by_rule = [(rule, list(rule.links(mapped, "torch", flax_mapped))) for rule in rules.rules]
    found = [link for _, links in by_rule for link in links]
    uses = Counter(name for link in found for name in link.torch)
    unmapped = [name for name in mapped if not uses[name]]
    problems = [f"no rule for torch leaf {name}" for name in unmapped]
    problems += [f"{uses[name]} rules for torch leaf {name}" for name in mapped if uses[name] > 1]
    links: list[Link] = []
    for link in found:
        ours, theirs = ", ".join(link.torch), ", ".join(link.flax)
        wants = [(f"flax leaf {theirs} wants torch", x) for x in link.torch if x not in mapped]
        wants += [(f"torch leaf {ours} wants flax", x) for x in link.flax if x not in flax_mapped]
        problems += [f"{wish} leaf {name}, which does not exist" for wish, name in wants]
        if not wants and all(uses[name] == 1 for name in link.torch):
            links.append(link)
    taken = Counter(name for link in links for name in link.flax)
    problems += [
        f"flax leaf {name} is used by {n} torch leaves" for name, n in taken.items() if n > 1
    ]
    problems += [f"no torch leaf for flax leaf {name}" for name in flax_mapped if not taken[name]]
    unused = [rule for rule, of_rule in by_rule if not rule.optional and not of_rule]
    problems += [f"rule {x} matches nothing{closest(x.torch, unmapped)}" for x in unused]
    for alias, original in aliases.items():
        if original not in torch_leaves:
            problems.append(f"torch leaf {alias} is tied to {original}, which does not exist")
        elif not np.array_equal(torch_leaves[alias], torch_leaves[original], equal_nan=True):
            problems.append(f"torch leaf {alias} is not equal to {original}, its declared tie")
    for term, original in terms.items():
        missing = [x for x in (term, original) if x not in torch_leaves or x in aliases]
        if missing:
            names = f"torch leaf {term} is added to {original}"
            problems.append(f"{names}: {missing[0]} does not exist{closest(missing[0], mapped)}")
        elif torch_leaves[term].shape != torch_leaves[original].shape:
            shapes = " and ".join(str(list(torch_leaves[x].shape)) for x in (term, original))
            problems.append(f"torch leaf {term} has not the shape of {original}: {shapes}")
    for alias, original in flax_aliases.items():
        if original not in flax_mapped:
            problems.append(f"flax leaf {alias} is tied to {original}, which does not exist")
        elif flax_leaves[alias].shape != flax_leaves[original].shape:
            shapes = " and ".join(str(list(flax_leaves[x].shape)) for x in (alias, original))
            problems.append(f"flax leaf {alias} has not the shape of {original}, its tie: {shapes}")
    for link in links:
        problems += link.misfits(torch_leaves, flax_leaves)
    if problems:
        raise TransplantError(problems)
    place = {name: number for number, name in enumerate(torch_leaves)}
    return WeightMap(
        tuple(sorted(links, key=lambda link: place[link.torch[0]])),
        tuple(aliases.items()),
        ignored,
        {name: leaf.shape for name, leaf in torch_leaves.items()},
        {name: leaf.shape for name, leaf in flax_leaves.items()},
        tuple(flax_aliases.items()),
        flax_ignored,
        _integers(torch_leaves),
        _integers(flax_leaves),
        tuple(terms.items()),
    )


def _integers(leaves: Arrays) -> dict[str, np.dtype]:
    return {name: leaf.dtype for name, leaf in leaves.items() if leaf.dtype.kind in "iub"}
