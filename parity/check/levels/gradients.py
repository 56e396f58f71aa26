"""The loss has the same gradient by every leaf."""

from collections.abc import Iterator

from parity.check.causes import explained
from parity.check.levels.logits import purity
from parity.check.locate import locate_backward
from parity.check.metrics import along_ones, gradient_norm, largest, max_abs, relative_l2
from parity.check.session import Session
from parity.frameworks.leaves import Leaves
from parity.report import Divergence
from parity.report.record import IMPURE, Record, Verdict, abstain, judge

# Relative L2 per leaf. A correct port was measured at 1.5e-15 to 1.6e-14 in float64 and 9e-7 to
# 5e-6 in float32; the smallest gradient bug at 0.11.
FLOAT64, FLOAT32 = 1e-12, 2e-5
# Of the norm of the whole gradient, where a gradient is analytically zero: rounding of either
# width, with room for long sums.
NULL = {"float64": 1e-12, "float32": 1e-5}


def records(session: Session) -> Iterator[Record]:
    """One record per leaf; null leaves are judged absolutely and named."""
    for number, dtype in enumerate(session.dtypes):
        if dtype == "float64" and session.impurities:
            yield abstain("float64", IMPURE)
            continue
        yield from _compared(session, dtype)
        session.progress((number + 1) / len(session.dtypes))
    if not session.impurities:
        yield from purity(session, "gradient_purity")


def _compared(session: Session, dtype: str) -> Iterator[Record]:
    (flax_loss, flax), (torch_loss, torch) = session.gradients(dtype)
    bound = FLOAT64 if dtype == "float64" else FLOAT32
    for name in flax:
        if name not in session.null_leaves:
            gap = relative_l2(flax[name], torch[name])
            yield judge(name, dtype, "relative_l2", gap, bound, flax[name].size)
    gap = abs(flax_loss - torch_loss) / max(abs(flax_loss), 1.0)
    yield judge("loss", dtype, "relative", gap, bound, 1)
    if null := _null_gaps(session, flax, torch):
        where = largest({name: gap for name, (gap, _) in null.items()})
        size = sum(size for _, size in null.values())
        note = f"zero up to rounding, judged absolutely: {session.null_names}"
        yield judge("null directions", dtype, "max_abs_of_norm", null[where][0], NULL[dtype],
                    size, note=note, where=where)  # fmt: skip


def _null_gaps(session: Session, flax: Leaves, torch: Leaves) -> dict[str, tuple[float, int]]:
    """By leaf, the gap where the gradient is analytically zero, in norms of the whole gradient."""
    scale, gaps = gradient_norm(flax), {}
    for name in session.null_leaves:
        gaps[name] = max_abs(flax[name], torch[name]) / scale, flax[name].size
    for name, axis in session.null_means:
        ours, theirs = (along_ones(side[name], axis) for side in (flax, torch))
        gaps[name] = max_abs(ours, theirs) / scale, ours.size
    return gaps


def locate(session: Session, records: list[Record]) -> Divergence | None:
    """The loss itself, or the guilty module nearest to it: those before only inherit its error."""
    from parity.check.causes.backward import explained_gradient, explained_loss  # as in logits

    bad = {record.name: record for record in records if record.verdict is Verdict.FAIL}
    if "loss" in bad:
        detail = "The logits agree, so it is the loss that is computed in another way."
        found = Divergence("loss", "forward", 0, bad["loss"].value, detail=detail)
        return explained(found, lambda found: explained_loss(session, found))
    leaves = [name for name in bad if name in session.flax_leaves]
    if not leaves:
        name, record = next(iter(bad.items()))
        return Divergence(name, "backward", 0, record.value, detail=record.note or "")
    found = locate_backward(session, {leaf: bad[leaf].value for leaf in leaves})
    found = found or Divergence(leaves[0], "backward", 0, bad[leaves[0]].value)
    return explained(found, lambda found: explained_gradient(session, found))
