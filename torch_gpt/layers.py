"""The layers that a model is built of, with weights from our generator. Read beside
flax_gpt/layers.py.

Dimension key: B batch, T new tokens, D embed dim.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from torch_gpt import random
from torch_gpt.config import GPTConfig


class RMSNormPlusOne(nn.RMSNorm):
    """An RMS norm that multiplies by 1 + its weight, so that a weight of 0 changes nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Norms the last axis, in float32 at least."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean_square = torch.mean(torch.square(wide), dim=-1, keepdim=True)
        scale = 1.0 + self.weight.to(wide.dtype)
        return (wide * torch.rsqrt(mean_square + self.eps) * scale).to(x.dtype)


def dropout(x: torch.Tensor, rate: float, key: torch.Tensor | None) -> torch.Tensor:
    """Zeroes elements with probability `rate` and scales up the rest; does nothing without a key.

    By hand, because the frameworks' own layers draw from different generators.
    """
    if key is None or rate == 0.0:
        return x
    kept = random.bernoulli(key.to(x.device), 1.0 - rate, x.shape)
    return torch.where(kept, x / (1.0 - rate), 0.0)


def activate(config: GPTConfig, x: torch.Tensor) -> torch.Tensor:
    """The MLP's nonlinear function of each number."""
    if config.activation == "silu":
        return F.silu(x)
    if config.activation == "gelu_bloom":
        return x * 0.5 * (1.0 + torch.tanh(0.79788456 * x * (1.0 + 0.044715 * x * x)))
    return F.gelu(x, approximate="tanh" if config.activation == "gelu_tanh" else "none")


def norm(config: GPTConfig, width: int | None = None) -> nn.LayerNorm | nn.RMSNorm:
    """The config's norm over the last axis, D wide or as given; variance in two passes."""
    options = dict(eps=config.norm_epsilon, dtype=parameter_dtype(config))
    width = config.embed_dim if width is None else width
    if config.norm == "layer":
        return nn.LayerNorm(width, **options)
    if config.norm == "rms":
        return nn.RMSNorm(width, **options)
    layer = RMSNormPlusOne(width, **options)
    nn.init.zeros_(layer.weight)
    return layer


def linear(
    config: GPTConfig,
    in_dim: int,
    out_dim: int,
    std: float,
    key: torch.Tensor | None,
    bias: bool = True,
) -> nn.Linear:
    """The native linear layer with weights from our generator and biases of zero."""
    options = dict(dtype=parameter_dtype(config), device=torch.get_default_device())
    layer = skip_init(nn.Linear, in_dim, out_dim, bias=bias, **options)
    with torch.no_grad():
        layer.weight.copy_(initial(config, (in_dim, out_dim), std, key).T)
        if bias:
            layer.bias.zero_()
    return layer


def embedding(
    config: GPTConfig, num_rows: int, key: torch.Tensor | None, width: int | None = None
) -> nn.Embedding:
    """The native embedding table, D wide or as given, with weights from our generator."""
    width = config.embed_dim if width is None else width
    options = dict(dtype=parameter_dtype(config), device=torch.get_default_device())
    table = skip_init(nn.Embedding, num_rows, width, **options)
    with torch.no_grad():
        table.weight.copy_(initial(config, (num_rows, width), config.init_std, key))
    return table


def initial(
    config: GPTConfig, shape: tuple[int, ...], std: float, key: torch.Tensor | None
) -> torch.Tensor:
    """Normal numbers of the given standard deviation; zeros without a key.

    In the 16-bit types they are those of float32, rounded.
    """
    if key is None:
        return torch.zeros(shape, dtype=parameter_dtype(config))
    dtype = parameter_dtype(config)
    wide = torch.promote_types(dtype, torch.float32)
    return (random.normal(key, shape, str(wide).removeprefix("torch.")) * std).to(dtype)


def residual_std(config: GPTConfig) -> float:
    """Smaller for the two maps per block that add to the stream, so that its variance does not
    grow with depth. GPT-2 report, 2019, section 2.3."""
    return config.init_std / (2 * config.num_layers) ** 0.5


def parameter_dtype(config: GPTConfig) -> torch.dtype:
    """The framework's dtype of that name.

    Raises:
        ValueError: where the framework would silently compute in another one.
    """
    # twin: jax makes float64 into float32 unless told otherwise; torch needs no switch.
    return getattr(torch, config.dtype)


def split_or_none(key: torch.Tensor | None, num: int) -> list[torch.Tensor | None]:
    """`num` keys from one, or as many Nones from None."""
    return [None] * num if key is None else list(random.split(key, num))
