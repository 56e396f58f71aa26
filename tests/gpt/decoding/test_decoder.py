"""The fast forms of prefill and step: the same numbers, and room that grows."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import torch_gpt
from flax_gpt.decoding import decoder as flax_decoder
from torch_gpt.decoding import decoder as torch_decoder

B, T = 3, 7
COUNTS = (7, 2, 5)


@dataclasses.dataclass(frozen=True)
class Steps:
    """Logits behind a prompt and behind every token after it, and the last cache."""

    logits: np.ndarray
    cache: object


def tokens_of(length=T, rows=B, seed=0):
    return np.random.default_rng(seed).integers(0, 61, (rows, length))


def decoded(gpt, decoder, prompt, new, counts=None, **options) -> Steps:
    """Reads a prompt, then one token after the other."""
    counts = None if counts is None else gpt.ints(counts)
    logits, cache = decoder.prefill(gpt.ints(prompt), counts, **options)
    found = [gpt.numpy(logits)]
    for t in range(new.shape[1]):
        logits, cache = decoder.advance(gpt.ints(new[:, t]), cache)
        found.append(gpt.numpy(logits))
    return Steps(np.stack(found, 1), cache)


def uncached(gpt, model, prompt, new, counts=None):
    """The same logits from whole sequences."""
    rows, counts = len(prompt), counts or [prompt.shape[1]] * len(prompt)
    found = np.zeros((rows, new.shape[1] + 1, model.config.vocab_size))
    for row, count in enumerate(counts):
        whole = np.concatenate([prompt[row, :count], new[row]])[None]
        found[row] = gpt.numpy(model(gpt.ints(whole))[0])[0, count - 1 :]
    return found


# --- the same function ---


@pytest.mark.parametrize("rows", [1, B])
@pytest.mark.parametrize("packed", [True, False])
def test_a_decoder_computes_what_the_model_does(gpt, rows, packed):
    model = gpt.model()
    prompt, new = tokens_of(rows=rows), tokens_of(4, rows, seed=1)
    decoder = gpt.package.Decoder(model, rows, packed)
    found = decoded(gpt, decoder, prompt, new)
    np.testing.assert_allclose(found.logits, uncached(gpt, model, prompt, new), rtol=0, atol=1e-12)
    np.testing.assert_array_equal(gpt.numpy(found.cache.lengths_B), [T + 4] * rows)


@pytest.mark.parametrize("chunk", [1, 3, None])
def test_a_prompt_may_be_read_in_chunks(gpt, chunk):
    model, new = gpt.model(), tokens_of(2, seed=1)
    decoder = gpt.package.Decoder(model, B)
    found = decoded(gpt, decoder, tokens_of(), new, COUNTS, chunk=chunk)
    expected = uncached(gpt, model, tokens_of(), new, COUNTS)
    np.testing.assert_allclose(found.logits, expected, rtol=0, atol=1e-12)


def test_chunks_bound_the_memory_of_the_scores(twins):
    flax, _ = twins
    model = flax.model(context_length=512)
    decoder = flax.package.Decoder(model, 1)

    def temporary(chunk):
        tokens, counts = np.zeros((1, 512), np.int32), np.full(1, 512, np.int32)
        static = 512, chunk, decoder.steps
        program = decoder.program(flax_decoder._prefill, tokens, counts, static=static)
        return program.memory_analysis().temp_size_in_bytes

    assert temporary(32) < temporary(None) / 4


# --- room ---


def test_a_full_cache_grows_to_twice_its_room_and_no_further_than_the_context(gpt):
    model = gpt.model(context_length=600, num_layers=1)
    decoder = gpt.package.Decoder(model, 1)
    prompt, new = tokens_of(255, 1), tokens_of(3, 1, seed=1)
    found = decoded(gpt, decoder, prompt, new)
    assert found.cache.capacity == 512
    expected = uncached(gpt, model, prompt, new)
    np.testing.assert_allclose(found.logits, expected, rtol=0, atol=1e-12)
    room = gpt.package.decoding.decoder.capacity_for
    assert [room(n, model.config) for n in (1, 256, 257, 512, 513, 600)] == [
        256, 256, 512, 512, 600, 600,
    ]  # fmt: skip


def test_past_the_context_is_an_error_and_so_is_a_prompt_without_room(gpt):
    model = gpt.model()
    decoder = gpt.package.Decoder(model, 1)
    _, cache = decoder.prefill(gpt.ints(tokens_of(29, 1)))
    with pytest.raises(ValueError, match=r"29 tokens \+ 1 new = 30 > context_length 29"):
        decoder.advance(gpt.ints([1]), cache)
    with pytest.raises(ValueError, match=r"Decoder.prefill: 7 tokens, capacity 6"):
        decoder.prefill(gpt.ints(tokens_of(7, 1)), capacity=6)


def test_after_warming_up_nothing_is_compiled_for_any_mix_of_lengths(twins):
    flax, _ = twins
    decoder = flax.package.Decoder(flax.model(context_length=300, num_layers=1), B)

    def run(length, counts, new):
        decoded(flax, decoder, tokens_of(length), tokens_of(new), counts)
        flax.package.generate(decoder, flax.ints(tokens_of(length)), new, flax.ints(counts))

    for length in (8, 16):
        run(length, (length, 1, 2), 3)
    before = decoder.num_compilations()
    for length in (5, 7, 9, 12, 16):
        for counts, new in (((length, 1, 2), 2), ((1, length, 3), 9)):
            run(length, counts, new)
    assert decoder.num_compilations() == before
    run(17, (17, 1, 1), 2)  # of another size: the count does count
    assert decoder.num_compilations() > before


# --- nothing is copied ---


class Written(TorchDispatchMode):
    """Counts bytes of what operations make anew or write to."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not function.is_view:
            # In place, as much as was given to write.
            written = args[-1] if result is args[0] else result
            self.bytes += written.nbytes if isinstance(written, torch.Tensor) else 0
        return result


