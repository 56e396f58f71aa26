"""Programs that jax has compiled, kept from one run of a command to the next."""

import os
import sys
from pathlib import Path

_BYTES = 1 << 30  # at most; the ones that were not used for longest go first


def keep_programs() -> None:
    """Have jax keep what it compiles in the user's cache folder, and look there first.

    Settings of jax in the environment are left as they are: `JAX_COMPILATION_CACHE_DIR=` keeps
    nothing. Call it before jax is imported; later it does nothing.
    """
    if "jax" in sys.modules:
        return
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(base) / "parity" / "jax"))
    # Most programs of a check compile in less than the second from which jax keeps them.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(_BYTES))
