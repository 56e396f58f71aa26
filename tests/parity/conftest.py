"""Small pairs, and broken copies of the twins."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import jax
import pytest

import flax_gpt
from parity.bugs import Edit, planted
from parity.corpus import Corpus
from parity.pair import Pair
from parity.twins import twins


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

    def make(changes: Mapping[str, Any] = {}, **options) -> Pair:
        sizes = dataclasses.replace(config, **changes)
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
def plant() -> Iterator[Callable[[str, str, str, str], ModuleType]]:
    """Imports a copy of a package in which one place of one file reads differently."""
    with contextlib.ExitStack() as copies:

        def planted_copy(package: str, file: str, right: str, wrong: str) -> ModuleType:
            edits = [Edit(file, right, wrong)]
            return copies.enter_context(planted(package.removesuffix("_gpt"), edits))

        yield planted_copy
