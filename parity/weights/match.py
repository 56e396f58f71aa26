"""Match the units of two models: by shapes, names, numbers, operations and the order of use."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from parity.frameworks.leaves import Arrays
from parity.weights.names import agreement, information, likeness, numbers, ranks, words
from parity.weights.units import (
    Fit,
    Unit,
    families,
    fits,
    is_usual,
    reordered,
    runs,
    stacks_of,
)

# What speaks for a pair of units, at most: words in common, equal names, numbers, operation, order.
_WORDS, _EQUAL, _NUMBERS, _OPERATION, _ORDER = 2.0, 1.0, 1.0, 0.5, 0.75
# The same for two that are added after units which are a pair, and for two factors, such as the
# gains of norms, between the same products.
_BEFORE, _BETWEEN = 1.5, 1.5
# Least difference between two pairs and the same two exchanged that decides without a run.
_CLEAR = 0.35
# Least likeness of a constant that torch or flax has, for the other may compute it.
_LIKE = 0.25
_DENSE = "linear", "embedding", "convolution", "transposed convolution"


@dataclasses.dataclass(frozen=True)
class Pair:
    """A unit of torch and one of flax, and the ways in which they are the same numbers."""

    torch: Unit
    flax: Unit
    score: float
    fits: tuple[Fit, ...]


@dataclasses.dataclass
class Matching:
    """Pairs of units, and what is left over of both models."""

    pairs: list[Pair]
    torch: list[Unit]
    flax: list[Unit]
    groups: list[list[int]]  # of places in `pairs` that could as well be exchanged

    @property
    def left(self) -> int:
        """How many leaves have no counterpart."""
        return sum(len(unit.names) for unit in (*self.torch, *self.flax) if is_needed(unit))


def is_needed(unit: Unit) -> bool:
    """Whether a unit must have a counterpart: a constant need not, nor what no output needs."""
    return unit.leaf.kind != "buffer" and unit.kind != "integer"


def match(
    ours: list[Unit], theirs: list[Unit], torch_leaves: Arrays, flax_leaves: Arrays
) -> Matching:
    """Match the units of torch and of flax; stack or fuse what else has no counterpart."""
    scores = _Scores(torch_leaves, flax_leaves)
    best = scores.assigned(ours, theirs)
    models = [ours, theirs]
    while best.left:
        found, chosen = best, models
        for side, unmatched in enumerate((best.torch, best.flax)):
            for paths in runs([unit for unit in unmatched if is_needed(unit)]):
                tried = list(models)
                tried[side] = stacks_of(models[side], paths)
                if len(tried[side]) == len(models[side]):
                    continue
                made = scores.assigned(*tried)
                if made.left < found.left:
                    found, chosen = made, tried
        if found is best:
            break
        best, models = found, chosen
    for side in (0, 1):
        unmatched = {x.name for x in (best.torch, best.flax)[side] if is_needed(x)}
        tried = list(models)
        for whole in (x for x in (best.torch, best.flax)[1 - side] if is_needed(x)):
            several = _family(tried[side], unmatched, whole, side)
            if several is not None:
                names = set(several.names)
                tried[side] = [x for x in tried[side] if x.name not in names] + [several]
        if len(tried[side]) < len(models[side]):
            made = scores.assigned(*tried)
            if made.left < best.left:
                best, models = made, tried
    return best


def _family(units: Sequence[Unit], unmatched: set[str], whole: Unit, side: int) -> Unit | None:
    """Return the siblings that are one leaf of the other model; one has no counterpart."""
    found = [
        several
        for several in families([unit for unit in units if is_needed(unit)], whole.size)
        if unmatched & set(several.names)
        and fits(*((several, whole) if side == 0 else (whole, several)))
    ]
    named = words(whole.owner)
    free = [len(unmatched & set(several.names)) / len(several.names) for several in found]
    best = max(
        range(len(found)),
        key=lambda i: (
            is_usual(found[i]),
            agreement(numbers(found[i].owner), numbers(whole.owner)),
            free[i],
            len(words(found[i].owner) & named),
        ),
        default=None,
    )
    return None if best is None else found[best]


class _Scores:
    """How well units go together."""

    def __init__(self, torch_leaves: Arrays, flax_leaves: Arrays):
        self._leaves = torch_leaves, flax_leaves

    def assigned(self, ours: list[Unit], theirs: list[Unit]) -> Matching:
        """Return the pairs that go together best, also with those that are used before them."""
        self._twins, self._between = {}, {}
        found = self._assigned(ours, theirs)
        before = [_predecessors(units) for units in (ours, theirs)]
        around = [_products_around(units) for units in (ours, theirs)]
        for _ in range(2):  # products find the factors between them, and these their terms
            twins = {pair.torch.name: pair.flax.name for pair in found.pairs}
            self._twins = {
                unit.name: {x for x, y in before[1].items() if y == twins[before[0][unit.name]]}
                for unit in ours
                if before[0].get(unit.name) in twins
            }
            self._between = {
                (name, other): _same_place(twins, mine, its)
                for (name, mine), (other, its) in itertools.product(*(x.items() for x in around))
            }
            found = self._assigned(ours, theirs)
        return found

    def _assigned(self, ours: list[Unit], theirs: list[Unit]) -> Matching:
        models = ours, theirs
        self._information = [information(unit.owner for unit in model) for model in models]
        self._ranks: list[dict[str, tuple[int, ...]]] = [{}, {}]
        for model, found in zip(models, self._ranks, strict=True):
            for dense in (True, False):
                kind = [x.owner for x in model if (x.leaf.kind in _DENSE) is dense]
                found |= ranks(list(dict.fromkeys(kind)))
        pairs, groups = [], []
        left: list[list[Unit]] = [[], []]
        for mine, other in _classes(*models):
            found = self._of_class(mine, other)
            groups += [[len(pairs) + i for i in group] for group in self._open(found)]
            pairs += found
            for side, units in enumerate((mine, other)):
                taken = {(pair.torch, pair.flax)[side].names for pair in found}
                left[side] += [unit for unit in units if unit.names not in taken]
        return Matching(pairs, left[0], left[1], groups)

    def _of_class(self, ours: list[Unit], theirs: list[Unit]) -> list[Pair]:
        table = {}
        scores = np.full((len(ours), len(theirs)), -1e6)
        self._by_name = scores.copy()  # order decides what is likely, and proves nothing
        orders = [_places(units) for units in (ours, theirs)]
        for (i, mine), (j, other) in itertools.product(enumerate(ours), enumerate(theirs)):
            made = fits(mine, other)
            if not made:
                continue
            order = 1.0 - abs(orders[0][i] - orders[1][j])
            named = self.score(mine, other) - made[0].cost
            if named > -10:
                table[i, j] = tuple(made)
                self._by_name[i, j] = named
                is_next = other.name in self._twins.get(mine.name, ())
                between = self._between.get((mine.name, other.name), 0.0)
                if between and _last_step(mine) == _last_step(other):
                    between = 1.0
                found = _BEFORE * is_next + _BETWEEN * between
                scores[i, j] = named + _ORDER * order + found
        # Pairs that fit come first: the large number is for one that does not.
        rows, columns = linear_sum_assignment(-scores)
        self._at = {}
        pairs = []
        for i, j in zip(rows, columns, strict=True):
            if (i, j) in table:
                self._at[len(pairs)] = int(i), int(j)
                pairs.append(Pair(ours[i], theirs[j], float(scores[i, j]), table[i, j]))
        return pairs

    def _open(self, pairs: list[Pair]) -> list[list[int]]:
        """Return the places of the pairs of a class that could as well be exchanged."""
        groups: list[set[int]] = []
        for first, second in itertools.combinations(range(len(pairs)), 2):
            (i, j), (k, n) = self._at[first], self._at[second]
            exchanged = self._by_name[i, n] + self._by_name[k, j]
            if self._by_name[i, j] + self._by_name[k, n] - exchanged < _CLEAR:
                joined = {first, second}
                for group in [x for x in groups if x & joined]:
                    joined |= group
                    groups.remove(group)
                groups.append(joined)
        return [sorted(group) for group in groups]

    def score(self, ours: Unit, theirs: Unit) -> float:
        """Return how well two units go together, less than -10 for those that cannot."""
        mine, other = ours.leaf, theirs.leaf
        score = 0.0
        if mine.is_known and other.is_known:
            if mine.role != other.role or (mine.kind in _DENSE) != (other.kind in _DENSE):
                return -100.0
            score += _OPERATION if mine.kind == other.kind else -_OPERATION
        elif "other" not in (ours.operation, theirs.operation):
            score += _OPERATION if ours.operation == theirs.operation else -2 * _OPERATION
        alike = likeness(words(ours.owner), words(theirs.owner), *self._information)
        is_equal = ours.owner == theirs.owner and ours.leaf.role == theirs.leaf.role
        score += _WORDS * alike + _EQUAL * is_equal
        score += _NUMBERS * agreement(
            *(x[y.owner] for x, y in zip(self._ranks, (ours, theirs), strict=True))
        )
        return score + self._constants(ours, theirs, alike)

    def _constants(self, ours: Unit, theirs: Unit, alike: float) -> float:
        """Return what speaks for a pair of which one is no parameter."""
        are_buffers = [unit.leaf.kind == "buffer" for unit in (ours, theirs)]
        if not any(are_buffers):
            return 0.0
        mine, other = (
            leaves[x.name] for leaves, x in zip(self._leaves, (ours, theirs), strict=True)
        )
        if mine.shape == other.shape and np.allclose(mine, other, 1e-5, 1e-6) and np.ptp(mine):
            return 1.0
        if not all(are_buffers) or ours.kind == "integer":
            return -0.5 if alike > _LIKE else -100.0
        return 0.0


def _predecessors(units: Sequence[Unit]) -> dict[str, str]:
    """Return what each unit that is added, such as a bias, is added to the product of."""
    order = sorted(units, key=lambda unit: unit.order)
    found = {
        unit.name: before.name
        for before, unit in itertools.pairwise(order)
        if unit.use and unit.operation == "term" and before.operation != "term"
    }
    by_owner: dict[str, list[Unit]] = {}
    for unit in units:
        by_owner.setdefault(unit.owner, []).append(unit)
    for group in by_owner.values():
        others = [unit for unit in group if unit.operation != "term"]
        if len(others) == 1:
            found |= {x.name: others[0].name for x in group if x.operation == "term"}
    return found


def _products_around(units: Sequence[Unit]) -> dict[str, tuple[str, str, int]]:
    """Return, for each factor, the products used before and after it, and its place in between."""
    found: dict[str, tuple[str, str, int]] = {}
    before, factors = "", []
    order = sorted((unit for unit in units if unit.use), key=lambda unit: unit.order)
    for unit in (*order, None):
        if unit is not None and unit.operation == "factor" and is_needed(unit):
            factors.append(unit.name)
        elif unit is None or unit.operation == "product":
            after = unit.name if unit else ""
            found |= {name: (before, after, place) for place, name in enumerate(factors)}
            before, factors = after, []
    return found


def _same_place(
    twins: Mapping[str, str], ours: tuple[str, str, int], theirs: tuple[str, str, int]
) -> float:
    """Return how much two factors are between the same products, from 0 to 1."""
    ends = [twins.get(x, x) == y for x, y in zip(ours[:2], theirs[:2], strict=True)]
    return (sum(ends) + (all(ends) and ours[2] == theirs[2])) / 3


def _last_step(unit: Unit) -> str:
    return unit.owner.rpartition(".")[2]


def _classes(ours: list[Unit], theirs: list[Unit]) -> Iterator[tuple[list[Unit], list[Unit]]]:
    """Yield the units of torch and of flax of one size and kind."""
    by_class: dict[tuple[object, ...], tuple[list[Unit], list[Unit]]] = {}
    for side, units in enumerate((ours, theirs)):
        for unit in units:
            by_class.setdefault((unit.size, unit.kind), ([], []))[side].append(unit)
    yield from by_class.values()


def _places(units: Sequence[Unit]) -> list[float]:
    """Return the place of each unit in their order, from 0 to 1."""
    order = sorted(range(len(units)), key=lambda i: units[i].order)
    return [order.index(i) / max(len(units) - 1, 1) for i in range(len(units))]


def exchanged(pairs: Sequence[Pair], order: Sequence[int]) -> list[Pair] | None:
    """Return pairs with the flax units in another order; None where these do not fit."""
    made = []
    for pair, place in zip(pairs, order, strict=True):
        flax = pairs[place].flax
        if not (found := fits(pair.torch, flax)):
            return None
        made.append(dataclasses.replace(pair, flax=flax, fits=tuple(found)))
    return made


def orders_of(pair: Pair) -> list[Pair]:
    """Return a pair with what is fused in every order, the present one first."""
    made = [pair]
    several = pair.torch if len(pair.torch.shapes) > 1 else pair.flax
    count = len(several.shapes)
    for order in itertools.permutations(range(count)) if 1 < count <= 4 else ():
        unit = reordered(several, order)
        both = (unit, pair.flax) if several is pair.torch else (pair.torch, unit)
        if unit != several and (found := fits(*both)):
            made.append(Pair(*both, pair.score, tuple(found)))
    return made


def alias_of(
    unit: Unit, pairs: Sequence[Pair], scores: Mapping[str, float], owners: Mapping[str, str]
) -> Pair | None:
    """Return the pair whose torch leaf a flax leaf without a counterpart is too, if there is.

    A vector is one if the matrix of its module, among the `owners` by that of the alias, is.
    """
    if len(unit.shapes[0]) < 2:
        pairs = [x for x in pairs if x.flax.owner == owners.get(unit.owner)]
    like = [
        x
        for x in pairs
        if x.flax.shapes == unit.shapes
        and x.flax.axes == unit.axes
        and not x.flax.stacks
        and len(x.flax.names) == 1
        and x.flax.kind == unit.kind
        and x.flax.leaf.role == unit.leaf.role
    ]
    return max(like, key=lambda x: scores.get(x.flax.name, 0.0), default=None)
