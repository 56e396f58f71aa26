"""A question about a language model, and what it finds."""

import dataclasses
from collections.abc import Callable

from parity.doctor.model import LanguageModel
from parity.doctor.offers import NAMES
from parity.report.record import Verdict


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
            return abstain(f"The model offers no {NAMES[self.needs]}.")
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


def judged(value: float, bound: float, good: str, bad: str | None = None) -> Finding:
    """Return the finding on a number that must not exceed its bound; NaN never passes.

    Args:
        value: to judge.
        bound: the largest value that passes.
        good: the sentence for a value that passes, with {value} and {bound} where they belong.
        bad: the sentence for one that does not; the same when None.
    """
    is_good = value <= bound
    sentence = good if is_good or bad is None else bad
    sentence = sentence.format(value=f"{value:.1e}", bound=f"{bound:.0e}")
    return (passed if is_good else failed)(sentence, value, bound)
