"""Adapters of low rank (LoRA), added to the weights that they were trained beside."""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import numpy as np

from parity.checkpoints.files import Header, file_headers, read_json

_NAME = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")
# Entries that make an adapter another thing, with the values of one that is a product added.
_PLAIN: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "lora_bias": (False, None),
    "alpha_pattern": ({}, None),
    "rank_pattern": ({}, None),
}


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A folder of peft with one adapter of low rank.

    Attributes:
        path: the folder.
        scale: of the products.
        by_inputs: whether weights are stored (in, out).
        pairs: the two factors of each tensor that changes, by its name.
    """

    path: Path
    scale: float
    by_inputs: bool
    pairs: Mapping[str, tuple[Header, Header]]

    @classmethod
    def open(cls, path: Path) -> Self:
        """Return an adapter whose config and headers have been read.

        Raises:
            ValueError: for what is no plain adapter, all problems in one line.
        """
        document = read_json(path / "adapter_config.json")
        problems = [
            f"{name} is {document[name]!r}"
            for name, values in _PLAIN.items()
            if name in document and document[name] not in values
        ]
        rank, alpha = document.get("r"), document.get("lora_alpha")
        if not (isinstance(rank, int) and rank > 0 and isinstance(alpha, int | float)):
            problems.append(f"r is {rank!r} and lora_alpha {alpha!r}")
        halves: dict[str, dict[str, Header]] = {}
        for name, x in file_headers(path / "adapter_model.safetensors").items():
            match = _NAME.fullmatch(name)
            if match is None:
                problems.append(f"{name} is no factor of a product")
            else:
                halves.setdefault(match[1], {})[match[2]] = x
        problems += [f"{name} has one factor" for name, x in halves.items() if len(x) == 1]
        if problems or not halves:
            raise ValueError(
                f"adapter {path}: {'; '.join(problems) or 'no tensors'}. Only products of low rank "
                "that are added to weights are merged. Merge it with the tool that trained it."
            )
        assert isinstance(rank, int) and isinstance(alpha, int | float)
        scale = alpha / (math.sqrt(rank) if document.get("use_rslora") else rank)
        pairs = {f"{name}.weight": (x["A"], x["B"]) for name, x in halves.items()}
        return cls(path, scale, bool(document.get("fan_in_fan_out")), pairs)

    def added(self, name: str, weight: np.ndarray) -> np.ndarray:
        """Return a weight with its product added, in float32 at least; itself where it has none.

        Raises:
            ValueError: for factors whose product has another shape.
        """
        if name not in self.pairs:
            return weight
        inner, outer = (x.read() for x in self.pairs[name])
        wide = np.promote_types(np.promote_types(inner.dtype, weight.dtype), np.float32)
        product = outer.astype(wide) @ inner.astype(wide)
        product = product.T if self.by_inputs else product
        if product.shape != weight.shape:
            raise ValueError(
                f"adapter {self.path}: its product for {name} is {list(product.shape)}, the weight "
                f"{list(weight.shape)}. It was trained beside another model. Give that one."
            )
        return weight.astype(wide) + self.scale * product
