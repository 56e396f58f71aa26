"""Questions about the loss, its gradient and a training step.

Dimension key: B batch, T tokens, V vocab.
"""

import math

import numpy as np

from parity.check.metrics import gradient_norm, largest
from parity.doctor.detectors.forward import cross_entropies
from parity.doctor.finding import Finding, abstain, failed, judged, passed
from parity.doctor.model import AdamW, Array, Counts, LanguageModel
from parity.doctor.offers import CanEvaluate, CanTrain, HasOwnStep, NoGradient
from parity.doctor.probes import (
    LENGTH,
    LONGEST,
    ROWS,
    drawn,
    is_finite,
    shaken,
    token_leaves,
    tokens,
    tolerance,
)
from parity.frameworks.leaves import Leaves

_STEPS, _CYCLES = 150, 80
_LAGS = range(-2, 4)


def token_accounting(model: LanguageModel) -> Finding:
    """Score given logits: each real label once, divided by the number of labels scored."""
    bound, ids, ignored = max(tolerance(model), 1e-5), tokens(model), model.ignore_index
    length = ids.shape[1]
    counts = np.array([length, max(length - 4, 2), 2, max(length // 2, 2)])
    logits_BTV = 3.0 * np.random.default_rng(0).normal(size=(*ids.shape, model.vocab_size))
    logits_BTV = logits_BTV.astype(np.float64 if model.dtype == "float64" else np.float32)
    labels = ids.copy()
    labels[0, 2] = 0
    cases: list[tuple[str, Array, Counts]] = [("whole rows", labels, None)]
    if model.takes_counts:
        cases.append(("padded rows", labels, counts))
    if ignored is not None:
        some = labels.copy()
        some[:, 1::3] = ignored
        cases.append((f"labels of {ignored}", some, None))
    found = None
    for words, given, real in cases:
        if (found := model.score(logits_BTV, given, real)) is None:
            break
        total, number = _total(logits_BTV, given, real, ignored)
        expected = total / number
        if found.num_tokens is not None and found.num_tokens != number:
            return failed(f"With {words} the loss counts {found.num_tokens} tokens of {number}.")
        if not abs(found.mean - expected) <= bound * max(expected, 1.0):
            return failed(
                f"With {words} the loss is {found.mean:.4f}; the cross entropy of the next token "
                f"is {expected:.4f}.",
                abs(found.mean - expected),
                bound,
            )
    if isinstance(model, CanEvaluate):
        short = np.array([1, 2, 1, 3])  # one row too short to be scored, and the next
        batches = [(ids, counts), (ids, short)] if model.takes_counts else [(ids, None)] * 2
        sums = [_total(model.logits(*batch), *batch, ignored) for batch in batches]
        total, number = (sum(x) for x in zip(*sums, strict=True))
        found = model.evaluate(batches)
        if not abs(found.mean - total / number) <= bound * max(total / number, 1.0):
            return failed(
                f"Two batches are evaluated to {found.mean:.4f}; all their tokens together have "
                f"{total / number:.4f}."
            )
    if found is None:
        return abstain("The model brings no loss and no evaluation of its own.")
    return passed("Every real label is scored once, and divided by how many there are.")


def _total(
    logits_BTV: Array, labels_BT: Array, counts_B: Counts, ignored: int | None
) -> tuple[float, int]:
    """Return the sum of the cross entropies of the next token, and their number."""
    targets_BT, steps_T = labels_BT[:, 1:], np.arange(1, labels_BT.shape[1])
    real_BT = targets_BT != ignored if ignored is not None else np.full(targets_BT.shape, True)
    if counts_B is not None:
        real_BT = real_BT & (steps_T < counts_B[:, None])
    losses_BT = cross_entropies(logits_BTV[:, :-1], np.where(real_BT, targets_BT, 0))
    return float(losses_BT[real_BT].sum()), int(real_BT.sum())


def gradient_coverage(model: CanTrain) -> Finding:
    """Differentiate: every parameter must get a gradient, and every row of a position table."""
    model = shaken(model)
    context = min(model.context_length, LONGEST)
    try:
        gradients = model.gradients(tokens(model, ROWS if context <= 256 else 1, context))
    except NoGradient as error:
        return failed(f"{error} Is it called in inference_mode, or detached?")
    if not any(np.any(gradient) for gradient in gradients.values()):
        return failed("No gradient comes out of the model: that of every parameter is zero.")
    for name, gradient in gradients.items():
        if not np.any(gradient) and not _is_meant(model, name):
            seen = f"{name} gets no gradient: it is frozen, or the loss does not depend on it."
            return failed(seen)
        if not is_finite(gradient):
            return failed(f"The gradient of {name} is not finite.")
    of_tokens = token_leaves(model, gradients)
    for name, gradient in gradients.items():
        fused = gradient.ndim == 2 and min(gradient.shape) >= 8
        if not fused or name in of_tokens or name == model.position_table or not gradient.any():
            continue
        # Of a fused projection a third is unused where a query stands in for a key; a ReLU that
        # is dead for all tokens leaves a tenth at most.
        for axis, word in enumerate(("columns", "rows")):
            unused = 1.0 - float(np.mean(np.any(gradient, axis=axis)))
            if unused >= 0.25:
                return failed(f"{name}: {unused:.0%} of its {word} get no gradient.", unused, 0.25)
    table = gradients.get(model.position_table or "")
    if table is not None and len(table) == context == model.context_length:
        # The last position has nothing to predict.
        unused = np.flatnonzero(~np.any(table[:-1], axis=1))
        if unused.size:
            return failed(
                f"{model.position_table}: {unused.size} of {context} rows get no gradient from a "
                f"full context, the first is row {unused[0]}."
            )
    return passed(f"All {len(gradients)} parameters get a gradient.")


def _is_meant(model: LanguageModel, name: str) -> bool:
    """Whether a parameter without a gradient is a constant, or only chooses."""
    leaves, ids = model.weights(), tokens(model)
    leaf = leaves[name]
    if name not in model.trained_names() and leaf.ndim >= 2:
        # A table of fixed positions, or a mask, which has few values.
        return name == model.position_table or 2 <= np.unique(leaf).size <= 3
    if leaf.ndim != 1:
        return False
    # A vector by which experts are chosen moves the logits in steps only.
    noise = np.random.default_rng(0).normal(0.0, 1.0, leaf.shape)
    before, little, much = (
        model.with_weights(leaves | {name: (leaf + x * noise).astype(leaf.dtype)}).logits(ids)
        for x in (0.0, 1e-5, 10.0)
    )
    return np.array_equal(before, little) and not np.array_equal(before, much)


def best_lag(model: CanTrain) -> Finding:
    """Train on a cycle of tokens: the logits must name the next token."""
    num = min(model.vocab_size, 31)
    cycle = np.random.default_rng(0).permutation(num)
    length = min(LENGTH, model.context_length)

    def passages(seed: int) -> Array:
        starts = np.random.default_rng((1, seed)).integers(0, num, ROWS)
        return cycle[(starts[:, None] + np.arange(length)) % num].astype(np.int32)

    trainer = model.trainer(_rate(model))
    losses = [trainer.step(passages(step)) for step in range(_CYCLES)]
    ids = passages(1000)
    named = np.argmax(model.with_weights(trainer.parameters()).logits(ids), axis=-1)
    hits = {}
    for lag in _LAGS:
        inside = slice(max(-lag, 0), length - max(lag, 0))
        shifted = slice(max(lag, 0), length + min(lag, 0))
        hits[lag] = float(np.mean(named[:, inside] == ids[:, shifted]))
    lag = max(hits, key=lambda lag: hits[lag])
    if hits[lag] < 0.5 or not np.mean(losses[-5:]) < 0.5 * losses[0]:
        return abstain(f"Nothing was learned of a cycle of {num} tokens in {_CYCLES} steps.")
    seen = f"Trained on a cycle, the logits at t name token t{lag:+d} in {hits[lag]:.0%} of cases."
    return (passed if lag == 1 else failed)(seen, lag, 1)


def overfit_one_batch(model: CanTrain) -> Finding:
    """Train on one small batch until it is learned by heart."""
    ids = tokens(model)
    losses: list[float] = []
    for rate in (1.0, 0.2):  # deep or recurrent ones may need smaller steps
        trainer = model.trainer(rate * _rate(model))
        losses = [trainer.step(ids)]
        while len(losses) < _STEPS and np.isfinite(losses[-1]) and losses[-1] > 0.1:
            losses.append(trainer.step(ids))
        if losses[-1] <= 0.1:
            break
    seen = f"One batch: loss {losses[0]:.2f} to {losses[-1]:.2f} in {len(losses)} steps."
    return judged(losses[-1], 0.1, seen)


def _rate(model: LanguageModel) -> float:
    """Return a learning rate that models of this size bear."""
    size = sum(leaf.size for leaf in model.weights().values())
    return 1e-2 if size < 1e5 else 3e-3 if size < 1e7 else 3e-4


def update_equals_reference(model: HasOwnStep) -> Finding:
    """Take four training steps: each must be AdamW's from where it started."""
    trainer, constants = model.reference_trainer()
    first: Leaves = {}
    second: Leaves = {}
    length = min(LENGTH, model.context_length)
    for number in range(4):
        ids = tokens(model, ROWS, length, seed=number)
        counts = [np.array([length, length - 2, 3, 2])] if model.takes_counts else []
        before = trainer.parameters()
        gradients = model.with_weights(before).gradients(ids, *counts)
        expected = reference_update(constants, number, before, gradients, first, second)
        loss = trainer.step(ids, *counts)
        after = trainer.parameters()
        errors = {
            name: float(np.linalg.norm(after[name] - before[name] - expected[name]))
            for name in before
        }
        for name, leaf in after.items():
            if not is_finite(leaf):
                seen = f"After step {number + 1} {name} is not finite; its loss was {loss:.3f}."
                return failed(seen)
        worst = largest(errors)
        found = math.hypot(*errors.values()) / gradient_norm(expected)
        # AdamW divides by a root of rounding where a gradient cancels, hence not 1e-12.
        bound = 1e-6 if model.dtype == "float64" else 1e-3
        if not found <= bound:
            seen = (
                f"Step {number + 1} is off AdamW's by {found:.1e} of its length, most in {worst}."
            )
            return failed(seen, found, bound)
    return passed("Four steps are AdamW's: rate, moments, decay, clipping and accumulation.")


def reference_update(
    constants: AdamW,
    number: int,
    weights: Leaves,
    gradients: Leaves,
    first: Leaves,
    second: Leaves,
) -> Leaves:
    """Return what AdamW adds to each leaf; `first` and `second` are its moments and move along.

    Loshchilov and Hutter, "Decoupled weight decay regularization", 2019, algorithm 2; the clipping
    divides by the norm plus 1e-6, as torch does.
    """
    gradients = {name: np.asarray(g, np.float64) for name, g in gradients.items()}
    if constants.clip_norm is not None:
        factor = min(constants.clip_norm / (gradient_norm(gradients) + 1e-6), 1.0)
        gradients = {name: g * factor for name, g in gradients.items()}
    rate, updates = constants.rates[number], {}
    for name, weight in weights.items():
        gradient = gradients.get(name, np.zeros_like(weight))
        first[name] = constants.beta1 * first.get(name, 0.0) + (1 - constants.beta1) * gradient
        second[name] = constants.beta2 * second.get(name, 0.0) + (1 - constants.beta2) * gradient**2
        m_hat = first[name] / (1 - constants.beta1 ** (number + 1))
        v_hat = second[name] / (1 - constants.beta2 ** (number + 1))
        decay = constants.weight_decay if constants.decays(name) else 0.0
        updates[name] = -rate * (m_hat / (np.sqrt(v_hat) + constants.epsilon) + decay * weight)
    return updates


def nan_origin(model: CanTrain) -> Finding:
    """Find the first NaN: from large scores, in the gradient, or from the optimizer."""
    ids = tokens(model)
    ids %= max(model.vocab_size // 2, 1)  # half of the vocabulary gets no gradient as an input
    trained = model.trained_names()
    large = {
        name: (30.0 * leaf).astype(leaf.dtype) if name in trained else leaf
        for name, leaf in drawn(model).items()
    }
    logits = model.with_weights(large).logits(ids)
    if not is_finite(logits):
        return failed("With weights 30 times larger the logits are not finite: an exp overflows.")
    for name, gradient in model.gradients(ids).items():
        if not is_finite(gradient):
            return failed(f"The backward pass gives NaN, in the gradient of {name}.")
    trainer = model.trainer(_rate(model))
    for step in range(2):
        trainer.step(ids)
        for name, leaf in trainer.parameters().items():
            if name in trained and not is_finite(leaf):
                return failed(
                    f"The optimizer makes NaN of {name} in step {step + 1}, from gradients that "
                    "are finite."
                )
    return passed("No NaN: not from large scores, not from the gradient, not from the optimizer.")
