"""The layers that a model is built of, with weights from our generator.

Read beside torch_gpt/layers.py.

Dimension key: B batch, T new tokens, D embed dim, F mlp dim.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from flax_gpt import random
from flax_gpt.config import GPTConfig

T = TypeVar("T")


def identity(x: T) -> T:
    """Return the argument, in place of a part that a model does not have."""
    return x


class RMSNormPlusOne(nnx.RMSNorm):
    """An RMS norm that multiplies by 1 + its weight, so that a weight of 0 changes nothing."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Norm the last axis, in float32 at least."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        assert self.scale is not None
        scale = 1.0 + self.scale[...].astype(wide.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        return (wide * jax.lax.rsqrt(mean_square + self.epsilon) * scale).astype(x.dtype)


class RMSNormOfHeads(nnx.RMSNorm):
    """An RMS norm over all heads of a token together."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Norm the last two axes."""
        return super().__call__(x.reshape(*x.shape[:-2], -1)).reshape(x.shape)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zero elements with probability `rate` and scale up the rest; do nothing without a key.

    By hand, because the frameworks' own layers draw from different generators.

    Returns:
        An array of the shape of x.
    """
    if key is None or rate == 0.0:
        return x
    kept = random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(kept, x / (1.0 - rate), 0.0)


def dropping(rate: float, key: jax.Array | None) -> Callable[[jax.Array], jax.Array]:
    """Return `dropout` with these arguments; `identity` where it would do nothing."""
    if key is None or rate == 0.0:
        return identity
    return functools.partial(dropout, rate=rate, key=key)


@dataclasses.dataclass(frozen=True)
class Scale:
    """A product with a constant."""

    factor: float

    def __call__(self, x: jax.Array) -> jax.Array:
        """Multiply."""
        return x * self.factor


@dataclasses.dataclass(frozen=True)
class SoftCap:
    """A bound on numbers that leaves small ones nearly as they are.

    Attributes:
        cap: that none of them reaches.
    """

    cap: float

    def __call__(self, x: jax.Array) -> jax.Array:
        """Bend numbers by the hyperbolic tangent."""
        return self.cap * jnp.tanh(x / self.cap)


def block_input(x: jax.Array, normed: jax.Array, after: jax.Array) -> jax.Array:
    """Return the residual stream before attention."""
    return x


def attention_input(x: jax.Array, normed: jax.Array, after: jax.Array) -> jax.Array:
    """Return the same as attention reads it, normed."""
    return normed


def attention_sum(x: jax.Array, normed: jax.Array, after: jax.Array) -> jax.Array:
    """Return the residual stream after attention."""
    return after


@dataclasses.dataclass(frozen=True)
class Activation:
    """The nonlinear function between the two maps of an MLP.

    Attributes:
        function: of each number.
    """

    function: Callable[[jax.Array], jax.Array]

    def __call__(self, up: jax.Array, gate: jax.Array) -> jax.Array:
        """Apply it to the first map's output."""
        return self.function(up)


@dataclasses.dataclass(frozen=True)
class GatedActivation(Activation):
    """The function of a third map, which multiplies the first. Shazeer, 2020."""

    def __call__(self, up: jax.Array, gate: jax.Array) -> jax.Array:
        """Apply it to the gate, and multiply."""
        return self.function(gate) * up


@dataclasses.dataclass(frozen=True)
class ClampedActivation(Activation):
    """The function of a gated MLP in gpt-oss: a steeper silu, bounded, and one added to the map.

    Attributes:
        steepness: of the logistic function.
        limit: that neither map goes beyond, the gate on one side alone.
    """

    steepness: float = 1.702
    limit: float = 7.0

    def __call__(self, up: jax.Array, gate: jax.Array) -> jax.Array:
        """Bound both, apply it to the gate, and multiply."""
        gate = jnp.minimum(gate, self.limit)
        up = jnp.clip(up, -self.limit, self.limit)
        return (up + 1.0) * gate * jax.nn.sigmoid(self.steepness * gate)


def without_shared(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return what experts made of x, where no MLP is shared."""
    return y


def gelu(x: jax.Array) -> jax.Array:
    """Compute x times the normal distribution function of x."""
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: jax.Array) -> jax.Array:
    """Compute the approximation of `gelu` that GPT-2 has."""
    return jax.nn.gelu(x, approximate=True)


def gelu_bloom(x: jax.Array) -> jax.Array:
    """Compute `gelu_tanh` with its constant cut to eight digits, as BLOOM has it."""
    return x * 0.5 * (1.0 + jnp.tanh(0.79788456 * x * (1.0 + 0.044715 * x * x)))


def silu(x: jax.Array) -> jax.Array:
    """Compute x times the logistic function of x."""
    return jax.nn.silu(x)


def relu(x: jax.Array) -> jax.Array:
    """Compute x, or 0 where it is negative."""
    return jax.nn.relu(x)


def relu_squared(x: jax.Array) -> jax.Array:
    """Compute the square of `relu`. So et al., "Primer", 2021."""
    return jnp.square(jax.nn.relu(x))


def layer_norm(config: GPTConfig, width: int) -> nnx.LayerNorm:
    """Make a norm by mean and variance over the last axis; the variance in two passes."""
    return nnx.LayerNorm(width, **_norm_options(config))


def layer_norm_no_bias(config: GPTConfig, width: int) -> nnx.LayerNorm:
    """Make a `layer_norm` that adds nothing."""
    return nnx.LayerNorm(width, use_bias=False, **_norm_options(config))


def rms_norm(config: GPTConfig, width: int) -> nnx.RMSNorm:
    """Make a norm by the root of the mean square over the last axis."""
    return nnx.RMSNorm(width, **_norm_options(config))


def rms_norm_plus_one(config: GPTConfig, width: int) -> RMSNormPlusOne:
    """Make an RMS norm that multiplies by 1 + its weight, which starts at 0."""
    options = _norm_options(config)
    return RMSNormPlusOne(width, scale_init=nnx.initializers.zeros_init(), **options)


def norm_of_heads(config: GPTConfig, width: int) -> RMSNormOfHeads:
    """Make an RMS norm over all heads together, as wide as given."""
    return RMSNormOfHeads(width, **_norm_options(config))


def linear(
    config: GPTConfig,
    in_dim: int,
    out_dim: int,
    std: float,
    key: jax.Array | None,
    bias: bool = True,
) -> nnx.Linear:
    """Make the native linear layer with weights from our generator and biases of zero."""
    # nnx layers ask for a stream of their own. The weights come afterwards: an initializer of our
    # own would be part of the graph definition, and no two models would share a compiled program.
    layer = nnx.Linear(
        in_dim,
        out_dim,
        use_bias=bias,
        kernel_init=nnx.initializers.zeros_init(),
        bias_init=nnx.initializers.zeros_init(),
        param_dtype=parameter_dtype(config),
        rngs=nnx.Rngs(0),
    )
    layer.kernel.set_value(initial(config, (in_dim, out_dim), std, key))
    return layer


def embedding(
    config: GPTConfig, num_rows: int, key: jax.Array | None, width: int | None = None
) -> nnx.Embed:
    """Make the native embedding table, D wide or as given, with weights from our generator."""
    width = config.embed_dim if width is None else width
    table = nnx.Embed(
        num_rows,
        width,
        embedding_init=nnx.initializers.zeros_init(),
        param_dtype=parameter_dtype(config),
        dtype=parameter_dtype(config),
        rngs=nnx.Rngs(0),
    )
    table.embedding.set_value(initial(config, (num_rows, width), config.init_std, key))
    return table


def initial(
    config: GPTConfig, shape: tuple[int, ...], std: float, key: jax.Array | None
) -> jax.Array:
    """Draw normal numbers of the given standard deviation; zeros without a key.

    In the 16-bit types they are those of float32, rounded.

    Returns:
        Weights in the config's dtype.
    """
    if key is None:
        return jnp.zeros(shape, parameter_dtype(config))
    dtype = parameter_dtype(config)
    wide = jnp.promote_types(dtype, jnp.float32)
    return (random.normal(key, shape, wide.name) * std).astype(dtype)


def residual_std(config: GPTConfig) -> float:
    """Return the standard deviation of the two maps per block that add to the residual stream.

    It is smaller, so that the stream's variance does not grow with depth. GPT-2 report, 2019,
    section 2.3.

    Returns:
        The config's, over the root of twice the number of layers.
    """
    return config.init_std / (2 * config.num_layers) ** 0.5


def parameter_dtype(config: GPTConfig) -> jnp.dtype:
    """Return the framework's dtype of the config's name.

    Returns:
        The dtype of parameters.

    Raises:
        ValueError: where the framework would silently compute in another one.
    """
    # twin: jax makes float64 into float32 unless asked not to; torch needs no switch.
    dtype = jnp.dtype(config.dtype)
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(
            f"GPT: dtype {config.dtype} with jax_enable_x64 off. jax would compute in float32. "
            "Build and run the model inside jax.enable_x64()."
        )
    return dtype


def split_or_none(key: jax.Array | None, num: int) -> list[jax.Array | None]:
    """Split a key into `num`; return as many Nones for None."""
    return [None] * num if key is None else list(random.split(key, num))


def _norm_options(config: GPTConfig) -> dict[str, Any]:
    return dict(
        epsilon=config.norm_epsilon,
        use_fast_variance=False,
        param_dtype=parameter_dtype(config),
        rngs=nnx.Rngs(0),
    )
