"""MLPs of which each token takes a few, as its router says. Read beside flax_gpt/experts.py.

Every token is kept: no expert has a capacity.

Dimension key: B batch, T new tokens, D embed dim, F width of an expert, X experts, U experts of one
token.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import nn

from torch_gpt.config import Experts, GPTConfig
from torch_gpt.layers import (
    Activation,
    dropout,
    initial,
    linear,
    parameter_dtype,
    residual_std,
    split_or_none,
)

_TINY = 1e-20  # a sum of sigmoids may be zero


class Router(nn.Module):
    """The choice of experts by a softmax over all of them.

    Args:
        config: of the model.
        key: draws the initial weights.
    """

    def __init__(self, config: GPTConfig, key: torch.Tensor | None = None):
        super().__init__()
        experts = cast(Experts, config.experts)
        self.num_chosen, self.scale = experts.num_chosen, experts.scale
        self.renormalise = experts.renormalise
        width, std = config.embed_dim, config.init_std
        self.linear = linear(config, width, experts.num_experts, std, key, experts.router_bias)

    def forward(self, x_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weights (B, T, U) of each token's experts, and which these are."""
        scores_BTX = self.scores(x_BTD)
        _, chosen_BTU = torch.topk(self.preferences(scores_BTX), self.num_chosen, dim=-1)
        weights_BTU = torch.take_along_dim(scores_BTX, chosen_BTU, dim=-1)
        if self.renormalise:
            weights_BTU = weights_BTU / (torch.sum(weights_BTU, dim=-1, keepdim=True) + _TINY)
        return (weights_BTU * self.scale).to(x_BTD.dtype), chosen_BTU

    def scores(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Return how well each expert fits (B, T, X), in float32 at least."""
        return torch.softmax(self.wide_logits(x_BTD), dim=-1)

    def preferences(self, scores_BTX: torch.Tensor) -> torch.Tensor:
        """Return the numbers of which the largest are chosen."""
        return scores_BTX

    def wide_logits(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Return what scores are made of (B, T, X), in float32 at least."""
        logits_BTX = self.linear(x_BTD)
        return logits_BTX.to(torch.promote_types(logits_BTX.dtype, torch.float32))

    def margins(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Return by how much the last chosen expert beats the best other one, (B, T).

        Where this is near to rounding, two correct programs may choose differently.
        """
        preferences_BTX = self.preferences(self.scores(x_BTD))
        best = torch.topk(preferences_BTX, self.num_chosen + 1, dim=-1).values
        return best[..., -2] - best[..., -1]


class SigmoidRouter(Router):
    """The choice by a sigmoid of each expert and a bias, which takes part in nothing else."""

    def __init__(self, config: GPTConfig, key: torch.Tensor | None = None):
        super().__init__(config, key)
        num_experts = cast(Experts, config.experts).num_experts
        self.preference = nn.Parameter(torch.zeros(num_experts, dtype=parameter_dtype(config)))

    def scores(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Return how well each expert fits (B, T, X), in float32 at least."""
        return torch.sigmoid(self.wide_logits(x_BTD))

    def preferences(self, scores_BTX: torch.Tensor) -> torch.Tensor:
        """Return the numbers of which the largest are chosen."""
        return scores_BTX + self.preference.to(scores_BTX.dtype)


class StackedExperts(nn.Module):
    """Gated MLPs of one shape, their weights stacked.

    Args:
        config: of the model.
        key: draws the initial weights.
        activation: between the maps.
    """

    def __init__(self, config: GPTConfig, key: torch.Tensor | None, activation: Activation):
        super().__init__()
        experts, subkeys = cast(Experts, config.experts), split_or_none(key, 3)
        X, D, F = experts.num_experts, config.embed_dim, experts.width
        std, residual = config.init_std, residual_std(config)
        self.activation = activation
        self.gate = nn.Parameter(initial(config, (X, D, F), std, subkeys[0]))
        self.up = nn.Parameter(initial(config, (X, D, F), std, subkeys[1]))
        self.down = nn.Parameter(initial(config, (X, F, D), residual, subkeys[2]))
        self.has_bias = config.mlp_bias
        if self.has_bias:
            self.gate_bias = nn.Parameter(initial(config, (X, F), std, None))
            self.up_bias = nn.Parameter(initial(config, (X, F), std, None))
            self.down_bias = nn.Parameter(initial(config, (X, D), std, None))

    def forward(
        self, x_BTD: torch.Tensor, weights_BTU: torch.Tensor, chosen_BTU: torch.Tensor
    ) -> torch.Tensor:
        """Compute `masked`, each expert on the tokens that chose it."""
        # twin: XLA multiplies sorted tokens in groups of their expert; torch goes from expert to
        # expert, which a compiled step of fixed shapes cannot.
        if torch.compiler.is_compiling():
            return self.masked(x_BTD, weights_BTU, chosen_BTU)
        tokens, chosen = x_BTD.flatten(0, 1), chosen_BTU.flatten(0, 1)
        weights, sums = weights_BTU.flatten(0, 1), torch.zeros_like(tokens)
        for expert in torch.unique(chosen).tolist():
            rows, places = torch.where(chosen == expert)
            gate, up = tokens[rows] @ self.gate[expert], tokens[rows] @ self.up[expert]
            if self.has_bias:
                gate, up = gate + self.gate_bias[expert], up + self.up_bias[expert]
            outputs = self.activation(up, gate) @ self.down[expert]
            if self.has_bias:
                outputs = outputs + self.down_bias[expert]
            sums = sums.index_add(0, rows, outputs * weights[rows, places, None])
        return sums.view_as(x_BTD)

    def masked(
        self, x_BTD: torch.Tensor, weights_BTU: torch.Tensor, chosen_BTU: torch.Tensor
    ) -> torch.Tensor:
        """Compute all experts on all tokens, and sum by weights that are 0 where not chosen."""
        num_experts = self.gate.shape[0]
        mask_BTUX = chosen_BTU[..., None] == torch.arange(num_experts, device=x_BTD.device)
        weights_BTX = torch.einsum("BTU,BTUX->BTX", weights_BTU, mask_BTUX.to(x_BTD.dtype))
        gate_BTXF = torch.einsum("BTD,XDF->BTXF", x_BTD, self.gate)
        up_BTXF = torch.einsum("BTD,XDF->BTXF", x_BTD, self.up)
        if self.has_bias:
            gate_BTXF = gate_BTXF + self.gate_bias
            up_BTXF = up_BTXF + self.up_bias
        h_BTXF = self.activation(up_BTXF, gate_BTXF)
        y_BTXD = torch.einsum("BTXF,XFD->BTXD", h_BTXF, self.down)
        if self.has_bias:
            y_BTXD = y_BTXD + self.down_bias
        return torch.einsum("BTX,BTXD->BTD", weights_BTX, y_BTXD)


class Shared(nn.Module):
    """An MLP that every token takes besides its experts."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.mlp = mlp

    def forward(self, x_BTD: torch.Tensor, y_BTD: torch.Tensor) -> torch.Tensor:
        """Add its output to the experts'."""
        return y_BTD + self.mlp(x_BTD)


class GatedShared(Shared):
    """The same, weighed by a sigmoid of the token."""

    def __init__(self, mlp: nn.Module, config: GPTConfig, key: torch.Tensor | None = None):
        super().__init__(mlp)
        self.gate = linear(config, config.embed_dim, 1, config.init_std, key, bias=False)

    def forward(self, x_BTD: torch.Tensor, y_BTD: torch.Tensor) -> torch.Tensor:
        """Add its output to the experts'."""
        return y_BTD + torch.sigmoid(self.gate(x_BTD)) * self.mlp(x_BTD)


class ExpertsMLP(nn.Module):
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
        key: torch.Tensor | None,
        router: type[Router],
        activation: Activation,
        shared: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ):
        super().__init__()
        subkeys = split_or_none(key, 2)
        self.router = router(config, subkeys[0])
        self.experts = StackedExperts(config, subkeys[1], activation)
        self.shared = shared
        self.dropout = config.dropout

    def forward(self, x_BTD: torch.Tensor, key: torch.Tensor | None = None) -> torch.Tensor:
        """Transform each token by itself."""
        y_BTD = self.experts(x_BTD, *self.router(x_BTD))
        return dropout(self.shared(x_BTD, y_BTD), self.dropout, key)
