"""The detectors: a function for each question, and the questions' texts as data."""

import tomllib
import typing
from importlib import resources

from parity.doctor.detectors import decoding, forward, learning, reference
from parity.doctor.finding import Detector


def _load() -> tuple[Detector, ...]:
    """Read the questions, each with its function and the protocol that its function asks for."""
    functions = vars(forward) | vars(learning) | vars(decoding) | vars(reference)
    text = (resources.files(__name__) / "questions.toml").read_text(encoding="utf-8")
    detectors = []
    for question in tomllib.loads(text)["question"]:
        function = functions[question["name"].replace("-", "_")]
        needs = typing.get_type_hints(function)["model"]
        after = tuple(question.pop("after", ()))
        detectors.append(Detector(examine=function, needs=needs, after=after, **question))
    return tuple(detectors)


DETECTORS = _load()
