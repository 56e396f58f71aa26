"""Level `tokens`: greedy and drawn tokens are equal in both frameworks, cached and uncached."""

from collections.abc import Iterator

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
LOOP = 8  # tokens that are also written by reading the whole text again for each


class _Reference:
    """Tokens of the first decoder in float64, to which all others are compared.

    Args:
        kind: greedy or drawn.
        tokens: (B, G).
        margins: of the choices (B, G).
        temperature: of the draw; 0 for greedy tokens.
    """

    def __init__(
        self, kind: str, tokens: np.ndarray, margins: np.ndarray, temperature: float = 0.0
    ):
        self.tokens, self._margins, self._temperature = tokens, margins, temperature
        self.shown = Generation(kind, tokens.tolist(), margins.tolist(), {})

    def compare(self, name: str, dtype: str, written: np.ndarray, error: float) -> Record:
        """Compare another decoder's tokens, given the measured error of a logit."""
        self.shown.reach[dtype] = overturned(error, self._temperature)
        self.shown.flips += _flips(name, dtype, self.tokens, written)
        margins, temperature = self._margins, self._temperature
        return record(name, dtype, self.tokens, written, margins, error, temperature)


def records(session: PairSession) -> Iterator[Record]:
    """Compare each decoder to the first in float64; the margins say whether equality is luck.

    What the loop without a cache would write is read off one pass over the whole text: it writes
    these tokens if, and only if, each is the best one after those before it. A short loop is run
    all the same.

    Yields:
        A record for each decoder, way of writing and dtype.
    """
    if session.pair.prompts is None:
        yield abstain("tokens", "the pair declares no decoder")
        return
    (tokens, counts), sampling = session.pair.prompts, session.pair.sampling
    length, shown = session.pair.new_tokens, session.plot_data.generations
    num, done = 2 * len(session.dtypes), 0
    greedy: _Reference | None = None
    drawn: _Reference | None = None
    truth: np.ndarray | None = None
    for dtype in session.dtypes:
        runs = session.runs(dtype)
        cached = [run.decoder().generate(tokens, counts, length, True) for run in runs]
        text = _Text(tokens, counts, cached[0] if greedy is None else greedy.tokens)
        logits = [run.outputs(text.batch)[""] for run in runs]
        truth = logits[0] if truth is None else truth
        error = float(np.max([text.gap(x, truth) for x in logits]))
        if greedy is None:
            greedy = _Reference("greedy", cached[0], text.margins(truth))
            shown.append(greedy.shown)
        for run, written, read in zip(runs, cached, logits, strict=True):
            yield greedy.compare(f"{run.name}, cached", dtype, written, error)
            yield greedy.compare(f"{run.name}, uncached", dtype, text.best(read), error)
            looped = run.decoder().generate(tokens, counts, min(length, LOOP), False)
            yield greedy.compare(f"{run.name}, uncached loop", dtype, looped, error)
            if sampling is not None:
                num_drawn, temperature = min(length, DRAWN), sampling["temperature"]
                found = run.decoder().sample(tokens, counts, num_drawn, sampling, session.seed)
                if drawn is None:
                    drawn = _Reference("drawn", *found, temperature)
                    shown.append(drawn.shown)
                yield drawn.compare(f"{run.name}, drawn", dtype, found[0], error)
            done += 1
            session.progress(done / num)


class _Text:
    """Prompts and the tokens written after them, for one pass without a cache.

    Args:
        tokens: prompts (B, T).
        counts: real tokens of each (B,).
        written: tokens after them (B, G).

    Attributes:
        batch: of the pass.
    """

    def __init__(self, tokens: np.ndarray, counts: np.ndarray, written: np.ndarray):
        num_new = written.shape[1]
        width = int(counts.max()) + num_new
        sequences = np.zeros((len(tokens), width), np.int32)
        for row, count in enumerate(counts):
            sequences[row, :count] = tokens[row, :count]
            sequences[row, count : count + num_new] = written[row]
        # The last token has been chosen but chooses nothing.
        lengths = (counts + num_new - 1).astype(np.int32)
        self.batch = Batch((sequences, lengths), np.arange(width) < lengths[:, None])
        self._chosen = counts[:, None] - 1 + np.arange(num_new)

    def gap(self, logits: np.ndarray, truth: np.ndarray) -> float:
        """Return the largest difference of two logits (B, T, V) at real tokens."""
        logits, truth = (self.batch.select({"": x})[""] for x in (logits, truth))
        return max_abs(logits, truth)

    def best(self, logits: np.ndarray) -> np.ndarray:
        """Return the best token at each choice, after the tokens before it, (B, G)."""
        return np.take_along_axis(np.argmax(logits, axis=-1), self._chosen, axis=1)

    def margins(self, logits: np.ndarray) -> np.ndarray:
        """Return top-1 minus top-2 logit at each choice, (B, G)."""
        top = np.sort(logits, axis=-1)[..., -2:]
        return np.take_along_axis(top[..., 1] - top[..., 0], self._chosen, axis=1)


def _flips(name: str, dtype: str, reference: np.ndarray, written: np.ndarray) -> list[Flip]:
    """Return the first differing token of each row that has one."""
    reference = reference[:, : written.shape[1]]
    places = [np.flatnonzero(a != b) for a, b in zip(reference, written, strict=True)]
    return [Flip(name, dtype, row, int(x[0])) for row, x in enumerate(places) if x.size]


def record(
    name: str,
    dtype: str,
    reference: np.ndarray,
    written: np.ndarray,
    margins: np.ndarray,
    error: float,
    temperature: float = 0.0,
) -> Record:
    """Count different tokens (B, G); a row's first flip is excused as `verdict_of_flip` says.

    Returns:
        The record; fewer tokens than the reference has are compared to its first ones.
    """
    reference, margins = (x[:, : written.shape[1]] for x in (reference, margins))
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
    use_cache, num_new = "uncached" not in bad.name, session.pair.new_tokens
    length = num_new if use_cache else min(num_new, LOOP)
    return explain(found, lambda found: explain_tokens(session, found, length, use_cache))
