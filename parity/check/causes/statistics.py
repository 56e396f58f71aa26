"""Find how two batch norms keep their running statistics differently, from one step of each.

A step moves a statistic s by m (b - s), where b is that of the batch and m the share that it takes.
Both sides begin with the same s. With r the ratio of their shares, which the mean shows, and b of
the variance c times as large in one as in the other, its moves are linear in each other and in s.
"""

import numpy as np

from parity.check.bounds import STATISTICS_RESIDUAL
from parity.check.pair_session import PairSession


def explain_statistics(session: PairSession, leaf: str) -> str | None:
    """Describe how the norm that owns a leaf keeps its statistics; None if no rule explains it."""
    path = leaf.rpartition(".")[0]
    start = session.flax_leaves
    names = [f"{path}.{kind}".lstrip(".") for kind in ("mean", "var")]
    if not all(name in start for name in names):
        return None
    batch, moves = session.pair.training_batch(0), []
    for run, convert in zip(
        session.runs("float64"), (dict, session.weight_map.to_flax), strict=True
    ):
        trainer = run.trainer(session.steps)
        trainer.step(*batch.inputs, **batch.keywords)
        after = convert(trainer.parameters())
        moves.append([(after[name] - start[name].astype(np.float64)).ravel() for name in names])
    (mean, var), (torch_mean, torch_var) = moves
    share = _fit(mean, torch_mean)
    made = _fit(torch_var, var, start[names[1]].astype(np.float64).ravel())
    if share is None or made is None:
        return None
    ratio, (slope, offset) = share[0], made
    factor = slope * ratio
    module = session.runs("float64")[1].module.get_submodule(session.modules.get(path, ""))
    taken, causes = getattr(module, "momentum", None), []
    if abs(factor - 1.0) > STATISTICS_RESIDUAL:
        taken = offset / (factor - 1.0)
    if abs(ratio - 1.0) > STATISTICS_RESIDUAL:
        words = f"flax takes {ratio:.6g} times torch's share of a batch into its statistics"
        if isinstance(taken, float):
            words = (
                f"torch takes {taken:.6g} of a batch into its statistics and flax "
                f"{ratio * taken:.6g}: flax's momentum is what stays, so give {1 - taken:.6g}"
            )
        causes.append(words)
    if abs(factor - 1.0) > STATISTICS_RESIDUAL:
        count = max(factor, 1.0 / factor) / abs(max(factor, 1.0 / factor) - 1.0)
        more, less = ("torch", "flax") if factor > 1.0 else ("flax", "torch")
        causes.append(
            f"the running variance is kept with n - 1 in {more} and with n in {less}: a factor of "
            f"{max(factor, 1.0 / factor):.6g} for the {count:.0f} numbers of a channel. Multiply "
            f"by n / (n - 1) in {less}, or take it as it is: evaluation differs by that"
        )
    return "; ".join(causes) or None


def _fit(target: np.ndarray, *terms: np.ndarray) -> np.ndarray | None:
    """Return the factors of the terms that sum up to a target; None where they do not."""
    matrix = np.stack(terms, axis=1)
    if len(target) <= len(terms) or np.linalg.matrix_rank(matrix) < len(terms):
        return None
    found = np.linalg.lstsq(matrix, target, rcond=None)[0]
    left = np.linalg.norm(matrix @ found - target)
    return found if left <= STATISTICS_RESIDUAL * np.linalg.norm(target) else None
