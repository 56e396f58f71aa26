"""MLPs of which each token takes a few, as its router says. Read beside torch_gpt/experts.py.

Every token is kept: no expert has a capacity.

Dimension key: B batch, T new tokens, D embed dim, F width of an expert, X experts, U experts of one
token.
"""

from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx

from flax_gpt.config import Experts, GPTConfig
from flax_gpt.layers import (
    Activation,
    dropout,
    initial,
    linear,
    parameter_dtype,
    residual_std,
    split_or_none,
)

_TINY = 1e-20  # a sum of sigmoids may be zero


class Router(nnx.Module):
    """The choice of experts by a softmax over all of them.

    Args:
        config: of the model.
        key: draws the initial weights.
    """

    def __init__(self, config: GPTConfig, key: jax.Array | None = None):
        experts = cast(Experts, config.experts)
        self.num_chosen, self.scale = experts.num_chosen, experts.scale
        self.renormalise = experts.renormalise
        width, std = config.embed_dim, config.init_std
        self.linear = linear(config, width, experts.num_experts, std, key, experts.router_bias)

    def __call__(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the weights (B, T, U) of each token's experts, and which these are."""
        scores_BTX = self.scores(x_BTD)
        _, chosen_BTU = jax.lax.top_k(self.preferences(scores_BTX), self.num_chosen)
        weights_BTU = jnp.take_along_axis(scores_BTX, chosen_BTU, axis=-1)
        if self.renormalise:
            weights_BTU = weights_BTU / (jnp.sum(weights_BTU, axis=-1, keepdims=True) + _TINY)
        return (weights_BTU * self.scale).astype(x_BTD.dtype), chosen_BTU

    def scores(self, x_BTD: jax.Array) -> jax.Array:
        """Return how well each expert fits (B, T, X), in float32 at least."""
        return jax.nn.softmax(self.wide_logits(x_BTD), axis=-1)

    def preferences(self, scores_BTX: jax.Array) -> jax.Array:
        """Return the numbers of which the largest are chosen."""
        return scores_BTX

    def wide_logits(self, x_BTD: jax.Array) -> jax.Array:
        """Return what scores are made of (B, T, X), in float32 at least."""
        logits_BTX = self.linear(x_BTD)
        return logits_BTX.astype(jnp.promote_types(logits_BTX.dtype, jnp.float32))

    def margins(self, x_BTD: jax.Array) -> jax.Array:
        """Return by how much the last chosen expert beats the best other one, (B, T).

        Where this is near to rounding, two correct programs may choose differently.
        """
        preferences_BTX = self.preferences(self.scores(x_BTD))
        best, _ = jax.lax.top_k(preferences_BTX, self.num_chosen + 1)
        return best[..., -2] - best[..., -1]


class SigmoidRouter(Router):
    """The choice by a sigmoid of each expert and a bias, which takes part in nothing else."""

    def __init__(self, config: GPTConfig, key: jax.Array | None = None):
        super().__init__(config, key)
        num_experts = cast(Experts, config.experts).num_experts
        self.preference = nnx.Param(jnp.zeros(num_experts, parameter_dtype(config)))

    def scores(self, x_BTD: jax.Array) -> jax.Array:
        """Return how well each expert fits (B, T, X), in float32 at least."""
        return jax.nn.sigmoid(self.wide_logits(x_BTD))

    def preferences(self, scores_BTX: jax.Array) -> jax.Array:
        """Return the numbers of which the largest are chosen."""
        return scores_BTX + self.preference[...].astype(scores_BTX.dtype)[None, None, :]


class StackedExperts(nnx.Module):
    """Gated MLPs of one shape, their weights stacked.

    Args:
        config: of the model.
        key: draws the initial weights.
        activation: between the maps.
    """

    def __init__(self, config: GPTConfig, key: jax.Array | None, activation: Activation):
        experts, subkeys = cast(Experts, config.experts), split_or_none(key, 3)
        X, D, F = experts.num_experts, config.embed_dim, experts.width
        std, residual = config.init_std, residual_std(config)
        self.activation = activation
        self.gate = nnx.Param(initial(config, (X, D, F), std, subkeys[0]))
        self.up = nnx.Param(initial(config, (X, D, F), std, subkeys[1]))
        self.down = nnx.Param(initial(config, (X, F, D), residual, subkeys[2]))
        self.has_bias = config.mlp_bias
        if self.has_bias:
            self.gate_bias = nnx.Param(initial(config, (X, F), std, None))
            self.up_bias = nnx.Param(initial(config, (X, F), std, None))
            self.down_bias = nnx.Param(initial(config, (X, D), std, None))

    def __call__(
        self, x_BTD: jax.Array, weights_BTU: jax.Array, chosen_BTU: jax.Array
    ) -> jax.Array:
        """Compute `masked`, each expert on the tokens that chose it."""
        # twin: XLA multiplies sorted tokens in groups of their expert; torch goes from expert to
        # expert, which a compiled step of fixed shapes cannot.
        chosen, num_chosen = chosen_BTU.reshape(-1), chosen_BTU.shape[-1]
        order = jnp.argsort(chosen)
        sizes = jnp.bincount(chosen, length=self.gate.shape[0])
        rows, experts = order // num_chosen, chosen[order]
        tokens = x_BTD.reshape(-1, x_BTD.shape[-1])
        gate = jax.lax.ragged_dot(tokens[rows], self.gate[...], sizes)
        up = jax.lax.ragged_dot(tokens[rows], self.up[...], sizes)
        if self.has_bias:
            gate, up = gate + self.gate_bias[...][experts], up + self.up_bias[...][experts]
        outputs = jax.lax.ragged_dot(self.activation(up, gate), self.down[...], sizes)
        if self.has_bias:
            outputs = outputs + self.down_bias[...][experts]
        outputs = outputs * weights_BTU.reshape(-1)[order][:, None]
        return jnp.zeros_like(tokens).at[rows].add(outputs).reshape(x_BTD.shape)

    def masked(self, x_BTD: jax.Array, weights_BTU: jax.Array, chosen_BTU: jax.Array) -> jax.Array:
        """Compute all experts on all tokens, and sum by weights that are 0 where not chosen."""
        num_experts = self.gate.shape[0]
        mask_BTUX = chosen_BTU[..., None] == jnp.arange(num_experts)[None, None, None, :]
        weights_BTX = jnp.einsum("BTU,BTUX->BTX", weights_BTU, mask_BTUX.astype(x_BTD.dtype))
        gate_BTXF = jnp.einsum("BTD,XDF->BTXF", x_BTD, self.gate[...])
        up_BTXF = jnp.einsum("BTD,XDF->BTXF", x_BTD, self.up[...])
        if self.has_bias:
            gate_BTXF = gate_BTXF + self.gate_bias[...][None, None]
            up_BTXF = up_BTXF + self.up_bias[...][None, None]
        h_BTXF = self.activation(up_BTXF, gate_BTXF)
        y_BTXD = jnp.einsum("BTXF,XFD->BTXD", h_BTXF, self.down[...])
        if self.has_bias:
            y_BTXD = y_BTXD + self.down_bias[...][None, None]
        return jnp.einsum("BTX,BTXD->BTD", weights_BTX, y_BTXD)


class Shared(nnx.Module):
    """An MLP that every token takes besides its experts."""

    def __init__(self, mlp: nnx.Module):
        self.mlp = mlp

    def __call__(self, x_BTD: jax.Array, y_BTD: jax.Array) -> jax.Array:
        """Add its output to the experts'."""
        return y_BTD + self.mlp(x_BTD)


class GatedShared(Shared):
    """The same, weighed by a sigmoid of the token."""

    def __init__(self, mlp: nnx.Module, config: GPTConfig, key: jax.Array | None = None):
        super().__init__(mlp)
        self.gate = linear(config, config.embed_dim, 1, config.init_std, key, bias=False)

    def __call__(self, x_BTD: jax.Array, y_BTD: jax.Array) -> jax.Array:
        """Add its output to the experts'."""
        return y_BTD + jax.nn.sigmoid(self.gate(x_BTD)) * self.mlp(x_BTD)


class ExpertsMLP(nnx.Module):
    """A router, its experts, and what is shared beside them, in place of an MLP.

    Args:
        config: of the model.
        key: draws the initial weights.
        router: the class of the router.
        activation: of the experts.
        shared: adds to the experts' output.
    """

    def __init__(
        self,
        config: GPTConfig,
        key: jax.Array | None,
        router: type[Router],
        activation: Activation,
        shared: Callable[[jax.Array, jax.Array], jax.Array],
    ):
        subkeys = split_or_none(key, 2)
        self.router = router(config, subkeys[0])
        self.experts = StackedExperts(config, subkeys[1], activation)
        self.shared = shared
        self.dropout = config.dropout

    def __call__(self, x_BTD: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Transform each token by itself."""
        y_BTD = self.experts(x_BTD, *self.router(x_BTD))
        return dropout(self.shared(x_BTD, y_BTD), self.dropout, key)
