"""How fast this machine multiplies matrices: the roof that a training step is held against."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch

from parity.environment import Devices, jax_scope, pinned_precision

SIZES = 512, 1024, 2048, 4096, 8192
# A size that takes longer is the last one tried: small products fill a CPU, a GPU wants large ones.
_LONG_S = 0.05
# Products are repeated until a turn is this long, so that neither clock nor launch counts.
_TURN_S = 0.05


@dataclasses.dataclass(frozen=True)
class Matmul:
    """A product of two square matrices in one framework.

    Attributes:
        framework: flax or torch.
        size: rows and columns of both.
        run: multiplies so often, one product after the other, and waits for the last.
        times: products in a turn.
    """

    framework: str
    size: int
    run: Callable[[int], None]
    times: int = 1

    def rate(self) -> float:
        """FLOP/s of one turn; a product of size n has 2 n**3."""
        start = time.perf_counter()
        self.run(self.times)
        return self.times * 2 * self.size**3 / (time.perf_counter() - start)


def best_matmul(
    framework: str,
    dtype: str,
    devices: Devices,
    sizes: tuple[int, ...] = SIZES,
    repeats: int = 3,
) -> Matmul:
    """The size that a framework multiplies fastest, by the median of a few turns.

    Args:
        framework: flax or torch.
        dtype: of the matrices, by name. float32 is multiplied in full, not as TF32.
        devices: where to multiply.
        sizes: to try, in rising order.
        repeats: turns of every size.
    """
    make = _flax_product if framework == "flax" else _torch_product
    best, fastest = None, 0.0
    for size in sizes:
        with pinned_precision():
            run = make(size, dtype, devices)
        run(1)  # compiles, and wakes the threads
        start = time.perf_counter()
        run(1)
        seconds = time.perf_counter() - start
        found = Matmul(framework, size, run, max(1, math.ceil(_TURN_S / seconds)))
        with pinned_precision():
            rate = statistics.median(found.rate() for _ in range(repeats))
        if rate > fastest:
            best, fastest = found, rate
        if seconds > _LONG_S:
            break
    return best


def _flax_product(size: int, dtype: str, devices: Devices) -> Callable[[int], None]:
    with jax_scope(dtype, devices.flax):
        a, b = (jnp.asarray(x).astype(dtype) for x in _matrices(size))
        product = jax.jit(jnp.matmul).lower(a, b).compile()

    def run(times: int) -> None:
        found = a
        for _ in range(times):
            found = product(found, b)
        jax.block_until_ready(found)

    return run


def _torch_product(size: int, dtype: str, devices: Devices) -> Callable[[int], None]:
    a, b = (torch.from_numpy(x).to(devices.torch, getattr(torch, dtype)) for x in _matrices(size))

    def run(times: int) -> None:
        found = a
        for _ in range(times):
            found = found @ b
        if devices.torch.type == "cuda":
            torch.cuda.synchronize(devices.torch)

    return run


def _matrices(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Two matrices; multiplying by the second again and again keeps numbers near 1."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((size, size), np.float32) for _ in range(2))
    return a, b / np.float32(math.sqrt(size))
