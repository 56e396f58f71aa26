"""What this machine can do at best, and what a piece of work takes of it.

Its matrix product rate bounds a training step, its read bandwidth a decoding step.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import math
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch

from parity.system.devices import Devices, fingerprint
from parity.system.memory import hand_back_freed_memory

SIZES = 512, 1024, 2048, 4096, 8192
# A size that takes longer is the last one tried: small products fill a CPU, a GPU wants large ones.
_LONG_S = 0.05
# Products are repeated for this long, so that neither clock nor launch counts.
_MATMUL_S = 0.05
_REPEATS = 3
BANDWIDTH_BYTES = 1 << 29  # many times the size of any processor cache
_READS = 2  # of each program per measurement, of which the best counts
_SAMPLE_S = 0.002  # between two looks at the memory in use
_VARIABLES = "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "XLA_FLAGS"


class Unavailable(Exception):
    """This machine cannot run a decoder or a training step; the message says why."""


def environment(devices: Devices, libraries: Sequence[str] = ()) -> dict[str, str | int | None]:
    """Return everything about the machine that can change a time.

    Args:
        devices: where the frameworks run.
        libraries: others whose versions matter, where they are installed.
    """
    versions = {}
    for name in libraries:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    variables = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    system = {"system": platform.platform(), "cores": os.cpu_count()}
    return fingerprint(devices) | versions | variables | system


@dataclasses.dataclass(frozen=True)
class Matmul:
    """Products of two square matrices of a size; `run` computes `times` of them and waits."""

    size: int
    times: int
    run: Callable[[int], object]

    def rate(self) -> float:
        """Measure FLOP/s; a product of size n has 2 n**3."""
        return self.times * 2 * self.size**3 / _seconds(lambda: self.run(self.times))


def best_matmul(framework: str, dtype: str, device: torch.device) -> Matmul:
    """Return the product that a framework computes fastest, by the median of a few repetitions.

    To be called with jax on its device and precision pinned; `device` is torch's.
    """
    found: list[tuple[float, Matmul]] = []
    for size in SIZES:
        run = (_flax_products if framework == "flax" else _torch_products)(size, dtype, device)
        run(1)  # compiles, and wakes the threads
        seconds = _seconds(lambda run=run: run(1))
        matmul = Matmul(size, max(1, math.ceil(_MATMUL_S / seconds)), run)
        found.append((statistics.median(matmul.rate() for _ in range(_REPEATS)), matmul))
        if seconds > _LONG_S:
            break
    return max(found, key=lambda pair: pair[0])[1]


def _flax_products(size: int, dtype: str, device: torch.device) -> Callable[[int], object]:
    first, factor = (jnp.asarray(x).astype(dtype) for x in _matrices(size))
    product = jax.jit(jnp.matmul).lower(first, factor).compile()
    products = functools.partial(functools.reduce, lambda found, _: product(found, factor))
    return lambda times: jax.block_until_ready(products(range(times), first))


def _torch_products(size: int, dtype: str, device: torch.device) -> Callable[[int], object]:
    first, factor = (torch.from_numpy(x).to(device, getattr(torch, dtype)) for x in _matrices(size))
    products = functools.partial(functools.reduce, lambda found, _: found @ factor)
    return lambda times: wait_for_torch(products(range(times), first))


def _matrices(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw two matrices; repeated products with the second stay near 1."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((size, size), np.float32) for _ in range(2))
    return a, b / np.float32(math.sqrt(size))


def wait_for_torch(_: object = None) -> None:
    """Block until what was started on a GPU is computed."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class Bandwidth:
    """How fast this machine reads memory: the rates of a few programs that do little else.

    On a CPU these are a sum in either framework and a matrix times a vector in XLA, over one array
    that both share; on a GPU a copy, of which both the read and the written bytes count. To be
    made with jax on its device and precision pinned; `device` is torch's.
    """

    def __init__(self, device: torch.device):
        columns = 1 << 10
        rows = max(1, BANDWIDTH_BYTES // (4 * columns))
        # Ones and not zeros: pages of zeros that were never written are one page, read from cache.
        shared = torch.ones(rows, columns, device=device)
        self._num_bytes = shared.nbytes
        self._programs: dict[str, Callable[[], object]] = {}
        if device.type == "cuda":
            target = torch.empty_like(shared)
            self._num_bytes *= 2
            self._programs["torch copy"] = lambda: wait_for_torch(target.copy_(shared))
            return
        array, vector = jnp.from_dlpack(shared), jnp.ones(rows, jnp.float32)
        add = jax.jit(jnp.sum).lower(array).compile()
        multiply = jax.jit(jnp.matmul).lower(vector, array).compile()
        self._programs["torch sum"] = lambda: torch.sum(shared)
        self._programs["XLA sum"] = lambda: jax.block_until_ready(add(array))
        self._programs["XLA matvec"] = lambda: jax.block_until_ready(multiply(vector, array))
        self.rates()  # wakes the threads

    def rates(self) -> dict[str, float]:
        """Measure bytes per second of every program."""
        return {
            name: self._num_bytes / min(_seconds(program) for _ in range(_READS))
            for name, program in self._programs.items()
        }


class MemoryGrowth:
    """Measure, inside a `with`, the peak growth of the memory in use.

    On a CPU this is the resident memory of a process, sampled by a thread, on Linux only; on a GPU
    the allocated memory of the device. Memory that was freed but not returned to the system would
    be reused unseen, so it is returned first.

    Args:
        device: whose memory.
        pid: of the process; None for this one.

    Attributes:
        num_bytes: the growth; None where it is unknown.
    """

    def __init__(self, device: torch.device, pid: int | None = None):
        self._device, self._process = device, "self" if pid is None else str(pid)
        self.num_bytes: int | None = None

    def __enter__(self) -> "MemoryGrowth":
        hand_back_freed_memory()
        self._before = self._in_use()
        self._highest = self._before or 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if self._before is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is None:
            return
        self._done.set()
        self._thread.join()
        self.num_bytes = max(self._highest, self._in_use() or 0) - self._before

    def _watch(self) -> None:
        while not self._done.wait(_SAMPLE_S):
            self._highest = max(self._highest, self._in_use() or 0)

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
    """Return the average number of runnable processes in the last minute; None where unknown."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _seconds(program: Callable[[], object]) -> float:
    start = time.perf_counter()
    program()
    return time.perf_counter() - start


class Compilations:
    """Count, inside a `with`, the programs that XLA compiles, and how long that takes.

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

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_time_span_listener(self._note)
        reached = -math.inf
        for start, end in sorted(self._spans):
            self.seconds += max(0.0, end - max(start, reached))
            reached = max(reached, end)

    def _note(self, event: str, start_time: float, end_time: float, **_: str | int) -> None:
        if event.startswith("/jax/core/compile/"):
            self._spans.append((start_time, end_time))
            self.count += event.endswith("backend_compile_duration")
