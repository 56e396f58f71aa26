"""AdamW from the framework's parts, with every default that differs between the two stated.

Read beside flax_gpt/training/optimizer.py.
"""

import functools
import math

import torch
from torch import nn

from torch_gpt.training.config import TrainConfig

INITIAL_SCALE, GROWTH_INTERVAL = 2.0**16, 2000  # of the loss, in float16


def adamw(config: TrainConfig, model: nn.Module) -> torch.optim.AdamW:
    """Make AdamW with decoupled decay. Loshchilov and Hutter, 2019, algorithm 2."""
    decayed = [p for name, p in model.named_parameters() if _decays(config, model, name)]
    others = [p for name, p in model.named_parameters() if not _decays(config, model, name)]
    return torch.optim.AdamW(
        [dict(params=decayed), dict(params=others, weight_decay=0.0)],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        fused=False,
    )


def learning_rate(config: TrainConfig, count: int) -> float:
    """Return the rate of the update that comes after `count` others.

    The frameworks' own schedules differ: optax's warm-up gives the first update a rate of 0, and
    torch's counts its own calls, so that calling it before the update shifts every rate by one.

    Returns:
        The rate.
    """
    progress = 0.0
    if config.schedule != "constant":
        assert config.total_steps is not None  # as TrainConfig sees to
        span = config.total_steps - config.warmup_steps
        progress = min(max((count - config.warmup_steps) / span, 0.0), 1.0)
    if config.schedule == "cosine":
        progress = 0.5 - 0.5 * math.cos(math.pi * progress)
    fraction = 1.0 - (1.0 - config.final_fraction) * progress
    warm = min((count + 1.0) / max(config.warmup_steps, 1), 1.0)
    return config.learning_rate * (warm if count < config.warmup_steps else fraction)


def num_updates(optimizer: torch.optim.Optimizer) -> int:
    """Return the number of updates that an AdamW state has seen."""
    return max((int(state["step"]) for state in optimizer.state.values()), default=0)


def clip_gradients(config: TrainConfig, model: nn.Module) -> torch.Tensor:
    """Scale a whole gradient down to the largest norm allowed; return its norm before that too.

    Pascanu et al., "On the difficulty of training recurrent neural networks", 2013.

    Returns:
        The norm; the gradient is scaled in place.
    """
    clip_norm = math.inf if config.clip_norm is None else config.clip_norm
    # twin: torch's own norm adds squares up one after the other on a CPU, and in float32 that of
    # GPT-2's embedding comes out 0.3 % too small; so both sum them by hand.
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    squares = [torch.sum(torch.square(gradient)) for gradient in gradients]
    norm = torch.sqrt(functools.reduce(torch.add, squares))
    nn.utils.clip_grads_with_norm_(model.parameters(), clip_norm, norm)
    return norm


def loss_scale(device: torch.device) -> torch.amp.GradScaler:
    """Make a scaler of the loss, which keeps float16 gradients off zero.

    Micikevicius et al., "Mixed precision training", 2018, section 3.2.

    Returns:
        The scaler, with the defaults stated.
    """
    return torch.amp.GradScaler(
        device.type, init_scale=INITIAL_SCALE, growth_interval=GROWTH_INTERVAL
    )


def _decays(config: TrainConfig, model: nn.Module, name: str) -> bool:
    """Tell whether a parameter decays: the weights of linear layers, or all."""
    owner, _, leaf = name.rpartition(".")
    return config.decay_all or (
        leaf == "weight" and isinstance(model.get_submodule(owner), nn.Linear)
    )
