"""A checkpoint folder of transformers, checked when it is opened and read tensor by tensor."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np

from flax_gpt import GPTConfig
from parity.checkpoints.adapter import Adapter
from parity.checkpoints.config import read_config
from parity.checkpoints.families import Family
from parity.checkpoints.files import CONFIG, Header, headers, listed, read_json
from parity.checkpoints.leftovers import plain_names, with_fused
from parity.checkpoints.weights import blank, checked, flax_blanks, torch_blanks
from parity.weights.rules import Rules
from parity.weights.weight_map import TransplantError, WeightMap, resolve

# The stored dtypes that are read, by their names in safetensors.
STORED = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# How names of quantised tensors end: GPTQ and AWQ, bitsandbytes, and scaled 8-bit floats.
_QUANTISED = (
    *(".qweight", ".qzeros", ".scales", ".g_idx", ".absmax", ".quant_map", ".SCB"),
    *(".weight_scale", ".weight_scale_inv", ".weight_packed"),
)


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
        if "quantization_config" in document:
            given = document["quantization_config"]
            method = given.get("quant_method") if isinstance(given, dict) else None
            raise ValueError(
                f"{where}: quantised weights ({method or 'quantization_config'} in {CONFIG}), "
                "which are codes and no numbers. They are not read. Get the original weights, or "
                "dequantise and save them."
            )
        family, fields, problems, notes = read_config(document, f"{where}/{CONFIG}")
        tensors = headers(path)
        named, found, more = plain_names(tensors, family.prefix, family.head)
        problems += found
        notes += [f"{where}: {note}" for note in more]
        remedy = "Give a checkpoint without these."
        if problems:
            raise ValueError(f"{where}: {listed(problems)}. {remedy}")
        try:
            config = GPTConfig(**fields, dtype=dtype or "float32")
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: {listed([str(error).rstrip('.')])}. {remedy}") from error
        rules, more = with_fused(family.rules(config), named)
        notes += [f"{where}: {note}" for note in more]
        aliases = {alias: original for alias, original in rules.ties if alias in named}
        read = {name: x for name, x in named.items() if not rules.is_ignored(name)}
        if problems := [
            f"{x.name} is stored as {x.kind}, there are {', '.join(STORED)}"
            for x in read.values()
            if x.kind not in STORED
        ]:
            raise ValueError(f"{where}: {listed(problems)}. {remedy}")
        if dtype is None:
            config = dataclasses.replace(config, dtype=_widest({x.kind for x in read.values()}))
        own = {name: x for name, x in read.items() if name not in aliases}
        blanks = {name: blank(x.shape) for name, x in own.items()}
        try:
            weight_map = resolve(rules, blanks, flax_blanks(config))
        except TransplantError as error:
            raise ValueError(f"{where}: {_misfit(family, rules, config, own)}") from error
        opened = None if adapter is None else Adapter.open(adapter)
        if opened is not None:
            aside = sorted(set(opened.pairs) - set(blanks))
            if aside:
                raise ValueError(
                    f"adapter {adapter}: {listed(aside)} is not among the tensors of {where}. "
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


def _misfit(family: Family, rules: Rules, config: GPTConfig, given: Mapping[str, Header]) -> str:
    """Say how tensors, by their names in the whole model, differ from its own; and the remedy."""
    expected = {x: leaf.shape for x, leaf in torch_blanks(rules, flax_blanks(config)).items()}
    missing = [name for name in expected if name not in given]
    unknown = [x.name for name, x in given.items() if name not in expected]
    if missing == [family.head] and not unknown:
        return (
            f"no {family.head}, and {CONFIG} does not say that the head is the embedding. If it "
            f"is, set tie_word_embeddings: true in {CONFIG}."
        )
    if codes := [x for x in unknown if x.endswith(_QUANTISED)]:
        return (
            f"quantised weights, {listed(codes)}. They are codes and no numbers, and not read. Get "
            "the original weights, or dequantise and save them."
        )
    if adapters := [x for x in unknown if "lora_" in x]:
        return (
            f"the weights of an adapter, {listed(adapters)}. They are the difference to a model. "
            "Merge them into it, save that and give it."
        )
    if prefix := _common_prefix(unknown, expected, family.prefix):
        return (
            f"names begin with {prefix!r}, as {listed(unknown, 2)}. Those of a {family.name} do "
            f"not. Rename the tensors without {prefix!r}."
        )
    shapes = [
        f"{x.name} is {list(x.shape)} and not {list(expected[name])}"
        for name, x in given.items()
        if name in expected and x.shape != expected[name]
    ]
    named = ("unknown ", unknown), ("missing ", missing), ("", shapes)
    seen = [word + listed(names, 5, 110) for word, names in named if names]
    return (
        f"{'; '.join(seen)}. Every tensor has one place in a {family.name} with this {CONFIG}. "
        "Give weights that belong to it."
    )


def _common_prefix(unknown: Sequence[str], expected: Collection[str], prefix: str) -> str:
    """Return what stands before a known name in every name that is unknown; empty if nothing."""
    names = {*expected, *(x.removeprefix(prefix) for x in expected)}
    for cut in range(1, len(unknown[0]) if unknown else 0):
        found = unknown[0][:cut]
        if unknown[0][cut:] in names and all(
            x.startswith(found) and x[cut:] in names for x in unknown
        ):
            return found
    return ""


def _widest(kinds: set[str]) -> str:
    """Return the dtype that holds numbers of all these without rounding them."""
    if kinds == {"F16"} or kinds == {"BF16"}:
        return STORED[kinds.pop()]
    return "float64" if "F64" in kinds else "float32"
