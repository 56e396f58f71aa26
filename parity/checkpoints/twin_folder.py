"""A folder with one twin's weights under its own names, and what makes a model of them again."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors import safe_open

from flax_gpt import GPTConfig
from parity.checkpoints.families import FAMILIES
from parity.checkpoints.folder import (
    Checkpoint,
    Weights,
    flax_shapes,
    headers,
    ids_of,
    read_json,
    suspicious,
    torch_shapes,
    write_folder,
)
from parity.frameworks.leaves import Leaves, different_leaves
from parity.weights.tables import TWINS
from parity.weights.weight_map import links_of

FRAMEWORKS = "flax", "torch"
_FORMAT = "parity-model-1"


@dataclasses.dataclass(frozen=True)
class TwinFolder(Weights):
    """A folder that `write_twin` made.

    Attributes:
        framework: whose names the weights have.
    """

    framework: str

    @classmethod
    def open(cls, path: Path, dtype: str | None = None) -> "TwinFolder":
        """Reads what it is and the header of its weights.

        Raises:
            ValueError: for a folder that is damaged; in one line.
        """
        document = read_json(path / "config.json")
        try:
            family, framework = document["family"], document["framework"]
            model = document["model"] | ({} if dtype is None else {"dtype": dtype})
            config = GPTConfig(**model)
            if framework not in FRAMEWORKS:
                raise ValueError(f"framework {framework!r}, there are flax and torch")
            if family not in FAMILIES:
                raise ValueError(f"family {family!r}, there are {', '.join(FAMILIES)}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"checkpoint {path}/config.json: {error}. It is not as `parity convert` wrote it. "
                "Convert again."
            ) from error
        found = headers(path)
        blank = {name: np.broadcast_to(np.float32(0), x.shape) for name, x in found.items()}
        wanted = flax_shapes(config) if framework == "flax" else torch_shapes(config)
        if problems := different_leaves(wanted, blank):
            raise ValueError(
                f"checkpoint {path}: {'; '.join(problems)}. The weights are not those of its "
                "config.json. Convert again."
            )
        return cls(path, family, config, (), framework)

    def leaves(self, dtype: str | None = None) -> Iterator[tuple[str, np.ndarray]]:
        """See `Weights`."""
        links = links_of(TWINS, torch_shapes(self.config))
        file = self.path / "model.safetensors"
        with suspicious(file), safe_open(file, framework="numpy") as opened:
            for link in links:
                (name,) = link.flax
                if self.framework == "flax":
                    leaf = opened.get_tensor(name)
                else:
                    leaf = link.to_flax({x: opened.get_tensor(x) for x in link.torch})[name]
                yield name, self.finite(name, leaf, dtype)


def write_twin(path: Path, framework: str, source: Weights) -> None:
    """Writes a folder with the weights of one twin, and the tokenizer of the source.

    Raises:
        ValueError: when there is something in the folder already.
    """
    config, leaves = source.config, dict(source.leaves())
    document = ids_of(source.path) | {
        "format": _FORMAT,
        "framework": framework,
        "family": source.family,
        "model": dataclasses.asdict(config),
    }
    tensors: Leaves = leaves
    if framework == "torch":
        links = links_of(TWINS, torch_shapes(config))
        tensors = {name: x for link in links for name, x in link.to_torch(leaves).items()}
    write_folder(path, document, tensors, _FORMAT, source.path)


def open_checkpoint(path: Path, dtype: str | None = None) -> Weights:
    """A folder of transformers, or one that `write_twin` made.

    Raises:
        ValueError: for a folder that is neither, or damaged; in one line.
    """
    document = read_json(path / "config.json")
    kind = TwinFolder if document.get("format") == _FORMAT else Checkpoint
    return kind.open(path, dtype)
