"""Level `gradients`: the loss has the same gradient by every leaf."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from parity.check import bounds
from parity.check.causes import explain
from parity.check.locate import locate_backward
from parity.check.metrics import along_ones, gradient_norm, largest, max_abs, relative_l2
from parity.check.noise import gradient_noise, judged_by_noise
from parity.check.session import Session
from parity.frameworks.leaves import Leaves
from parity.frameworks.protocols import Runner
from parity.report import Divergence
from parity.report.record import IMPURE, Record, Verdict, abstain, judge

if TYPE_CHECKING:  # as in locate
    from parity.check.pair_session import PairSession


def records(session: Session[Runner, Runner]) -> Iterator[Record]:
    """Yield one record per leaf; null directions are judged absolutely and named."""
    for number, dtype in enumerate(session.dtypes):
        if dtype == "float64" and session.impurities:
            yield abstain("float64", IMPURE)
            continue
        yield from _compared(session, dtype)
        session.progress((number + 1) / len(session.dtypes))
    if not session.impurities:
        yield from session.proof_of_float64("gradient")


def _compared(session: Session[Runner, Runner], dtype: str) -> Iterator[Record]:
    (flax_loss, flax), (torch_loss, torch) = session.gradients(dtype)
    bound = bounds.GRADIENT[dtype]
    compared = [name for name in flax if name not in session.null.leaves]
    gaps = {name: relative_l2(flax[name], torch[name]) for name in compared}
    gaps[""] = abs(flax_loss - torch_loss) / max(abs(flax_loss), 1.0)
    noise = {} if all(gap <= bound for gap in gaps.values()) else gradient_noise(session, dtype)
    for name, gap in gaps.items():
        words, metric = (name, "relative_l2") if name else ("loss", "relative")
        size = flax[name].size if name else 1
        yield judged_by_noise(words, dtype, metric, gap, bound, size, noise.get(name, 0.0))
    if null := _null_gaps(session, flax, torch):
        where = largest({name: gap for name, (gap, _) in null.items()})
        gap, bound = null[where][0], bounds.NULL_GRADIENT[dtype]
        size = sum(size for _, size in null.values())
        note = f"zero up to rounding, judged absolutely: {session.null}"
        made = judge("null directions", dtype, "max_abs_of_norm", gap, bound, size, note=note)
        yield made.at(where)


def _null_gaps(
    session: Session[Runner, Runner], flax: Leaves, torch: Leaves
) -> dict[str, tuple[float, int]]:
    """Return the gap and size of each null direction, in norms of the whole gradient."""
    scale, gaps = gradient_norm(flax), {}
    for name in session.null.leaves:
        gaps[name] = max_abs(flax[name], torch[name]) / scale, flax[name].size
    for name, axis in session.null.means:
        ours, theirs = (along_ones(side[name], axis) for side in (flax, torch))
        gaps[name] = max_abs(ours, theirs) / scale, ours.size
    return gaps


def locate(session: "PairSession", records: list[Record]) -> Divergence | None:
    """Return the loss, or the divergent module nearest to it: those before inherit its error."""
    from parity.check.causes.backward import explain_gradient, explain_loss  # as in logits

    bad = {record.name: record for record in records if record.verdict is Verdict.FAIL}
    if "loss" in bad:
        detail = "The logits agree, so the loss itself is computed differently."
        found = Divergence("loss", "forward", 0, bad["loss"].gap, detail=detail)
        return explain(found, lambda found: explain_loss(session, found))
    leaves = [name for name in bad if name in session.flax_leaves]
    if not leaves:
        name, record = next(iter(bad.items()))
        return Divergence(name, "backward", 0, record.gap, detail=record.note or "")
    found = locate_backward(session, {leaf: bad[leaf].gap for leaf in leaves})
    found = found or Divergence(leaves[0], "backward", 0, bad[leaves[0]].gap)
    return explain(found, lambda found: explain_gradient(session, found))
