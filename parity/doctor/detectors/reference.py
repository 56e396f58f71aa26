"""The strongest question, for a model that has a reference: does it do the same?"""

from collections.abc import Iterable, Iterator

import numpy as np

from parity.doctor.detectors.forward import LENGTH, ROWS
from parity.doctor.finding import Finding, failed, gap, passed, tokens, tolerance
from parity.doctor.patient import Patient
from parity.frameworks.leaves import Leaves
from parity.weights.randomize import randomized


def parity(patient: Patient) -> Finding:
    """Every answer must be the reference's, from the first weights to the last token."""
    number = 0
    for words, found, expected in _answers(patient, patient.reference):
        number += 1
        off = gap(found, expected)
        if not off <= tolerance(patient):
            return failed(f"{words}: differs from the reference by {off:.1e}.", off)
    return passed(f"{number} answers are those of the reference.")


def _answers(left: Patient, right: Patient) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(what was asked, answer, answer of the reference) for all that both offer, in the order of a
    model's life."""
    mine, theirs = left.weights(), right.weights()
    if mine.keys() != theirs.keys():
        yield "The names of the weights", np.zeros(1), np.ones(1)
        return
    for name in mine:
        yield f"The initial {name}", mine[name], theirs[name]
    leaves = randomized(theirs, right.seed)
    left, right = left.with_weights(leaves), right.with_weights(leaves)

    def both(field: str) -> bool:
        return bool(getattr(left, field) and getattr(right, field))

    ids = tokens(left, ROWS, LENGTH)
    counts = np.array([ids.shape[1], 5, 2, 1])
    yield "The logits", left.logits(ids, None), right.logits(ids, None)
    if both("takes_counts"):
        padded = [x.logits(ids, counts) for x in (left, right)]
        for row, count in enumerate(counts):
            yield f"The logits of padded row {row}", *(x[row, :count] for x in padded)
    if both("cast"):
        narrow = left.cast("float16"), right.cast("float16")
        yield "The logits in float16", *(np.asarray(x.logits(ids, None), float) for x in narrow)
    if both("gradients"):
        mine, theirs = left.gradients(ids), right.gradients(ids)
        for name, gradient in theirs.items():
            expected = _or_zeros(gradient, leaves[name])
            yield f"The gradient of {name}", _or_zeros(mine[name], expected), expected
    if both("score"):
        logits = left.logits(ids, None)
        for words, real in (("whole rows", None), ("padded rows", counts)):
            if real is None or both("takes_counts"):
                yield f"The loss of {words}", *_numbers(x.score(logits, ids, real).mean
                                                        for x in (left, right))  # fmt: skip
    if both("evaluate") and both("takes_counts"):
        batches = [(ids, counts), (ids, np.array([1, 2, 1, 3]))]
        yield "The evaluation", *_numbers(x.evaluate(batches).mean for x in (left, right))
    if both("reference_trainer"):
        trainers = left.reference_trainer()[0], right.reference_trainer()[0]
        for step in range(2):
            # Ragged, so that parts of a batch have different numbers of tokens.
            batch = tokens(left, ROWS, LENGTH, seed=step)
            real = np.array([batch.shape[1], batch.shape[1] - 2, 3, 2])
            losses = [x.step(batch, real) for x in trainers]
            yield f"The loss of step {step + 1}", *_numbers(losses)
            yield f"The weights after step {step + 1}", *(_flat(x.parameters()) for x in trainers)
    if both("dropout_losses"):
        yield "Dropout", *(np.array(x.dropout_losses(ids)) for x in (left, right))
    if both("decoder") and left.decoder.ragged and right.decoder.ragged:
        yield from _decoded(left, right, ids)
    if both("generate"):
        yield from _generated(left, right, ids)


def _decoded(
    left: Patient, right: Patient, ids: np.ndarray
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    states = [x.decoder.empty(ROWS, left.context_length) for x in (left, right)]
    for words, piece, counts in (
        ("a ragged prompt", ids[:, :4], np.array([4, 1, 3, 2])),
        ("one token more", ids[:, 4:5], None),
        ("a chunk more", ids[:, 5:9], None),
    ):
        answers = [
            x.decoder.read(state, piece, counts)
            for x, state in zip((left, right), states, strict=True)
        ]
        found, expected = (
            [a[0][r, :c] for r, c in enumerate(counts if counts is not None else [None] * ROWS)]
            for a in answers
        )
        yield f"Cached logits of {words}", np.concatenate(found), np.concatenate(expected)
        states = [a[1] for a in answers]


def _generated(
    left: Patient, right: Patient, ids: np.ndarray
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    prompt = ids[:, : min(left.context_length // 4, 6)]
    for words, options in (
        ("Greedy tokens", {}),
        ("Drawn tokens", dict(temperature=1.0, seed=3)),
        ("Greedy tokens with a stop", dict(stop_ids=(int(right.generate(prompt, 6)[0, 1]),))),
    ):
        yield words, *(x.generate(prompt, 6, **options).astype(float) for x in (left, right))


def _numbers(values: Iterable[float]) -> list[np.ndarray]:
    """Numbers as arrays in which a gap counts in units of nats: beside zero and one."""
    return [np.array([-1.0, 1.0, value]) for value in values]


def _or_zeros(gradient: np.ndarray | None, like: np.ndarray) -> np.ndarray:
    return np.zeros_like(like) if gradient is None else gradient


def _flat(leaves: Leaves) -> np.ndarray:
    return np.concatenate([leaf.ravel() for leaf in leaves.values()])
