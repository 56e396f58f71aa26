"""Strict flags, and the fixture that runs a test once on each twin."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # two busy cores: waiting threads must sleep

import contextlib
import dataclasses
import hashlib
import platform
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import flax_gpt
import flax_gpt.random
import torch_gpt
import torch_gpt.random
from parity.frameworks.flax.scope import drop_programs_if_many

# Programs run here for milliseconds, so compiling fast matters more than fast code. CI's
# `parity check`, and the test of the README's numbers, compile as users do. Level 0 rounds normals
# in another way, and level 1 gives a wrong gradient: off by 0.1 in float64 for the LSTM of the
# self-test, where 0, 2 and 3 agree with torch to 1e-15.
_FLAGS = [
    "--xla_backend_optimization_level=2",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
]
os.environ.setdefault("XLA_FLAGS", " ".join(_FLAGS))

_MOST_BYTES = 1 << 29  # of compiled programs that are kept; all go when there are more


def _programs() -> Path:
    """The folder of compiled programs, in pytest's cache; they are of one kind of processor."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    flags = next((line for line in lines if line.startswith("flags")), platform.platform())
    kind = hashlib.sha256(flags.encode()).hexdigest()[:12]
    folder = Path(__file__).parents[1] / ".pytest_cache" / "d" / "programs" / kind
    if folder.is_dir() and sum(x.stat().st_size for x in os.scandir(folder)) > _MOST_BYTES:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# A program is compiled once, whichever worker, process or run of the tests is the first to need it;
# `pytest --cache-clear` forgets them all.
_PROGRAMS = jax.config.jax_compilation_cache_dir or str(_programs())
for name, value in {
    "jax_compilation_cache_dir": _PROGRAMS,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": 0,
}.items():
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)

hypothesis.settings.register_profile("here", deadline=None, derandomize=True, max_examples=15)
hypothesis.settings.load_profile("here")

# All sizes differ, so that no axis can stand in for another.
SIZES = dict(
    vocab_size=61, context_length=29, embed_dim=15, num_layers=2, num_heads=3, mlp_dim=23
)  # fmt: skip


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return two workers, or none for a single file, which one worker would run whole."""
    paths = {config.invocation_params.dir / arg.partition("::")[0] for arg in config.args}
    return 0 if len(paths) == 1 and all(map(Path.is_file, paths)) else 2


@pytest.fixture(autouse=True, scope="module")
def memory_maps_are_left() -> Iterator[None]:
    """Forget compiled programs before a worker has as many memory maps as the kernel allows."""
    yield
    drop_programs_if_many()


@dataclasses.dataclass(frozen=True)
class Twin:
    """One of the two packages, and how tests speak to it."""

    name: str
    package: ModuleType
    random: ModuleType
    ints: Callable[[Any], Any]
    floats: Callable[[Any], Any]

    def config(self, **changes) -> Any:
        """A small float64 config with sizes that all differ."""
        sizes = SIZES | dict(dtype="float64", init_std=0.5)
        return self.package.GPTConfig(**(sizes | changes))

    def model(self, seed: int = 1, **changes) -> Any:
        """A model with weights from a seed, large enough for every one of them to matter."""
        return self.package.GPT(self.config(**changes), self.random.key(seed))

    def numpy(self, array: Any) -> np.ndarray:
        """Any of the twin's arrays on the host."""
        return array.detach().numpy() if isinstance(array, torch.Tensor) else np.asarray(array)


TWINS = {
    "flax": Twin(
        "flax",
        flax_gpt,
        flax_gpt.random,
        lambda x: jnp.asarray(np.asarray(x), jnp.int32),
        lambda x: jnp.asarray(np.asarray(x)),
    ),
    "torch": Twin(
        "torch",
        torch_gpt,
        torch_gpt.random,
        lambda x: torch.from_numpy(np.asarray(x)).long(),
        lambda x: torch.from_numpy(np.array(x)),
    ),
}


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """64-bit types in jax, and no gradients in torch."""
    # Promotion stays standard here: in float64 nnx.LayerNorm itself promotes with float32.
    with jax.enable_x64(True), torch.no_grad():
        yield


@pytest.fixture(params=list(TWINS))
def gpt(request) -> Iterator[Twin]:
    """Each twin in turn, in float64."""
    with float64():
        yield TWINS[request.param]


@pytest.fixture
def twins() -> Iterator[tuple[Twin, Twin]]:
    """Both twins at once, in float64."""
    with float64():
        yield TWINS["flax"], TWINS["torch"]


@pytest.fixture
def rng() -> np.random.Generator:
    """The same numbers in every run."""
    return np.random.default_rng(0)
