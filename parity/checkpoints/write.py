"""Write checkpoint folders, whole or not at all."""

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.numpy import save_file

from flax_gpt import GPTConfig
from parity.checkpoints.config import write_config
from parity.checkpoints.families import FAMILIES
from parity.checkpoints.files import CONFIG, SINGLE, read_json
from parity.checkpoints.weights import torch_blanks
from parity.frameworks.leaves import Leaves
from parity.weights.weight_map import resolve

# What else belongs to a checkpoint and is copied unread.
_COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "added_tokens.json",
    "chat_template.jinja",
)


def save(
    path: Path, family: str, config: GPTConfig, leaves: Leaves, source: Path | None = None
) -> None:
    """Write a folder that transformers loads.

    Args:
        path: of the new folder, which must not be there, or be empty.
        family: a key of FAMILIES.
        config: of the model.
        leaves: of the Flax twin, in the type to store.
        source: a folder whose tokenizer is copied.

    Raises:
        ValueError: when the family has no such models, or the folder is in use.
    """
    table = FAMILIES[family]
    # The library has ids of its own where these are missing, and refuses those beyond a vocabulary.
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")) | ids_of(source)
    document = ids | write_config(table, config, config.dtype)
    rules = table.rules(config)
    weight_map = resolve(rules, torch_blanks(rules, leaves), leaves)
    tensors = dataclasses.replace(weight_map, ties=()).to_torch(leaves)
    write_folder(path, document, tensors, "pt", source)


def write_folder(
    path: Path, document: Mapping[str, object], tensors: Leaves, kind: str, source: Path | None
) -> None:
    """Write a folder with a config.json, one file of weights, and the tokenizer of another folder.

    Args:
        path: of the new folder.
        document: content of config.json.
        tensors: by their names in the file.
        kind: of these names, for the file's metadata.
        source: the other folder; None for no tokenizer.

    Raises:
        ValueError: see `check_new`.
    """
    with new_folder(path) as folder:
        (folder / CONFIG).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, folder / SINGLE, metadata={"format": kind})
        found = [] if source is None else [source / name for name in _COPIED]
        for file in found:
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
        for file in folder.iterdir():
            file.chmod(0o644)  # safetensors lets nobody else read what it writes


def ids_of(folder: Path | None) -> dict[str, object]:
    """Return the ids that begin, end and pad texts, by a folder's config.json."""
    if folder is None:
        return {}
    return {
        name: value
        for name, value in read_json(folder / CONFIG).items()
        if name.endswith("_token_id")
    }


def check_new(path: Path) -> None:
    """Refuse a folder that could not be made after all the work.

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
    """Make a folder beside `path` that is renamed at the end; on an error nothing is left of it.

    Yields:
        The folder to write into.

    Raises:
        ValueError: see `check_new`.
        OSError: with the folder in its message, when the disk refuses it.
    """
    check_new(path)
    folder = Path(tempfile.mkdtemp(dir=path.absolute().parent, prefix=f".{path.name}."))
    try:
        yield folder
        os.chmod(folder, 0o755)
        if path.exists():
            path.rmdir()
        folder.rename(path)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):  # a full disk, reported without a name
            raise OSError(
                f"{path}: {error}. Nothing was written. Make room or name another."
            ) from error
        raise
