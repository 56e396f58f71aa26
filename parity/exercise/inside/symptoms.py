"""What a forward pass does, seen from outside: for one that no known bug explains."""

from types import ModuleType

import numpy as np

from . import probes
from .probes import Starter, Values

_SEEN = 1e-7  # a change that is no rounding


def symptoms(framework: ModuleType, modules: Starter, reference: Starter) -> Values:
    """Return sentences, the gravest first."""
    read = framework.reader(framework.build(modules))
    tokens = probes.tokens(3, 7, 0)
    V = probes.SIZES["vocab_size"]
    logits = read(tokens)
    if logits.shape != (*tokens.shape, V):
        return {"seen": [f"logits are {list(logits.shape)}, not {[*tokens.shape, V]}"]}
    found = []
    if not np.isfinite(logits).all():
        found.append(
            f"{np.count_nonzero(~np.isfinite(logits))} of {logits.size} logits are not finite"
        )

    def change(row: int, column: int) -> np.ndarray:
        """Return by how much the logits of each position change with one token."""
        changed = tokens.copy()
        changed[row, column] = (changed[row, column] + 1) % V
        with np.errstate(invalid="ignore"):
            return np.abs(read(changed) - logits).max(axis=-1)

    last, first = change(0, tokens.shape[1] - 1), change(0, 0)
    if (leak := last[0, :-1].max()) > _SEEN:
        found.append(f"a later token changes an earlier logit by {leak:.1e}")
    if (leak := max(last[1:].max(), first[1:].max())) > _SEEN:
        found.append(f"a token changes a logit of another row by {leak:.1e}")
    if first[0, -1] <= _SEEN:
        found.append("the first token does not change the last logits")
    if last[0, -1] <= _SEEN:
        found.append("the last token does not change its own logits")
    swapped = tokens.copy()
    swapped[:, [0, 1]] = swapped[:, [1, 0]]
    with np.errstate(invalid="ignore"):
        if np.abs(read(swapped) - logits)[:, -1].max() <= _SEEN:
            found.append("the order of earlier tokens makes no difference")
    return {"seen": found}
