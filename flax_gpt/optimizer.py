"""AdamW as the framework ships it, with every default that differs between the two stated.

Read beside torch_gpt/optimizer.py.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flax_gpt.config import TrainConfig


def adamw(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW with decoupled decay on every parameter. Loshchilov and Hutter, 2019, algorithm 2.

    `optax.adamw` is this chain, but for the bias correction: it computes 1 - beta**count in
    float32, which at count 1 and beta 0.999 is off by 1.3e-5, where torch uses Python doubles.
    """
    return optax.chain(
        scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale(-config.learning_rate),
    )


def scale_by_adam(beta1: float, beta2: float, epsilon: float) -> optax.GradientTransformation:
    """Adam's direction, with bias corrections exact to rounding. State as `optax.scale_by_adam`."""

    def init(parameters: Any) -> optax.ScaleByAdamState:
        zeros = jax.tree.map(jnp.zeros_like, parameters)
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), zeros, zeros)

    def update(gradients: Any, state: optax.ScaleByAdamState, parameters: Any = None):
        def direction(m: jax.Array, v: jax.Array) -> jax.Array:
            # -expm1(n log b) is 1 - b**n without the cancellation.
            steps = count.astype(m.dtype)
            m_hat = m / -jnp.expm1(steps * math.log(beta1))
            v_hat = v / -jnp.expm1(steps * math.log(beta2))
            return m_hat / (jnp.sqrt(v_hat) + epsilon)

        count = state.count + 1
        mu = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, state.mu, gradients)
        nu = jax.tree.map(lambda v, g: beta2 * v + (1 - beta2) * g * g, state.nu, gradients)
        return jax.tree.map(direction, mu, nu), optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)
