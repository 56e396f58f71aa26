"""A checkpoint is one safetensors file: written beside and renamed, checked when it is read."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from parity.frameworks.leaves import Leaves
from parity.system.files import write_file

FORMAT = "parity-checkpoint-1"


def write_checkpoint(path: Path, states: Mapping[str, Leaves], about: Mapping[str, str]) -> None:
    """Write the states of trainers, by framework.

    Args:
        path: of the file; its folder exists.
        states: arrays by name, for each framework.
        about: text to keep in the file, by name.

    Raises:
        ValueError: for numbers that are not finite, which must not outlive the run.
        OSError: when the disk refuses it.
    """
    tensors = {f"{side}/{name}": x for side, state in states.items() for name, x in state.items()}
    _check_finite(path, tensors)
    write_file(path, save(tensors, metadata={"format": FORMAT} | dict(about)))


def read_checkpoint(path: Path) -> tuple[dict[str, Leaves], dict[str, str]]:
    """Return the states and the text that `write_checkpoint` wrote.

    Raises:
        ValueError: for a file that is truncated, of another kind, or holds numbers that are not
            finite; in one line.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT:
                raise ValueError(
                    f"checkpoint {path}: written by something else. A checkpoint has the format "
                    f"{FORMAT}. Give one that `parity train` wrote."
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError as error:
        raise ValueError(f"checkpoint {path}: no such file. Give one that exists.") from error
    except (SafetensorError, OSError, struct.error, json.JSONDecodeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"checkpoint {path}: cannot be read ({reason}). The file is truncated or damaged. "
            "Delete it to go back to the one before."
        ) from error
    _check_finite(path, tensors)
    states: dict[str, Leaves] = {}
    for name, tensor in tensors.items():
        side, _, leaf = name.partition("/")
        states.setdefault(side, {})[leaf] = tensor
    return states, about


def _check_finite(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    for name, tensor in tensors.items():
        if not np.issubdtype(tensor.dtype, np.floating):
            continue
        if bad := int(np.count_nonzero(~np.isfinite(tensor))):
            raise ValueError(
                f"checkpoint {path}: {bad} of {tensor.size} numbers in {name} are not finite. "
                "Nothing can be trained from them. Go back to the checkpoint before."
            )
