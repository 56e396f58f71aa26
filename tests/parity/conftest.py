"""Small pairs, and broken copies of the twins."""

import contextlib
import os
from collections.abc import Callable, Iterator
from types import ModuleType

import jax
import pytest

from parity.bugs import Edit, planted
from parity.corpus import Corpus
from parity.pair import Pair
from parity.selftest import small_twins


@pytest.fixture(scope="session")
def corpus() -> Corpus:
    """The text that every CPython carries."""
    return Corpus.load()


@pytest.fixture(scope="session")
def small(corpus) -> Callable[..., Pair]:
    """Makes pairs that compile fast; packages may be broken copies."""
    return lambda changes=None, **options: small_twins(corpus, changes, **options)


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
