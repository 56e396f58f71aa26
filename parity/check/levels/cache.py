"""Reading a sequence in pieces through the cache gives the logits of reading it whole."""

from collections.abc import Iterator

import numpy as np

from parity.check.causes import explained
from parity.check.locate import first_divergence, float64_gap, model_name
from parity.check.metrics import max_abs
from parity.check.session import Session
from parity.frameworks.capture import Trace
from parity.frameworks.spec import Batch
from parity.report import Divergence
from parity.report.record import Record, Verdict, abstain, judge

# As for logits: the cache must change nothing.
BOUND = {"float64": 1e-12, "float32": 1e-5}

# Widths of the calls that read a sequence: a prefill, then chunks over a warm cache and single
# tokens in turn. How much of each width is real is drawn per row, so rows move at their own pace.
WIDTHS = 32, (8, 1)


def records(session: Session) -> Iterator[Record]:
    """Cached against uncached inside each framework, and cached against cached across."""
    if session.pair.sequences is None:
        yield abstain("cache", "the pair declares no decoder")
        return
    tokens, counts = session.pair.sequences
    calls = ragged_calls(tokens, counts, session.seed)
    real = np.arange(tokens.shape[1]) < counts[:, None]
    for number, dtype in enumerate(session.dtypes):
        cached = []
        for run in session.runs(dtype):
            whole = run.outputs(Batch((tokens, counts)))
            pieces = assemble(calls, run.decoder().chunks(calls, tokens.shape[1]), whole.shape)
            gap = max_abs(pieces[real], whole[real])
            yield judge(f"{run.name}, cached against uncached", dtype, "max_abs", gap, BOUND[dtype],
                        whole[real].size)  # fmt: skip
            cached.append(pieces[real])
        gap = max_abs(*cached)
        yield judge("cached across frameworks", dtype, "max_abs", gap, BOUND[dtype], cached[0].size)
        session.progress((number + 1) / len(session.dtypes))


def ragged_calls(
    tokens: np.ndarray, counts: np.ndarray, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """A sequence of calls (tokens (B, T), counts (B,)) that reads every row to its count.

    Each call has its own share of real tokens per row, none included; the rest is padding.
    """
    rng = np.random.default_rng(seed)
    first, others = WIDTHS
    done, calls = np.zeros_like(counts), []
    while np.any(done < counts):
        width = first if not calls else others[len(calls) % len(others)]
        taken = np.minimum(rng.integers(0, width + 1, len(counts)), counts - done).astype(np.int32)
        part = np.zeros((len(counts), width), np.int32)
        for row, (start, number) in enumerate(zip(done, taken, strict=True)):
            part[row, :number] = tokens[row, start : start + number]
        calls.append((part, taken))
        done = done + taken
    return calls


def assemble(calls: list, outputs: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Puts the outputs of calls back into the order of the sequence; NaN where none belongs."""
    filler = np.nan if np.issubdtype(outputs[0].dtype, np.floating) else -1
    whole = np.full(shape, filler, outputs[0].dtype)
    done = np.zeros(shape[0], int)
    for (_, taken), output in zip(calls, outputs, strict=True):
        for row, number in enumerate(taken):
            whole[row, done[row] : done[row] + number] = output[row, :number]
        done += taken
    return whole


def locate(session: Session, records: list[Record]) -> Divergence | None:
    """The first module whose output through the cache is not what it is without."""
    from parity.check.causes.decode import explained_chunks  # as in logits

    bad = next(record for record in records if record.verdict is Verdict.FAIL)
    run = next((r for r in session.runs("float64") if bad.name.startswith(r.name)), None)
    found = Divergence(bad.name, "decode", 0, bad.value)
    if bad.dtype != "float64":
        return found
    tokens, counts = session.pair.sequences
    calls, capacity = ragged_calls(tokens, counts, session.seed), tokens.shape[1]
    if run is not None:
        real = np.arange(capacity) < counts[:, None]
        traces: list[Trace] = []
        run.traces(Batch((tokens, counts)), traces.append)
        whole = _by_token(traces, real)
        pieces = run.decoder_traces(lambda decoder: decoder.chunks(calls, capacity))
        joined, paths = _joined(pieces, calls, real), {trace.path for trace in whole}
        root = model_name(session)
        found = first_divergence(whole, joined, float64_gap, root, "decode", paths) or found
    return explained(found, lambda found: explained_chunks(session, found, calls, capacity))


def _by_token(traces: list[Trace], real: np.ndarray) -> list[Trace]:
    """Traces cut to real tokens; those that are not laid out (B, T, ...) are dropped."""
    return [
        Trace(
            trace.path,
            tuple(x[real] for x in trace.inputs if x.shape[:2] == real.shape),
            trace.output[real],
        )
        for trace in traces
        if trace.output.shape[:2] == real.shape
    ]


def _joined(traces: list[Trace], calls: list, real: np.ndarray) -> list[Trace]:
    """One trace per module from one per module and call, cut to real tokens."""
    by_path: dict[str, list[Trace]] = {}
    for trace in traces:
        by_path.setdefault(trace.path, []).append(trace)

    def join(arrays: list[np.ndarray]) -> np.ndarray:
        return assemble(calls, arrays, (*real.shape, *arrays[0].shape[2:]))[real]

    def per_token(arrays: list[np.ndarray]) -> bool:
        return all(
            array.shape[:2] == tokens.shape
            for array, (tokens, _) in zip(arrays, calls, strict=True)
        )

    joined = []
    for path, group in by_path.items():
        if len(group) != len(calls) or not per_token([trace.output for trace in group]):
            continue
        inputs = zip(*(trace.inputs for trace in group), strict=True)
        kept = tuple(join(list(arrays)) for arrays in inputs if per_token(list(arrays)))
        joined.append(Trace(path, kept, join([trace.output for trace in group])))
    return joined
