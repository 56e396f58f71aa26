"""Small pairs, and broken copies of the twins."""

import contextlib
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest

from parity.faults import Edit, mutated
from parity.faults.selftest import small_twins
from parity.pair.pair import Pair
from parity.pair.text import Corpus


@pytest.fixture(scope="session")
def corpus() -> Corpus:
    """The text that every CPython carries."""
    return Corpus.load()


@pytest.fixture(scope="session")
def small(corpus) -> Callable[..., Pair]:
    """Makes pairs that compile fast; packages may be broken copies."""
    return lambda changes=None, **options: small_twins(corpus, changes, **options)


@pytest.fixture
def plant() -> Iterator[Callable[[str, str, str, str], ModuleType]]:
    """Imports a copy of a package in which one place of one file reads differently."""
    with contextlib.ExitStack() as copies:
        yield lambda package, *edit: copies.enter_context(mutated(package, [Edit(*edit)]))
