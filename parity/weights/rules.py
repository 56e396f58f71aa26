"""The weight map as data: which torch leaf is which flax leaf, and in what layout.

A rule is one line for one kind of leaf, used in both directions. `*` stands for anything between
two dots; the n-th star of one pattern is the n-th of the other. `{a,b,c}` lists leaves that the
other model keeps fused, side by side along the output axis or where the layout says. `[layer]`
stands for the numbers of leaves that the other model keeps stacked along the axis `[layer]` of the
layout. As a file:

    ignored = ["blocks.*.mask"]
    flax_ignored = ["head.*"]

    [[rule]]
    torch = "blocks.*.mlp.up.weight"
    flax = "blocks.*.mlp.up.kernel"
    layout = "transposed"

    [[rule]]
    torch = "layers.[layer].{gate,up}.weight"
    flax = "layers.gate_up.kernel"
    layout = "o i -> [layer] {} i o"

    [[tie]]
    alias = "head.weight"
    original = "embedding.weight"

    [[sum]]
    term = "lstm.bias_ih_l0"
    original = "lstm.bias_hh_l0"

A rule may be one line of the table `map`, whose layout follows from both models if it is left out;
`rest = "auto"` infers what the file does not say:

    rest = "auto"
    map."attention.q.weight" = "attention.wq: (n h) d -> d n h"
"""

import dataclasses
import itertools
import json
import re
import tomllib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from parity.weights.layouts import Axes, Layout, Link

