"""What this machine can do at best: the roofs that steps are held against.

How fast it multiplies matrices bounds a training step, how fast it reads memory a decoding step.
"""

import dataclasses
import math
import os
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch

from parity.frameworks.flax.scope import jax_scope
from parity.system.devices import Devices, pinned_precision
from parity.system.memory import hand_back_freed_memory

SIZES = 512, 1024, 2048, 4096, 8192
# A size that takes longer is the last one tried: small products fill a CPU, a GPU wants large ones.
_LONG_S = 0.05
# Products are repeated until a turn is this long, so that neither clock nor launch counts.
_TURN_S = 0.05
_SAMPLE_S = 0.002  # between two looks at the memory in use


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


class Bandwidth:
    """How fast this machine reads memory, by the fastest of a few programs that do little else.

    On a CPU these are a sum in either framework and a matrix times a vector in XLA, over one array
    that both share; on a GPU a copy, of which both the read and the written bytes count.

    Args:
        devices: whose memory.
        num_bytes: of the array, in float32: many times what any cache holds.
        repeats: of each program per measurement, of which the best counts.
    """

    def __init__(self, devices: Devices, num_bytes: int = 1 << 29, repeats: int = 2):
        self._repeats = repeats
        columns = 1 << 10
        rows = max(1, num_bytes // (4 * columns))
        # Ones and not zeros: pages of zeros that nobody has written are one page, read from cache.
        shared = torch.ones(rows, columns, device=devices.torch)
        if devices.torch.type == "cuda":
            target = torch.empty_like(shared)

            def copy() -> None:
                target.copy_(shared)
                torch.cuda.synchronize(devices.torch)

            self._programs = {"torch copy": (copy, 2 * shared.nbytes)}
            return
        with jax_scope("float32", devices.flax), pinned_precision():
            array = jnp.from_dlpack(shared)
            vector = jnp.ones(rows, jnp.float32)
            add = jax.jit(jnp.sum).lower(array).compile()
            multiply = jax.jit(jnp.matmul).lower(vector, array).compile()
        self._programs = {
            "torch sum": (lambda: torch.sum(shared), shared.nbytes),
            "XLA sum": (lambda: jax.block_until_ready(add(array)), shared.nbytes),
            "XLA matvec": (lambda: jax.block_until_ready(multiply(vector, array)), shared.nbytes),
        }
        for program, _ in self._programs.values():
            program()

    def rates(self) -> dict[str, float]:
        """Bytes per second of every program, now."""
        return {
            name: num_bytes / min(_seconds(program) for _ in range(self._repeats))
            for name, (program, num_bytes) in self._programs.items()
        }


class MemoryGrowth:
    """Watches, inside a `with`, by how much the memory in use grows at its highest.

    On a CPU this is the resident memory of a process, sampled by a thread, and Linux alone tells
    it; on a GPU the memory that the device has given away. What an earlier part of the process has
    freed and kept is taken again without being seen, so freed memory is handed back first.

    Args:
        devices: whose memory.
        pid: of the process; None for this one.

    Attributes:
        num_bytes: the growth; None where it cannot be told.
    """

    def __init__(self, devices: Devices, pid: int | None = None):
        self._device, self._process = devices.torch, "self" if pid is None else str(pid)
        self.num_bytes: int | None = None

    def __enter__(self) -> "MemoryGrowth":
        hand_back_freed_memory()
        self._before = self._highest = self._in_use()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if self._before is not None:
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        if self._before is None:
            return
        self._done.set()
        self._thread.join()
        self.num_bytes = max(self._highest, self._in_use()) - self._before

    def _watch(self) -> None:
        while not self._done.wait(_SAMPLE_S):
            self._highest = max(self._highest, self._in_use())

    def _in_use(self) -> int | None:
        if self._device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self._device)
            return total - free
        try:
            pages = Path("/proc", self._process, "statm").read_text().split()[1]
            return int(pages) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, ValueError, IndexError):
            return None


def load_average() -> float | None:
    """Average number of processes that wanted to run in the last minute; None where unknown."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _seconds(program: Callable[[], object]) -> float:
    start = time.perf_counter()
    program()
    return time.perf_counter() - start


class Compilations:
    """Counts, inside a `with`, the programs that XLA compiles, and how long that takes.

    Attributes:
        count: programs.
        seconds: during which one was traced, lowered or compiled; nested ones count once.
    """

    def __init__(self):
        self.count, self.seconds = 0, 0.0
        self._spans: list[tuple[float, float]] = []

    def __enter__(self) -> "Compilations":
        jax.monitoring.register_event_time_span_listener(self._note)
        return self

    def __exit__(self, *_) -> None:
        jax.monitoring.unregister_event_time_span_listener(self._note)
        reached = -math.inf
        for start, end in sorted(self._spans):
            self.seconds += max(0.0, end - max(start, reached))
            reached = max(reached, end)

    def _note(self, event: str, start: float, end: float, **_) -> None:
        if event.startswith("/jax/core/compile/"):
            self._spans.append((start, end))
            self.count += event.endswith("backend_compile_duration")
