"""The device, and whether 64-bit types exist, as a context that jax runs in."""

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax

from parity.frameworks.flax.lift import Log, lifted
from parity.system.memory import share_of_memory_maps

Result = TypeVar("Result")


@contextlib.contextmanager
def jax_scope(dtype: str, device: jax.Device, log: Log | None = None) -> Iterator[None]:
    """Run jax on `device`, with 64-bit types exactly when dtype is float64; lifted with a log."""
    lift = contextlib.nullcontext() if log is None else lifted(log)
    with jax.enable_x64(dtype == "float64"), jax.default_device(device), lift:
        yield


def lowered(run: Callable[[], Result]) -> Result:
    """Run a program; once more with empty caches if jax cannot lower it.

    jax keeps a NumPy constant that a model holds in the type of the scope that met it first, and
    then cannot compile a program of the other one.

    Returns:
        What the program returns.
    """
    try:
        return run()
    except ValueError as error:
        if "Cannot lower jaxpr" not in str(error):
            raise
    # After the handler, whose traceback keeps what is to be forgotten.
    jax.clear_caches()
    gc.collect()
    return run()


def drop_programs_if_many() -> None:
    """Forget all compiled programs once they use half of the memory maps that a process may have.

    What runs for long over many models would otherwise be ended by the kernel.
    """
    if share_of_memory_maps() > 0.5:
        jax.clear_caches()
        gc.collect()
