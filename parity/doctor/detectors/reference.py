"""The strongest question, for a model that has a reference: does it do the same?"""

from collections.abc import Iterator
from typing import TypeGuard, TypeVar

import numpy as np

from parity.doctor.finding import Finding, abstain, failed, passed
from parity.doctor.model import Array, LanguageModel
from parity.doctor.offers import CanCast, CanDecode, CanEvaluate, CanGenerate, CanTrain, HasOwnStep
from parity.doctor.probes import ROWS, drawn, gap, tokens, tolerance

Kind = TypeVar("Kind", bound=LanguageModel)


def parity(model: LanguageModel) -> Finding:
    """Compare every answer with the reference's, from the first weights to the last token."""
    if model.reference is None:
        return abstain("The model offers no reference.")
    mine, theirs = model.weights(), model.reference.weights()
    if mine.keys() != theirs.keys():
        return failed("The names of the weights: differ from the reference.")
    for name, leaf in theirs.items():
        if not (off := gap(mine[name], leaf)) <= tolerance(model):
            return failed(f"The initial {name}: differs from the reference by {off:.1e}.", off)
    leaves = drawn(model.reference)
    pair = model.with_weights(leaves), model.reference.with_weights(leaves)
    number = len(leaves)
    for (words, found), (_, expected) in zip(*(_answers(x, pair) for x in pair), strict=True):
        number += 1
        if not (off := gap(found, expected)) <= tolerance(model):
            return failed(f"{words}: differs from the reference by {off:.1e}.", off)
    return passed(f"{number} answers are those of the reference.")


def _answers(
    model: LanguageModel, pair: tuple[LanguageModel, LanguageModel]
) -> Iterator[tuple[str, Array]]:
    """Yield (question, answer) for all that both of a pair offer, in the order of a model's life.

    Args:
        model: the one of the pair that answers.
        pair: the model in question and its reference.
    """

    def offered(_: LanguageModel, kind: type[Kind]) -> TypeGuard[Kind]:
        return all(isinstance(x, kind) for x in pair)

    (asked, reference), ids = pair, tokens(model)
    counted = asked.takes_counts and reference.takes_counts
    counts = np.array([ids.shape[1], 5, 2, 1])
    yield "The logits", model.logits(ids)
    if counted:
        padded = model.logits(ids, counts)
        for row, count in enumerate(counts):
            yield f"The logits of padded row {row}", padded[row, :count]
    if offered(model, CanCast):
        yield "The logits in float16", np.asarray(model.cast("float16").logits(ids), float)
    if offered(model, CanTrain):
        for name, gradient in model.gradients(ids).items():
            yield f"The gradient of {name}", gradient
    logits = asked.logits(ids)
    for words, real in (("whole rows", None), ("padded rows", counts)):
        if (real is None or counted) and (score := model.score(logits, ids, real)):
            yield f"The loss of {words}", _number(score.mean)
    if offered(model, CanEvaluate) and counted:
        batches = [(ids, counts), (ids, np.array([1, 2, 1, 3]))]
        yield "The evaluation", _number(model.evaluate(batches).mean)
    if offered(model, HasOwnStep):
        trainer, _ = model.reference_trainer()
        for step in range(2):
            # Ragged, so that parts of a batch have different numbers of tokens.
            batch = tokens(model, seed=step)
            real = np.array([batch.shape[1], batch.shape[1] - 2, 3, 2])
            yield f"The loss of step {step + 1}", _number(trainer.step(batch, real))
            flat = [leaf.ravel() for leaf in trainer.parameters().values()]
            yield f"The weights after step {step + 1}", np.concatenate(flat)
    if offered(model, CanTrain) and (losses := model.dropout_losses(ids)):
        yield "Dropout", np.array(losses)
    if offered(model, CanDecode) and model.ragged:
        cache = model.decoder.empty(ROWS, model.context_length)
        for words, piece, real in (
            ("a ragged prompt", ids[:, :4], np.array([4, 1, 3, 2])),
            ("one token more", ids[:, 4:5], None),
            ("a chunk more", ids[:, 5:9], None),
        ):
            found, cache = model.decoder.read(cache, piece, real)
            rows = (
                [row[:count] for row, count in zip(found, real, strict=True)]
                if real is not None
                else found
            )
            yield f"Cached logits of {words}", np.concatenate(rows)
    if offered(model, CanGenerate) and offered(reference, CanGenerate):
        prompt = ids[:, : min(model.context_length // 4, 6)]
        stop = int(reference.generate(prompt, 6)[0, 1])
        yield "Greedy tokens", model.generate(prompt, 6).astype(float)
        yield "Drawn tokens", model.generate(prompt, 6, temperature=1.0, seed=3).astype(float)
        stopped = model.generate(prompt, 6, stop_ids=(stop,))
        yield "Greedy tokens with a stop", stopped.astype(float)


def _number(value: float) -> Array:
    """Return an array in which a gap counts in units of nats: beside one and minus one."""
    return np.array([-1.0, 1.0, value])
