"""The device, and whether 64-bit types exist, as a context that jax runs in."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def jax_scope(dtype: str, device: jax.Device) -> Iterator[None]:
    """Run jax on `device`, with 64-bit types exactly when dtype is float64."""
    with jax.enable_x64(dtype == "float64"), jax.default_device(device):
        yield
