"""Exchanges of weights that names may have mixed up: one for all repeated blocks alike."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence, Set

from parity.weights.match import Pair
from parity.weights.names import numbers, template, words
from parity.weights.units import Fit, Unit, fits

# The places of pairs, each with the place of the pair whose flax unit it gets.
Move = dict[int, int]
# Places by the numbers of their blocks and the name in their module.
_Slot = dict[tuple[tuple[int, ...], str], int]
# Slots of one parent that are also tried in turns of three: such as query, key and value.
_FEW = 4


def moves(pairs: Sequence[Pair], fixed: Set[int] = frozenset()) -> list[Move]:
    """Return exchanges of modules and leaves of equal shapes, those of one parent first.

    Those that take equal names apart come last.

    Args:
        pairs: of the map at hand.
        fixed: places of pairs that stay.
    """
    found: dict[tuple[tuple[int, int], ...], Move] = {}
    near: list[Move] = []
    far: list[Move] = []
    for slots in _all_slots(pairs, fixed):
        by_parent: dict[str, list[_Slot]] = {}
        for (parent, _), slot in slots.items():
            by_parent.setdefault(parent, []).append(slot)
        for group in by_parent.values():
            near += [_turned(x) for x in itertools.combinations(group, 2)]
            if len(group) <= _FEW:
                for first, second, third in itertools.combinations(group, 3):
                    near += [_turned((first, second, third)), _turned((first, third, second))]
        groups = itertools.combinations(by_parent.values(), 2)
        far += [_turned(x) for pair in groups for x in itertools.product(*pair)]
    for move in (*_shortest_first(near), *_shortest_first(far)):
        if move and _is_alike(pairs, move):
            found.setdefault(tuple(sorted(move.items())), move)
    return sorted(
        found.values(),
        key=lambda move: any(is_against_names(pairs[i], pairs[j].flax) for i, j in move.items()),
    )


def _shortest_first(found: list[Move]) -> list[Move]:
    return sorted(found, key=lambda move: len(move))


def moved(pairs: Sequence[Pair], move: Move) -> list[Pair] | None:
    """Return pairs after an exchange; None where shapes do not allow it."""
    made = list(pairs)
    for place, source in move.items():
        found = fits(pairs[place].torch, pairs[source].flax)
        if not found:
            return None
        found.sort(key=lambda fit: _as_before(fit, pairs[place], pairs[source]))
        made[place] = dataclasses.replace(pairs[place], flax=pairs[source].flax, fits=tuple(found))
    return made


def is_against_names(pair: Pair, flax: Unit) -> bool:
    """Whether a pair of equal names would get a flax unit of another name.

    Weights that are moved by name lie as the names say. Names are equal in their last step, such as
    `q_proj` and `wq`, or in all words, whatever the numbers.

    Returns:
        True if the pair's names are equal in one of these ways and those with `flax` are not.
    """

    def last(unit: Unit) -> str:
        return unit.owner.rpartition(".")[2]

    def named(unit: Unit) -> Iterator[object]:
        name = last(unit)
        yield "" if name.isdigit() else name
        yield words(name)
        yield words(unit.owner)

    names = zip(named(pair.torch), named(pair.flax), named(flax), strict=True)
    return any(ours and ours == theirs != other for ours, theirs, other in names)


def _as_before(fit: Fit, *before: Pair) -> bool:
    """Return a key by which a layout that the pairs had before comes first."""
    return fit.layout not in {pair.fits[0].layout for pair in before}


def _all_slots(pairs: Sequence[Pair], fixed: Set[int]) -> Iterator[dict[tuple[str, str], _Slot]]:
    """Yield places by parent and name: of modules and of leaves, as each framework has them."""
    for is_torch, is_module in itertools.product((True, False), repeat=2):
        slots: dict[tuple[str, str], _Slot] = {}
        for place, pair in enumerate(pairs):
            unit = pair.torch if is_torch else pair.flax
            if place in fixed:
                continue
            above, _, leaf = unit.name.rpartition(".")
            path = (above or unit.name) if is_module and not unit.leaf.part else unit.owner
            parent, _, name = path.rpartition(".")
            within = "" if path == unit.name else leaf
            slots.setdefault((template(parent), name), {})[numbers(parent), within] = place
        yield slots


def _turned(slots: Sequence[_Slot]) -> Move:
    """Return the move that gives each slot what the next has; nothing for unlike slots."""
    if any(slot.keys() != slots[0].keys() for slot in slots):
        return {}
    turned = zip(slots, (*slots[1:], slots[0]), strict=True)
    return {slot[key]: other[key] for slot, other in turned for key in slot}


def _is_alike(pairs: Sequence[Pair], move: Move) -> bool:
    """Whether all that is exchanged has the size, kind and role of what it replaces."""

    def same(one: Unit, other: Unit) -> bool:
        is_known = one.leaf.is_known and other.leaf.is_known
        return (one.size, one.kind) == (other.size, other.kind) and not (
            is_known and one.leaf.role != other.leaf.role
        )

    return all(
        same(pairs[i].torch, pairs[j].torch) and same(pairs[i].flax, pairs[j].flax)
        for i, j in move.items()
    )
