"""Both twins are GPT-2 as Hugging Face computes it."""

import functools

import numpy as np
import pytest
import torch
import transformers

from parity.weights.tables import HF_GPT2, TWINS
from parity.weights.transplant import transplant

B, T, G = 3, 11, 13
BOUND = 1e-12


@functools.cache
def reference():
    """A GPT-2 with random numbers in every leaf, so that each one matters."""
    config = transformers.GPT2Config(
        vocab_size=61, n_positions=29, n_embd=15, n_layer=2, n_head=3, n_inner=23,
        activation_function="gelu_new", attn_implementation="eager",
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).double().eval()
    rng = np.random.default_rng(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
            parameter.copy_(torch.from_numpy(rng.normal(centre, 0.4, parameter.shape)))
    return model


@functools.cache
def ported(flax, torch_twin):
    """The reference's weights in each twin: into flax from Hugging Face, into torch from flax."""
    models = flax.package.GPT(flax.config()), torch_twin.package.GPT(torch_twin.config())
    transplant(reference(), models[0], HF_GPT2)
    transplant(*models, TWINS)
    return models


@functools.cache
def tokens_of():
    """Rows of ids."""
    return np.random.default_rng(1).integers(0, 61, (B, T))


@pytest.fixture
def both(twins):
    """Each twin with its port of the reference."""
    return list(zip(twins, ported(*twins), strict=True))


def test_the_config_says_what_hugging_face_says(both):
    theirs = reference().config
    for _, model in both:
        ours = model.config
        assert (ours.vocab_size, ours.context_length) == (theirs.vocab_size, theirs.n_positions)
        assert (ours.embed_dim, ours.num_heads) == (theirs.n_embd, theirs.n_head)
        assert (ours.num_layers, ours.mlp_dim) == (theirs.n_layer, theirs.n_inner)
        assert ours.norm_epsilon == theirs.layer_norm_epsilon


def test_logits_are_those_of_hugging_face(both):
    expected = reference()(torch.from_numpy(tokens_of())).logits.numpy()
    assert expected.dtype == "float64" and expected.std() > 0.5
    for gpt, model in both:
        found = gpt.numpy(model(gpt.ints(tokens_of()))[0])
        np.testing.assert_allclose(found, expected, rtol=0, atol=BOUND, err_msg=gpt.name)


def test_padded_rows_are_those_of_hugging_face_with_a_mask(both):
    counts = np.array((7, 11, 2))
    real = np.arange(T) < counts[:, None]
    expected = reference()(
        torch.from_numpy(tokens_of()), attention_mask=torch.from_numpy(real.astype(int))
    ).logits.numpy()
    for gpt, model in both:
        found = gpt.numpy(model(gpt.ints(tokens_of()), None, gpt.ints(counts))[0])
        np.testing.assert_allclose(found[real], expected[real], rtol=0, atol=BOUND)


def test_greedy_tokens_are_those_of_hugging_face(both):
    prompts = torch.from_numpy(tokens_of())
    theirs = reference().generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=G, do_sample=False
    )
    expected = theirs[:, T:].numpy()
    assert len(np.unique(expected)) > 8  # not one token again and again
    for gpt, model in both:
        generation = gpt.package.generate(model, gpt.ints(tokens_of()), G)
        np.testing.assert_array_equal(gpt.numpy(generation.tokens_BG), expected, gpt.name)
