"""A module without settings is trained by the same AdamW in both frameworks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import flax_gpt
from parity.frameworks.flax.module import adamw as flax_adamw
from parity.frameworks.torch.module import adamw as torch_adamw


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_default_optimizers_agree_with_each_other_and_with_the_twins(dtype):
    rng = np.random.default_rng(0)
    start, *gradients = (rng.normal(size=(7, 5)).astype(dtype) for _ in range(9))
    config = flax_gpt.TrainConfig(schedule="constant", decay_all=True)
    ends = []
    with jax.enable_x64(dtype == "float64"):
        for optimizer in (flax_adamw(), flax_gpt.adamw(config)):
            parameters = jnp.asarray(start)
            state = optimizer.init(parameters)
            for gradient in gradients:
                updates, state = optimizer.update(jnp.asarray(gradient), state, parameters)
                parameters = optax.apply_updates(parameters, updates)
            ends.append(np.asarray(parameters))
    parameter = torch.nn.Parameter(torch.from_numpy(start.copy()))
    optimizer = torch_adamw([parameter])
    for gradient in gradients:
        parameter.grad = torch.from_numpy(gradient)
        optimizer.step()
    assert np.array_equal(*ends), "another AdamW than the twins'"
    gap = np.max(np.abs(ends[0] - parameter.detach().numpy()))
    assert gap <= 8 * np.finfo(dtype).eps
