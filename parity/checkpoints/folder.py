"""A checkpoint folder of transformers, checked when it is opened and read tensor by tensor."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

import numpy as np

from flax_gpt import GPTConfig
from parity.checkpoints.adapter import Adapter
from parity.checkpoints.config import read_config
from parity.checkpoints.files import CONFIG, Header, headers, read_json
from parity.checkpoints.leftovers import plain_names, with_fused
from parity.checkpoints.weights import blank, checked, flax_blanks
from parity.weights.weight_map import TransplantError, WeightMap, resolve

# The stored dtypes that are read, by their names in safetensors.
STORED = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A folder of transformers; see `Weights`.

    Attributes:
        weight_map: torch names of the family to flax leaves.
    """

    path: Path
    family: str
    config: GPTConfig
    notes: tuple[str, ...]
    weight_map: WeightMap
    _tensors: Mapping[str, Header]  # by name in the family
    _adapter: Adapter | None = None

    @classmethod
    def open(cls, path: Path, dtype: str | None = None, adapter: Path | None = None) -> Self:
        """Return a folder whose config.json and headers of weights have been read.

        Args:
            path: the folder.
            dtype: of the model; the widest that a tensor is stored in when None.
            adapter: a folder of peft whose products are added to the weights.

        Raises:
            ValueError: for a folder that is not whole, not safe or not understood; all problems in
                one line.
        """
        document = read_json(path / CONFIG)
        where = f"checkpoint {path}"
        family, fields, problems, notes = read_config(document, f"{where}/{CONFIG}")
        tensors = headers(path)
        named, found, more = plain_names(tensors, family.prefix, family.head)
        problems += found
        notes += [f"{where}: {note}" for note in more]
        remedy = "Give a checkpoint without these."
        if problems:
            raise ValueError(f"{where}: {'; '.join(problems)}. {remedy}")
        try:
            config = GPTConfig(**fields, dtype=dtype or "float32")
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {error}. {remedy}") from error
        rules, more = with_fused(family.rules(config), named)
        notes += [f"{where}: {note}" for note in more]
        aliases = {alias: original for alias, original in rules.ties if alias in named}
        read = {name: x for name, x in named.items() if not rules.is_ignored(name)}
        if problems := [
            f"{x.name} is stored as {x.kind}, there are {', '.join(STORED)}"
            for x in read.values()
            if x.kind not in STORED
        ]:
            raise ValueError(f"{where}: {'; '.join(problems)}. {remedy}")
        if dtype is None:
            config = dataclasses.replace(config, dtype=_widest({x.kind for x in read.values()}))
        blanks = {name: blank(x.shape) for name, x in read.items() if name not in aliases}
        try:
            weight_map = resolve(rules, blanks, flax_blanks(config))
        except TransplantError as error:
            raise ValueError(
                f"{where}: {'; '.join(error.problems)}. Every tensor has one place in a "
                f"{family.name} with this config.json. Give weights that belong to it."
            ) from error
        opened = None if adapter is None else Adapter.open(adapter)
        if opened is not None:
            aside = sorted(set(opened.pairs) - set(blanks))
            if aside:
                raise ValueError(
                    f"adapter {adapter}: {', '.join(aside)} is not among the tensors of {where}. "
                    "Every product has its weight. Give the model that it was trained beside."
                )
            notes.append(f"{where}: {len(opened.pairs)} products of {adapter} added")
        tail = weight_map, read, opened
        checkpoint = cls(path, family.name, config, tuple(notes), *tail)
        checkpoint._check_ties(aliases)
        return checkpoint

    def leaves(self, dtype: str | None = None) -> Iterator[tuple[str, np.ndarray]]:
        """See `Weights`."""
        for link in self.weight_map.links:
            headers = {name: self._tensors[name] for name in link.torch}
            read = {
                name: checked(self, x.name, self._read(name), dtype) for name, x in headers.items()
            }
            yield from link.to_flax(read, self.weight_map.flax_shapes).items()

    def _read(self, name: str) -> np.ndarray:
        tensor = self._tensors[name].read()
        return tensor if self._adapter is None else self._adapter.added(name, tensor)

    def _check_ties(self, aliases: Mapping[str, str]) -> None:
        """Refuse a head that is saved although it is tied, and is not the embedding."""
        for alias, original in aliases.items():
            if not np.array_equal(self._tensors[alias].read(), self._tensors[original].read()):
                raise ValueError(
                    f"checkpoint {self.path}: {alias} is not {original}, although config.json says "
                    "that they are tied. One of them is wrong. Say tie_word_embeddings: false to "
                    "use both."
                )


def _widest(kinds: set[str]) -> str:
    """Return the dtype that holds numbers of all these without rounding them."""
    if kinds == {"F16"} or kinds == {"BF16"}:
        return STORED[kinds.pop()]
    return "float64" if "F64" in kinds else "float32"
