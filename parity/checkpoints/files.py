"""Files of a checkpoint folder: JSON, and safetensors that are checked as they are read."""

import contextlib
import dataclasses
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

CONFIG, SINGLE = "config.json", "model.safetensors"
_INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Header:
    """One tensor of a file: its name there, its shape, and the name of its stored dtype."""

    file: Path
    name: str
    shape: tuple[int, ...]
    kind: str

    def read(self) -> np.ndarray:
        """Return the tensor.

        Raises:
            ValueError: for a file that ends too early.
        """
        with readable(self.file), safe_open(self.file, framework="numpy") as opened:
            return opened.get_tensor(self.name)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

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
    """Return the header of every tensor, from one file or the shards of an index.

    Raises:
        ValueError: for weights that are missing, damaged, or only there as pickles.
    """
    if (path / SINGLE).is_file():  # before the index, which may be older
        return file_headers(path / SINGLE)
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
            found |= file_headers(path / file)
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
    raise ValueError(f"checkpoint {path}: no {SINGLE} and no {_INDEX}. Give a folder with weights.")


def file_headers(file: Path) -> dict[str, Header]:
    """Return the header of every tensor of one file.

    Raises:
        ValueError: for a file that cannot be read.
    """
    with readable(file), safe_open(file, framework="numpy") as opened:
        found = {}
        for name in opened.keys():
            part = opened.get_slice(name)
            found[name] = Header(file, name, tuple(part.get_shape()), str(part.get_dtype()))
        return found


@contextlib.contextmanager
def readable(file: Path) -> Iterator[None]:
    """Turn whatever can be wrong with a safetensors file into one line.

    Raises:
        ValueError: for a file that cannot be read.
    """
    try:
        yield
    except (SafetensorError, OSError, struct.error, json.JSONDecodeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{file}: cannot be read ({reason}). The file is truncated or damaged. Get it again."
        ) from error
