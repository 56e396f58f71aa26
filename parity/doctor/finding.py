"""A question about a language model, and what it finds."""

import dataclasses
import re
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path

from parity.doctor.model import LanguageModel
from parity.doctor.offers import NAMES, NoGradient
from parity.report.record import Verdict

# What frameworks say of a type or operation that they do not have on this machine.
_LIMIT = re.compile(
    r"not implemented for '|UNIMPLEMENTED|[Uu]nsupported (element )?type"
    r"|not supported on (the )?CPU"
)
# Where a call enters a model of either framework that is made of layers alone.
_CALLS = "nn/modules/module.py", "nnx/module.py", "nnx/nn/", "/transformers/"
_OWN = str(Path(__file__).parents[1])


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
        convention: whether a published model may answer otherwise, and be meant so.
    """

    name: str
    examine: Callable[..., Finding]
    asks: str
    matters: str
    remedy: str
    needs: type = LanguageModel
    after: tuple[str, ...] = ()
    convention: bool = False

    def __call__(self, model: LanguageModel) -> Finding:
        """Return the finding; what the model's own code raises is a failure."""
        if not isinstance(model, self.needs):
            return abstain(f"The model offers no {NAMES[self.needs]}.")
        try:
            finding = self.examine(model)
        except NoGradient as error:
            return abstain(str(error))
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            seen = f"{type(error).__name__}: {lines[0][:200]}"
            if _LIMIT.search(str(error)):
                return abstain(f"The framework cannot run this here, {seen}")
            if _is_own(error):
                return Finding(Verdict.ERROR, f"The question itself went wrong, {seen}")
            return failed(f"Raised {seen}")
        if finding.verdict is Verdict.FAIL and self.convention and (kind := model.declares()):
            return abstain(f"{kind} is meant so. {finding.sentence}")
        return finding


def _is_own(error: Exception) -> bool:
    """Whether an exception rose in code of the doctor, with no call of the model on the way."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    outside = (x for x in files if not x.startswith(_OWN) and not _is_library(x))
    return not any(outside) and not any(call in x for x in files for call in _CALLS)


def _is_library(file: str) -> bool:
    return "site-packages" in file or "<" in file or file.startswith(sysconfig.get_path("stdlib"))


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
