"""The handle of each twin: the same answers from both, and from its package itself."""

import dataclasses

import numpy as np
import pytest

import flax_gpt
from parity.twins.flax import FlaxTwin
from parity.twins.torch import TorchTwin
from parity.twins.twin import Stream

CONFIG = flax_gpt.GPTConfig(
    vocab_size=29,
    context_length=24,
    embed_dim=20,
    num_layers=2,
    num_heads=4,
    mlp_dim=28,
    dtype="float64",
    init_std=0.5,
)
COUNTS = np.array([7, 3], np.int32)
DRAWN = dict(temperature=0.8, top_k=9)


@pytest.fixture(scope="module")
def handles():
    """Both twins with the same weights."""
    flax = FlaxTwin.build(CONFIG, seed=1)
    return flax, TorchTwin.build(CONFIG, leaves=flax.leaves().items())


@pytest.fixture
def tokens(rng) -> np.ndarray:
    return rng.integers(0, CONFIG.vocab_size, (2, 7), np.int32)


def test_leaves_of_one_twin_build_both(handles, tokens):
    flax, torch = handles
    again = FlaxTwin.build(CONFIG, leaves=iter(flax.leaves().items()))
    np.testing.assert_array_equal(again.logits(tokens, COUNTS), flax.logits(tokens, COUNTS))
    np.testing.assert_allclose(torch.logits(tokens), flax.logits(tokens), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [FlaxTwin, TorchTwin])
def test_leaves_that_are_not_exactly_the_models_are_refused(kind, handles):
    leaves = handles[0].leaves()
    less = {name: x for name, x in leaves.items() if name != "norm.bias"}
    with pytest.raises(ValueError, match=r"norm\.bias is missing"):
        kind.build(CONFIG, leaves=less.items())
    with pytest.raises(ValueError, match="extra is unknown"):
        kind.build(CONFIG, leaves=(leaves | {"extra": np.zeros(3)}).items())
    narrow = leaves | {"norm.bias": leaves["norm.bias"].astype(np.float32)}
    with pytest.raises(ValueError, match=r"norm\.bias is float32\[20\], not float64\[20\]"):
        kind.build(CONFIG, leaves=narrow.items())


def test_chunks_read_what_one_call_reads_and_leave_the_cache_as_it_was(handles, tokens):
    for twin in (*handles, FlaxTwin(handles[0].model, compiled=False)):
        whole = twin.logits(tokens)
        empty = twin.empty(2, 12)
        split = 4
        first, cache = twin.read(empty, tokens[:, :split])
        second, longer = twin.read(cache, tokens[:, split:])
        pieces = np.concatenate([first, second], axis=1)
        np.testing.assert_allclose(pieces, whole, rtol=0, atol=1e-12)
        lengths = np.array([split, split])
        cut = twin.truncate(longer, lengths)
        again, _ = twin.read(cut, tokens[:, split:])
        np.testing.assert_allclose(again, second, rtol=0, atol=1e-12)
        swapped, _ = twin.read(twin.select(cache, np.array([1, 0])), tokens[::-1, split:])
        np.testing.assert_allclose(swapped[::-1], second, rtol=0, atol=1e-12)


def test_both_write_and_stream_the_same_tokens(handles, tokens):
    for sampling in ({"temperature": 0.0}, DRAWN):
        found = [twin.write(tokens[:1], 6, sampling=sampling, seed=3) for twin in handles]
        np.testing.assert_array_equal(found[0].tokens_BG, found[1].tokens_BG)
        np.testing.assert_allclose(found[0].margins_BG, found[1].margins_BG, rtol=0, atol=1e-5)
        for twin in handles:
            for use_cache in (True, False):
                stream = Stream(twin, tokens[0].tolist(), sampling, 3, use_cache)
                written = []
                for _ in range(6):
                    written.append(int(np.argmax(stream.scores_V)))
                    stream.append(written[-1])
                assert written == found[0].tokens_BG[0].tolist(), (twin.name, use_cache)


def test_a_stop_id_ends_a_row(handles, tokens):
    for twin in handles:
        first = int(twin.write(tokens, 2, COUNTS).tokens_BG[0, 0])
        written = twin.write(tokens, 2, COUNTS, stop_ids=(first,)).tokens_BG
        assert written[0].tolist() == [first, flax_gpt.NO_TOKEN]


def test_attention_weights_are_a_distribution_over_what_a_token_sees(handles, tokens):
    found = [twin.attention_weights(tokens) for twin in handles]
    for flax, torch in zip(*found, strict=True):
        assert flax.shape == (2, CONFIG.num_heads, 7, 7)
        np.testing.assert_allclose(flax, torch, rtol=0, atol=1e-12)
        np.testing.assert_allclose(flax.sum(axis=-1), 1.0, rtol=1e-12)
        assert not np.any(np.triu(flax, 1))
    assert len(found[0]) == CONFIG.num_layers


def test_a_cast_or_copied_twin_leaves_the_first_as_it_was(handles, tokens):
    for twin in handles:
        before = twin.logits(tokens)
        narrow = twin.cast("float32")
        assert narrow.logits(tokens).dtype == np.float32
        np.testing.assert_allclose(narrow.logits(tokens), before, rtol=0, atol=1e-2)
        other = twin.copy()
        other.load({name: np.zeros_like(x) for name, x in other.leaves().items()})
        assert not np.any(other.logits(tokens))
        other.trainer(dict(learning_rate=0.1)).step(tokens)
        np.testing.assert_array_equal(twin.logits(tokens), before)


def test_both_evaluate_and_train_alike(handles, tokens):
    batches = [(tokens, COUNTS), (tokens[:1], None)]
    flax, torch = (twin.evaluate(batches) for twin in handles)
    assert flax == pytest.approx(torch, rel=1e-12) and flax["tokens"] == 6 + 2 + 6
    config = dataclasses.replace(CONFIG, dropout=0.1)
    leaves = handles[0].leaves()
    trainers = [
        kind.build(config, leaves=leaves.items()).trainer(dict(learning_rate=1e-2), seed=2)
        for kind in (FlaxTwin, TorchTwin)
    ]
    losses = np.array([[x.step(tokens, COUNTS) for x in trainers] for _ in range(3)])
    np.testing.assert_allclose(losses[:, 0], losses[:, 1], rtol=1e-12)
    flax, torch = (x.evaluate(batches) for x in trainers)
    assert flax == pytest.approx(torch, rel=1e-11)
    assert trainers[0].gradient_norm == pytest.approx(trainers[1].gradient_norm, rel=1e-12)


def test_compilations_are_counted_where_the_package_compiles(handles, tokens):
    flax, torch = handles
    before, of_torch = flax.num_compilations(), torch.num_compilations()
    flax.write(tokens, 3)
    between = flax.num_compilations()
    flax.write(tokens, 3)
    assert between - flax.num_compilations() == 0 and between >= before
    torch.write(tokens, 3)
    assert torch.num_compilations() == of_torch  # the package compiles nothing; others may have
