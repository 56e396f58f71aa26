"""The one reader of the catalogues: TOML files of bugs, faults and edits."""

import dataclasses
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from parity.faults.edit import Edit

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Entry = TypeVar("Entry", bound="DataclassInstance")


def read_catalogue(path: Path, kind: type[Entry]) -> tuple[Entry, ...]:
    """Read all entries of a catalogue.

    An entry is a table named like its class, [[bug]] for a `Bug`, with the fields of the class as
    keys. A list of tables is a list of edits, whose text is kept as it is. Other text may be
    wrapped: white space in it counts as one space.

    Args:
        path: a TOML file.
        kind: a dataclass.

    Returns:
        An object per entry, in the order of the file.

    Raises:
        ValueError: a key is unknown or missing; names the file and the entry.
    """
    name = kind.__name__.lower()
    document = tomllib.loads(path.read_text(encoding="utf-8"))
    if document.keys() != {name}:
        raise ValueError(
            f"{path.name}: tables {', '.join(document)}. A catalogue has one kind. Use [[{name}]]."
        )
    return tuple(
        _made(kind, table, f"{path.name}, {name} {number}, {table.get('id') or table.get('title')}")
        for number, table in enumerate(document[name], 1)
    )


def _made(kind: type[Entry], table: dict[str, object], where: str) -> Entry:
    """Build a dataclass from a table."""
    fields = dataclasses.fields(kind)
    known = {field.name for field in fields}
    needed = {
        field.name
        for field in fields
        if field.default is field.default_factory is dataclasses.MISSING
    }
    problems = [f"unknown key {key!r}" for key in table if key not in known]
    problems += [f"no key {key!r}" for key in sorted(needed - table.keys())]
    if problems:
        raise ValueError(
            f"{where}: {', '.join(problems)}. An entry has the fields of {kind.__name__}: "
            f"{', '.join(sorted(known))}. Correct it."
        )
    exact = kind is Edit
    return kind(**{key: x if exact else _value(x, where) for key, x in table.items()})


def _value(value: object, where: str) -> object:
    if isinstance(value, str):
        return " ".join(value.split())
    if isinstance(value, list):
        return tuple(
            _made(Edit, x, where) if isinstance(x, dict) else _value(x, where) for x in value
        )
    return value
