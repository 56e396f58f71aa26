"""Where the frameworks run, at what precision, and a fingerprint of the machine."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import platform
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax
    import torch

_PACKAGES = {"flax": ("jax", "flax"), "torch": ("torch",)}


@dataclasses.dataclass(frozen=True)
class Devices:
    """One device per framework."""

    flax: jax.Device
    torch: torch.device

    def __str__(self) -> str:
        import torch

        name = torch.cuda.get_device_name(self.torch) if self.torch.type == "cuda" else "cpu"
        return f"flax on {self.flax.device_kind}, torch on {name}"


def choose_devices(wanted: str) -> Devices:
    """Return the devices for `--device`; auto takes GPUs when both frameworks have one."""
    import jax
    import torch

    if wanted not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device {wanted}: there are auto, cpu and cuda. Choose one of them.")
    have_torch, have_flax = torch.cuda.is_available(), bool(_jax_gpus())
    if wanted == "cuda" and not (have_torch and have_flax):
        blind = [name for name, has in (("torch", have_torch), ("jax", have_flax)) if not has]
        raise ValueError(
            f"--device cuda: {' and '.join(blind)} can use no GPU here. Both must run on "
            "one. Install the extra 'cuda' or choose --device cpu."
        )
    if wanted != "cpu" and have_torch and have_flax:
        return Devices(_jax_gpus()[0], torch.device("cuda", 0))
    return Devices(jax.devices("cpu")[0], torch.device("cpu"))


def _jax_gpus() -> list[jax.Device]:
    import jax

    try:
        return jax.devices("gpu")
    except RuntimeError:  # this is how jax says that there is no such platform
        return []


@contextlib.contextmanager
def pinned_precision() -> Iterator[None]:
    """Use full float32 products in both frameworks: jax defaults to TF32 on recent GPUs."""
    import jax
    import torch

    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with jax.default_matmul_precision("highest"):
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def versions(*frameworks: str) -> dict[str, str]:
    """Return the versions of NumPy and of the packages of some frameworks."""
    packages = [package for framework in frameworks for package in _PACKAGES[framework]]
    return {package: importlib.metadata.version(package) for package in (*packages, "numpy")}


def num_threads(framework: str) -> int:
    """Return the number of threads that share the work of a framework."""
    if framework == "flax":
        return os.cpu_count() or 1
    import torch

    return torch.get_num_threads()


def fingerprint(devices: Devices) -> dict[str, str | int]:
    """Return everything about this machine that can change a digit."""
    place = {"devices": str(devices), "precision": "highest", "threads": num_threads("torch")}
    return {"python": platform.python_version()} | versions("flax", "torch") | place
