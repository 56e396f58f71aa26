"""The state of a training as named NumPy arrays, of whichever twin.

A saved state has `parameters.`, `first.` and `second.` followed by a leaf name, `updates`, `step`,
and where there are such: `key`, `scale`, `streak`.
"""

from typing import Any

import numpy as np

from parity.frameworks.leaves import Leaves, copied, different_leaves

# Tokens (B, T) and counts (B,) of each call.
Calls = list[tuple[np.ndarray, np.ndarray]]


def named_state(
    parameters: Leaves, first: Leaves, second: Leaves, updates: int, step: int
) -> Leaves:
    groups = {"parameters.": parameters, "first.": copied(first), "second.": copied(second)}
    named = {prefix + name: x for prefix, leaves in groups.items() for name, x in leaves.items()}
    return named | {"updates": np.array(updates, np.int64), "step": np.array(step, np.int64)}


def leaves_under(prefix: str, saved: Leaves) -> Leaves:
    return {name.removeprefix(prefix): x for name, x in saved.items() if name.startswith(prefix)}


def evaluation_numbers(evaluation: Any) -> dict[str, float]:
    return {
        "loss": float(evaluation.loss.mean),
        "perplexity": float(evaluation.loss.perplexity),
        "accuracy": float(evaluation.accuracy),
        "tokens": int(evaluation.loss.num_tokens),
    }


def require_same_state(present: Leaves, given: Leaves) -> None:
    if problems := different_leaves(present, given):
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"{'; '.join(problems[:3])}{more}. A state is exactly the trainer's. Go on with the "
            "configuration that it was written with."
        )
