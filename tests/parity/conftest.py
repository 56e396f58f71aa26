"""Small pairs, and broken copies of the twins."""

import dataclasses
import importlib
import itertools
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import jax
import pytest

import flax_gpt
import torch_gpt
from parity.corpus import Corpus
from parity.pair import Pair
from parity.twins import twins

_PACKAGES = {"flax_gpt": flax_gpt, "torch_gpt": torch_gpt}
_numbers = itertools.count()


@pytest.fixture(scope="session")
def corpus() -> Corpus:
    """The text that every CPython carries."""
    return Corpus.load()


@pytest.fixture(scope="session")
def small(corpus) -> Callable[..., Pair]:
    """Makes pairs that compile fast; packages may be broken copies."""
    config = flax_gpt.GPTConfig(
        vocab_size=len(corpus.vocabulary), context_length=48, embed_dim=20, num_layers=2,
        num_heads=4, mlp_dim=28,
    )  # fmt: skip

    def make(dropout: float = 0.0, **options) -> Pair:
        sizes = dataclasses.replace(config, dropout=dropout)
        return twins(corpus, sizes, max_new_tokens=16, **options)

    return make


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory) -> None:
    """Planted faults change one twin; the other's programs need not be compiled again.

    Neither here nor in the processes that tests start.
    """
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


@pytest.fixture
def plant(tmp_path, monkeypatch) -> Callable[[str, str, str, str], ModuleType]:
    """Imports a copy of a package in which one place of one file reads differently."""

    def planted(package: str, file: str, right: str, wrong: str) -> ModuleType:
        name = f"broken_{package}_{next(_numbers)}"
        copy = tmp_path / name
        copy.mkdir()
        for source in Path(_PACKAGES[package].__file__).parent.glob("*.py"):
            text = source.read_text()
            if source.name == file:
                assert text.count(right) == 1, f"{right!r} is in {file} {text.count(right)} times"
                text = text.replace(right, wrong)
            (copy / source.name).write_text(text.replace(package, name))
        monkeypatch.syspath_prepend(tmp_path)
        return importlib.import_module(name)

    yield planted
    for name in [name for name in sys.modules if name.startswith("broken_")]:
        del sys.modules[name]
    shutil.rmtree(tmp_path, ignore_errors=True)
