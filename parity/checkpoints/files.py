"""Files of a checkpoint folder: JSON, and safetensors that are checked as they are read."""

import contextlib
import dataclasses
import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

Json, JsonMapping = dict[str, Any], Mapping[str, Any]  # objects of a JSON file
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


def read_json(path: Path) -> Json:
    """Return the JSON object in a file.

    Raises:
        ValueError: in one line.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(_without(path)) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")[:150]
        raise ValueError(
            _pointer(path) or f"{path}: cannot be read ({reason}). Get the file again."
        ) from error
    if not isinstance(document, dict):
        raise ValueError(f"{path}: a {type(document).__name__}, not an object. Get the file again.")
    return document


def listed(problems: Iterable[str], most: int = 5, length: int = 150) -> str:
    """Return the first problems and the number of the others, in a line that fits a screen."""
    found, shown = list(problems), list[str]()
    for problem in found[:most]:
        text = problem if len(problem) <= length else f"{problem[: length - 3]}..."
        if shown and sum(map(len, (*shown, text))) > length:
            break
        shown.append(text)
    rest = len(found) - len(shown)
    return "; ".join(shown) + (f"; and {rest:,} more" if rest else "")


def _without(path: Path) -> str:
    """Say what a folder without a file of JSON is, and what to give in its place."""
    folder = path.parent
    where = f"checkpoint {folder}"
    if not folder.is_dir():
        return f"{where}: no such folder. A checkpoint is a folder. Name one that is there."
    names = sorted(x.name for x in folder.iterdir())
    if "adapter_config.json" in names:
        return (
            f"{where}: an adapter (adapter_config.json), the difference to a model that is not "
            "here. Merge it into its model (merge_and_unload of peft), save that and give it."
        )
    if gguf := next((x for x in names if x.endswith(".gguf")), None):
        return (
            f"{where}: {gguf} is GGUF, a format of llama.cpp with quantised weights. It is not "
            "read. Get the original as safetensors with its config.json."
        )
    return (
        f"{where}: no {path.name}. A folder of transformers has one, and weights in safetensors. "
        "Give such a folder."
    )


def _pointer(file: Path) -> str | None:
    """Return what is wrong with a file that only points to one in Git LFS."""
    with contextlib.suppress(OSError):
        with file.open("rb") as opened:
            if opened.read(40).startswith(b"version https://git-lfs"):
                return (
                    f"{file}: a pointer of Git LFS, and not the file itself. Run git lfs pull in "
                    "its folder, or download the file."
                )
    return None


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
                f"checkpoint {path}: {listed(missing)} {'is' if len(missing) == 1 else 'are'} "
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
    if (path / "adapter_config.json").is_file() or any(path.glob("*.gguf")):
        raise ValueError(_without(path / CONFIG))
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
        reason = str(error).strip().partition("\n")[0].rstrip(".")[:150]
        raise ValueError(
            _pointer(file)
            or f"{file}: cannot be read ({reason}). The file is truncated or damaged. Get it again."
        ) from error
