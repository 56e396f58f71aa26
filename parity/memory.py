"""Memory that nobody uses any more."""

import contextlib
import ctypes
import gc


def hand_back_freed_memory() -> None:
    """Frees what nobody refers to, and asks the C library to give it back; only glibc can."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
