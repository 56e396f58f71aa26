"""A checkpoint folder of transformers: opened with suspicion, read tensor by tensor, written whole
or not at all.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

import flax_gpt
import torch_gpt
from flax_gpt import GPTConfig
from parity.checkpoints.config import read_config, write_config
from parity.checkpoints.families import FAMILIES, Family
from parity.frameworks.flax.scope import jax_scope
from parity.frameworks.leaves import Leaves, dotted
from parity.frameworks.torch.leaves import numpy_view
from parity.weights.tables import TWINS
from parity.weights.weight_map import TransplantError, WeightMap, links_of, resolve

# Their names of the types that weights may be stored in.
STORED = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_CONFIG, _INDEX, _SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
_HEAD = "lm_head.weight"
# What else belongs to a checkpoint and goes along unread.
_BESIDE = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
    "vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Header:
    """What a file says of one tensor: its name there, its shape, and the type it is stored in."""

    file: Path
    name: str
    shape: tuple[int, ...]
    kind: str


@dataclasses.dataclass(frozen=True)
class Weights:
    """A folder that is understood: every tensor has its place, and none has been read yet.

    Attributes:
        path: the folder.
        family: a key of FAMILIES, whose rules hold.
        config: of the model, in the type that the folder was stored in or that was asked for.
        notes: what was left aside, a line each.
    """

    path: Path
    family: str
    config: GPTConfig
    notes: tuple[str, ...]

    def leaves(self, dtype: str | None = None) -> Iterator[tuple[str, np.ndarray]]:
        """Flax leaves by name, one tensor after the other, so that few are held at once.

        Args:
            dtype: to cast to; None for that of the config.

        Raises:
            ValueError: for numbers that are not finite, or a file that ends too early.
        """
        raise NotImplementedError

    def flax(self, device: jax.Device | None = None) -> nnx.Module:
        """The Flax twin with these weights.

        Raises:
            ValueError: see `leaves`.
        """
        device = device or jax.devices("cpu")[0]
        with jax_scope(self.config.dtype, device):
            model = nnx.eval_shape(lambda: flax_gpt.GPT(self.config))
            flat = nnx.to_flat_state(nnx.state(model))
            by_name = {dotted(path): variable for path, variable in flat}
            for name, leaf in self.leaves():
                by_name[name].set_value(jnp.asarray(leaf))
            return model

    def torch(self, device: torch.device | None = None) -> torch.nn.Module:
        """The PyTorch twin with these weights.

        Raises:
            ValueError: see `leaves`.
        """
        with torch.device("meta"):  # nothing is drawn or zeroed that will be written over
            model = torch_gpt.GPT(torch_gpt.GPTConfig(**dataclasses.asdict(self.config)))
        model = model.to_empty(device="cpu")
        targets = dict(model.named_parameters())
        links = {link.flax: link for link in links_of(TWINS, targets)}
        for name, leaf in self.leaves():
            for target, moved in links[(name,)].to_torch({name: leaf}).items():
                np.copyto(numpy_view(targets[target]), moved)
        return model if device is None else model.to(device)

    def finite(self, name: str, leaf: np.ndarray, dtype: str | None) -> np.ndarray:
        """A leaf in the type that is wanted.

        Raises:
            ValueError: for numbers that are not finite.
        """
        bad = int(np.count_nonzero(~np.isfinite(leaf)))
        if bad:
            raise ValueError(
                f"checkpoint {self.path}: {bad} of {leaf.size} numbers in {name} are not finite. "
                "Nothing can be computed with them. Get the file again."
            )
        dtype = dtype or self.config.dtype
        with np.errstate(over="ignore"):  # which is an error of ours, in the next line
            cast = leaf.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype, copy=False)
        if cast is not leaf and not np.all(np.isfinite(cast)):
            raise ValueError(
                f"checkpoint {self.path}: numbers in {name} are too large for {dtype}. They would "
                "become infinite. Take a wider type."
            )
        return cast


@dataclasses.dataclass(frozen=True)
class Checkpoint(Weights):
    """A folder of transformers.

    Attributes:
        weight_map: torch names of the family to flax leaves.
    """

    weight_map: WeightMap
    _files: Mapping[str, tuple[Path, str]]  # by name of the family, the file and the name in it

    @classmethod
    def open(cls, path: Path, dtype: str | None = None) -> "Checkpoint":
        """Reads config.json and the headers of all weights.

        Args:
            path: the folder.
            dtype: of the model; None for the widest that a tensor is stored in.

        Raises:
            ValueError: for a folder that is not whole, not safe or not understood; all problems in
                one line.
        """
        document = read_json(path / _CONFIG)
        where = f"checkpoint {path}"
        family, fields, problems, notes = read_config(document, f"{where}/{_CONFIG}")
        tensors = headers(path)
        named = _named(tensors, family, problems)
        if not problems:
            try:
                config = GPTConfig(**fields, dtype=dtype or "float32")
            except (ValueError, TypeError) as error:
                problems.append(str(error))
        if problems:
            raise ValueError(f"{where}: {'; '.join(problems)}. Give a checkpoint without these.")
        rules = family.rules(config)
        aliases = {alias: original for alias, original in rules.ties if alias in named}
        read = {name: x for name, x in named.items() if not rules.is_ignored(name)}
        problems += [
            f"{x.name} is stored as {x.kind}, there are {', '.join(STORED)}"
            for x in read.values()
            if x.kind not in STORED
        ]
        if problems:
            raise ValueError(f"{where}: {'; '.join(problems)}. Give a checkpoint without these.")
        if dtype is None:
            config = dataclasses.replace(config, dtype=_widest({x.kind for x in read.values()}))
        blank = {name: _blank(x.shape) for name, x in read.items() if name not in aliases}
        try:
            weight_map = resolve(rules, blank, flax_shapes(config))
        except TransplantError as error:
            raise ValueError(
                f"{where}: {'; '.join(error.problems)}. Every tensor has one place in a "
                f"{family.name} with this config.json. Give weights that belong to it."
            ) from error
        files = {name: (x.file, x.name) for name, x in read.items()}
        checkpoint = cls(path, family.name, config, tuple(notes), weight_map, files)
        checkpoint._check_ties(aliases)
        return checkpoint

    def leaves(self, dtype: str | None = None) -> Iterator[tuple[str, np.ndarray]]:
        """See `Weights`."""
        for link in self.weight_map.links:
            read = {x: self.finite(self._files[x][1], self._read(x), dtype) for x in link.torch}
            yield from link.to_flax(read, self.weight_map.flax_shapes).items()

    def _read(self, name: str) -> np.ndarray:
        file, inside = self._files[name]
        with suspicious(file), safe_open(file, framework="numpy") as opened:
            return opened.get_tensor(inside)

    def _check_ties(self, aliases: Mapping[str, str]) -> None:
        """A head that is saved although it is tied must be the embedding."""
        for alias, original in aliases.items():
            if not np.array_equal(self._read(alias), self._read(original)):
                raise ValueError(
                    f"checkpoint {self.path}: {alias} is not {original}, although config.json says "
                    "that they are tied. One of them is wrong. Say tie_word_embeddings: false to "
                    "use both."
                )


def save(
    path: Path, family: str, config: GPTConfig, leaves: Leaves, source: Path | None = None
) -> None:
    """Writes a folder that transformers loads.

    Args:
        path: of the new folder, which must not be there, or be empty.
        family: a key of FAMILIES.
        config: of the model.
        leaves: of the Flax twin, in the type to store.
        source: a folder whose tokenizer goes along.

    Raises:
        ValueError: when the family has no such models, or the folder is in use.
    """
    table = FAMILIES[family]
    document = ids_of(source) | write_config(table, config, config.dtype)
    rules = table.rules(config)
    weight_map = resolve(rules, _torch_names(rules, leaves), leaves)
    tensors = dataclasses.replace(weight_map, ties=()).to_torch(leaves)
    write_folder(path, document, tensors, "pt", source)


def write_folder(
    path: Path, document: Mapping[str, Any], tensors: Leaves, kind: str, source: Path | None
) -> None:
    """Writes a folder with a config.json, one file of weights, and the tokenizer of another folder.

    Args:
        path: of the new folder.
        document: what config.json says.
        tensors: by their names in the file.
        kind: which names these are, for the file's own note.
        source: the other folder; None for no tokenizer.

    Raises:
        ValueError: see `check_new`.
    """
    with new_folder(path) as folder:
        (folder / _CONFIG).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, folder / _SINGLE, metadata={"format": kind})
        for name in _BESIDE if source is not None else ():
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        for file in folder.iterdir():
            file.chmod(0o644)  # safetensors lets nobody else read what it writes


def ids_of(folder: Path | None) -> dict[str, Any]:
    """The ids that begin, end and pad texts, by a folder's config.json."""
    if folder is None:
        return {}
    return {
        name: value
        for name, value in read_json(folder / _CONFIG).items()
        if name.endswith("_token_id")
    }


