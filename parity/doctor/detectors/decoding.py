"""Questions about the cache and about generated tokens.

Dimension key: B batch, T tokens, V vocab, G generated tokens.
"""

from collections.abc import Iterator

import numpy as np

from parity.doctor.detectors.forward import LENGTH, ROWS
from parity.doctor.finding import Finding, failed, gap, passed, shaken, tokens, tolerance
from parity.doctor.patient import Patient


def cached_equals_uncached(patient: Patient) -> Finding:
    """However a sequence is cut into calls, the logits are those of one call without a cache."""
    patient = shaken(patient)
    ids = tokens(patient, ROWS, min(LENGTH, patient.context_length - 1))
    whole = patient.logits(ids, None)
    bound = tolerance(patient)
    worst = 0.0
    for words, where, found, expected in _readings(patient, ids, whole):
        off = gap(found, expected)
        if not off <= bound:
            return failed(
                f"{words}: the logits at token {where} differ from those without a cache by "
                f"{off:.1e} standard deviations.",
                off,
                bound,
            )
        worst = max(worst, off)
    return passed("Read in any pieces, the logits are those without a cache.", worst, bound)


def _readings(
    patient: Patient, ids: np.ndarray, whole: np.ndarray
) -> Iterator[tuple[str, int, np.ndarray, np.ndarray]]:
    """(what was done, first token of the piece, logits, logits without a cache), piece by piece."""
    decoder, (rows, length) = patient.decoder, ids.shape
    pieces = {
        "All at once": (length,),
        "Four tokens, then one by one": (4, *[1] * (length - 4)),
        "In chunks of four": (4,) * (length // 4),
    }
    capacity = min(patient.context_length, 4 * length)
    for words, sizes in pieces.items():
        state, at = decoder.empty(rows, capacity), 0
        for size in sizes:
            found, after = decoder.read(state, ids[:, at : at + size], None)
            yield words, at, found, whole[:, at : at + size]
            if at == 4:  # the same state is continued again, and then with other tokens
                again, _ = decoder.read(state, ids[:, at : at + size], None)
                yield f"{words}, continued twice", at, again, whole[:, at : at + size]
                decoder.read(state, (ids[:, at : at + size] + 1) % patient.vocab_size, None)
            state, at = after, at + size
    if decoder.ragged:
        yield from _ragged(patient, ids, whole, capacity)
    start = decoder.read(decoder.empty(rows, capacity), ids[:, :4], None)[1]
    if decoder.select:
        order = np.array([2, 0, 0, 3])
        state = decoder.select(start, order)
        found, _ = decoder.read(state, ids[order, 4:5], None)
        yield "Rows taken in another order", 4, found, whole[order, 4:5]
    if decoder.truncate and decoder.ragged:
        lengths = np.array([3, 4, 1, 2])
        state = decoder.truncate(start, lengths)
        following = ids[np.arange(rows), lengths][:, None]
        found, _ = decoder.read(state, following, None)
        yield "Cut back", 1, found[:, 0], whole[np.arange(rows), lengths]


def _ragged(
    patient: Patient, ids: np.ndarray, whole: np.ndarray, capacity: int
) -> Iterator[tuple[str, int, np.ndarray, np.ndarray]]:
    """Rows of different lengths, padded in every piece."""
    rows = len(ids)
    decoder = patient.decoder
    state, lengths = decoder.empty(rows, capacity), np.zeros(rows, int)
    for counts in ((4, 1, 3, 2), (2, 4, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1), (1, 0, 2, 4)):
        counts = np.array(counts)
        width = int(counts.max())
        piece = np.stack([np.roll(ids[r], -lengths[r])[:width] for r in range(rows)])
        found, state = decoder.read(state, piece, None if counts.min() == width else counts)
        for row, count in enumerate(counts):
            if count:
                start = int(lengths[row])
                expected = whole[row, start : start + count]
                yield f"Ragged rows, row {row}", start, found[row, :count], expected
        lengths = lengths + counts


def growing_graph(patient: Patient) -> Finding:
    """Decoding must not keep the graph of every step alive."""
    if patient.keeps_graph(tokens(patient, ROWS, 4)):
        return failed("The cache behind generated tokens requires grad: memory grows by the step.")
    return passed("The cache behind generated tokens is free of any graph.")


def recompilation(patient: Patient) -> Finding:
    """Prompts of nearly the same length must share a program."""
    longest = max(min(patient.context_length - 2, 16), 4)
    lengths = tuple(range(longest - 3, longest + 1))
    found = patient.num_programs(lengths)
    seen = f"{found} programs for prompts of {lengths[0]} to {lengths[-1]} tokens."
    return passed(seen, found, 1) if found <= 1 else failed(seen, found, 1)


def sampling(patient: Patient) -> Finding:
    """Greedy names the most likely token, draws are as random as asked, and a stop is a stop."""
    patient = shaken(patient)
    length = patient.context_length // 4
    prompt = tokens(patient, ROWS, min(length, 6))
    length = prompt.shape[1]
    greedy = patient.generate(prompt, 6)
    sequence = np.concatenate([prompt, greedy], axis=1).astype(np.int32)
    likely = np.argmax(patient.logits(sequence, None), axis=-1)[:, length - 1 : -1]
    if not np.array_equal(likely, greedy):
        step = int(np.argwhere((likely != greedy).any(axis=0))[0, 0])
        return failed(f"Greedy token {step + 1} is not the most likely one without a cache.")
    if patient.takes_counts and patient.decoder and patient.decoder.ragged and length > 1:
        counts = np.full(ROWS, length)
        counts[0] = length - 1
        padded = patient.generate(prompt, 6, counts_B=counts)
        alone = patient.generate(prompt[:, :-1], 6)
        if not np.array_equal(padded[0], alone[0]):
            return failed(f"A prompt of {length - 1} tokens goes on differently when padded.")
    cold = patient.generate(prompt, 6, temperature=1e-4, seed=1)
    if not np.array_equal(cold, greedy):
        return failed("At temperature 0.0001 the tokens are not the most likely ones.")
    hot = patient.generate(np.repeat(prompt[:1], ROWS, axis=0), 6, temperature=1e4, seed=1)
    often = max(0.3, 4.0 / patient.vocab_size)
    repeats = float(np.mean(hot[:, 1:] == hot[:, :-1]))
    common = float(np.max(np.unique(hot, return_counts=True)[1]) / hot.size)
    if repeats > often:
        return failed(
            f"At temperature 10,000 a token repeats in {repeats:.0%} of steps: the same noise is "
            "drawn every time.",
            repeats,
            often,
        )
    if common > often:
        return failed(
            f"At temperature 10,000 one token makes up {common:.0%} of {hot.size} draws.",
            common,
            often,
        )
    stop = int(greedy[0, 2])
    first = int(np.flatnonzero(greedy[0] == stop)[0])
    stopped = patient.generate(prompt, 6, stop_ids=(stop,))
    if not np.array_equal(stopped[0, : first + 1], greedy[0, : first + 1]) or np.any(
        stopped[0, first + 1 :] >= 0
    ):
        return failed(f"A row does not end behind its stop, token {first + 1}.")
    return passed("Greedy, hot and cold draws and stops are as they should be.")
