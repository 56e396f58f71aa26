"""Level `cache`: chunked decoding through the KV cache gives the logits of one uncached pass."""

from collections.abc import Iterator, Sequence

import numpy as np

from parity.check import bounds
from parity.check.causes import explain
from parity.check.causes.decode import explain_chunks
from parity.check.levels import plans
from parity.check.locate import first_divergence, float64_gap
from parity.check.metrics import max_abs
from parity.check.pair_session import PairSession
from parity.frameworks.batch import Batch
from parity.frameworks.capture import Trace
from parity.frameworks.protocols import Calls
from parity.report import Divergence
from parity.report.record import Record, abstain, first_failed, judge

# Widths of the calls that read a sequence: a prefill, then chunks over a warm cache and single
# tokens alternating. How much of each width is real is drawn per row, so rows advance at their own
# pace.
WIDTHS = 32, (8, 1)


def records(session: PairSession) -> Iterator[Record]:
    """Compare cached with uncached inside each framework, and cached with cached across."""
    if session.pair.sequences is None:
        yield abstain("cache", "the pair declares no decoder")
        return
    tokens, counts = session.pair.sequences
    calls = ragged_calls(tokens, counts, session.seed)
    real = np.arange(tokens.shape[1]) < counts[:, None]
    for number, dtype in enumerate(session.dtypes):
        cached, bound = [], bounds.CACHE[dtype]
        for run in session.runs(dtype):
            whole = run.outputs(Batch((tokens, counts)))[""]
            pieces = assemble(calls, run.decoder().chunks(calls, tokens.shape[1]), whole.shape)
            gap, name = max_abs(pieces[real], whole[real]), f"{run.name}, cached against uncached"
            yield judge(name, dtype, "max_abs", gap, bound, whole[real].size)
            cached.append(pieces[real])
        gap = max_abs(*cached)
        yield judge("cached across frameworks", dtype, "max_abs", gap, bound, cached[0].size)
        session.progress((number + 1) / (len(session.dtypes) + 1))
    yield from plans.records(session)
    session.progress(1.0)


def ragged_calls(
    tokens: np.ndarray, counts: np.ndarray, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return calls (tokens (B, T), counts (B,)) that read every row up to its count.

    Each call has its own share of real tokens per row, perhaps none; the rest is padding.
    """
    rng = np.random.default_rng(seed)
    first, others = WIDTHS
    done, calls = np.zeros_like(counts), []
    while np.any(done < counts):
        width = first if not calls else others[len(calls) % len(others)]
        taken = np.minimum(rng.integers(0, width + 1, len(counts)), counts - done).astype(np.int32)
        chunk = np.zeros((len(counts), width), np.int32)
        for row, (start, number) in enumerate(zip(done, taken, strict=True)):
            chunk[row, :number] = tokens[row, start : start + number]
        calls.append((chunk, taken))
        done = done + taken
    return calls


def assemble(calls: Calls, outputs: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Put outputs of calls back into the order of the sequence; NaN or -1 beyond a row's end."""
    filler = np.nan if np.issubdtype(outputs[0].dtype, np.floating) else -1
    whole = np.full(shape, filler, outputs[0].dtype)
    done = np.zeros(shape[0], int)
    for (_, taken), output in zip(calls, outputs, strict=True):
        for row, number in enumerate(taken):
            whole[row, done[row] : done[row] + number] = output[row, :number]
        done += taken
    return whole


def locate(session: PairSession, records: list[Record]) -> Divergence | None:
    """Return the first module whose output through the cache is not that without it."""
    if (found := plans.locate(session, records)) is not None:
        return found
    bad = first_failed(records)
    run = next((r for r in session.runs("float64") if bad.name.startswith(r.name)), None)
    found = Divergence(bad.name, "decode", 0, bad.gap)
    if bad.dtype != "float64" or session.pair.sequences is None:
        return found
    tokens, counts = session.pair.sequences
    calls, capacity = ragged_calls(tokens, counts, session.seed), tokens.shape[1]
    if run is not None:
        real = np.arange(capacity) < counts[:, None]
        traces: list[Trace] = []
        run.traces(Batch((tokens, counts)), traces.append)
        whole = _by_token(traces, real)
        pieces = run.decoder_traces(lambda decoder: decoder.chunks(calls, capacity))
        joined, root = _joined(pieces, calls, real), session.model_name
        found = first_divergence(whole, joined, float64_gap, root, "decode") or found
    return explain(found, lambda found: explain_chunks(session, found, calls, capacity))


def _by_token(traces: list[Trace], real: np.ndarray) -> list[Trace]:
    """Return traces cut to real tokens, without those that are not laid out (B, T, ...)."""
    inputs = [tuple(x[real] for x in t.inputs if x.shape[:2] == real.shape) for t in traces]
    both = zip(traces, inputs, strict=True)
    return [Trace(t.path, x, t.output[real]) for t, x in both if t.output.shape[:2] == real.shape]


def _joined(traces: list[Trace], calls: Calls, real: np.ndarray) -> list[Trace]:
    """Join the traces of a module's calls to one, cut to real tokens."""
    by_path: dict[str, list[Trace]] = {}
    for trace in traces:
        by_path.setdefault(trace.path, []).append(trace)

    def join(arrays: Sequence[np.ndarray]) -> np.ndarray:
        return assemble(calls, arrays, (*real.shape, *arrays[0].shape[2:]))[real]

    def per_token(arrays: Sequence[np.ndarray]) -> bool:
        return [x.shape[:2] for x in arrays] == [tokens.shape for tokens, _ in calls]

    joined = []
    for path, group in by_path.items():
        outputs = [trace.output for trace in group]
        if len(group) == len(calls) and per_token(outputs):
            inputs = zip(*(trace.inputs for trace in group), strict=True)
            # A mask has as many columns as its call has slots.
            kept = tuple(
                join(x) for x in inputs if per_token(x) and len({y.shape[2:] for y in x}) == 1
            )
            joined.append(Trace(path, kept, join(outputs)))
    return joined
