"""Rotary positions: queries and keys turn by angles that grow with where they stand, so that their
product knows how far apart they are. Read beside flax_gpt/rotary.py.

Dimension key: B batch, T new tokens, H head dim, E pairs of a head's numbers that turn.
"""

import dataclasses

import numpy as np
import torch

from torch_gpt.config import GPTConfig


@dataclasses.dataclass(frozen=True)
class Rotation:
    """By how much each token's pairs turn, in float32 at least."""

    cos_BT1E: torch.Tensor
    sin_BT1E: torch.Tensor


def rotation(config: GPTConfig, positions_BT: torch.Tensor) -> Rotation:
    """The rotation of tokens that stand at given positions.

    A token's angles depend on its own position alone, so a key that was cached stays right, with
    dynamic scaling too.
    """
    wide = torch.promote_types(getattr(torch, config.dtype), torch.float32)
    places_BT1 = positions_BT[:, :, None].to(wide)
    if config.rotary.scaling == "dynamic":
        steps_11E = -torch.arange(config.rotary_dim // 2).to(places_BT1)[None, None, :]
        powers_11E = steps_11E / (config.rotary_dim // 2)
        lengths_BT1 = torch.clamp(places_BT1 + 1.0, min=float(original_length(config)))
        turns = torch.exp(powers_11E * torch.log(stretched_base(config, lengths_BT1)))
    else:
        turns = torch.from_numpy(frequencies(config)).to(places_BT1)[None, None, :]
    angles_BTE = places_BT1 * turns
    return Rotation(torch.cos(angles_BTE)[:, :, None, :], torch.sin(angles_BTE)[:, :, None, :])


def rotate(x: torch.Tensor, turn: Rotation) -> torch.Tensor:
    """Queries or keys (B, T, heads, H), each turned by its token's angles; numbers beyond the pairs
    stay."""
    num_pairs = turn.cos_BT1E.shape[-1]
    wide = x.to(turn.cos_BT1E.dtype)
    first = wide[..., :num_pairs]
    second = wide[..., num_pairs : 2 * num_pairs]
    parts = [
        first * turn.cos_BT1E - second * turn.sin_BT1E,
        second * turn.cos_BT1E + first * turn.sin_BT1E,
        wide[..., 2 * num_pairs :],
    ]
    return torch.cat(parts, dim=-1).to(x.dtype)


def frequencies(config: GPTConfig) -> np.ndarray:
    """Angle per token of each pair (E,), in float64; of dynamic scaling for short sequences."""
    rotary = config.rotary
    num_pairs = config.rotary_dim // 2
    turns_E = rotary.base ** (-np.arange(num_pairs) / num_pairs)
    if rotary.scaling == "linear":
        return turns_E / rotary.factor
    if rotary.scaling == "llama3":
        # How often a pair goes round in the original length decides: slow ones are divided.
        rounds_E = original_length(config) * turns_E / (2.0 * np.pi)
        kept_E = (rounds_E - rotary.low_frequency) / (rotary.high_frequency - rotary.low_frequency)
        kept_E = np.clip(kept_E, 0.0, 1.0)
        return kept_E * turns_E + (1.0 - kept_E) * turns_E / rotary.factor
    return turns_E


def stretched_base(config: GPTConfig, lengths_BT1: torch.Tensor) -> torch.Tensor:
    """The base for sequences of these lengths, of the original one at least. NTK-aware scaling,
    as in the `dynamic` type of transformers."""
    rotary, size = config.rotary, config.rotary_dim
    growth_BT1 = rotary.factor * lengths_BT1 / original_length(config) - (rotary.factor - 1.0)
    return rotary.base * growth_BT1 ** (size / (size - 2))


def original_length(config: GPTConfig) -> int:
    """Tokens that the angles were made for before they were scaled."""
    return config.rotary.original_length or config.context_length