_STACK = re.compile(r"\[(\w+)\]")
_FIELDS = (
    f"[[rule]] with torch, flax and perhaps layout ({', '.join(Layout)} or axes), heads, optional; "
    "map; [[tie]] and [[flax_tie]] with alias and original; [[sum]] with term and original; "
    "ignored; flax_ignored; rest"
)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a weight map.

    Attributes:
        torch: pattern of torch leaves.
        flax: pattern of flax leaves.
        layout: how one lies in the other, a `Layout` or axes as `parity.weights.layouts` describes
            them; empty where the two models say it.
        heads: number of heads by which fused leaves alternate; 1 for one after the other.
        optional: whether it may match nothing.
    """

    torch: str
    flax: str
    layout: str = Layout.SAME
    heads: int = 1
    optional: bool = False

    def __str__(self) -> str:
        return f"{self.torch} <-> {self.flax} ({self.layout})"

    def links(
        self, names: Collection[str], framework: str = "torch", others: Collection[str] = ()
    ) -> Iterator[Link]:
        """Yield links of the leaves of "torch" or "flax" that the rule matches.

        The `others` are the leaves of the other framework, which tell how many are stacked there.
        """
        mine, other = (self.torch, self.flax) if framework == "torch" else (self.flax, self.torch)
        numbers = _stacks_by_stars(mine, names)
        theirs = _stacks_by_stars(other, others) if _STACK.search(other) else {}
        for stars, stacks in numbers.items():
            both = stacks | theirs.get(stars, {})
            torch, flax = (_filled(x, stars, both) for x in (self.torch, self.flax))
            sizes = tuple((f"[{name}]", len(found)) for name, found in both.items())
            yield Link(torch, flax, self.layout, self.heads, sizes)


@dataclasses.dataclass(frozen=True)
class Rules:
    """A whole weight map.

    Attributes:
        rules: one per kind of leaf.
        ties: pairs of torch names (alias, original) that are one tensor; flax has the original.
        ignored: patterns of torch leaves that are not weights, such as mask buffers.
        flax_ties: pairs of flax names (alias, original) that are one torch tensor.
        flax_ignored: patterns of flax leaves that torch lacks and no output needs.
        rest: "auto" to infer what is not said; empty where all is said.
        notes: what was decided without proof when the rules were inferred.
        sums: pairs of torch names (term, original); flax has their sum for the original.
        exchange: lines of other rules, which take equal names apart and make the outputs equal;
            empty where there are none.
    """

    rules: tuple[Rule, ...]
    ties: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    flax_ties: tuple[tuple[str, str], ...] = ()
    flax_ignored: tuple[str, ...] = ()
    rest: str = ""
    notes: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    sums: tuple[tuple[str, str], ...] = ()
    exchange: str = dataclasses.field(default="", compare=False)

    def is_ignored(self, torch_name: str) -> bool:
        """Whether a torch leaf is left out on purpose."""
        return any(re.fullmatch(_regex(pattern), torch_name) for pattern in self.ignored)

    def is_flax_ignored(self, flax_name: str) -> bool:
        """Whether a flax leaf is left out on purpose."""
        return any(re.fullmatch(_regex(pattern), flax_name) for pattern in self.flax_ignored)

    @property
    def is_open(self) -> bool:
        """Whether the two models have to say what the rules leave open."""
        return self.rest == "auto" or any(not rule.layout for rule in self.rules)

    @classmethod
    def load(cls, path: Path) -> "Rules":
        """Return the rules in a file.

        Raises:
            ValueError: for a file that is missing or invalid, in one line.
        """
        try:
            return cls.parse(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"rules {path}: {error.strerror}. Name a rules file.") from error
        except ValueError as error:
            raise ValueError(f"rules {path}: {error}") from error

    @classmethod
    def parse(cls, text: str) -> "Rules":
        """Return the rules in the text of a rules file.

        Raises:
            ValueError: for invalid text.
        """
        try:
            document = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{error}. A rules file is TOML.") from error
        try:
            lines = [_line(*pair) for pair in document.pop("map", {}).items()]
            rules = tuple(_rule(rule) for rule in (*document.pop("rule", ()), *lines))
            ties, flax_ties = (
                tuple((tie["alias"], tie["original"]) for tie in document.pop(kind, ()))
                for kind in ("tie", "flax_tie")
            )
            sums = tuple((x["term"], x["original"]) for x in document.pop("sum", ()))
            ignored = [_names(kind, document.pop(kind, [])) for kind in ("ignored", "flax_ignored")]
            rest = document.pop("rest", "")
            if rest not in ("", "auto"):
                raise ValueError(f"rest = {rest!r}: it is auto, or left out")
            return cls(rules, ties, ignored[0], flax_ties, ignored[1], rest, sums=sums, **document)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise ValueError(f"{error}. A file has {_FIELDS}.") from error

    def to_toml(self) -> str:
        """Return the text of a file that `load` reads."""
        parts = [f"# {note}" for note in self.notes]
        for kind in ("ignored", "flax_ignored", "rest"):
            if value := getattr(self, kind):
                parts.append(f"{kind} = {json.dumps(value)}")
        for rule in self.rules:
            lines = [
                f"{field.name} = {json.dumps(value)}"
                for field in dataclasses.fields(rule)
                if (value := getattr(rule, field.name)) != field.default
            ]
            parts.append("\n".join(["[[rule]]", *lines]))
        pairs = (("tie", "alias", self.ties), ("flax_tie", "alias", self.flax_ties))
        for kind, key, found in (*pairs, ("sum", "term", self.sums)):
            for one, original in found:
                lines = f"{key} = {json.dumps(one)}\noriginal = {json.dumps(original)}"
                parts.append(f"[[{kind}]]\n{lines}")
        return "\n\n".join(parts) + "\n"


def as_line(rule: Rule) -> str:
    """Return a rule as a line of the table `map`."""
    layout = f": {rule.layout}" if rule.layout else ""
    return f"map.{json.dumps(rule.torch)} = {json.dumps(rule.flax + layout)}"


def _line(torch: str, flax: object) -> Mapping[str, object]:
    """Return the rule that a line of the table `map` is."""
    if not isinstance(flax, str):
        raise ValueError(f"map of {torch}: quote the name, which has dots, and give a flax leaf")
    name, _, layout = flax.partition(":")
    return {"torch": torch, "flax": name.strip(), "layout": layout.strip()}


def _rule(rule: Mapping[str, object]) -> Rule:
    """Return a checked rule of a file: a pattern that is no text would fail much later."""
    for framework in ("torch", "flax"):
        if not isinstance(rule.get(framework), str):
            raise ValueError(f"a rule without {framework}")
    made = Rule(**(rule | {"layout": str(rule.get("layout", Layout.SAME))}))  # type: ignore[arg-type]
    stars = [pattern.count("*") for pattern in (made.torch, made.flax)]
    if stars[0] != stars[1]:
        raise ValueError(
            f"{made.torch} and {made.flax} have {stars[0]} and {stars[1]} stars. Leaves that the "
            "other model stacks have [layer] instead, and an axis [layer] in the layout"
        )
    if made.layout:
        axes = Axes.read(made.layout, made.heads)
        for pattern, side in ((made.torch, axes.flax), (made.flax, axes.torch)):
            named = sorted(f"[{name}]" for name in _STACK.findall(pattern))
            held = sorted(x for group in side for x in group if x[0] == "[")
            if named != held:
                raise ValueError(
                    f"{pattern} stacks {', '.join(named) or 'nothing'}, and layout {made.layout!r} "
                    f"has {', '.join(held) or 'no stacked axis'} on the other side"
                )
    return made


def _names(kind: str, names: object) -> tuple[str, ...]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{kind}: it is a list of names")
    return tuple(names)


def _regex(pattern: str) -> str:
    """Return the expression of a pattern without braces, whose groups are its stars."""
    steps = re.split(r"(\*|\[\w+\])", pattern)
    found = {"*": r"([^.]+)"}
    return "".join(
        found[x] if x == "*" else rf"(?P<{x[1:-1]}>\d+)" if i % 2 else re.escape(x)
        for i, x in enumerate(steps)
    )


def _stacks_by_stars(
    pattern: str, names: Collection[str]
) -> dict[tuple[str, ...], dict[str, list[str]]]:
    """Return what stands for the stars, and then for each bracket, in the names that match."""
    found: dict[tuple[str, ...], dict[str, set[str]]] = {}
    regexes = [re.compile(_regex(x)) for x in _alternatives(pattern)]
    for name, regex in itertools.product(names, regexes):
        if match := regex.fullmatch(name):
            places = {place - 1 for place in regex.groupindex.values()}
            stars = tuple(x for i, x in enumerate(match.groups()) if i not in places)
            stacks = found.setdefault(stars, {})
            for stack, number in match.groupdict().items():
                stacks.setdefault(stack, set()).add(number)
    return {
        stars: {stack: sorted(numbers, key=int) for stack, numbers in stacks.items()}
        for stars, stacks in found.items()
    }


def _filled(
    pattern: str, stars: tuple[str, ...], stacks: Mapping[str, list[str]]
) -> tuple[str, ...]:
    """Return the names that a pattern stands for, its stars and brackets replaced."""
    left = iter(stars)
    pattern = re.sub(r"\*", lambda _: next(left), pattern)
    patterns = [pattern]
    for stack, numbers in stacks.items():
        if f"[{stack}]" in pattern:
            patterns = [x.replace(f"[{stack}]", number) for x in patterns for number in numbers]
    return tuple(name for x in patterns for name in _alternatives(x))


def _alternatives(name: str) -> Iterator[str]:
    parts = re.split(r"\{([^}]*)\}", name)
    choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
    return ("".join(choice) for choice in itertools.product(*choices))
