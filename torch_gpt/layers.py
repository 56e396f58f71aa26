"""The layers that a model is built of, with weights from our generator.

Read beside flax_gpt/layers.py.

Dimension key: B batch, T new tokens, D embed dim, F mlp dim.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from torch_gpt import random
from torch_gpt.config import GPTConfig

T = TypeVar("T")


def identity(x: T) -> T:
    """Return the argument, in place of a part that a model does not have."""
    return x


class RMSNormPlusOne(nn.RMSNorm):
    """An RMS norm that multiplies by 1 + its weight, so that a weight of 0 changes nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Norm the last axis, in float32 at least."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean_square = torch.mean(torch.square(wide), dim=-1, keepdim=True)
        assert self.eps is not None
        scale = 1.0 + self.weight.to(wide.dtype)
        return (wide * torch.rsqrt(mean_square + self.eps) * scale).to(x.dtype)


class RMSNormOfHeads(nn.RMSNorm):
    """An RMS norm over all heads of a token together."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Norm the last two axes."""
        return super().forward(x.flatten(-2)).reshape(x.shape)


def dropout(x: torch.Tensor, rate: float, key: torch.Tensor | None) -> torch.Tensor:
    """Zero elements with probability `rate` and scale up the rest; do nothing without a key.

    By hand, because the frameworks' own layers draw from different generators.

    Returns:
        An array of the shape of x.
    """
    if key is None or rate == 0.0:
        return x
    kept = random.bernoulli(key.to(x.device), 1.0 - rate, x.shape)
    return torch.where(kept, x / (1.0 - rate), 0.0)


