"""The weight map as data: which torch leaf is which flax leaf, and in what layout.

A rule is one line for one kind of leaf, used in both directions. `*` stands for anything between
two dots; the n-th star of one pattern is the n-th of the other. `{a,b,c}` lists leaves that the
other model keeps fused, side by side along the output axis. As a file:

    ignored = ["blocks.*.mask"]

    [[rule]]
    torch = "blocks.*.mlp.up.weight"
    flax = "blocks.*.mlp.up.kernel"
    layout = "transposed"

    [[tie]]
    alias = "head.weight"
    original = "embedding.weight"
"""

import dataclasses
import itertools
import json
import re
import tomllib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from parity.weights.layouts import Layout, Link


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a weight map.

    Attributes:
        torch: pattern of torch leaves.
        flax: pattern of flax leaves.
        layout: how one lies in the other.
        heads: number of heads by which fused leaves alternate; 1 for one after the other.
        optional: whether it may match nothing.
    """

    torch: str
    flax: str
    layout: Layout = Layout.SAME
    heads: int = 1
    optional: bool = False

    def __str__(self) -> str:
        return f"{self.torch} <-> {self.flax} ({self.layout})"

    def links(self, names: Collection[str], framework: str = "torch") -> Iterator[Link]:
        """Yield links of the leaves of "torch" or "flax" that the rule matches."""
        pattern, seen = (self.torch if framework == "torch" else self.flax), set()
        for name, alternative in itertools.product(names, _alternatives(pattern)):
            found = re.fullmatch(_regex(alternative), name)
            if found is not None and found.groups() not in seen:
                seen.add(found.groups())
                torch, flax = (_filled(x, found.groups()) for x in (self.torch, self.flax))
                yield Link(torch, flax, self.layout, self.heads)


@dataclasses.dataclass(frozen=True)
class Rules:
    """A whole weight map.

    Attributes:
        rules: one per kind of leaf.
        ties: pairs of torch names (alias, original) that are one tensor; flax has the original.
        ignored: patterns of torch leaves that are not weights, such as mask buffers.
    """

    rules: tuple[Rule, ...]
    ties: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()

    def is_ignored(self, torch_name: str) -> bool:
        """Whether a torch leaf is left out on purpose."""
        return any(re.fullmatch(_regex(pattern), torch_name) for pattern in self.ignored)

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
            return cls(
                tuple(Rule(**_fields(rule)) for rule in document.pop("rule", ())),
                tuple((tie["alias"], tie["original"]) for tie in document.pop("tie", ())),
                tuple(document.pop("ignored", ())),
                **document,
            )
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{error}. A file has [[rule]] with torch, flax and perhaps layout "
                f"({', '.join(Layout)}), heads, optional; [[tie]] with alias and original; ignored."
            ) from error

    def to_toml(self) -> str:
        """Return the text of a file that `load` reads."""
        parts = []
        if self.ignored:
            parts.append(f"ignored = {json.dumps(self.ignored)}")
        for rule in self.rules:
            lines = [
                f"{field.name} = {json.dumps(value)}"
                for field in dataclasses.fields(rule)
                if (value := getattr(rule, field.name)) != field.default
            ]
            parts.append("\n".join(["[[rule]]", *lines]))
        for alias, original in self.ties:
            tie = f"alias = {json.dumps(alias)}\noriginal = {json.dumps(original)}"
            parts.append(f"[[tie]]\n{tie}")
        return "\n\n".join(parts) + "\n"


def _fields(rule: dict[str, Any]) -> dict[str, Any]:
    """Return a checked rule of a file: a pattern that is no text would fail much later."""
    for framework in ("torch", "flax"):
        if not isinstance(rule.get(framework), str):
            raise ValueError(f"a rule without {framework}")
    stars = [rule[framework].count("*") for framework in ("torch", "flax")]
    if stars[0] != stars[1]:
        raise ValueError(f"{rule['torch']} and {rule['flax']} have {stars[0]} and {stars[1]} stars")
    return rule | {"layout": Layout(rule.get("layout", "same"))}


def _regex(pattern: str) -> str:
    return r"([^.]+)".join(map(re.escape, pattern.split("*")))


def _filled(pattern: str, stars: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names that a pattern stands for, its stars replaced."""
    left = iter(stars)
    return tuple(_alternatives(re.sub(r"\*", lambda _: next(left), pattern)))


def _alternatives(name: str) -> Iterator[str]:
    parts = re.split(r"\{([^}]*)\}", name)
    choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
    return ("".join(choice) for choice in itertools.product(*choices))
