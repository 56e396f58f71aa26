"""The device, and whether 64-bit types exist, as a context that jax runs in."""

import contextlib
import gc
from collections.abc import Iterator

import jax

from parity.frameworks.flax.lift import Log, lifted
from parity.system.memory import share_of_memory_maps


@contextlib.contextmanager
def jax_scope(dtype: str, device: jax.Device, log: Log | None = None) -> Iterator[None]:
    """Run jax on `device`, with 64-bit types exactly when dtype is float64; lifted with a log."""
    lift = contextlib.nullcontext() if log is None else lifted(log)
    with jax.enable_x64(dtype == "float64"), jax.default_device(device), lift:
        yield


def drop_programs_if_many() -> None:
    """Forget all compiled programs once they use half of the memory maps that a process may have.

    What runs for long over many models would otherwise be ended by the kernel.
    """
    if share_of_memory_maps() > 0.5:
        jax.clear_caches()
        gc.collect()
