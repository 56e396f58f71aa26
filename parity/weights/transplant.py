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
    """
    if isinstance(source, nnx.Module):
        weight_map = resolve(rules, torch_leaves(target), flax_leaves(source))
        kept = {name: torch_leaves(target)[name] for name in weight_map.ignored}
        load_torch(target, weight_map.to_torch(flax_leaves(source)) | kept)
    else:
        weight_map = resolve(rules, torch_leaves(source), flax_leaves(target))
        load_flax(target, weight_map.to_flax(torch_leaves(source)))
    return weight_map
