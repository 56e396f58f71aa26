"""Links as rules, with stars for the numbers of layers."""

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence

from parity.frameworks.leaves import Leaves
from parity.weights.layouts import Link
from parity.weights.rules import Rule, Rules
from parity.weights.weight_map import TransplantError, resolve

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # between dots, or at an end


def compress(
    links: Sequence[Link],
    ties: tuple[tuple[str, str], ...],
    ignored: tuple[str, ...],
    torch: Leaves,
    flax: Leaves,
) -> Rules:
    """Return rules with stars where these resolve to the same links, else one for each link."""
    literal = [Rule(_braced(x.torch), _braced(x.flax), x.layout, x.heads) for x in links]
    starred = [_starred(rule) for rule in literal]
    uses = Counter(
        name for rule in dict.fromkeys(starred) for x in rule.links(torch) for name in x.torch
    )
    # Layers of a Sequential differ in kind under one pattern: such keep their numbers.
    chosen = [
        star if all(uses[name] == 1 for name in link.torch) else rule
        for link, rule, star in zip(links, literal, starred, strict=True)
    ]
    rules = Rules(tuple(dict.fromkeys(chosen)), ties, tuple(dict.fromkeys(map(_star, ignored))))
    try:
        is_same = set(resolve(rules, torch, flax).links) == set(links)
    except TransplantError:
        is_same = False
    return rules if is_same else Rules(tuple(literal), ties, ignored)


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
    steps = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(
        step[0] if len(set(step)) == 1 else "{" + ",".join(step) + "}" for step in steps
    )
