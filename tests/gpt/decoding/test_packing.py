"""Weights laid out for steps: the same function in fewer operations, and what it costs in bytes."""

import collections

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from torch_gpt.decoding import kernels as torch_kernels

B, T = 3, 7
COUNTS = (7, 2, 5)


def tokens_of(length=T, rows=B, seed=0):
    return np.random.default_rng(seed).integers(0, 61, (rows, length))


def decoded(gpt, decoder, prompt, new, counts=None):
    """Logits after a prompt and after every token that follows it."""
    counts = None if counts is None else gpt.ints(counts)
    logits, cache = decoder.prefill(gpt.ints(prompt), counts)
    found = [gpt.numpy(logits)]
    for t in range(new.shape[1]):
        logits, cache = decoder.advance(gpt.ints(new[:, t]), cache)
        found.append(gpt.numpy(logits))
    return np.stack(found, 1)


def uncached(gpt, model, prompt, new, counts=None):
    """The same logits from whole sequences."""
    rows, counts = len(prompt), counts or [prompt.shape[1]] * len(prompt)
    found = np.zeros((rows, new.shape[1] + 1, model.config.vocab_size))
    for row, count in enumerate(counts):
        whole = np.concatenate([prompt[row, :count], new[row]])[None]
        found[row] = gpt.numpy(model(gpt.ints(whole))[0])[0, count - 1 :]
    return found


def test_a_packed_model_shares_what_it_can_and_says_what_it_adds(gpt):
    model = gpt.model(dtype="float32")
    matrices = 4 * sum(
        i * o for i, o in 4 * [(15, 15)] + [(15, 23), (23, 15)]
    ) * model.config.num_layers  # fmt: skip
    extra = {
        kernel: gpt.package.Decoder(model, 1, kernels=kernel).extra_bytes
        for kernel in gpt.package.KERNELS
    }
    head, inside = 4 * 61 * 15, 4 * 3 * 15 * 15 * model.config.num_layers
    if gpt.name == "flax":
        # One order is that of the layers, the other that of a tied head.
        assert extra == {"plain": 0, "in_out": head, "out_in": matrices, "outputs_first": 0}
        many = gpt.package.Decoder(model, 8, kernels="outputs_first")
        assert many.extra_bytes == matrices
    else:
        copies = dict(in_out=matrices + head, packed=matrices + head)
        # Queries, keys and values are one matrix, for more rows where it can be.
        joined = dict(joined=inside, mv=inside, split=inside)
        assert extra == {"plain": 0, "outputs_first": 0} | copies | joined
    assert gpt.package.Decoder(model, 8, packed=False).extra_bytes == 0
    packed = gpt.package.Decoder(model, 1).model
    assert gpt.package.Decoder(packed, 1).model is packed


class Started(TorchDispatchMode):
    """Counts the operations that torch starts, by name."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def started(gpt, decoder, rows, counts=None):
    """The operations of one step."""
    counts = None if counts is None else gpt.ints(counts)
    _, cache = decoder.prefill(gpt.ints(tokens_of(rows=rows)), counts)
    with Started() as seen:
        decoder.advance(gpt.ints([1] * rows), cache)
    return seen.counts


SHORT = {"_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math"}


@pytest.mark.parametrize(
    "changes, rows, counts, short",
    [
        ({}, 1, None, 2),
        ({}, B, None, 2),
        ({}, B, COUNTS, 0),  # ragged rows do not all see the same
        (dict(window=T + 2, num_full_layers=0), 1, None, 2),
        (dict(window=T, num_full_layers=1), 1, None, 1),
        (dict(positions="alibi"), 1, None, 0),
        (dict(positions="rotary", head_dim=6, num_kv_heads=1, qk_norm="head"), 1, None, 2),
    ],
)
def test_a_step_that_sees_all_takes_the_short_way(twins, changes, rows, counts, short):
    _, gpt = twins
    model = gpt.model(**changes)
    decoder = gpt.package.Decoder(model, rows, kernels="joined")
    seen = started(gpt, decoder, rows, counts)
    assert sum(seen[name] for name in SHORT) == short
    prompt, new = tokens_of(rows=rows), tokens_of(3, rows, seed=1)
    found = decoded(gpt, decoder, prompt, new, counts)
    expected = uncached(gpt, model, prompt, new, counts)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_a_layer_of_a_step_starts_few_operations(twins):
    _, gpt = twins
    shallow, deep = (
        started(gpt, gpt.package.Decoder(gpt.model(num_layers=n), 1, kernels="joined"), 1).total()
        for n in (1, 2)
    )
    plain = started(gpt, gpt.package.Decoder(gpt.model(num_layers=1), 1, packed=False), 1).total()
    # Four products, two norms, attention, GELU, two writes and two sums; views are the rest.
    assert deep - shallow <= 33
    assert shallow < plain


def test_a_machine_may_have_more_cores_than_a_layer_has_outputs(twins, monkeypatch):
    _, gpt = twins
    monkeypatch.setattr(torch, "get_num_threads", lambda: 20)
    model, prompt, new = gpt.model(), tokens_of(rows=1), tokens_of(2, 1, seed=1)
    found = decoded(gpt, gpt.package.Decoder(model, 1, kernels="split"), prompt, new)
    expected = uncached(gpt, model, prompt, new)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_without_onednn_torch_falls_back_on_its_own_linear(twins, monkeypatch):
    _, gpt = twins
    monkeypatch.setattr(torch_kernels, "_can_pack", lambda dtype: False)
    model = gpt.model(dtype="float32")
    decoder = gpt.package.Decoder(model, B, kernels="packed")
    assert decoder.extra_bytes == 0 and {x.kernel for x in decoder.kernels} == {"plain"}
    found = decoded(gpt, decoder, tokens_of(), tokens_of(2, seed=1))
    expected = uncached(gpt, model, tokens_of(), tokens_of(2, seed=1))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_onednn_is_asked_before_it_is_used():
    assert not torch_kernels._can_pack(torch.float64)
