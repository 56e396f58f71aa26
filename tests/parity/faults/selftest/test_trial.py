"""The check catches planted faults and says where they are; a clean pair raises no alarm."""

import dataclasses

import pytest

from parity.check.check import check
from parity.check.levels.names import HORIZON
from parity.faults.selftest import FAULTS, trial
from parity.report.record import Verdict
from parity.weights.layouts import Layout
from parity.weights.rules import Rules
from parity.weights.tables import TWINS

# The first of each level and kind in each model; `parity self-test`, which CI runs, plants all, and
# checks clean twins of other architectures and tasks.
SAMPLE = list({(x.level, x.kind, x.subject): x for x in reversed(FAULTS)}.values())


@pytest.mark.parametrize("fault", SAMPLE, ids=lambda fault: f"{fault.subject}, {fault.title}")
def test_a_planted_fault_is_caught_located_and_explained(fault, corpus):
    outcome = trial(fault, corpus)
    assert outcome.detected and outcome.located, outcome.report
    assert outcome.report.exit_code == 1
    assert not outcome.misled and outcome.explained == (fault.cause is not None), outcome.report
    late = fault.level == "trajectory"
    assert ("Looks like a bug" in outcome.report.divergence.detail) == late


@pytest.mark.parametrize("seed", range(3))
def test_a_clean_pair_raises_no_alarm(seed, small):
    report = check(small(seed=seed), seed=seed, steps=HORIZON)
    assert {level.verdict for level in report.levels} <= {Verdict.PASS, Verdict.TIE}, report
    assert report.exit_code == 0 and report.divergence is None


@pytest.mark.parametrize("seed", range(8))
def test_a_clean_training_raises_no_alarm(seed, small):
    levels = ["gradients", "optimizer", "trajectory"]
    report = check(small({"dropout": 0.1}, seed=seed), levels=levels, seed=seed, steps=HORIZON)
    assert [level.verdict for level in report.levels] == [Verdict.PASS] * 3, report


def test_a_square_projection_left_untransposed_is_caught_by_running_it(small):
    rules = tuple(
        dataclasses.replace(rule, layout=Layout.SAME) if ".attention." in rule.torch else rule
        for rule in TWINS.rules
    )
    report = check(dataclasses.replace(small(), rules=Rules(rules)), dtypes=("float64",))
    assert report.levels[0].verdict is Verdict.FAIL
    assert report.divergence.where == "blocks.0.attention.query.weight"
    assert {level.verdict for level in report.levels[1:]} == {Verdict.BLOCKED}


def test_null_directions_are_those_that_theory_names(small):
    report = check(small(), levels=["gradients"], dtypes=("float64",))
    (record,) = [r for r in report.levels[0].records if r.name == "null directions"]
    assert record.note == (
        "zero up to rounding, judged absolutely: blocks.*.attention.key.bias; "
        "the mean over axis 0 of blocks.*.attention.out.bias, blocks.*.mlp.down.bias; "
        "the mean over axis 1 of blocks.*.attention.out.kernel, blocks.*.mlp.down.kernel, "
        "position_embedding.embedding"
    )


def test_the_classes_of_an_untied_head_add_their_own_null_direction(small):
    report = check(small(task="token-class"), levels=["gradients"], dtypes=("float64",))
    (record,) = [r for r in report.levels[0].records if r.name == "null directions"]
    assert "head.bias" in record.note and "head.kernel" in record.note
    assert "gpt.token_embedding.embedding" in record.note
