"""Questions about one forward pass.

Dimension key: B batch, T tokens, S slots, N heads, V vocab.
"""

import math
import re
from collections.abc import Callable, Iterator

import numpy as np

from parity.doctor.finding import Finding, abstain, failed, judged, passed
from parity.doctor.model import Array, LanguageModel
from parity.doctor.offers import CanCast, CanDecode, CanGenerate, CanTrain, ShowsAttention
from parity.doctor.probes import (
    LENGTH,
    LONGEST,
    ROWS,
    drawn,
    gap,
    is_finite,
    shaken,
    token_leaves,
    tokens,
    tolerance,
)
from parity.frameworks.leaves import Leaves

_IN_A_BLOCK = re.compile(r"(?:^|[._])(\d+)(?:[._]|$)")
_LOUD = 80.0  # of queries and of keys, so that scores are near 10,000 and seldom above 60,000
_MOST_BLOCKS = 4  # that are asked one by one
_LEAK = 0.03  # of a standard deviation: a leak changes what is attended to, rounding does not
_UNSUPPORTED = RuntimeError, NotImplementedError, TypeError  # of a type in which nothing runs


def cross_entropies(logits_BTV: Array, targets_BT: Array) -> Array:
    """Return nats per token, in float64."""
    logits_BTV = np.asarray(logits_BTV, np.float64)
    top = logits_BTV.max(axis=-1, keepdims=True)
    norms = np.log(np.exp(logits_BTV - top).sum(axis=-1)) + top[..., 0]
    return norms - np.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]


def initial_loss(model: LanguageModel) -> Finding:
    """Ask for the loss of fresh weights, which know nothing: near ln V, with small logits."""
    if model.trained:
        return abstain("The weights are trained; only fresh ones know nothing.")
    ids = tokens(model)
    logits_BTV = model.logits(ids)
    if not is_finite(logits_BTV):
        return failed("The logits of fresh weights are not finite.")
    loss = float(np.mean(cross_entropies(logits_BTV[:, :-1], ids[:, 1:])))
    expected, spread = math.log(model.vocab_size), float(np.std(np.asarray(logits_BTV, float)))
    seen = (
        f"Loss {loss:.2f} at the start, ln {model.vocab_size} is {expected:.2f}; the logits have "
        f"a standard deviation of {spread:.2f}."
    )
    # A tied head favours the token itself, which costs up to 0.7 nats at the width of GPT-2.
    is_near = -0.3 <= loss - expected <= 1.0
    return (passed if is_near else failed)(seen, loss - expected, 1.0)


