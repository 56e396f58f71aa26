"""Experts: tokens grouped by expert compute what the masked definition does, gradients included."""

import jax
import numpy as np
import pytest
import torch as pytorch
from flax import nnx

from parity.frameworks.flax.leaves import flax_leaves, load_flax
from parity.weights.randomize import randomized
from parity.weights.tables import TWINS
from parity.weights.transplant import transplant

BOUND = 1e-12
SIZES = dict(vocab_size=61, context_length=23, embed_dim=15, num_layers=1, num_heads=3, mlp_dim=13,
             gated=True)  # fmt: skip
EXPERTS = dict(num_experts=7, num_chosen=3, width=11)
KINDS = {
    "softmax, then the best": dict(renormalise=False),
    "softmax of the best": dict(router_bias=True),
    "sigmoid": dict(router="sigmoid", scale=1.7),
    "shared": dict(shared_width=5, shared_gate=True),
}


def mlps(twins, kind):
    """The experts of both twins with the same random numbers in every leaf."""
    changes = SIZES | dict(experts=EXPERTS | KINDS[kind])
    flax, torch = (gpt.package.GPT(gpt.config(**changes)) for gpt in twins)
    load_flax(flax, randomized(flax_leaves(flax), 1))
    transplant(flax, torch, TWINS)
    return list(zip(twins, (flax.blocks[0].mlp, torch.blocks[0].mlp), strict=True))


def inputs(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(2, 9, 15))


@pytest.mark.parametrize("kind", KINDS)
def test_grouped_tokens_get_what_the_masked_definition_gives(twins, kind):
    outputs, choices = [], []
    for gpt, mlp in mlps(twins, kind):
        x_BTD = gpt.floats(inputs())
        weights_BTU, chosen_BTU = mlp.router(x_BTD)
        found = gpt.numpy(mlp.experts(x_BTD, weights_BTU, chosen_BTU))
        masked = gpt.numpy(mlp.experts.masked(x_BTD, weights_BTU, chosen_BTU))
        np.testing.assert_allclose(found, masked, rtol=0, atol=BOUND)
        assert np.all(gpt.numpy(mlp.router.margins(x_BTD)) > 1e-9)
        sums = gpt.numpy(weights_BTU).sum(-1)
        if kind in ("softmax of the best", "sigmoid"):
            np.testing.assert_allclose(sums, KINDS[kind].get("scale", 1.0), atol=BOUND)
        outputs.append(gpt.numpy(mlp(x_BTD)))
        choices.append(gpt.numpy(chosen_BTU))
    np.testing.assert_array_equal(*choices)
    np.testing.assert_allclose(*outputs, rtol=0, atol=BOUND)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_experts_and_router_are_those_of_the_definition_in_both(twins, kind):
    (_, flax), (_, torch) = mlps(twins, kind)
    found = {}
    graph, state = nnx.split(flax)
    for way in ("__call__", "masked"):

        def loss(state, way=way):
            mlp = nnx.merge(graph, state)
            x_BTD = jax.numpy.asarray(inputs())
            y_BTD = getattr(mlp.experts, way)(x_BTD, *mlp.router(x_BTD))
            return (mlp.shared(x_BTD, y_BTD) ** 2).sum()

        found[way] = nnx.to_flat_state(jax.grad(loss)(state))
    for (path, one), (_, other) in zip(found["__call__"], found["masked"], strict=True):
        np.testing.assert_allclose(one[...], other[...], atol=1e-10, err_msg=str(path))
    gpt = twins[1]
    with pytorch.enable_grad():
        x_BTD = gpt.floats(inputs())
        (torch(x_BTD) ** 2).sum().backward()
    theirs = dict(torch.named_parameters())
    router = np.asarray(dict(found["__call__"])["router", "linear", "kernel"][...])
    np.testing.assert_allclose(theirs["router.linear.weight"].grad.numpy().T, router, atol=1e-10)
    gate = np.asarray(dict(found["__call__"])["experts", "gate"][...])
    np.testing.assert_allclose(theirs["experts.gate"].grad.numpy(), gate, atol=1e-10)
    assert np.abs(router).max() > 1e-3


def test_a_bias_that_chooses_weighs_nothing(twins):
    for gpt, mlp in mlps(twins, "sigmoid"):
        x_BTD = gpt.floats(inputs())
        scores_BTX = gpt.numpy(mlp.router.scores(x_BTD))
        weights_BTU, chosen_BTU = (gpt.numpy(x) for x in mlp.router(x_BTD))
        expected = np.take_along_axis(scores_BTX, chosen_BTU, -1)
        expected = 1.7 * expected / expected.sum(-1, keepdims=True)
        np.testing.assert_allclose(weights_BTU, expected, atol=BOUND)
        best = np.argsort(-scores_BTX, axis=-1)[..., :3]
        assert not np.array_equal(np.sort(best, -1), np.sort(chosen_BTU, -1))


def test_a_batch_invariant_cache_refuses_experts(gpt):
    config = gpt.config(**(SIZES | dict(experts=EXPERTS)))
    with pytest.raises(ValueError, match="BatchInvariantCache: 7 experts"):
        gpt.package.BatchInvariantCache.empty(config, 1, 16)
