"""Parts of levels that a whole check does not bring into every state."""

import dataclasses
import gc
import re
import weakref

import jax
import numpy as np
import pytest
from flax import nnx

import flax_gpt
from parity.check.check import check
from parity.check.levels.cache import assemble, ragged_calls
from parity.check.levels.names import HORIZON, LEVELS
from parity.check.levels.optimizer import SAMPLE
from parity.check.levels.run import run_levels
from parity.check.levels.tokens import record
from parity.check.pair_session import PairSession
from parity.pair.text import Corpus
from parity.report.record import Verdict, judge
from parity.system.devices import choose_devices
from parity.twins.flax import FlaxTwin
from parity.twins.pair import preset_config, twins


def margins(*rows):
    return np.array(rows)


def test_a_flipped_token_is_excused_only_by_a_margin_within_the_error():
    reference, written = np.array([[1, 2, 3]]), np.array([[1, 5, 6]])
    thin, wide = margins([1.0, 1e-7, 1.0]), margins([1.0, 1e-3, 1.0])
    tie = record("x", "float32", reference, written, thin, error=1e-6)
    assert tie.verdict is Verdict.TIE and tie.value == 2
    assert "row 0 flips at token 2, margin 1.0e-07" in tie.note
    assert record("x", "float32", reference, written, wide, error=1e-6).verdict is Verdict.FAIL


def test_one_thin_margin_does_not_excuse_another_row():
    reference, written = np.array([[1, 2], [3, 4]]), np.array([[1, 9], [8, 4]])
    both = margins([1.0, 1e-9], [0.5, 1.0])
    failed = record("x", "float32", reference, written, both, error=1e-6)
    assert failed.verdict is Verdict.FAIL and "row 1 flips at token 1" in failed.note


def test_a_large_model_is_still_probed_with_padding_and_repetition(corpus):
    config = flax_gpt.GPTConfig.preset("gpt2")
    for probes in (twins(corpus, config).probes, twins(corpus).probes):
        ragged = [batch for batch in probes.values() if batch.real is not None]
        tokens = ragged[0].inputs[0]  # gradients are taken on the first
        assert any(np.unique(row).size == 1 for row in tokens)
        assert not ragged[0].real.all()


def test_a_fault_does_not_widen_its_own_excuse():
    reference, written = np.array([[1, 2]]), np.array([[1, 9]])
    wrong = record("x", "float64", reference, written, margins([1.0, 0.36]), error=3.2)
    assert wrong.verdict is Verdict.FAIL


def test_equal_tokens_of_models_that_give_nan_are_no_pass():
    reference = np.array([[0, 0]])
    nan = record("x", "float64", reference, reference, margins([np.nan, np.nan]), error=np.nan)
    assert nan.verdict is Verdict.FAIL


def test_equal_tokens_print_the_smallest_margin():
    reference = np.array([[1, 2]])
    equal = record("x", "float64", reference, reference, margins([0.25, 0.125]), error=1e-15)
    assert equal.verdict is Verdict.PASS and equal.noise == 0.125
    empty = record("x", "float64", np.empty((0, 0)), np.empty((0, 0)), np.empty((0, 0)), error=0.0)
    assert empty.verdict is Verdict.ERROR


def test_ragged_calls_read_every_token_once_and_in_order():
    tokens = np.arange(4 * 40).reshape(4, 40).astype(np.int32)
    counts = np.array([40, 39, 7, 1], np.int32)
    calls = ragged_calls(tokens, counts, seed=0)
    assert {part.shape[1] for part, _ in calls} == {32, 8, 1}
    assert any(0 in taken for _, taken in calls), "some calls give a row nothing"
    outputs = [np.stack([part, part], axis=-1).astype(float) for part, _ in calls]
    whole = assemble(calls, outputs, (4, 40, 2))
    real = np.arange(40) < counts[:, None]
    assert np.array_equal(whole[real][:, 0], tokens[real])
    assert np.all(np.isnan(whole[~real]))


def test_a_pair_without_a_decoder_abstains_with_the_reason(small):
    pair = dataclasses.replace(small(), prompts=None, sequences=None)
    report = check(pair, levels=["cache", "tokens"], dtypes=("float64",))
    assert [level.verdict for level in report.levels] == [Verdict.ABSTAIN, Verdict.ABSTAIN]
    assert "declares no decoder" in report.levels[0].records[0].note
    assert report.exit_code == 2, "nothing was compared"


def test_a_model_that_raises_is_an_error_with_its_words_and_blocks_the_rest(small):
    def broken(model, *inputs):
        raise RuntimeError("no such thing\nas a second line")

    pair = small()
    pair = dataclasses.replace(pair, torch=dataclasses.replace(pair.torch, forward=broken))
    report = check(pair, levels=["logits", "cache"], dtypes=("float64",))
    assert [level.verdict for level in report.levels] == [Verdict.ERROR, Verdict.BLOCKED]
    assert re.fullmatch(
        r"RuntimeError at test_levels\.py:\d+: no such thing", report.levels[0].records[-1].note
    )
    assert report.exit_code == 2


def test_an_unknown_level_is_refused_with_the_known_ones(small):
    with pytest.raises(ValueError, match=r"no level logit\. There are weights, logits"):
        check(small(), levels=["logit"])


