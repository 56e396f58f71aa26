"""Convert a file of one module's weights into a file of its port's."""

from pathlib import Path

import numpy as np
import torch
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from parity.frameworks.flax.leaves import flax_leaves
from parity.frameworks.torch.leaves import torch_leaves
from parity.system.files import write_file
from parity.weights.infer import infer_rules
from parity.weights.rules import Rules
from parity.weights.weight_map import resolve


def convert_file(
    source: Path,
    out: Path,
    torch_module: torch.nn.Module,
    flax_module: nnx.Module,
    to: str,
    rules: Rules | None = None,
) -> int:
    """Write a file of one module's weights as one of its port's.

    Bit for bit, in the dtypes of the file, which has exactly the weights of the module. The modules
    give names and shapes alone.

    Args:
        source: the weights of the other framework's module.
        out: the new file, which appears whole or not at all.
        torch_module: the PyTorch module.
        flax_module: the Flax NNX module.
        to: flax or torch.
        rules: the weight map; inferred by names when None.

    Returns:
        The number of tensors written.
    """
    port, original = torch_leaves(torch_module), flax_leaves(flax_module)
    weight_map = resolve(rules or infer_rules(torch_module, flax_module), port, original)
    try:
        with safe_open(source, framework="numpy") as opened:
            leaves = {name: opened.get_tensor(name) for name in opened.keys()}
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{source}: {error}. Weights are read from a safetensors file. Name one."
        ) from error
    wanted = port if to == "flax" else original
    # What the file lacks or has in vain; the target has its own of the rest.
    if to == "flax":
        free = {alias for alias, _ in weight_map.ties} | set(weight_map.ignored)
        kept = {name: original[name] for name in weight_map.flax_ignored}
    else:
        free = {alias for alias, _ in weight_map.flax_ties} | set(weight_map.flax_ignored)
        kept = {name: port[name] for name in weight_map.ignored}
    problems = [f"{name} is missing" for name in wanted if name not in leaves and name not in free]
    problems += [f"{name} is unknown" for name in leaves if name not in wanted]
    problems += [
        f"{name} is {list(leaf.shape)}, the module's is {list(wanted[name].shape)}"
        for name, leaf in leaves.items()
        if name in wanted and leaf.shape != wanted[name].shape
    ]
    if problems:
        of = "torch" if to == "flax" else "flax"
        raise ValueError(
            f"{source}: {'; '.join(problems)}. The file has the {of} module's weights. Give that "
            "file or mend the module."
        )
    made = (weight_map.to_flax if to == "flax" else weight_map.to_torch)(leaves) | kept
    write_file(out, save({name: np.ascontiguousarray(x) for name, x in made.items()}))
    return len(made)