def dropping(rate: float, key: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return `dropout` with these arguments; `identity` where it would do nothing."""
    if key is None or rate == 0.0:
        return identity
    return functools.partial(dropout, rate=rate, key=key)


@dataclasses.dataclass(frozen=True)
class Scale:
    """A product with a constant."""

    factor: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply."""
        return x * self.factor


@dataclasses.dataclass(frozen=True)
class SoftCap:
    """A bound on numbers that leaves small ones nearly as they are.

    Attributes:
        cap: that none of them reaches.
    """

    cap: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Bend numbers by the hyperbolic tangent."""
        return self.cap * torch.tanh(x / self.cap)


def block_input(x: torch.Tensor, normed: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Return the residual stream before attention."""
    return x


def attention_input(x: torch.Tensor, normed: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Return the same as attention reads it, normed."""
    return normed


def attention_sum(x: torch.Tensor, normed: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Return the residual stream after attention."""
    return after


@dataclasses.dataclass(frozen=True)
class Activation:
    """The nonlinear function between the two maps of an MLP.

    Attributes:
        function: of each number.
    """

    function: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, up: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """Apply it to the first map's output."""
        return self.function(up)


@dataclasses.dataclass(frozen=True)
class GatedActivation(Activation):
    """The function of a third map, which multiplies the first. Shazeer, 2020."""

    def __call__(self, up: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
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

    def __call__(self, up: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """Bound both, apply it to the gate, and multiply."""
        gate, up = (
            torch.clamp(gate, max=self.limit),
            torch.clamp(up, min=-self.limit, max=self.limit),
        )
        return (up + 1.0) * gate * torch.sigmoid(self.steepness * gate)


def without_shared(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return what experts made of x, where no MLP is shared."""
    return y


def gelu(x: torch.Tensor) -> torch.Tensor:
    """Compute x times the normal distribution function of x."""
    return F.gelu(x, approximate="none")


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """Compute the approximation of `gelu` that GPT-2 has."""
    return F.gelu(x, approximate="tanh")


def gelu_bloom(x: torch.Tensor) -> torch.Tensor:
    """Compute `gelu_tanh` with its constant cut to eight digits, as BLOOM has it."""
    return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1.0 + 0.044715 * x * x)))


def silu(x: torch.Tensor) -> torch.Tensor:
    """Compute x times the logistic function of x."""
    return F.silu(x)


def relu(x: torch.Tensor) -> torch.Tensor:
    """Compute x, or 0 where it is negative."""
    return F.relu(x)


def relu_squared(x: torch.Tensor) -> torch.Tensor:
    """Compute the square of `relu`. So et al., "Primer", 2021."""
    return torch.square(F.relu(x))


def layer_norm(config: GPTConfig, width: int) -> nn.LayerNorm:
    """Make a norm by mean and variance over the last axis; the variance in two passes."""
    return nn.LayerNorm(width, **_norm_options(config))


def layer_norm_no_bias(config: GPTConfig, width: int) -> nn.LayerNorm:
    """Make a `layer_norm` that adds nothing."""
    return nn.LayerNorm(width, bias=False, **_norm_options(config))


def rms_norm(config: GPTConfig, width: int) -> nn.RMSNorm:
    """Make a norm by the root of the mean square over the last axis."""
    return nn.RMSNorm(width, **_norm_options(config))


def rms_norm_plus_one(config: GPTConfig, width: int) -> RMSNormPlusOne:
    """Make an RMS norm that multiplies by 1 + its weight, which starts at 0."""
    layer = RMSNormPlusOne(width, **_norm_options(config))
    nn.init.zeros_(layer.weight)
    return layer


def norm_of_heads(config: GPTConfig, width: int) -> RMSNormOfHeads:
    """Make an RMS norm over all heads together, as wide as given."""
    return RMSNormOfHeads(width, **_norm_options(config))


def linear(
    config: GPTConfig,
    in_dim: int,
    out_dim: int,
    std: float,
    key: torch.Tensor | None,
    bias: bool = True,
) -> nn.Linear:
    """Make the native linear layer with weights from our generator and biases of zero."""
    options = dict(dtype=parameter_dtype(config), device=torch.get_default_device())
    layer = cast(nn.Linear, skip_init(nn.Linear, in_dim, out_dim, bias=bias, **options))
    with torch.no_grad():
        layer.weight.copy_(initial(config, (in_dim, out_dim), std, key).T)
        if bias:
            layer.bias.zero_()
    return layer


def embedding(
    config: GPTConfig, num_rows: int, key: torch.Tensor | None, width: int | None = None
) -> nn.Embedding:
    """Make the native embedding table, D wide or as given, with weights from our generator."""
    width = config.embed_dim if width is None else width
    options = dict(dtype=parameter_dtype(config), device=torch.get_default_device())
    table = cast(nn.Embedding, skip_init(nn.Embedding, num_rows, width, **options))
    with torch.no_grad():
        table.weight.copy_(initial(config, (num_rows, width), config.init_std, key))
    return table


def initial(
    config: GPTConfig, shape: tuple[int, ...], std: float, key: torch.Tensor | None
) -> torch.Tensor:
    """Draw normal numbers of the given standard deviation; zeros without a key.

    In the 16-bit types they are those of float32, rounded.

    Returns:
        Weights in the config's dtype.
    """
    if key is None:
        return torch.zeros(shape, dtype=parameter_dtype(config))
    dtype = parameter_dtype(config)
    wide = torch.promote_types(dtype, torch.float32)
    return (random.normal(key, shape, str(wide).removeprefix("torch.")) * std).to(dtype)


def residual_std(config: GPTConfig) -> float:
    """Return the standard deviation of the two maps per block that add to the residual stream.

    It is smaller, so that the stream's variance does not grow with depth. GPT-2 report, 2019,
    section 2.3.

    Returns:
        The config's, over the root of twice the number of layers.
    """
    return config.init_std / (2 * config.num_layers) ** 0.5


def parameter_dtype(config: GPTConfig) -> torch.dtype:
    """Return the framework's dtype of the config's name.

    Returns:
        The dtype of parameters.

    Raises:
        ValueError: where the framework would silently compute in another one.
    """
    # twin: jax makes float64 into float32 unless asked not to; torch needs no switch.
    return getattr(torch, config.dtype)


def split_or_none(key: torch.Tensor | None, num: int) -> list[torch.Tensor | None]:
    """Split a key into `num`; return as many Nones for None."""
    return [None] * num if key is None else list(random.split(key, num))


def _norm_options(config: GPTConfig) -> dict[str, Any]:
    return dict(eps=config.norm_epsilon, dtype=parameter_dtype(config))
