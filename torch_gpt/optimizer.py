"""AdamW as the framework ships it, with every default that differs between the two stated.

Read beside flax_gpt/optimizer.py.
"""

from collections.abc import Iterable

import torch

from torch_gpt.config import TrainConfig


def adamw(config: TrainConfig, parameters: Iterable[torch.Tensor]) -> torch.optim.AdamW:
    """AdamW with decoupled decay on every parameter. Loshchilov and Hutter, 2019, algorithm 2."""
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        fused=False,
    )