def test_progress_reaches_the_end_of_every_level(small):
    seen = {}
    pair = small({"num_layers": 1})
    check(pair, steps=HORIZON, progress=lambda name, share: seen.update({name: share}))
    assert list(seen) == list(LEVELS)
    assert all(share >= 0.5 for share in seen.values()), seen
    assert all(seen[name] == 1.0 for name in LEVELS if name != "weights"), seen


def test_a_text_with_more_characters_than_ids_is_refused_wherever_it_comes_in():
    text = Corpus.from_text("".join(map(chr, range(0x100, 0xD000))), "all of unicode")
    message = r"data file all of unicode: 52992 different characters > vocabulary size 50257\."
    with pytest.raises(ValueError, match=message):
        preset_config(text, "gpt2")
    with pytest.raises(ValueError, match=message):
        twins(text, flax_gpt.GPTConfig.preset("gpt2"))


def test_models_are_given_back_when_others_are_asked_for_and_come_back_the_same(small):
    session = PairSession(small(), choose_devices("cpu"))
    runs, batch = session.runs("float64"), session.gradient_probe
    before = [run.outputs(batch)[""] for run in runs]
    held = [weakref.ref(run.module) for run in runs]
    session.runs("float32")
    gc.collect()
    assert [reference() for reference in held] == [None, None]
    for run, output in zip(session.runs("float64"), before, strict=True):
        assert np.array_equal(run.outputs(batch)[""], output)
        other = run.at({name: 2 * leaf for name, leaf in run.gradients(batch)[1].items()})
        assert not np.array_equal(other.outputs(batch)[""], output)


def test_a_large_leaf_is_compared_by_a_sample_of_its_numbers(small):
    config = dict(embed_dim=320, num_layers=1, num_heads=1, mlp_dim=8)
    report = check(small(config), levels=["optimizer"], dtypes=("float64",), steps=1)
    assert report.ok
    counts = {record.name: record.count for record in report.levels[0].records}
    session = PairSession(small(config), choose_devices("cpu"))
    sizes = [x.size for name, x in session.flax_leaves.items() if name not in session.null.leaves]
    assert max(sizes) > SAMPLE
    assert counts["step 1 update"] == sum(min(size, SAMPLE) for size in sizes)


@pytest.fixture
def all_are_large(monkeypatch):
    """Models of every size are treated as those for which memory is short."""
    monkeypatch.setattr("parity.system.memory.LARGE", 0)


def test_memory_is_saved_without_a_change_to_what_is_compared(small, request):
    training = dict(levels=["optimizer", "trajectory"], dtypes=("float64",), steps=HORIZON)
    expected = check(small({"num_layers": 1}), **training)
    request.getfixturevalue("all_are_large")
    found = check(small({"num_layers": 1}), **training)
    assert expected.ok and found.ok
    for plain, saving in zip(expected.levels, found.levels, strict=True):
        named = [[(x.name, x.count) for x in level.records] for level in (plain, saving)]
        assert named[0] == named[1]


def test_a_large_model_gives_its_programs_back_too(small, all_are_large):
    session = PairSession(small(), choose_devices("cpu"))
    run, batch = session.runs("float64")[0], session.gradient_probe
    before = run.outputs(batch)[""]
    assert run._forward._cache_size() == 1
    session.release()
    assert run._forward._cache_size() == 0
    assert np.array_equal(run.outputs(batch)[""], before)


def test_a_large_model_whose_update_is_wrong_is_found_in_the_same_place(
    small, plant, all_are_large
):
    broken = plant(
        "flax_gpt", "training/optimizer.py", "steps = count.astype(m.dtype)", "steps = 1.0"
    )
    report = check(
        small({"num_layers": 1}, flax_package=broken),
        levels=["optimizer"], dtypes=("float64",), steps=HORIZON,
    )  # fmt: skip
    assert report.divergence.phase == "optimizer" and report.divergence.step == 2


def test_a_large_model_is_trained_where_it_lies(all_are_large):
    config = flax_gpt.GPTConfig.preset("tiny")
    model = flax_gpt.GPT(config, flax_gpt.random.key(0))
    trainer = FlaxTwin(model).trainer(dict(learning_rate=1e-3))
    state = jax.tree.leaves(nnx.state(trainer.model))
    trainer.step(np.ones((2, 8), np.int32))
    assert all(leaf.is_deleted() for leaf in state)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(nnx.state(model)))


def test_an_error_blocks_the_levels_that_need_it_and_a_failure_all():
    class Quiet:
        progress = staticmethod(lambda fraction: None)
        release = staticmethod(lambda: None)

    def passing(session):
        yield judge("x", "float64", "max_abs", 0.0, 1.0, 1)

    def raising(session):
        raise RuntimeError("no gradient of this")
        yield

    def failing(session):
        yield judge("x", "float64", "max_abs", 2.0, 1.0, 1)

    def verdicts(gradients):
        levels = dict.fromkeys(LEVELS, (passing, lambda session, records: None))
        levels["gradients"] = gradients, lambda session, records: None
        finished, _ = run_levels(levels, Quiet(), lambda name, fraction: None)
        return [str(level.verdict) for level in finished]

    blocked = ["BLOCKED"] * 2
    assert verdicts(raising) == ["PASS", "PASS", "ERROR", *blocked, "PASS", "PASS"]
    assert verdicts(failing) == ["PASS", "PASS", "FAIL", *blocked, *blocked]
