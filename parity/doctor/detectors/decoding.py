"""Questions about the cache and about generated tokens.

Dimension key: B batch, T tokens, V vocab, G generated tokens.
"""

from collections.abc import Iterator

import numpy as np

from parity.doctor.finding import Finding, failed, judged, passed
from parity.doctor.model import Array
from parity.doctor.offers import CanDecode, CanGenerate, CanKeepGraph, Compiles, Selects, Truncates
from parity.doctor.probes import LENGTH, ROWS, gap, shaken, tokens, tolerance

Readings = Iterator[tuple[str, int, Array, Array]]


def cached_equals_uncached(model: CanDecode) -> Finding:
    """Cut a sequence into calls: the logits must be those of one call without a cache."""
    model = shaken(model)
    ids = tokens(model, ROWS, min(LENGTH, model.context_length - 1))
    whole = model.logits(ids)
    bound = tolerance(model)
    worst = 0.0
    for words, where, found, expected in _readings(model, ids, whole):
        off = gap(found, expected)
        if not off <= bound:
            seen = f"{words}: the logits at token {where} differ from those without a cache by"
            return failed(f"{seen} {off:.1e} standard deviations.", off, bound)
        worst = max(worst, off)
    return passed("Read in any pieces, the logits are those without a cache.", worst, bound)


def _readings(model: CanDecode, ids: Array, whole: Array) -> Readings:
    """Yield (what was done, first token of the piece, logits, logits without a cache)."""
    decoder, (rows, length) = model.decoder, ids.shape
    pieces = {
        "All at once": (length,),
        "Four tokens, then one by one": (4, *[1] * (length - 4)),
        "In chunks of four": (4,) * (length // 4),
    }
    capacity = min(model.context_length, 4 * length)
    for words, sizes in pieces.items():
        cache, at = decoder.empty(rows, capacity), 0
        for size in sizes:
            piece, expected = ids[:, at : at + size], whole[:, at : at + size]
            found, longer = decoder.read(cache, piece)
            yield words, at, found, expected
            if at == 4:  # the same cache is continued again, and then with other tokens
                yield f"{words}, continued twice", at, decoder.read(cache, piece)[0], expected
                decoder.read(cache, (piece + 1) % model.vocab_size)
            cache, at = longer, at + size
    if model.ragged:
        yield from _ragged(model, ids, whole, capacity)
    _, start = decoder.read(decoder.empty(rows, capacity), ids[:, :4])
    if isinstance(decoder, Selects):
        order = np.array([2, 0, 0, 3])
        found, _ = decoder.read(decoder.select(start, order), ids[order, 4:5])
        yield "Rows taken in another order", 4, found, whole[order, 4:5]
    if isinstance(decoder, Truncates) and model.ragged:
        lengths = np.array([3, 4, 1, 2])
        following = ids[np.arange(rows), lengths][:, None]
        found, _ = decoder.read(decoder.truncate(start, lengths), following)
        yield "Cut back", 1, found[:, 0], whole[np.arange(rows), lengths]


def _ragged(model: CanDecode, ids: Array, whole: Array, capacity: int) -> Readings:
    """Yield readings of rows of different lengths, padded in every piece."""
    decoder, rows = model.decoder, len(ids)
    cache, lengths = decoder.empty(rows, capacity), np.zeros(rows, int)
    for counts in ((4, 1, 3, 2), (2, 4, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1), (1, 0, 2, 4)):
        counts = np.array(counts)
        width = int(counts.max())
        piece = np.stack([np.roll(ids[r], -lengths[r])[:width] for r in range(rows)])
        found, cache = decoder.read(cache, piece, None if counts.min() == width else counts)
        for row, count in enumerate(counts):
            if count:
                start = int(lengths[row])
                expected = whole[row, start : start + count]
                yield f"Ragged rows, row {row}", start, found[row, :count], expected
        lengths = lengths + counts


def growing_graph(model: CanKeepGraph) -> Finding:
    """Decode: the cache must not keep the graph of every step alive."""
    if model.keeps_graph(tokens(model, length=4)):
        return failed("The cache behind generated tokens requires grad: memory grows by the step.")
    return passed("The cache behind generated tokens is free of any graph.")


def recompilation(model: Compiles) -> Finding:
    """Continue prompts of nearly the same length: they must share a program."""
    longest = max(min(model.context_length - 2, 16), 4)
    lengths = tuple(range(longest - 3, longest + 1))
    found = model.num_programs(lengths)
    return judged(found, 1, f"{found} programs for prompts of {lengths[0]} to {longest} tokens.")


def sampling(model: CanGenerate) -> Finding:
    """Generate: greedy names the most likely token, draws are random, and a stop is a stop."""
    model = shaken(model)
    length = model.context_length // 4
    prompt = tokens(model, ROWS, min(length, 6))
    length = prompt.shape[1]
    greedy = model.generate(prompt, 6)
    sequence = np.concatenate([prompt, greedy], axis=1).astype(np.int32)
    likely = np.argmax(model.logits(sequence), axis=-1)[:, length - 1 : -1]
    if not np.array_equal(likely, greedy):
        step = int(np.argwhere((likely != greedy).any(axis=0))[0, 0])
        return failed(f"Greedy token {step + 1} is not the most likely one without a cache.")
    if model.takes_counts and isinstance(model, CanDecode) and model.ragged and length > 1:
        counts = np.full(ROWS, length)
        counts[0] = length - 1
        padded = model.generate(prompt, 6, counts_B=counts)
        alone = model.generate(prompt[:, :-1], 6)
        if not np.array_equal(padded[0], alone[0]):
            return failed(f"A prompt of {length - 1} tokens goes on differently when padded.")
    cold = model.generate(prompt, 6, temperature=1e-4, seed=1)
    if not np.array_equal(cold, greedy):
        return failed("At temperature 0.0001 the tokens are not the most likely ones.")
    hot = model.generate(np.repeat(prompt[:1], ROWS, axis=0), 6, temperature=1e4, seed=1)
    often = max(0.3, 4.0 / model.vocab_size)
    repeats = float(np.mean(hot[:, 1:] == hot[:, :-1]))
    common = float(np.max(np.unique(hot, return_counts=True)[1]) / hot.size)
    if repeats > often:
        seen = f"At temperature 10,000 a token repeats in {repeats:.0%} of steps: the same noise is"
        return failed(f"{seen} drawn every time.", repeats, often)
    if common > often:
        seen = f"At temperature 10,000 one token makes up {common:.0%} of {hot.size} draws."
        return failed(seen, common, often)
    stop = int(greedy[0, 2])
    first = int(np.flatnonzero(greedy[0] == stop)[0])
    stopped = model.generate(prompt, 6, stop_ids=(stop,))
    expected = np.where(np.arange(6) <= first, greedy[0], -1)
    if not np.array_equal(np.maximum(stopped[0], -1), expected):
        return failed(f"A row does not end behind its stop, token {first + 1}.")
    return passed("Greedy, hot and cold draws and stops are as they should be.")
