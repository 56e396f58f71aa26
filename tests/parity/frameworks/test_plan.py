"""Plans drawn by hypothesis, carried out on both twins as they grow."""

import dataclasses

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from parity.frameworks.plan import (
    Empty,
    Fill,
    Grow,
    ImpossibleError,
    Limits,
    Read,
    Select,
    Truncate,
    Way,
    alternatives,
    draw,
    follow,
    is_possible,
    prefixes,
    shrunk,
)
from parity.twins.companions import COMPANIONS
from parity.twins.flax import FlaxTwin
from parity.twins.follow import Follower
from parity.twins.torch import TorchTwin

BOUND = 1e-12
LIMITS = Limits(11, 24, (Way("GPT"), Way("Decoder.advance", packed=True)), capacities=(8, 24))


def machine(kind, name):
    """A state machine of one twin in the companion of a name."""
    companion = COMPANIONS[name]
    limits = companion.flax if kind is FlaxTwin else companion.torch
    config = dataclasses.replace(companion.config, dtype="float64", init_std=0.5)
    twin = kind.build(config, seed=1)
    follower = Follower(twin)
    sources = st.integers(0, 1 << 30)

    class Caches(RuleBasedStateMachine):
        """One plan, an operation at a time; every read is compared with an uncached pass."""

        def do(self, operation):
            try:
                held = follow((*self.plan, operation), limits)[-1]
            except ImpossibleError:
                return
            source = None if isinstance(operation, Empty) else self.caches[operation.source]
            if not isinstance(operation, Read):
                cache = follower.cache_of(operation, source)
            else:
                logits, cache = follower.read(operation, source)
                for history, found in zip(held.rows, logits, strict=True):
                    if len(found):
                        # Of one width, which is one program.
                        whole = np.zeros((1, limits.context_length), np.int32)
                        whole[0, : len(history)] = history
                        expected = twin.logits(whole, np.array([len(history)]))[0]
                        expected = expected[len(history) - len(found) : len(history)]
                        np.testing.assert_allclose(found, expected, rtol=0, atol=BOUND)
            self.plan += (operation,)
            self.caches.append(cache)

        @initialize(invariant=st.booleans(), seed=sources)
        def begin(self, invariant, seed):
            self.plan, self.caches = (), []
            rng = np.random.default_rng(seed)
            capacity = limits.capacities[-1] if invariant else int(rng.choice(limits.capacities))
            rows = int(rng.choice(limits.rows))
            self.do(Empty(rows, capacity, invariant and limits.invariant))

        def source(self, number):
            return number % len(self.plan)

        @rule(number=sources, way=st.sampled_from(limits.ways), seed=sources)
        def read(self, number, way, seed):
            rng, source = np.random.default_rng(seed), self.source(number)
            try:
                held = follow(self.plan, limits)[source]
            except ImpossibleError:
                return
            room = min(held.capacity, limits.context_length) - np.array([*map(len, held.rows)])
            most = np.minimum(room, 1 if way.is_step else limits.width)
            least = np.minimum(most, 0 if way.call in ("GPT", "definition") else 1)
            counts = rng.integers(least, most + 1) if not way.is_step else np.ones(len(most), int)
            tokens = (tuple(map(int, rng.integers(0, limits.vocab_size, n))) for n in counts)
            self.do(Read(source, tuple(tokens), way, None if way.is_step else limits.width))

        @rule(number=sources, shares=st.lists(st.floats(0, 1), min_size=4, max_size=4))
        def truncate(self, number, shares):
            source = self.source(number)
            rows = follow(self.plan, limits)[source].rows
            lengths = (round(len(row) * share) for row, share in zip(rows, shares, strict=False))
            self.do(Truncate(source, tuple(lengths)))

        @rule(number=sources, rows=st.lists(st.integers(0, 3), min_size=1, max_size=4))
        def select(self, number, rows):
            size = limits.rows[rows[0] % len(limits.rows)]
            source = self.source(number)
            held = follow(self.plan, limits)[source]
            taken = tuple(rows[x % len(rows)] % len(held.rows) for x in range(size))
            self.do(Select(source, taken))

        @rule(number=sources)
        def grow(self, number):
            self.do(Grow(self.source(number), limits.capacities[-1]))

        @precondition(lambda self: len(self.plan) > 1)
        @rule(number=sources, value=st.sampled_from([float("nan"), 1e30, float("inf")]))
        def fill(self, number, value):
            self.do(Fill(self.source(number), value))

    return Caches


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *((TorchTwin, name) for name in COMPANIONS if name != "T5 positions"),
        (FlaxTwin, "learned positions"),
    ],
)
def test_whatever_is_done_with_caches_they_read_as_one_uncached_pass(kind, name):
    case = machine(kind, name).TestCase
    case.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
    case().runTest()


def test_rows_of_which_all_histories_are_beginnings():
    rows, index = prefixes([(1, 2), (1,), (3,), (1, 2, 3), (2, 2)])
    assert sorted(rows) == [(1, 2, 3), (2, 2), (3,)]
    assert all(rows[index[x]][: len(x)] == x for x in index)


def test_a_plan_is_made_as_short_as_what_fails():
    plans = (draw(np.random.default_rng(seed), LIMITS) for seed in range(20))

    def fails(plan):
        """A step after a cache has grown."""
        return any(
            isinstance(x, Read) and x.way.is_step and isinstance(plan[x.source], Grow) for x in plan
        )

    plan = next(plan for plan in plans if fails(plan))
    short = shrunk(plan, LIMITS, fails, 30.0)
    assert [type(x) for x in short] == [Empty, Grow, Read]


def test_alternatives_are_possible_and_say_what_is_other():
    packed = Way("Decoder.advance", packed=True)
    plan = Empty(2, 8), Read(0, ((1,), (2,)), packed)
    found = {words: other for words, other in alternatives(plan) if is_possible(other, LIMITS)}
    assert "Decoder.advance(packed=False) in place of Decoder.advance(packed=True)" in found
    assert "GPT" in "".join(found) or "definition in place of Decoder" in "".join(found)


@pytest.mark.parametrize(
    "operation",
    [
        Read(1, ((1,), (2,)), Way("GPT")),
        Read(0, ((1,),), Way("GPT")),
        Read(0, ((1,) * 9, (2,)), Way("GPT"), 9),
        Read(0, ((), ()), Way("prefill"), 4),
        Truncate(0, (1, 0)),
        Select(0, (2,)),
        Grow(0, 7),
    ],
)
def test_what_no_cache_can_do_is_impossible(operation):
    assert not is_possible((Empty(2, 8), operation), LIMITS)


def test_a_cache_whose_memory_was_given_away_cannot_be_taken_again():
    step = Read(0, ((1,), (2,)), Way("Decoder.advance"))
    plan = Empty(2, 8), step, dataclasses.replace(step, source=0)
    assert is_possible(plan, LIMITS)
    assert not is_possible(plan, dataclasses.replace(LIMITS, donates=True))
