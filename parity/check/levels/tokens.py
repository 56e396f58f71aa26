"""Decoding chooses the same tokens, greedy and drawn: two frameworks, with and without cache."""

from collections.abc import Iterator

import numpy as np

from parity.check.causes import explained
from parity.check.levels import logits
from parity.check.metrics import max_abs
from parity.check.session import Session
from parity.frameworks.spec import Batch
from parity.report import Divergence
from parity.report.plot_data import Flip, Generation
from parity.report.record import Record, Verdict, abstain

# Logit errors within which a flip can be an accident, as for logits.
ERROR = {"float64": logits.FLOAT64_LARGE, "float32": logits.FLOAT32}

# Of the noise of a draw, which is two logarithms in float32 and reaches 17: two units in the last
# place of that.
NOISE = 4e-6
DRAWN = 64  # tokens to draw behind each prompt


def records(session: Session) -> Iterator[Record]:
    """Each decoder against the first one in float64; the margins say whether equality is luck."""
    if session.pair.prompts is None:
        yield abstain("tokens", "the pair declares no decoder")
        return
    tokens, counts = session.pair.prompts
    reference: np.ndarray | None = None
    margins = errors = None
    drawn = drawn_margins = None
    parts = len(session.dtypes) * 2 * (3 if session.pair.sampling else 2)
    done = 0
    for dtype in session.dtypes:
        for run in session.runs(dtype):
            decoder = run.decoder()
            for use_cache in (True, False):
                written = decoder.generate(tokens, counts, session.pair.new_tokens, use_cache)
                if reference is None:
                    reference = written
                    margins, errors = _margins(session, tokens, counts, reference)
                    thin = {x: 2 * error for x, error in errors.items()}
                    greedy = _kept(session, "greedy", reference, margins, thin)
                name = f"{run.name}, {'cached' if use_cache else 'uncached'}"
                greedy.flips += _flips(name, dtype, reference, written)
                yield record(name, dtype, reference, written, margins, errors[dtype])
                done += 1
                session.progress(done / parts)
            if session.pair.sampling is None:
                continue
            length = min(session.pair.new_tokens, DRAWN)
            written, found = decoder.sample(
                tokens, counts, length, session.pair.sampling, session.seed
            )
            if drawn is None:
                drawn, drawn_margins = written, found
                temperature = session.pair.sampling["temperature"]
                thin = {x: reach(error, temperature) for x, error in errors.items()}
                sampled = _kept(session, "drawn", drawn, drawn_margins, thin)
            name = f"{run.name}, drawn"
            sampled.flips += _flips(name, dtype, drawn, written)
            yield record(name, dtype, drawn, written, drawn_margins, errors[dtype],
                         sampled.reach[dtype])  # fmt: skip
            done += 1
            session.progress(done / parts)


def _kept(
    session: Session, kind: str, tokens: np.ndarray, margins: np.ndarray, reach: dict[str, float]
) -> Generation:
    """The reference, kept as evidence."""
    generation = Generation(kind, tokens.tolist(), margins.tolist(), reach)
    session.evidence.generations.append(generation)
    return generation


def _flips(name: str, dtype: str, reference: np.ndarray, written: np.ndarray) -> list[Flip]:
    """Where each row first chose another token."""
    places = [np.flatnonzero(a != b) for a, b in zip(reference, written, strict=True)]
    return [Flip(name, dtype, row, int(x[0])) for row, x in enumerate(places) if x.size]


def reach(error: float, temperature: float) -> float:
    """The margin within which a drawn token can flip by rounding.

    Two scores that err by e each can trade places when they are less than 2e apart; a temperature
    below 1 widens the errors of logits with their distances.
    """
    return 2 * (error / temperature + NOISE)


def _margins(
    session: Session, tokens: np.ndarray, counts: np.ndarray, written: np.ndarray
) -> tuple[np.ndarray, dict[str, float]]:
    """Top-1 minus top-2 logit in float64 at each choice, and each dtype's measured logit error."""
    width = int(counts.max()) + written.shape[1]
    sequences = np.zeros((len(tokens), width), np.int32)
    for row, count in enumerate(counts):
        sequences[row, :count] = tokens[row, :count]
        sequences[row, count : count + written.shape[1]] = written[row]
    # The last token has been chosen but chooses nothing.
    lengths = (counts + written.shape[1] - 1).astype(np.int32)
    batch = Batch((sequences, lengths), np.arange(width) < lengths[:, None])
    truth = session.runs("float64")[0].outputs(batch)
    errors = {
        dtype: float(
            np.max(
                [
                    max_abs(batch.select(run.outputs(batch)), batch.select(truth))
                    for run in session.runs(dtype)
                ]
            )
        )
        for dtype in session.dtypes
    }
    top = np.sort(truth, axis=-1)[..., -2:]
    margin = top[..., 1] - top[..., 0]
    chosen = counts[:, None] - 1 + np.arange(written.shape[1])
    return np.take_along_axis(margin, chosen, axis=1), errors


def record(
    name: str, dtype: str, reference: np.ndarray, written: np.ndarray, margins: np.ndarray,
    error: float, thin: float | None = None,
) -> Record:  # fmt: skip
    """Counts different tokens; a row's first flip is excused only by a thin margin.

    And only where the logits are as exact as they should be: a fault must not widen its own excuse.
    """
    flips = _flips(name, dtype, reference, written)
    # Two logits that err by e each can trade places when they are less than 2e apart.
    thin = 2 * error if thin is None else thin
    sound = error <= ERROR[dtype]
    real = [x for x in flips if not (sound and margins[x.row, x.index] <= thin)]
    verdict = Verdict.FAIL if real else Verdict.TIE if flips else Verdict.PASS
    if np.any(np.isnan(margins)) or not np.isfinite(error):
        verdict = Verdict.FAIL  # equal perhaps, but the first of all NaN is no choice
    smallest = float(np.min(margins)) if margins.size else 0.0
    note = f"smallest margin {smallest:.1e}, {dtype} logit error {error:.1e}"
    step = 0
    for flip in (real + flips)[:1]:
        step = flip.index + 1
        margin = margins[flip.row, flip.index]
        note = f"row {flip.row} flips at token {step}, margin {margin:.1e}, logit error {error:.1e}"
    if reference.size == 0:
        verdict, note = Verdict.ERROR, "nothing was compared"
    different = int(np.count_nonzero(reference != written))
    return Record(name, dtype, "different tokens", different, 0, written.size, verdict,
                  noise=smallest, note=note, step=step)  # fmt: skip


def locate(session: Session, records: list[Record]) -> Divergence | None:
    """The decoder and the token that flipped."""
    from parity.check.causes.decode import explained_tokens  # as in logits

    bad = next(record for record in records if record.verdict is Verdict.FAIL)
    detail = f"In {bad.dtype}: {bad.note}."
    found = Divergence(bad.name, "decode", bad.step, bad.value, detail=detail)
    if bad.dtype != "float64" or bad.name.endswith("drawn"):
        return found
    asked = *session.pair.prompts, not bad.name.endswith("uncached")
    return explained(found, lambda found: explained_tokens(session, found, *asked))
