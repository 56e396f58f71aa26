"""A folder with one twin's weights under its own names, as `parity convert` writes it."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

import numpy as np

from flax_gpt import GPTConfig
from parity.checkpoints.families import FAMILIES
from parity.checkpoints.files import Header, headers, read_json
from parity.checkpoints.folder import Checkpoint
from parity.checkpoints.weights import Weights, blank, checked, flax_blanks, twin_blanks
from parity.checkpoints.write import ids_of, write_folder
from parity.frameworks.leaves import Leaves, different_leaves
from parity.twins.names import FRAMEWORKS
from parity.weights.tables import TWINS
from parity.weights.weight_map import links_of

_FORMAT = "parity-model-1"


@dataclasses.dataclass(frozen=True)
class TwinFolder:
    """A folder that `write_twin` made; see `Weights`.

    Attributes:
        framework: of the twin whose names the weights have.
    """

    path: Path
    family: str
    config: GPTConfig
    notes: tuple[str, ...]
    framework: str
    _tensors: Mapping[str, Header]

    @classmethod
    def open(cls, path: Path, dtype: str | None = None) -> Self:
        """Return a folder whose config.json and headers of weights have been read.

        Args:
            path: the folder.
            dtype: of the model; as stored when None.

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
        given = {name: blank(x.shape) for name, x in found.items()}
        expected = flax_blanks(config) if framework == "flax" else twin_blanks(config)
        if problems := different_leaves(expected, given):
            raise ValueError(
                f"checkpoint {path}: {'; '.join(problems)}. The weights are not those of its "
                "config.json. Convert again."
            )
        return cls(path, family, config, (), framework, found)

    def leaves(self, dtype: str | None = None) -> Iterator[tuple[str, np.ndarray]]:
        """See `Weights`."""
        for link in links_of(TWINS, twin_blanks(self.config)):
            (name,) = link.flax
            if self.framework == "flax":
                leaf = self._tensors[name].read()
            else:
                leaf = link.to_flax({x: self._tensors[x].read() for x in link.torch})[name]
            yield name, checked(self, name, leaf, dtype)


def write_twin(path: Path, framework: str, source: Weights) -> None:
    """Write a folder with the weights of one twin, and the tokenizer of the source.

    Args:
        path: of the new folder.
        framework: of the twin.
        source: of the weights.

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
        links = links_of(TWINS, twin_blanks(config))
        tensors = {name: x for link in links for name, x in link.to_torch(leaves).items()}
    write_folder(path, document, tensors, _FORMAT, source.path)


def open_checkpoint(path: Path, dtype: str | None = None, adapter: Path | None = None) -> Weights:
    """Return an opened folder of transformers, or one that `write_twin` made.

    Args:
        path: the folder.
        dtype: of the model; as stored when None.
        adapter: a folder of peft whose products are added to the weights of transformers.

    Raises:
        ValueError: for a folder that is neither, or damaged; in one line.
    """
    document = read_json(path / "config.json")
    if document.get("format") != _FORMAT:
        return Checkpoint.open(path, dtype, adapter)
    if adapter is not None:
        raise ValueError(
            f"adapter {adapter}: {path} has the names of a twin. An adapter has those of "
            "transformers. Merge it first, and convert after."
        )
    return TwinFolder.open(path, dtype)
