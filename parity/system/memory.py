"""Memory that nobody uses any more."""

import contextlib
import ctypes
import gc
import os
import tempfile
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

LARGE = 10_000_000  # numbers, from where on memory is worth more than time

_MMAP_THRESHOLD = -3  # its number in malloc.h


def is_large(arrays: Iterable[Any]) -> bool:
    """Whether a model of these weights is one that memory is saved for."""
    return sum(array.size for array in arrays) > LARGE


def hand_back_freed_memory() -> None:
    """Frees what nobody refers to, and asks the C library to give it back; only glibc can."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def return_freed_memory_at_once() -> None:
    """From now on whatever takes a megabyte goes back as soon as it is freed; only with glibc.

    It otherwise keeps up to 32 MB apiece, in a heap that such pieces leave full of holes: in a
    check of gpt2, half a gigabyte. To be called before there are any, by who owns the process.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 20)


def on_disk(leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Copies in files that go when the copies do, for what is not needed soon.

    Where there is no room for them, the arrays themselves.
    """
    return {name: _on_disk(array) for name, array in leaves.items()}


def _on_disk(array: np.ndarray) -> np.ndarray:
    if not array.size:  # nothing to map
        return array
    with tempfile.TemporaryFile() as file:
        try:
            # To write into a mapped file for which the disk has no room ends the process.
            os.posix_fallocate(file.fileno(), 0, array.nbytes)
        except (OSError, AttributeError):
            return array
        copy = np.memmap(file, array.dtype, "r+", shape=array.shape)
    copy[...] = array
    return copy
