"""Links as rules, with stars for the numbers of layers."""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Sequence

from parity.frameworks.leaves import Arrays
from parity.weights.layouts import Axes, Link
from parity.weights.rules import Rule, Rules

# A step of a path, or the end of one, as in `layers_0`.
_NUMBER = re.compile(r"(?:(?<![^._])|(?<=_))\d+(?![^.])")


def compress(links: Sequence[Link], base: Rules, torch: Arrays, flax: Arrays) -> Rules:
    """Return rules with stars where these give the same links, else one for each link.

    Ties, ignored leaves and notes are those of `base`.
    """
    mapped = {name for link in links for name in link.torch}
    names = [name for name in torch if name in mapped]
    literal = [as_rule(link) for link in links]
    starred = [_starred(rule) for rule in literal]
    uses = Counter(
        name
        for rule in dict.fromkeys(starred)
        for link in rule.links(names, "torch", flax)
        for name in link.torch
    )
    # Layers of a Sequential differ in kind under one pattern: such keep their numbers.
    chosen = [
        star if all(uses[name] == 1 for name in link.torch) else rule
        for link, rule, star in zip(links, literal, starred, strict=True)
    ]
    rules = tuple(dict.fromkeys(chosen))
    found = {link for rule in rules for link in rule.links(names, "torch", flax)}
    is_same = found == set(links)
    shorter = dataclasses.replace(
        base,
        rules=rules if is_same else tuple(literal),
        ignored=tuple(dict.fromkeys(map(_star, base.ignored))),
        flax_ignored=tuple(dict.fromkeys(map(_star, base.flax_ignored))),
    )
    of_flax = {name for link in links for name in link.flax}
    if any(map(shorter.is_ignored, names)) or any(map(shorter.is_flax_ignored, of_flax)):
        return dataclasses.replace(base, rules=shorter.rules)
    return shorter


def as_rule(link: Link) -> Rule:
    """Return the rule for a link alone."""
    axes, counts = Axes.read(link.layout, link.heads), dict(link.stacks)
    patterns = []
    for names, other in ((link.torch, axes.flax), (link.flax, axes.torch)):
        stacks = [x for x in counts if any(x in group for group in other)]
        width = len(names) // math.prod(counts[x] for x in stacks)
        patterns.append(_pattern(names, stacks, counts, width))
    return Rule(patterns[0], patterns[1], link.layout, link.heads)


def _pattern(
    names: tuple[str, ...], stacks: Sequence[str], counts: dict[str, int], width: int
) -> str:
    """Return one pattern for leaves: braces for those side by side, brackets for a stack."""
    found, step = list(names[:width]), len(names)
    for stack in stacks:
        step //= counts[stack]
        places = _differing(names[0], names[step]) if step < len(names) else []
        for place, name in enumerate(found):
            parts = re.split(r"(\[\w+\]|\d+)", name)
            for number in places:
                parts[number] = stack
            found[place] = "".join(parts)
    return _braced(tuple(found))


def _differing(name: str, other: str) -> list[int]:
    """Return the places of the numbers in which two names differ."""
    both = (re.split(r"(\[\w+\]|\d+)", x) for x in (name, other))
    return [place for place, (a, b) in enumerate(zip(*both, strict=True)) if a != b]


def _starred(rule: Rule) -> Rule:
    """Return the rule for all layers, if both models number them alike."""
    if _NUMBER.findall(rule.torch) != _NUMBER.findall(rule.flax):
        return rule
    return dataclasses.replace(rule, torch=_star(rule.torch), flax=_star(rule.flax))


def _star(name: str) -> str:
    return _NUMBER.sub("*", name)


def _braced(names: tuple[str, ...]) -> str:
    """Return one pattern for fused leaves, which lists in braces where they differ."""
    if len(names) == 1:
        return names[0]
    steps = [name.split(".") for name in names]
    if len({len(x) for x in steps}) > 1:
        return "{" + ",".join(names) + "}"
    columns = list(zip(*steps, strict=True))
    if sum(len(set(column)) > 1 for column in columns) > 1:
        return "{" + ",".join(names) + "}"
    return ".".join(x[0] if len(set(x)) == 1 else "{" + ",".join(x) + "}" for x in columns)
