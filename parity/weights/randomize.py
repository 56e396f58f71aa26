"""Random weights without zeros and ones, so that every leaf matters."""

import numpy as np

from parity.frameworks.leaves import Leaves


def randomized(leaves: Leaves, seed: int) -> Leaves:
    """Return new numbers for every leaf.

    Matrices are drawn with the deviation that keeps a signal's size, 1 / sqrt(shorter side), and
    arrays with more axes as if all but the longest were one. Vectors keep their value (zero biases,
    unit norms) and get noise of 0.2. A variance stays positive, and integers stay as they are.
    """
    rng = np.random.default_rng(seed)
    drawn = {}
    for name, leaf in leaves.items():
        if leaf.dtype.kind in "iub":
            drawn[name] = leaf
            continue
        is_vector = leaf.ndim < 2
        deviation = 0.2 if is_vector else (leaf.size / max(leaf.shape)) ** -0.5
        new = (leaf if is_vector else 0.0) + rng.normal(0.0, deviation, leaf.shape)
        if leaf.dtype.kind == "c":
            new = new + 1j * rng.normal(0.0, deviation, leaf.shape)
        is_variance = name.endswith((".var", "running_var"))
        drawn[name] = (np.abs(new) if is_variance else new).astype(leaf.dtype)
    return drawn
