"""Level `gradients`: the loss has the same gradient by every leaf."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from parity.check import bounds
from parity.check.causes import explain
from parity.check.locate import locate_backward
from parity.check.metrics import along_ones, gradient_norm, largest, max_abs, relative_l2
from parity.check.noise import excused, gradient_noise
from parity.check.session import Session
from parity.frameworks.leaves import Leaves
from parity.frameworks.protocols import Runner
from parity.report import Divergence
from parity.report.record import Record, Verdict, abstain, judge

if TYPE_CHECKING:  # as in locate
    from parity.check.pair_session import PairSession


def records(session: Session[Runner, Runner]) -> Iterator[Record]:
    """Yield one record per leaf; null directions are judged absolutely and named."""

    @functools.cache
    def noise(number: int) -> dict[str, float]:
        flax, torch = (run.gradients(session.gradient_probe) for run in session.moved_runs[number])
        if number:
            to_flax = session.weight_map.gradients_to_flax
            flax, torch = ((loss, to_flax(gradients)) for loss, gradients in (flax, torch))
        return {x.name: x.gap for x in _compared(session, "float64", flax, torch)}

    rounding = functools.cache(functools.partial(gradient_noise, session))
    for number, dtype in enumerate(session.dtypes):
        for made in _compared(session, dtype, *session.gradients(dtype)):
            made = excused(made, lambda x=made: rounding(x.dtype).get(x.name, 0.0))
            yield session.decided(made, lambda number, name=made.name: noise(number)[name])
        session.progress((number + 1) / len(session.dtypes))
    if not any(gradient_norm(gradient) for _, gradient in session.gradients("float64")):
        yield abstain("gradients", "all are zero: no weight moves an output of either model")
    yield from session.proof_of_float64("gradient")


def _compared(
    session: Session[Runner, Runner],
    dtype: str,
    flax_side: tuple[float, Leaves],
    torch_side: tuple[float, Leaves],
) -> Iterator[Record]:
    (flax_loss, flax), (torch_loss, torch) = flax_side, torch_side
    bound = bounds.GRADIENT[dtype]
    for name in flax:
        if name in session.null.leaves:
            continue
        a, b, note = flax[name], torch[name], None
        finite = np.isfinite(a)
        if not finite.all() and np.array_equal(finite, np.isfinite(b)):
            a, b = a[finite], b[finite]
            note = f"{np.count_nonzero(~finite)} of {finite.size} not finite on both sides"
            if not a.size:
                yield dataclasses.replace(abstain(name, note), dtype=dtype)
                continue
        gap = relative_l2(a, b)
        yield judge(name, dtype, "relative_l2", gap, bound, a.size, note=note)
    gap = abs(flax_loss - torch_loss) / max(abs(flax_loss), 1.0)
    frozen = ", ".join(session.pair.frozen)
    note = f"frozen, without a gradient: {frozen}" if frozen else None
    yield judge("loss", dtype, "relative", gap, bound, 1, note=note)
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
    scale, gaps = gradient_norm(flax) or 1.0, {}
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