@pytest.mark.parametrize("counts", [None, (1, 0, 1)])
def test_an_append_writes_as_much_to_a_large_cache_as_to_a_small_one(gpt, counts):
    counts = None if counts is None else gpt.ints(counts)
    config, tokens = gpt.config(), gpt.ints(np.zeros((B, 1)))
    attention_metadata = gpt.package.metadata.attention_metadata
    written = []
    for capacity in (16, 4096):
        cache = gpt.package.KVCache.empty(config, B, capacity)
        new = gpt.floats(np.ones((B, config.num_heads, 1, config.head_width)))
        new = gpt.package.LayerCache(new, new)
        if gpt.name == "torch":
            metadata = attention_metadata(tokens, cache, counts, 4096)
            with Written() as found:
                cache.layers[0].append(new, metadata)
            written.append(found.bytes)
        else:

            def append(layer, cache, new=new, counts=counts):
                return layer.append(new, attention_metadata(tokens, cache, counts, 4096))

            program = jax.jit(append, donate_argnums=0)
            program = program.lower(cache.layers[0], cache).compile()
            found = program.memory_analysis()
            assert found.alias_size_in_bytes == found.output_size_in_bytes - 16  # the tuple itself
            written.append(found.temp_size_in_bytes)
    assert written[0] == written[1]


def test_the_steps_of_torch_stay_in_one_place(twins):
    _, gpt = twins
    decoder = gpt.package.Decoder(gpt.model(), 1)
    _, cache = decoder.prefill(gpt.ints(tokens_of(7, 1)))
    places = [layer.keys_BKSH.data_ptr() for layer in cache.layers]
    older = cache
    for token in range(5):
        _, cache = decoder.advance(gpt.ints([token]), cache)
    assert [layer.keys_BKSH.data_ptr() for layer in cache.layers] == places
    _, other = decoder.advance(gpt.ints([9]), older)  # a stale handle: it copies
    assert other.layers[0].keys_BKSH.data_ptr() != places[0]


# --- torch's compiled step ---


@pytest.fixture(scope="module")
def replayed():
    """A model, a prompt's cache, and what makes a replay of its step."""
    torch._dynamo.reset()
    config = torch_gpt.GPTConfig(
        vocab_size=61, context_length=29, embed_dim=15, num_layers=2, num_heads=3, mlp_dim=23,
        dtype="float64", init_std=0.5,
    )  # fmt: skip
    model = torch_gpt.GPT(config, torch_gpt.random.key(1))
    empty = torch_gpt.KVCache.empty(config, B, 20)
    counts = torch.tensor(COUNTS)
    _, cache = torch_gpt.prefill(model, torch.from_numpy(tokens_of()), empty, counts)
    replay = torch_decoder._Replay(model, cache, backend="aot_eager")
    return model, cache, replay


def test_a_replay_steps_as_the_model_does_and_stays_in_its_buffers(replayed):
    model, cache, replay = replayed
    expected_cache = cache
    before = [layer.keys_BKSH.clone() for layer in cache.layers]
    for token in range(4):
        tokens = torch.full((B,), token)
        expected, expected_cache = torch_gpt.decode_step(model, tokens, expected_cache)
        assert replay.can_take(cache)
        found, longer = replay(tokens, cache)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
        assert longer.lengths_B.tolist() == expected_cache.lengths_B.tolist()
        cache = longer
    assert cache.layers[0].keys_BKSH.data_ptr() == replay._keys[0].data_ptr()
    for layer, keys in zip(replayed[1].layers, before, strict=True):
        for row, count in enumerate(COUNTS):
            torch.testing.assert_close(layer.keys_BKSH[row, :, :count], keys[row, :, :count])


def test_a_replay_takes_no_cache_that_would_spoil_another(replayed):
    _, cache, replay = replayed
    _, first = replay(torch.ones(B, dtype=torch.int64), cache)
    held = [layer.keys_BKSH.clone() for layer in first.layers]
    _, second = replay(torch.ones(B, dtype=torch.int64), first)
    # The buffers are seen through two values, so another prompt, or the older one, may not enter.
    assert replay.can_take(second) and not replay.can_take(cache) and not replay.can_take(first)
    for layer, keys in zip(first.layers, held, strict=True):
        for row, length in enumerate(first.lengths_B.tolist()):
            torch.testing.assert_close(layer.keys_BKSH[row, :, :length], keys[row, :, :length])
    del first, second
    assert replay.can_take(cache)
    assert not replay.can_take(cache.grow(21))
