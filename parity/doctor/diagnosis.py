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

_COLOURS = {
    Verdict.PASS: "green",
    Verdict.ABSTAIN: "yellow",
    Verdict.BLOCKED: "dim",
    Verdict.FAIL: "bold red",
}


@dataclasses.dataclass(frozen=True)
class Answer:
    """One detector, what it found, and the seconds it took."""

    detector: Detector
    finding: Finding
    seconds: float


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
        """Return 0 if nothing wrong was seen, 1 if something was, 2 if nothing could be asked."""
        if self.fired:
            return 1
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
                {
                    "detector": x.detector.name,
                    "verdict": x.finding.verdict,
                    "sentence": x.finding.sentence,
                    "value": x.finding.value,
                    "bound": x.finding.bound,
                    "seconds": round(x.seconds, 3),
                }
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
        silent: dict[str, list[str]] = {}
        for answer in self.answers:
            verdict = answer.finding.verdict
            if verdict in (Verdict.ABSTAIN, Verdict.BLOCKED):
                silent.setdefault(answer.finding.sentence, []).append(answer.detector.name)
                continue
            table.add_row(
                answer.detector.name,
                Text(verdict, style=_COLOURS[verdict]),
                Text(answer.finding.sentence, style="" if verdict is Verdict.FAIL else "dim"),
            )
        parts: list[RenderableType] = [
            Text(f"{self.name}, {self.framework}, {self.num_params:,} weights"),
            table,
        ]
        for answer in self.answers:
            if answer.finding.verdict is Verdict.FAIL:
                parts += _advice(answer)
        for reason, names in silent.items():
            parts.append(Text(f"not asked: {', '.join(names)}. {reason}", style="dim"))
        style = {0: "bold green", 1: "bold red"}.get(self.exit_code, "bold yellow")
        parts.append(Text(self.summary, style=style))
        return Group(*parts)


def _advice(answer: Answer) -> list[RenderableType]:
    """Render what was found, why it matters and what to try."""
    lines = (answer.finding.sentence, answer.detector.matters, answer.detector.remedy)
    words = "seen", "why it matters", "try next"
    body = Text()
    for word, line in zip(words, lines, strict=True):
        body.append(f"{word}: ", style="bold")
        body.append(f"{line}\n")
    return [Text(answer.detector.name, style="bold red"), Padding(body, (0, 0, 0, 2))]


def examine(
    model: LanguageModel,
    *,
    detectors: Sequence[Detector] = DETECTORS,
    stop_early: bool = True,
    progress: Callable[[str, float], None] = lambda name, fraction: None,
) -> Diagnosis:
    """Ask a language model the questions, one after the other.

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
            with torch.random.fork_rng(devices=[]):  # dropout draws from the global generator
                torch.manual_seed(model.seed)
                finding = detector(model)
        if finding.verdict is Verdict.FAIL:
            failed.append(detector.name)
        answers.append(Answer(detector, finding, time.perf_counter() - start))
    return Diagnosis(model.name, model.framework, model.num_params, tuple(answers))
