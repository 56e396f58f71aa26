"""Reduce memory use: return freed memory, keep arrays on disk."""

import contextlib
import ctypes
import gc
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

LARGE = 10_000_000  # numbers, from where on memory is worth more than time

_MMAP_THRESHOLD = -3  # its number in malloc.h


class Sized(Protocol):
    """An array of either framework or of NumPy."""

    @property
    def size(self) -> int:
        """The number of its elements."""


def is_large(arrays: Iterable[Sized]) -> bool:
    """Whether a model of these weights is worth saving memory for."""
    return sum(array.size for array in arrays) > LARGE


def hand_back_freed_memory() -> None:
    """Collect garbage and ask the C library to return freed memory; only glibc can."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def return_freed_memory_at_once() -> None:
    """From now on return every allocation of a megabyte or more when it is freed; only with glibc.

    glibc otherwise keeps up to 32 MB apiece, in a heap that such allocations leave full of holes:
    in a check of gpt2, half a gigabyte. Call it before there are any, in the main program.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 20)


def share_of_memory_maps() -> float:
    """Return how much of the kernel's limit of mappings this process uses; 0.0 where unknown.

    Every compiled program takes some, and a process that reaches the limit, 65,530 on most
    machines, is ended by the next allocation, whatever memory is free.
    """
    try:
        limit = int(Path("/proc/sys/vm/max_map_count").read_text())
        with open("/proc/self/maps", "rb") as maps:
            return sum(1 for _ in maps) / limit
    except (OSError, ValueError):
        return 0.0


def on_disk(leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return copies in temporary files, which vanish with the copies.

    Where the disk has no room for one, the array itself stands in its place.
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
