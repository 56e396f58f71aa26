"""Level `tokens`: greedy and drawn tokens are equal in both frameworks, cached and uncached."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping

import numpy as np

from parity.check import bounds
from parity.check.causes import explain
from parity.check.causes.decode import explain_tokens
from parity.check.metrics import max_abs
from parity.check.pair_session import PairSession
from parity.check.ties import overturned, verdict_of_flip
from parity.frameworks.batch import Batch
from parity.report import Divergence
from parity.report.plot_data import Flip, Generation
from parity.report.record import Record, Verdict, abstain, first_failed

DRAWN = 64  # tokens to draw after each prompt


@dataclasses.dataclass(frozen=True)
class _Reference:
    """Tokens of the first decoder in float64, to which all others are compared."""

    tokens: np.ndarray  # (B, G)
    margins: np.ndarray  # of the choices (B, G)
    errors: Mapping[str, float]  # by dtype, the measured error of a logit
    temperature: float = 0.0  # of the draw; 0 for greedy tokens

    @functools.cached_property
    def shown(self) -> Generation:
        """The same for plots."""
        reach = {dtype: overturned(e, self.temperature) for dtype, e in self.errors.items()}
        kind = "drawn" if self.temperature else "greedy"
        return Generation(kind, self.tokens.tolist(), self.margins.tolist(), reach)

    def compare(self, name: str, dtype: str, written: np.ndarray) -> Record:
        """Compare another decoder's tokens."""
        self.shown.flips += _flips(name, dtype, self.tokens, written)
        error = self.errors[dtype]
        return record(name, dtype, self.tokens, written, self.margins, error, self.temperature)


def records(session: PairSession) -> Iterator[Record]:
    """Compare each decoder to the first in float64; the margins say whether equality is luck."""
    if session.pair.prompts is None:
        yield abstain("tokens", "the pair declares no decoder")
        return
    (tokens, counts), sampling = session.pair.prompts, session.pair.sampling
    kinds = ("cached", "uncached", "drawn")[: 3 if sampling else 2]
    length, num, done = session.pair.new_tokens, len(session.dtypes) * 2 * len(kinds), 0
    references: dict[str, _Reference] = {}
    errors: Mapping[str, float] = {}
    for dtype in session.dtypes:
        for run in session.runs(dtype):
            decoder = run.decoder()
            for kind in kinds:
                margins, temperature = None, 0.0
                if kind == "drawn" and sampling is not None:
                    num_drawn, temperature = min(length, DRAWN), sampling["temperature"]
                    drawn = decoder.sample(tokens, counts, num_drawn, sampling, session.seed)
                    written, margins = drawn
                else:
                    written = decoder.generate(tokens, counts, length, kind == "cached")
                way = "greedy" if margins is None else "drawn"
                if way not in references:
                    if margins is None:
                        margins, errors = _margins(session, tokens, counts, written)
                    references[way] = _Reference(written, margins, errors, temperature)
                    session.plot_data.generations.append(references[way].shown)
                yield references[way].compare(f"{run.name}, {kind}", dtype, written)
                done += 1
                session.progress(done / num)


def _flips(name: str, dtype: str, reference: np.ndarray, written: np.ndarray) -> list[Flip]:
    """Return the first differing token of each row that has one."""
    places = [np.flatnonzero(a != b) for a, b in zip(reference, written, strict=True)]
    return [Flip(name, dtype, row, int(x[0])) for row, x in enumerate(places) if x.size]


def _margins(
    session: PairSession, tokens: np.ndarray, counts: np.ndarray, written: np.ndarray
) -> tuple[np.ndarray, dict[str, float]]:
    """Return top-1 minus top-2 logit in float64 at each choice, and each dtype's logit error."""
    width = int(counts.max()) + written.shape[1]
    sequences = np.zeros((len(tokens), width), np.int32)
    for row, count in enumerate(counts):
        sequences[row, :count] = tokens[row, :count]
        sequences[row, count : count + written.shape[1]] = written[row]
    # The last token has been chosen but chooses nothing.
    lengths = (counts + written.shape[1] - 1).astype(np.int32)
    batch = Batch((sequences, lengths), np.arange(width) < lengths[:, None])
    truth = session.runs("float64")[0].outputs(batch)
    real, errors = batch.select(truth)[""], {}
    for dtype in session.dtypes:
        outputs = (batch.select(run.outputs(batch))[""] for run in session.runs(dtype))
        errors[dtype] = float(np.max([max_abs(x, real) for x in outputs]))
    top = np.sort(truth[""], axis=-1)[..., -2:]
    margin = top[..., 1] - top[..., 0]
    chosen = counts[:, None] - 1 + np.arange(written.shape[1])
    return np.take_along_axis(margin, chosen, axis=1), errors


def record(
    name: str,
    dtype: str,
    reference: np.ndarray,
    written: np.ndarray,
    margins: np.ndarray,
    error: float,
    temperature: float = 0.0,
) -> Record:
    """Count different tokens (B, G); a row's first flip is excused as `verdict_of_flip` says."""
    flips, bound = _flips(name, dtype, reference, written), bounds.LOGITS[dtype]
    verdicts = [verdict_of_flip(margins[x.row, x.index], error, bound, temperature) for x in flips]
    verdict = max(verdicts, key=list(Verdict).index, default=Verdict.PASS)
    if np.any(np.isnan(margins)) or not np.isfinite(error):
        verdict = Verdict.FAIL  # perhaps equal, but the first of all NaN is no choice
    smallest = float(np.min(margins)) if margins.size else 0.0
    note, step = f"smallest margin {smallest:.1e}, {dtype} logit error {error:.1e}", 0
    if flips:
        flip = flips[verdicts.index(Verdict.FAIL) if Verdict.FAIL in verdicts else 0]
        margin, step = margins[flip.row, flip.index], flip.index + 1
        note = f"row {flip.row} flips at token {step}, margin {margin:.1e}, logit error {error:.1e}"
    if reference.size == 0:
        verdict, note = Verdict.ERROR, "nothing was compared"
    different = int(np.count_nonzero(reference != written))
    metric, count = "different tokens", written.size
    return Record(name, dtype, metric, different, 0, count, verdict, smallest, note, "", step)


def locate(session: PairSession, records: list[Record]) -> Divergence | None:
    """Return the decoder and the token that flipped."""
    bad = first_failed(records)
    detail = f"In {bad.dtype}: {bad.note}."
    found = Divergence(bad.name, "decode", bad.step, bad.gap, detail=detail)
    if bad.dtype != "float64" or bad.name.endswith("drawn"):
        return found
    use_cache = not bad.name.endswith("uncached")
    return explain(found, lambda found: explain_tokens(session, found, use_cache))