def determinism(model: LanguageModel) -> Finding:
    """Ask twice: the same answer, except in training with dropout."""
    ids = tokens(model)
    if not np.array_equal(model.logits(ids), model.logits(ids), equal_nan=True):
        return failed("Two evaluations of the same tokens differ: something still draws.")
    if isinstance(model, CanGenerate):
        prompt = ids[:, : model.context_length // 4]
        if not np.array_equal(model.generate(prompt, 6), model.generate(prompt, 6)):
            return failed("Two greedy continuations of the same prompt differ.")
    # A head that starts at zero has one loss, whatever is dropped.
    losses = shaken(model).dropout_losses(ids) if isinstance(model, CanTrain) else None
    if losses is None:
        return passed("Evaluation repeats itself.")
    if losses[0] == losses[1]:
        return failed(
            "Two training steps drop the same elements: with dropout their losses of one batch "
            f"are both {losses[0]:.6f}."
        )
    return passed("Evaluation repeats itself, dropout does not.")


def causality(model: LanguageModel) -> Finding:
    """Change a later token: no earlier logit may change."""
    model = shaken(model)
    ids = tokens(model)
    before = model.logits(ids)
    worst, at = 0.0, 0
    for place in (ids.shape[1] - 1, ids.shape[1] // 2, 1):
        changed = ids.copy()
        changed[:, place] = (ids[:, place] + 1) % model.vocab_size
        found = gap(model.logits(changed)[:, :place], before[:, :place])
        if not found <= worst:
            worst, at = found, place
    return judged(
        worst,
        tolerance(model) / 100,  # the same shapes, hence the same order of sums
        "No logit changes with a later token.",
        f"Changing token {at} moves logits before it by {{value}} standard deviations.",
    )


def mask_strength(model: LanguageModel) -> Finding:
    """Change later tokens where scores are near 10,000: no mask may be weaker than they are."""
    ids = tokens(model)
    place = ids.shape[1] // 4
    changed = ids.copy()
    changed[:, place:] = (ids[:, place:] + 1) % model.vocab_size
    worst = 0.0
    for leaves in _loud(model):
        asked = model.with_weights(leaves)
        before, after = (asked.logits(x)[:, :place] for x in (ids, changed))
        if not (is_finite(before) and is_finite(after)):
            return abstain("Matrices 80 times larger give no finite logits.")
        worst = max(worst, gap(after, before))
        if worst > _LEAK:
            break
    return judged(
        worst,
        _LEAK,
        "No mask gives way to scores near 10,000.",
        "With scores near 10,000 a later token moves logits before it by {value} standard "
        "deviations: the mask is a number that is too small.",
    )


def _loud(model: LanguageModel) -> Iterator[Leaves]:
    """Yield weights for which the scores of one block are near 10,000, block by block.

    The matrices of the others are zero and embeddings of size one, so that the size of the scores
    does not depend on what stands before a block. In a model without numbers all are loud.
    """
    leaves, numbers = drawn(model), {}
    trained, tables, of_tokens = model.trained_names(), model.tables(), token_leaves(model, leaves)
    for name, leaf in leaves.items():
        if leaf.ndim < 2 or name not in trained:
            continue
        if name in tables:
            width = leaf.size / max(leaf.shape)
            leaves[name] = (leaf * width**0.5).astype(leaf.dtype)
        elif name != model.position_table and name not in of_tokens:
            found = _IN_A_BLOCK.search(name)
            numbers[name] = int(found[1]) if found else None
    blocks = sorted({x for x in numbers.values() if x is not None})
    for block in dict.fromkeys([*blocks[: _MOST_BLOCKS - 1], *blocks[-1:]] or [None]):
        factors = {x: _LOUD if number in (block, None) else 0.0 for x, number in numbers.items()}
        yield leaves | {x: (leaves[x] * f).astype(leaves[x].dtype) for x, f in factors.items()}


def causality_gradient(model: CanTrain) -> Finding:
    """Differentiate: position t must depend on tokens 0 to t, all of them, and on no other."""
    reach_TT = shaken(model).reach(tokens(model, 1, 12)[0])
    if reach_TT is None:
        return abstain("No embedding layer was called with the tokens themselves.")
    if not is_finite(reach_TT):
        return failed("The gradient of a logit by an embedding is not finite.")
    largest = float(reach_TT.max())
    future_TT = np.triu(np.ones_like(reach_TT, bool), 1)
    leak = float(reach_TT[future_TT].max()) / (largest or 1.0)
    if leak > 1e-9:
        t, s = np.argwhere(future_TT & (reach_TT > 1e-9 * largest))[0]
        return failed(f"The logits at {t} depend on token {s}, by {leak:.1e} of the most.", leak)
    if blind := np.argwhere(_expected(reach_TT > 0.0) & (reach_TT == 0.0)).tolist():
        t, s = blind[0]
        return failed(f"The logits at {t} do not depend on token {s}, which they may see.")
    window = _window(reach_TT > 0.0)
    return passed(f"Position t depends on token t and {window} before it, on none behind.", leak)


def attention_rows(model: ShowsAttention) -> Finding:
    """Sum the attention weights of a query: one, over exactly the slots that it may see."""
    model = shaken(model)
    ids = tokens(model)
    length, layers = ids.shape[1], []
    sinks = any("sink" in name for name in model.weights())  # they take weight from all slots
    for counts in (None, _ragged(length)) if model.takes_counts else (None,):
        layers = model.attention(ids, counts)
        if not layers:
            return abstain("The model shows no attention weights.")
        for number, weights in enumerate(layers):
            weights_BNTS = np.asarray(weights, np.float64)
            if weights_BNTS.shape[2] != length or weights_BNTS.shape[3] < length:
                return failed(f"Layer {number}: weights of shape {weights_BNTS.shape}.")
            for row in range(len(ids)):
                real = length if counts is None else int(counts[row])
                found_NTS = weights_BNTS[min(row, len(weights_BNTS) - 1), :, :real]
                sums_NT = found_NTS.sum(axis=-1)
                off = float(np.max(sums_NT - 1.0 if sinks else np.abs(sums_NT - 1.0)))
                if not off <= max(tolerance(model), 1e-6):
                    return failed(
                        f"Layer {number}: the weights of a query add up to 1 only within {off:.1e}."
                    )
                sees_NTS = found_NTS > 0.0
                may_TS = np.zeros(sees_NTS.shape[1:], bool)
                may_TS[:, :real] = _expected(np.all(sees_NTS, axis=0)[:, :real])
                if wrong := np.argwhere((sees_NTS != may_TS).any(axis=0)).tolist():
                    t, s = wrong[0]
                    does = "does not see" if may_TS[t, s] else "sees"
                    return failed(
                        f"Layer {number}, row {row}: query {t} {does} slot {s}; it may see "
                        f"{may_TS[t].sum()} slots and sees {np.any(sees_NTS[:, t], axis=0).sum()}."
                    )
    window = _window(np.all(np.asarray(layers[-1])[1] > 0.0, axis=0)[:, :length])
    return passed(f"Weights add up to one; query t sees slot t and {window} before it.")


def attention_scale(model: ShowsAttention) -> Finding:
    """Return whether queries and keys with elements of size one have scores of size one.

    The logarithms of a query's weights spread as its scores do. With matrices drawn for unit
    outputs that is 1 for a scale of 1 / sqrt(head dim).
    """
    leaves, trained = dict(model.weights()), model.trained_names()
    width, rng = _width(model, leaves), np.random.default_rng(model.seed)
    for name, leaf in leaves.items():
        if name in trained and leaf.ndim == 2 and width in leaf.shape:
            leaves[name] = rng.normal(0.0, width**-0.5, leaf.shape).astype(leaf.dtype)
    ids = tokens(model)
    layers = model.with_weights(leaves).attention(ids)
    if not layers:
        return abstain("The model shows no attention weights.")
    spreads = []
    for t in range(ids.shape[1] // 2, ids.shape[1]):
        seen_BNS = np.asarray(layers[0], np.float64)[:, :, t, : t + 1]
        if np.any(np.sum(seen_BNS > 0.0, axis=-1) < 2):
            return abstain("A query sees fewer than two slots, so no scores can be compared.")
        spreads.append(np.nanstd(np.log(np.where(seen_BNS > 0.0, seen_BNS, np.nan)), axis=-1))
    found = float(np.mean(spreads))
    seen = f"Scores of the first layer have a standard deviation of {found:.2f}"
    if not 0.6 <= found <= 1.7:
        return failed(f"{seen}, where queries and keys of size one give 1.", found)
    return passed(f"{seen}.", found)


def residual_stream(model: LanguageModel) -> Finding:
    """Set the matrices of all blocks to zero: a token must still come through to the logits."""
    if model.is_recurrent():
        return abstain("Its layers are recurrent: they pass a state on, and not a stream.")
    leaves, trained = drawn(model), model.trained_names()  # fresh heads may be zero
    of_tokens = token_leaves(model, leaves)
    inside = [
        name
        for name, leaf in leaves.items()
        if leaf.ndim >= 2
        and name in trained
        and _IN_A_BLOCK.search(name)
        and name not in of_tokens  # a numbered embedding or head is no block
        and name != model.position_table
    ]
    if not inside:
        return abstain("No weight has the number of a block in its name.")
    silent = leaves | {name: np.zeros_like(leaves[name]) for name in inside}
    spread = _spread(model.with_weights(silent).logits(_row_by_row(model))[:, 0])
    if not spread > 0.0:
        return failed("With silent blocks every token gives the same logits: no path around them.")
    return passed("With silent blocks a token still comes through to the logits.", spread)


def position_sensitivity(model: LanguageModel) -> Finding:
    """Move tokens: their positions must matter, and must not be all that matters."""
    if model.position_table is None:
        return _order_sensitivity(shaken(model))
    several = _row_by_row(model)
    same = np.full_like(several, tokens(model, 1, 1)[0, 0])
    # A table or a head may start at zero, so drawn weights show whether positions matter at all.
    for asked, is_drawn in ((shaken(model), True), (model, False)):
        by_place = _spread(asked.logits(same)[0])
        by_token = _spread(asked.logits(several)[:, 0])
        if is_drawn and not by_place > 1e-6 * by_token:
            return failed(
                "With drawn weights the same token gives the same logits at every position, "
                f"though {model.position_table} is there to tell them apart.",
                by_place / by_token if by_token else None,
            )
        if not is_drawn and not model.trained and by_place > 10.0 * by_token > 0.0:
            return failed(
                f"With fresh weights a logit varies {by_place / by_token:.0f} times more with the "
                "position than with the token.",
                by_place / by_token,
                10.0,
            )
    return passed("Logits vary with the position as well as with the token.")


def _order_sensitivity(model: LanguageModel) -> Finding:
    """Exchange two earlier tokens: the last logits must change."""
    moved = tokens(model, rows=1, seed=1)
    moved[0, -2] = (moved[0, -3] + 1) % model.vocab_size  # two that differ
    swapped = moved.copy()
    swapped[0, -3:-1] = moved[0, -2:-4:-1]
    found = gap(model.logits(swapped)[:, -1], model.logits(moved)[:, -1])
    if not found > tolerance(model):
        return failed("Exchanging two earlier tokens changes nothing: a bag of words.", found)
    # A mask alone makes deep layers depend on the order; in the first only positions do.
    if isinstance(model, ShowsAttention):
        layers, exchanged = (
            [np.asarray(weights_BNTS, float)[0, :, -1] for weights_BNTS in model.attention(x)[:1]]
            for x in (moved, swapped)
        )
        pairs = zip(exchanged, layers, strict=True)
        if any(gap(x[:, [-2, -3]], y[:, [-3, -2]]) <= tolerance(model) for x, y in pairs):
            return failed("The first layer attends to a token alike wherever it stands.")
    return passed(f"Order matters: exchanging two tokens moves the last logits by {found:.1e}.")


def batch_independence(model: LanguageModel) -> Finding:
    """Run the rows of a batch alone: the same logits, and losses that add up to the batch's."""
    model = shaken(model)
    ids, bound = tokens(model), tolerance(model)
    together = model.logits(ids)
    gaps = [gap(model.logits(ids[r : r + 1])[0], together[r]) for r in range(len(ids))]
    worst = float(np.max(gaps))
    if not worst <= bound:
        return failed(
            f"A row alone differs from the same row in a batch by {worst:.1e} standard deviations.",
            worst,
            bound,
        )
    if whole := model.score(together, ids):
        pairs = zip(np.split(together, ROWS), np.split(ids, ROWS), strict=True)
        rows = [score for pair in pairs if (score := model.score(*pair))]
        weights = [1 if row.num_tokens is None else row.num_tokens for row in rows]
        expected = float(np.average([row.mean for row in rows], weights=weights))
        if not abs(whole.mean - expected) <= max(bound, 1e-5):
            return failed(
                f"The loss of a batch is {whole.mean:.4f}, that of its rows one by one "
                f"{expected:.4f}: a row is scored by what stands in another.",
                abs(whole.mean - expected),
            )
    return passed("Rows do not know of each other.", worst, bound)


def padding_invariance(model: LanguageModel) -> Finding:
    """Pad rows: nothing may change, whatever ids the padding is made of."""
    if not model.takes_counts:
        return abstain("The model offers no padding.")
    model = shaken(model)
    ids = tokens(model)
    counts = _ragged(ids.shape[1])
    padded, whole = model.logits(ids, counts), model.logits(ids)
    # What stands behind a token does not change it, so whole rows tell what is right.
    gaps = [gap(padded[row, :count], whole[row, :count]) for row, count in enumerate(counts)]
    which = int(np.argmax(gaps))
    return judged(
        gaps[which],
        tolerance(model),
        "A padded row comes out as it does without padding.",
        f"Row {which}, {counts[which]} tokens and padding up to {ids.shape[1]}, differs from the "
        "same row without padding by {value} standard deviations.",
    )


def boundary_lengths(model: LanguageModel) -> Finding:
    """Run one token and a full context; one token more must be refused, not computed wrong."""
    model = shaken(model)
    context = min(model.context_length, LONGEST)
    ids = tokens(model, 1, context)
    whole = model.logits(ids)
    refused = []
    for length in (1, context - 1, context):
        found = model.logits(ids[:, :length])
        if not is_finite(found):
            return failed(f"The logits of {length} tokens are not finite.")
        if not gap(found, whole[:, :length]) <= 10 * tolerance(model):
            return failed(f"{length} tokens give other logits than the same tokens and more.")
    if context == model.context_length and _has_one_row_each(model):
        longer = np.concatenate([ids, ids[:, :1]], axis=1)
        if _answers(lambda: model.logits(longer)[:, -1]):
            return failed(f"{context + 1} tokens in a context of {context} are read all the same.")
        refused.append("a longer text")
    if isinstance(model, CanDecode) and model.bounded:
        decoder, capacity = model.decoder, min(4, context - 1)
        _, cache = decoder.read(decoder.empty(1, capacity), ids[:, :capacity])
        if _answers(lambda: decoder.read(cache, ids[:, :1])[0]):
            return failed(
                f"Token {capacity + 1} into a cache of {capacity} slots is neither refused nor NaN:"
                " it overwrites what was there."
            )
        refused.append("one token more than a cache holds")
    seen = f"Lengths 1, {context - 1} and {context} work"
    return passed(f"{seen}; refused: {', '.join(refused)}." if refused else f"{seen}.")


def dtype_audit(model: CanCast) -> Finding:
    """Run it in every type: the logits of float64, up to the digits of the type."""
    model = shaken(model)
    ids = tokens(model)
    try:
        exact = model.cast("float64")
        if exact.dtype != "float64":
            return abstain(f"The model computes in {exact.dtype} whatever its weights are.")
        truth = np.asarray(exact.logits(ids), np.float64)
    except _UNSUPPORTED as error:
        return abstain(f"The model does not run in float64: {type(error).__name__}.")
    # Of a standard deviation; 40 units in the last place, where two layers need 3 and twelve 10.
    right, silent = [], []
    for dtype, bound in (("float32", 5e-6), ("bfloat16", 0.3), ("float16", 0.04)):
        try:
            logits = np.asarray(model.cast(dtype).logits(ids)).astype(np.float64)
        except _UNSUPPORTED:
            silent.append(dtype)
            continue
        if not is_finite(logits):
            return failed(f"The logits in {dtype} are not finite, though those in float64 are.")
        found = float(np.sqrt(np.mean(np.square(logits - truth))) / np.std(truth))
        if not found <= bound:
            seen = f"In {dtype} the logits are off by {found:.1e} of their standard deviation."
            return failed(seen, found, bound)
        right.append(dtype)
    seen = f"{', '.join(right)}: the logits of float64, up to their digits."
    return passed(seen + (f" It does not run in {', '.join(silent)}." if silent else ""))


def _has_one_row_each(model: LanguageModel) -> bool:
    """Whether the position table ends with the context."""
    table = model.position_table
    return table is not None and model.context_length in model.weights()[table].shape


def _expected(seen_TT: Array) -> Array:
    """Return what a causal mask shows: all up to the query, or a window as wide as any query's."""
    behind_TT = np.subtract.outer(np.arange(len(seen_TT)), np.arange(len(seen_TT)))
    causal_TT = behind_TT >= 0
    window = int(behind_TT[causal_TT & seen_TT].max(initial=0))
    return causal_TT & (behind_TT <= max(window, 1))


def _window(seen_TT: Array) -> str:
    """Describe how far back a query sees."""
    behind_TT = np.subtract.outer(np.arange(len(seen_TT)), np.arange(len(seen_TT)))
    window = int(behind_TT[seen_TT & (behind_TT >= 0)].max(initial=0))
    return "all" if window == len(seen_TT) - 1 else f"only {window} (if no such window is meant)"


def _width(model: LanguageModel, leaves: Leaves) -> int:
    """Return D, by the matrix that has a row for each token."""
    matrices = [leaf.shape for leaf in leaves.values() if leaf.ndim == 2]
    for shape in matrices:
        if model.vocab_size in shape:
            return shape[0] if shape[1] == model.vocab_size else shape[1]
    return max(rows for rows, _ in matrices)


def _row_by_row(model: LanguageModel) -> Array:
    """Return rows of one token each, another in every row."""
    length = min(LENGTH, model.context_length)
    return np.arange(ROWS, dtype=np.int32)[:, None].repeat(length, axis=1) % model.vocab_size


def _ragged(length: int) -> Array:
    """Return real tokens of four rows, the first not the longest."""
    return np.array([max(length // 2, 1), length, 1, max(length - 1, 1)])


def _spread(logits_KV: Array) -> float:
    """Return the root mean square over logits of their deviation over cases."""
    return float(np.sqrt(np.mean(np.var(np.asarray(logits_KV, np.float64), axis=0))))


def _answers(call: Callable[[], Array]) -> bool:
    """Whether a call that must be refused gives numbers instead."""
    try:
        return is_finite(call())
    except Exception:
        return False
