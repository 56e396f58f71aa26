"""What a detector finds, and the values that findings are made of."""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from parity.doctor.model import OFFERS, LanguageModel
from parity.report.record import Verdict
from parity.weights.randomize import randomized

Model = TypeVar("Model", bound=LanguageModel)


@dataclasses.dataclass(frozen=True)
class Finding:
    """The answer of one detector.

    Attributes:
        verdict: PASS, FAIL, ABSTAIN where the question cannot be asked, BLOCKED where an earlier
            failure would make the answer meaningless.
        sentence: what was seen, with numbers.
        value: the number that was judged, if there is one.
        bound: the largest value that passes.
    """

    verdict: Verdict
    sentence: str
    value: float | None = None
    bound: float | None = None


@dataclasses.dataclass(frozen=True)
class Detector:
    """One question about a language model.

    Attributes:
        name: short, words joined by dashes.
        examine: asks the question of a model.
        asks: the question, in one line.
        matters: why the answer matters.
        remedy: what to look at when it fails.
        needs: the protocol that a model must satisfy to be asked.
        after: detectors whose failure makes its answer meaningless.
    """

    name: str
    examine: Callable[..., Finding]
    asks: str
    matters: str
    remedy: str
    needs: type = LanguageModel
    after: tuple[str, ...] = ()

    def __call__(self, model: LanguageModel) -> Finding:
        """Return the finding; what the model's own code raises is a failure."""
        if not isinstance(model, self.needs):
            return abstain(f"The model offers no {OFFERS[self.needs]}.")
        try:
            return self.examine(model)
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            return failed(f"Raised {type(error).__name__}: {lines[0][:200]}")


def passed(sentence: str, value: float | None = None, bound: float | None = None) -> Finding:
    """Report that nothing wrong was seen."""
    return Finding(Verdict.PASS, sentence, value, bound)


def failed(sentence: str, value: float | None = None, bound: float | None = None) -> Finding:
    """Report that something wrong was seen."""
    return Finding(Verdict.FAIL, sentence, value, bound)


def abstain(sentence: str) -> Finding:
    """Report that the question could not be asked."""
    return Finding(Verdict.ABSTAIN, sentence)


def judged(value: float, bound: float, good: str, bad: str) -> Finding:
    """Judge a number that must not exceed its bound; NaN never passes."""
    good, bad = (text.format(value=f"{value:.1e}", bound=f"{bound:.0e}") for text in (good, bad))
    return passed(good, value, bound) if value <= bound else failed(bad, value, bound)


def shaken(model: Model) -> Model:
    """Return the model with random weights: fresh ones hide what is zero or nearly so."""
    return model.with_weights(randomized(model.weights(), model.seed))


def tokens(model: LanguageModel, rows: int, length: int, seed: int = 0) -> np.ndarray:
    """Draw ids (rows, length) from the whole vocabulary, cut to the context."""
    rng = np.random.default_rng((model.seed, seed))
    length = min(length, model.context_length)
    return rng.integers(0, model.vocab_size, (rows, length)).astype(np.int32)


def gap(left: np.ndarray, right: np.ndarray) -> float:
    """Return the largest difference, in units of the right side's standard deviation."""
    left, right = (np.asarray(x, np.float64) for x in (left, right))
    if left.shape != right.shape or not right.size:
        return float("nan")
    scale = float(np.std(right))
    return float(np.max(np.abs(left - right)) / (scale if scale > 0 else 1.0))


def tolerance(model: LanguageModel) -> float:
    """Return how far two ways to compute the same logits may differ, in standard deviations.

    In float32 a thousand units in the last place, where a model of a hundred layers needs a few
    hundred; in float64 what a float32 somewhere inside would exceed.
    """
    return {"float64": 1e-9, "float32": 1e-4, "float16": 0.1, "bfloat16": 0.5}[model.dtype]