def check_new(path: Path) -> None:
    """Refuses a folder that could not be made after all the work.

    Raises:
        ValueError: when there is something in `path`, or no folder to make it in.
    """
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(
            f"{path}: there is something already. Nothing is written over. Name another."
        )
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path}: no folder {path.parent}. Make it or name another.")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` that takes its name at the end; nothing is left of it on an error.

    Raises:
        ValueError: see `check_new`.
    """
    check_new(path)
    folder = Path(tempfile.mkdtemp(dir=path.absolute().parent, prefix=f".{path.name}."))
    try:
        yield folder
        os.chmod(folder, 0o755)
        if path.exists():
            path.rmdir()
        folder.rename(path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _torch_names(rules: Any, leaves: Leaves) -> dict[str, np.ndarray]:
    """Blank tensors of the family for all leaves, by its rules read from right to left."""
    shapes = {name: leaf.shape for name, leaf in leaves.items()}
    return {
        name: _blank(link.torch_shape(shapes), leaves[link.flax[0]].dtype)
        for rule in rules.rules
        for link in rule.links_of_flax(leaves)
        for name in link.torch
    }


def flax_shapes(config: GPTConfig) -> Leaves:
    """Leaves of the Flax twin in float32, which take no memory."""
    with jax_scope("float32", jax.devices("cpu")[0]):
        config = dataclasses.replace(config, dtype="float32")
        state = nnx.state(nnx.eval_shape(lambda: flax_gpt.GPT(config)))
    return {dotted(path): _blank(x.shape) for path, x in nnx.to_flat_state(state)}


def torch_shapes(config: GPTConfig) -> Leaves:
    """Leaves of the PyTorch twin in float32, which take no memory."""
    return _torch_names(TWINS, flax_shapes(config))


def _blank(shape: Any, dtype: Any = np.float32) -> np.ndarray:
    """An array of that shape that takes no memory."""
    return np.broadcast_to(np.zeros((), dtype), tuple(shape))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: in one line.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"checkpoint {path.parent}: no {path.name}. A folder of transformers has one, and "
            "weights in safetensors. Give such a folder."
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: cannot be read ({reason}). Get the file again.") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path}: a {type(document).__name__}, not an object. Get the file again.")
    return document


def headers(path: Path) -> dict[str, Header]:
    """Every tensor by its name, from one file or the shards of an index.

    Raises:
        ValueError: for weights that are missing, damaged, or only there as pickles.
    """
    if (path / _SINGLE).is_file():  # first, as the library has it: an index may be older
        return _header(path / _SINGLE)
    if (path / _INDEX).is_file():
        index = read_json(path / _INDEX).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(x, str) for x in index.values()):
            raise ValueError(f"{path / _INDEX}: no weight_map of names. Get the file again.")
        outside = [x for x in index.values() if Path(x).name != x]
        if outside:
            raise ValueError(
                f"{path / _INDEX}: {outside[0]!r} is not in the folder. Shards lie beside their "
                "index. Get the files from somewhere else."
            )
        missing = sorted({x for x in index.values() if not (path / x).is_file()})
        if missing:
            raise ValueError(
                f"checkpoint {path}: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} "
                "missing. The index names them. Get them again."
            )
        found = {}
        for file in sorted(set(index.values())):
            found |= _header(path / file)
        if set(found) != set(index):
            names = ", ".join(sorted(set(found) ^ set(index))[:5])
            raise ValueError(
                f"checkpoint {path}: {names}: the index and the shards do not agree. They are of "
                "different checkpoints. Get them again."
            )
        return found
    pickles = sorted(x.name for x in path.glob("*") if x.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        raise ValueError(
            f"checkpoint {path}: only {pickles[0]}, a pickle, which can run any code when it is "
            "read. It is not opened. Get the weights as safetensors."
        )
    raise ValueError(
        f"checkpoint {path}: no {_SINGLE} and no {_INDEX}. Give a folder with weights."
    )


def _header(file: Path) -> dict[str, Header]:
    with suspicious(file), safe_open(file, framework="numpy") as opened:
        found = {}
        for name in opened.keys():
            part = opened.get_slice(name)
            found[name] = Header(file, name, tuple(part.get_shape()), str(part.get_dtype()))
        return found


@contextlib.contextmanager
def suspicious(file: Path) -> Iterator[None]:
    """What can be wrong with a safetensors file, in one line.

    Raises:
        ValueError: when it is.
    """
    try:
        yield
    except (SafetensorError, OSError, struct.error, json.JSONDecodeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{file}: cannot be read ({reason}). The file is truncated or damaged. Get it again."
        ) from error


def _named(tensors: Mapping[str, Header], family: Family, problems: list[str]) -> dict[str, Header]:
    """Tensors by the names of the whole model; a base model is saved without its prefix."""
    found: dict[str, Header] = {}
    for name, x in tensors.items():
        whole = name if name.startswith(family.prefix) or name == _HEAD else family.prefix + name
        if whole in found:
            problems.append(f"{name} and {found[whole].name} are one tensor")
        found[whole] = x
    return found


def _widest(kinds: set[str]) -> str:
    """The type that holds numbers of all these without rounding them."""
    if kinds == {"F16"} or kinds == {"BF16"}:
        return STORED[kinds.pop()]
    return "float64" if "F64" in kinds else "float32"
