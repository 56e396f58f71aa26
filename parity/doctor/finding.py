"""What a detector found, and what it is made of."""

import dataclasses
from collections.abc import Callable

import numpy as np

from parity.doctor.patient import Patient
from parity.report.record import Verdict
from parity.weights.randomize import randomized


@dataclasses.dataclass(frozen=True)
class Finding:
    """The answer of one detector.

    Attributes:
        verdict: PASS, FAIL, ABSTAIN where the question cannot be put, BLOCKED where an earlier
            failure would make the answer meaningless.
        sentence: what was seen, with numbers.
        value: the number that was judged, if there is one.
        bound: what it was held against.
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
        examine: the question put to a patient.
        asks: the question, in one line.
        matters: why the answer matters.
        remedy: what to look at when it fails.
        needs: fields of the patient that it cannot do without.
        after: detectors whose failure makes its answer meaningless.
    """

    name: str
    examine: Callable[[Patient], Finding]
    asks: str
    matters: str
    remedy: str
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    def __call__(self, patient: Patient) -> Finding:
        """The finding, whatever the patient's own code does on the way."""
        if missing := [field for field in self.needs if not getattr(patient, field)]:
            return abstain(f"The model offers no {' and no '.join(map(_spoken, missing))}.")
        try:
            return self.examine(patient)
        except Exception as error:
            told = str(error).strip().splitlines() or [""]
            return Finding(Verdict.FAIL, f"Raised {type(error).__name__}: {told[0][:200]}")


def _spoken(field: str) -> str:
    words = {
        "takes_counts": "padding", "score": "loss of its own", "decoder": "cache",
        "evaluate": "evaluation of its own", "reference_trainer": "training step of its own",
        "generate": "generation", "attention": "attention weights", "reach": "token embedding",
        "num_programs": "count of compiled programs", "reference": "reference",
        "keeps_graph": "autograd graph", "dropout_losses": "dropout", "cast": "other types",
    }  # fmt: skip
    return words.get(field, field)


def passed(sentence: str, value: float | None = None, bound: float | None = None) -> Finding:
    """Nothing wrong was seen."""
    return Finding(Verdict.PASS, sentence, value, bound)


def failed(sentence: str, value: float | None = None, bound: float | None = None) -> Finding:
    """Something wrong was seen."""
    return Finding(Verdict.FAIL, sentence, value, bound)


def abstain(sentence: str) -> Finding:
    """The question could not be put."""
    return Finding(Verdict.ABSTAIN, sentence)


def judged(value: float, bound: float, good: str, bad: str) -> Finding:
    """A number that must not exceed its bound; NaN never passes."""
    good, bad = (text.format(value=f"{value:.1e}", bound=f"{bound:.0e}") for text in (good, bad))
    return passed(good, value, bound) if value <= bound else failed(bad, value, bound)


def shaken(patient: Patient) -> Patient:
    """The model with every weight drawn anew: fresh weights hide what is zero or nearly so."""
    return patient.with_weights(randomized(patient.weights(), patient.seed))


def tokens(patient: Patient, rows: int, length: int, seed: int = 0) -> np.ndarray:
    """Ids (rows, length) from the whole vocabulary, cut to the context."""
    rng = np.random.default_rng((patient.seed, seed))
    length = min(length, patient.context_length)
    return rng.integers(0, patient.vocab_size, (rows, length)).astype(np.int32)


def gap(left: np.ndarray, right: np.ndarray) -> float:
    """The largest difference, in units of the right side's standard deviation."""
    left, right = (np.asarray(x, np.float64) for x in (left, right))
    if left.shape != right.shape or not right.size:
        return float("nan")
    scale = float(np.std(right))
    return float(np.max(np.abs(left - right)) / (scale if scale > 0 else 1.0))


def tolerance(patient: Patient) -> float:
    """How far two ways to compute the same logits may part, in standard deviations.

    In float32 a thousand units in the last place, where a model of a hundred layers needs a few
    hundred; in float64 what a float32 somewhere inside would exceed.
    """
    return {"float64": 1e-9, "float32": 1e-4, "float16": 0.1, "bfloat16": 0.5}[patient.dtype]
