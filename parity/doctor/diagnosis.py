"""An examination from the first question to the last, and its result as a value."""

import dataclasses
import time
from collections.abc import Callable, Sequence

import torch
from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from parity.doctor.detectors import DETECTORS
from parity.doctor.finding import Detector, Finding
from parity.doctor.model import LanguageModel
from parity.report.html import render
from parity.report.json import to_json
from parity.report.record import Verdict


@dataclasses.dataclass(frozen=True)
class Answer:
    """One detector, what it found, and the seconds it took."""

    detector: Detector
    finding: Finding
    seconds: float

    @property
    def advice(self) -> Text:
        """What was seen, why it matters and what to try."""
        seen, asked = self.finding.sentence, self.detector
        lines = ("seen", seen), ("why it matters", asked.matters), ("try next", asked.remedy)
        return Text.assemble(
            *(x for word, line in lines for x in ((f"{word}: ", "bold"), f"{line}\n"))
        )


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What is wrong with a language model, as far as the questions go."""

    name: str
    framework: str
    num_params: int
    answers: tuple[Answer, ...]

    @property
    def fired(self) -> tuple[str, ...]:
        """Return the detectors that saw something wrong, by name, in the order of the questions."""
        return tuple(x.detector.name for x in self.answers if x.finding.verdict is Verdict.FAIL)

    @property
    def exit_code(self) -> int:
        """Return 0 if nothing wrong was seen, 1 if something was, 2 if it could not be asked."""
        if self.fired:
            return 1
        if any(x.finding.verdict is Verdict.ERROR for x in self.answers):
            return 2
        return 0 if any(x.finding.verdict is Verdict.PASS for x in self.answers) else 2

    @property
    def summary(self) -> str:
        """Return the outcome in a line."""
        asked = sum(x.finding.verdict in (Verdict.PASS, Verdict.FAIL) for x in self.answers)
        if not asked:
            return "Nothing could be asked."
        if self.fired:
            return f"{len(self.fired)} of {asked} answers are wrong. Begin with {self.fired[0]}."
        return f"Nothing wrong in {asked} answers. What no question asks, no answer tells."

    def to_json(self) -> str:
        """Return everything as JSON."""
        document = {
            "schema": 1,
            "name": self.name,
            "framework": self.framework,
            "num_params": self.num_params,
            "fired": list(self.fired),
            "answers": [
                {"detector": x.detector.name}
                | dataclasses.asdict(x.finding)
                | {"seconds": round(x.seconds, 3)}
                for x in self.answers
            ],
        }
        return to_json(document, indent=2)

    def to_html(self) -> str:
        """Return a page that loads nothing from elsewhere."""
        return render("parity.doctor", "diagnosis.html.jinja", diagnosis=self)

    def __rich__(self) -> RenderableType:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in ("question", "answer", "what was seen"):
            table.add_column(heading, no_wrap=heading != "what was seen")
        advice: list[RenderableType] = []
        silent: dict[str, list[str]] = {}
        for answer in self.answers:
            name, verdict = answer.detector.name, answer.finding.verdict
            if verdict in (Verdict.ABSTAIN, Verdict.BLOCKED):
                silent.setdefault(answer.finding.sentence, []).append(name)
                continue
            answered, seen = ("bold red", "") if verdict is Verdict.FAIL else ("green", "dim")
            sentence = Text(answer.finding.sentence, style=seen)
            table.add_row(name, Text(verdict, style=answered), sentence)
            if verdict is Verdict.FAIL:
                advice += [Text(name, style="bold red"), Padding(answer.advice, (0, 0, 0, 2))]
        title = Text(f"{self.name}, {self.framework}, {self.num_params:,} weights")
        notes = [f"not asked: {', '.join(names)}. {reason}" for reason, names in silent.items()]
        style = {0: "bold green", 1: "bold red"}.get(self.exit_code, "bold yellow")
        summary = Text(self.summary, style=style)
        return Group(title, table, *advice, *(Text(x, style="dim") for x in notes), summary)


def examine(
    model: LanguageModel,
    *,
    detectors: Sequence[Detector] = DETECTORS,
    stop_early: bool = True,
    progress: Callable[[str, float], None] = lambda name, fraction: None,
) -> Diagnosis:
    """Return the answers of a language model to the questions, one after the other.

    Args:
        model: under examination.
        detectors: the questions, in order.
        stop_early: leave out what an earlier failure has made meaningless.
        progress: called with the name of the question and the fraction done.
    """
    answers: list[Answer] = []
    failed: list[str] = []
    for number, detector in enumerate(detectors):
        progress(detector.name, number / len(detectors))
        blockers = [name for name in detector.after if name in failed] if stop_early else []
        if stop_early and failed[:1] == ["initial-loss"] and answers[0].finding.value is None:
            blockers = ["initial-loss"]  # its logits were no numbers
        start = time.perf_counter()
        if blockers:
            finding = Finding(Verdict.BLOCKED, f"Means nothing while {blockers[0]} fails.")
        else:
            # Dropout draws from the global generator; and every copy would be compiled anew.
            eager = torch.compiler.set_stance("force_eager")
            with eager, torch.random.fork_rng(devices=[]):
                torch.manual_seed(model.seed)
                finding = detector(model)
        if finding.verdict is Verdict.FAIL:
            failed.append(detector.name)
        answers.append(Answer(detector, finding, time.perf_counter() - start))
    return Diagnosis(model.name, model.framework, model.num_params, tuple(answers))
