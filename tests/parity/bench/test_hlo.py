"""What compiled programs do to a cache: exact numbers, where times are not."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_gpt
from flax_gpt.decoding.generate import _loop
from parity.bench.hlo import remade_caches

CONFIG = flax_gpt.GPTConfig(
    vocab_size=97, context_length=2048, embed_dim=48, num_layers=2, num_heads=3, mlp_dim=96
)
CAPACITY = 320  # read sizes of 0, 256 and 320 slots


def decoder_of(batch_size):
    return flax_gpt.Decoder(flax_gpt.GPT(CONFIG, flax_gpt.random.key(0)), batch_size)


def shape_of(batch_size, capacity=CAPACITY):
    return batch_size, CONFIG.num_heads, capacity, CONFIG.head_width


def step_program(decoder, batch_size, capacity=CAPACITY):
    cache = flax_gpt.KVCache.empty(CONFIG, batch_size, capacity)
    return decoder.program(flax_gpt.decode_step, np.zeros(batch_size, np.int32), state=cache)


def uncached_program(decoder, length):
    def read(model, tokens_BT):
        x_BTD, _ = model.hidden(tokens_BT)
        return model.unembed(x_BTD[:, -1:])

    return decoder.program(read, np.zeros((1, length), np.int32))


@pytest.mark.parametrize("batch_size", [1, 2, 4, 8, 16])
def test_a_step_and_the_loop_make_no_array_as_large_as_the_cache(batch_size):
    decoder = decoder_of(batch_size)
    shape = shape_of(batch_size)
    assert not remade_caches(step_program(decoder, batch_size).as_text(), shape)
    logits = np.zeros((batch_size, CONFIG.vocab_size), np.float32)
    operands = logits, np.zeros(0, np.int32), None, np.int32(3)
    cache = flax_gpt.KVCache.empty(CONFIG, batch_size, CAPACITY)
    loop = decoder.program(_loop, *operands, state=cache, static=(flax_gpt.GREEDY, decoder.steps))
    assert not remade_caches(loop.as_text(), shape)


def compiled(function, batch_size):
    """A function of a cache, which is donated, a token's keys and a slot, as text."""
    shape = shape_of(batch_size)
    operands = jnp.zeros(shape), jnp.zeros((*shape[:2], 1, shape[3])), jnp.int32(3)
    return jax.jit(function, donate_argnums=0).lower(*operands).compile().as_text()


def test_a_cache_that_is_read_after_it_was_written_is_seen_to_be_copied():
    def naive(keys, new, slot):
        keys = jax.lax.dynamic_update_slice(keys, new, (0, 0, slot, 0))
        return jnp.einsum("BKTH,BKSH->BKTS", new, keys), keys

    assert remade_caches(compiled(naive, 1), shape_of(1))


def test_a_cache_that_is_cleaned_in_every_step_is_seen():
    def cleaning(keys, new, slot):
        seen = jnp.where(jnp.arange(CAPACITY)[None, None, :, None] < slot, keys, 0.0)
        scores = jnp.einsum("BKTH,BKSH->BKTS", new, seen)
        return scores, jax.lax.dynamic_update_slice(keys, new, (0, 0, slot, 0))

    assert remade_caches(compiled(cleaning, 2), shape_of(2))


def test_a_cache_without_donation_is_seen_to_be_copied():
    def step(keys, new, slot):
        return jax.lax.dynamic_update_slice(keys, new, (0, 0, slot, 0))

    operands = jnp.zeros(shape_of(1)), jnp.zeros((1, 3, 1, 16)), jnp.int32(3)
    text = jax.jit(step).lower(*operands).compile().as_text()
    assert remade_caches(text, shape_of(1))
    assert not remade_caches(compiled(step, 1), shape_of(1))


def test_the_work_of_a_step_is_affine_in_its_slots():
    decoder = decoder_of(1)
    slots = 64, 128, 192, 256
    costs = [step_program(decoder, 1, n).cost_analysis() for n in slots]
    for name in ("flops", "bytes accessed"):
        slopes = np.diff([cost[name] for cost in costs])
        assert slopes.min() > 0 and np.ptp(slopes) < 0.1 * slopes.mean(), (name, slopes)


def test_the_work_without_a_cache_is_quadratic_in_the_length():
    decoder = decoder_of(1)
    flops = [uncached_program(decoder, n).cost_analysis()["flops"] for n in (64, 96, 128, 160)]
    bends = np.diff(flops, 2)
    assert bends.min() > 0 and np.ptp(bends) < 0.1 * bends.mean()
    # Each token again: a step without a cache costs more than all of the slots of one with it.
    cached = step_program(decoder, 1, 160).cost_analysis()["flops"]
    assert flops[-1] > 20 * cached


def test_the_programs_of_a_mix_of_prompts_are_bounded():
    decoder = decoder_of(1)
    before = decoder.num_compilations()
    for length, new in itertools.product((3, 9, 17, 60, 130, 250), (1, 5)):
        flax_gpt.generate(decoder, np.ones((1, length), np.int32), new)
    # Prompts round up to 4, 16, 32, 64 and 256; all fit 256 slots, so there is one loop.
    assert decoder.num_compilations() - before == 5 + 1
