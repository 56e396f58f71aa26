"""Real pairs pass by float64 and their faults fit their files; `.ci/run` plants the faults."""

import ast
from collections.abc import Iterator

import jax
import pytest

from parity.faults.edit import mutated_text
from tests.real import suite

# What people write broadcasts, and warns.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(autouse=True)
def jax_as_people_have_it() -> Iterator[None]:
    with jax.numpy_rank_promotion("allow"), jax.default_matmul_precision("default"):
        yield


# One of each kind; a pair takes seconds, and `.ci/run` checks all of them at every level.
QUICK = "gcn", "gqa_einsum", "lstm", "moe", "rotary_complex", "siren"


@pytest.mark.parametrize("name", QUICK)
def test_a_healthy_pair_passes_by_float64(name):
    row = suite.run(name, levels=("weights", "logits"), dtypes=("float64",))
    assert row.healthy, f"{row}\n{row.report or ''}"


def test_a_fault_of_a_pair_is_detected_placed_and_explained():
    fault = next(x for x in suite.faults_of("vae") if x.cause)
    row = suite.run("vae", fault, levels=("weights", "logits"), dtypes=("float64",))
    assert row.detected and row.placed and row.explained and not row.misled, f"{row}"


@pytest.mark.parametrize("path", suite.FILES, ids=lambda path: path.stem)
def test_a_file_says_what_it_is_and_its_faults_fit_it(path):
    text = path.read_text()
    assert len(ast.get_docstring(ast.parse(text)).splitlines()) == 1
    program = suite.program_of(text)[0]
    for name in suite.named(path):
        faults = suite.faults_of(name)
        assert len(faults) >= 2
        for fault in faults:
            assert mutated_text(path.name, program, [suite.edit_of(path, fault)]) != program


def test_the_suite_has_the_pairs_that_it_promises():
    names = suite.names()
    assert len(names) == len(set(names)) >= 29
    assert sum(name.startswith("hf_") for name in names) == 9
