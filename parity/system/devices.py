"""Where the two frameworks run, at what precision, and a fingerprint of both."""

import contextlib
import dataclasses
import importlib.metadata
import platform
from collections.abc import Iterator

import jax
import numpy as np
import torch


@dataclasses.dataclass(frozen=True)
class Devices:
    """One device per framework."""

    flax: jax.Device
    torch: torch.device

    def __str__(self) -> str:
        name = torch.cuda.get_device_name(self.torch) if self.torch.type == "cuda" else "cpu"
        return f"flax on {self.flax.device_kind}, torch on {name}"


def choose_devices(wanted: str) -> Devices:
    """The devices of `--device`: auto takes GPUs when both frameworks have one.

    Raises:
        ValueError: for a GPU that one of the frameworks does not have, or an unknown word.
    """
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
    try:
        return jax.devices("gpu")
    except RuntimeError:  # this is how jax says that there is no such platform
        return []


@contextlib.contextmanager
def pinned_precision() -> Iterator[None]:
    """Full float32 products in both frameworks: jax defaults to TF32 on recent GPUs."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with jax.default_matmul_precision("highest"):
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def fingerprint(devices: Devices) -> dict[str, str | int]:
    """Everything about this machine that can change a digit."""
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": importlib.metadata.version("flax"),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "devices": str(devices),
        "precision": "highest",
        "threads": torch.get_num_threads(),
    }
