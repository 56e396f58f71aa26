"""Move weights between the frameworks by rules: strict, in both directions, bit for bit."""

import torch
from flax import nnx

from parity.frameworks.flax.leaves import flax_leaves, load_flax
from parity.frameworks.torch.leaves import load_torch, torch_leaves
from parity.weights.rules import Rules
from parity.weights.weight_map import WeightMap, resolve


def transplant(
    source: torch.nn.Module | nnx.Module, target: torch.nn.Module | nnx.Module, rules: Rules
) -> WeightMap:
    """Copy all weights of one model into its port in the other framework.

    Returns:
        The resolved rules.

    Raises:
        TransplantError: unless every leaf of both models is used exactly once and fits; the target
            is then as it was.
        ValueError: unless there is one model of each framework.
    """
    if isinstance(source, nnx.Module) and isinstance(target, torch.nn.Module):
        present = torch_leaves(target)
        weight_map = resolve(rules, present, flax_leaves(source))
        kept = {name: present[name] for name in weight_map.ignored}
        load_torch(target, weight_map.to_torch(flax_leaves(source)) | kept)
    elif isinstance(source, torch.nn.Module) and isinstance(target, nnx.Module):
        present = flax_leaves(target)
        weight_map = resolve(rules, torch_leaves(source), present)
        kept = {name: present[name] for name in weight_map.flax_ignored}
        load_flax(target, weight_map.to_flax(torch_leaves(source)) | kept)
    else:
        kinds = " into ".join(type(module).__name__ for module in (source, target))
        raise ValueError(
            f"transplant: {kinds}. Weights move between a torch.nn.Module and a flax.nnx.Module. "
            "Give one of each."
        )
    return weight_map
