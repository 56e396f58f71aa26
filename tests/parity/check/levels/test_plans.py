"""Plans of cache operations: each planted fault is seen, a right program is not, lines run."""

import contextlib
import io

import numpy as np
import pytest
import torch

import flax_gpt
import torch_gpt
from parity.check.levels import plans
from parity.check.pair_session import PairSession
from parity.faults import mutated
from parity.faults.selftest import PLAN_FAULTS, trial
from parity.frameworks.plan import Read, follow, is_possible
from parity.report.record import Verdict
from parity.twins.companions import COMPANIONS
from parity.twins.pair import companions

PACKAGES = {"flax_gpt": flax_gpt, "torch_gpt": torch_gpt}
# Of flax_gpt a few, because each compiles its programs anew; `parity self-test` plants all.
SAMPLE = [fault for fault in PLAN_FAULTS if fault.subject == "torch_gpt"]
SAMPLE += [fault for fault in PLAN_FAULTS if fault.subject == "flax_gpt"][::7]


@pytest.fixture
def two_threads():
    """Two, so that a product that is shared out has something left over."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def trials_of(name, subject, package=None):
    """What gives plans to one twin, or a changed copy of it, in the companion of a name."""
    packages = PACKAGES | ({} if package is None else {subject: package})
    pair = companions(packages["flax_gpt"], packages["torch_gpt"])[name]
    session = PairSession(pair, dtypes=("float64",))
    return plans.Trials(session, session.runs("float64")[list(PACKAGES).index(subject)])


@pytest.mark.parametrize("fault", SAMPLE, ids=lambda fault: f"{fault.subject}, {fault.title}")
def test_a_planted_fault_is_seen_by_the_plans_of_a_check(fault, two_threads):
    with mutated(fault.subject, fault.edits) as package:
        found = trials_of(fault.companion, fault.subject, package).record("x")
    assert found.verdict is Verdict.FAIL


@pytest.mark.parametrize("name", COMPANIONS)
def test_the_plans_of_a_check_find_nothing_in_the_twins(name, two_threads):
    for subject in PACKAGES:
        found = trials_of(name, subject).record("x")
        assert found.verdict is Verdict.PASS and found.count > 350


def test_a_failure_is_a_short_plan_with_its_cause_and_lines_that_run(corpus):
    (fault,) = (x for x in PLAN_FAULTS if x.title == "packed step does not turn its key")
    outcome = trial(fault, corpus)
    found = outcome.report.divergence
    assert outcome.detected and outcome.located
    assert found.where == "torch_gpt, Decoder.advance(packed=True)"
    assert "packed=False) in place of Decoder.advance(packed=True)" in found.cause
    lines = found.detail.partition("\n")[2].strip().splitlines()
    assert len(lines) <= 6
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), torch.no_grad():
        exec("\n".join(lines), {})
    assert "tensor" in printed.getvalue()  # rounding: this is the right twin
    assert float(eval(printed.getvalue(), {"tensor": lambda x, **_: x})) < 1e-4


def test_the_companions_together_have_every_part():
    configs = [companion.config for companion in COMPANIONS.values()]
    config = torch_gpt.config
    preset = torch_gpt.GPTConfig.preset("tiny")
    for field, kinds in (
        ("positions", config.POSITIONS), ("norm", config.NORMS), ("activation", config.ACTIVATIONS),
        ("norm_place", config.NORM_PLACES), ("residual", config.RESIDUALS),
        ("qk_norm", config.QK_NORMS),
    ):  # fmt: skip
        assert {getattr(x, field) for x in (preset, *configs)} == set(kinds), field
    for field in "gated", "tied_head", "qkv_bias", "out_bias", "mlp_bias":
        assert {getattr(x, field) for x in configs} == {False, True}, field
    assert {x.window is None for x in configs} == {False, True}
    groups = {(x.kv_heads == 1, x.kv_heads == x.num_heads) for x in configs}
    assert len(groups) == 3
    assert any(
        companion.flax.first > 256 for companion in COMPANIONS.values() if companion.flax.first
    )


@pytest.mark.parametrize("name", COMPANIONS)
def test_plans_are_possible_and_take_every_way(name):
    for limits in (COMPANIONS[name].flax, COMPANIONS[name].torch):
        drawn = [plans.draw(np.random.default_rng((0, x)), limits) for x in range(limits.plans)]
        assert all(is_possible(plan, limits) for plan in drawn)
        ways = {x.way for plan in drawn for x in plan if isinstance(x, Read)}
        assert ways == set(limits.ways)
        held = [x for plan in drawn for x in follow(plan, limits)]
        ragged = {len(set(map(len, x.rows))) > 1 for x in held}
        assert len(limits.rows) == 1 == limits.rows[0] or ragged == {False, True}


def test_plans_fill_caches_to_the_last_slot():
    for companion in COMPANIONS.values():
        limits = companion.torch
        drawn = (plans.draw(np.random.default_rng((0, x)), limits) for x in range(30))
        held = (x for plan in drawn for x in follow(plan, limits))
        assert any(x.capacity in map(len, x.rows) for x in held), limits
