"""Runs the stages on a student's folder, one after the other, and writes down what each gave.

One line of JSON per event, so that whatever ends this process, what was known before is known:
`ready`; `begun` with a stage; `done` with the stage and its values or its error.
"""

import contextlib
import importlib
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType, ModuleType, SimpleNamespace
from typing import Any

NAMES = "cache", "model", "generate", "train"  # each may import those before it

_LONGEST = 300  # characters of an error
_LARGEST = 4_000_000  # characters of a stage's values


class OutOfTime(BaseException):
    """A stage has run too long. No Exception, so that `except Exception` does not swallow it."""


class CannotImport(Exception):
    """A file of the student's could not be imported, now or before. Says why."""


class Student:
    """A starter's files, imported when they are first asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._failures: dict[str, str] = {}
        sys.path.insert(0, str(folder))

    def __getattr__(self, name: str) -> ModuleType:
        if name not in NAMES:
            raise AttributeError(name)
        if name not in self._failures:
            try:
                return importlib.import_module(name)
            except BaseException as error:
                # Not again in every stage: an import that hangs would cost the time of each.
                sys.modules[name] = None
                said = "it does not end" if isinstance(error, OutOfTime) else None
                said = said or in_one_line(error, str(self.folder))
                self._failures[name] = f"{name}.py cannot be imported: {said}"
        raise CannotImport(self._failures[name])


def loaded(texts: Mapping[str, str]) -> SimpleNamespace:
    """A starter's files from their texts, by file name; `sys.modules` is left as it was."""
    before = {name: sys.modules.get(name) for name in NAMES}
    found = SimpleNamespace()
    try:
        for name in NAMES:
            module = ModuleType(name)
            sys.modules[name] = module
            exec(compile(texts[f"{name}.py"], f"{name}.py", "exec"), module.__dict__)
            setattr(found, name, module)
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
    return found


def main(job_file: str) -> None:
    """Does a job: see parity/exercise/sandbox.py, which writes it.

    Args:
        job_file: JSON with framework, folder, reference, stages, seconds, limits, events.
    """
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    limit(job["limits"])
    signal.signal(signal.SIGALRM, _out_of_time)
    with open(job["events"], "a", encoding="utf-8") as events:
        stages = _stages(job["framework"])
        with stages.scope():
            reference = loaded(job["reference"])
        student = Student(Path(job["folder"]))

        def emit(**event: Any) -> None:
            text = json.dumps(event)
            if len(text) > _LARGEST:
                event = {key: event[key] for key in ("event", "stage")}
                text = json.dumps(event | {"error": f"gave {len(text):,} characters of numbers"})
            events.write(f"{text}\n")
            events.flush()

        emit(event="ready")
        for stage in job["stages"]:
            emit(event="begun", stage=stage)
            with stages.scope():
                values, error = attempt(
                    lambda stage=stage: run_stage(stage, stages, student, reference),
                    job["seconds"],
                    str(student.folder),
                )
            emit(event="done", stage=stage, values=values, error=error)


def _stages(framework: str) -> ModuleType:
    """The stages of one framework, on the CPU."""
    if framework == "flax":
        import jax

        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_disable_most_optimizations", True)  # compiles twice as fast
    return importlib.import_module(f".{framework}_stages", __package__)


def run_stage(name: str, stages: ModuleType, modules: Any, reference: Any) -> dict[str, Any]:
    """What a starter gives in one stage."""
    if name in ("part_2", "symptoms"):
        module = importlib.import_module(f".{name}", __package__)
        return getattr(module, name)(stages, modules, reference)
    return getattr(stages, name.replace(" ", "_"))(modules, reference)


def attempt(
    call: Callable[[], dict[str, Any]], seconds: float, folder: str
) -> tuple[dict[str, Any] | None, str | None]:
    """What a call gave, or how it ended instead, in one line; whatever it raises."""
    try:
        with _alarm(seconds):
            return call(), None
    except OutOfTime:
        return None, f"not done after {seconds:.0f} seconds"
    except BaseException as error:
        return None, in_one_line(error, folder)


def in_one_line(error: BaseException, folder: str) -> str:
    """Where in the student's files it was raised, and what."""
    if isinstance(error, SystemExit):
        text = f"ended Python with exit code {error.code}"
    elif isinstance(error, CannotImport):
        return str(error)[:_LONGEST]
    else:
        text = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    places = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if os.path.dirname(frame.filename) == folder
    ]
    if places:
        text = f"{os.path.basename(places[-1].filename)}, line {places[-1].lineno}: {text}"
    return text[:_LONGEST]


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def _out_of_time(number: int, frame: FrameType | None) -> None:
    raise OutOfTime


def limit(limits: Mapping[str, int]) -> None:
    """Sets resource limits by their names in `resource`; what the system does not know is left."""
    for name, value in limits.items():
        with contextlib.suppress(AttributeError, ValueError, OSError):
            number = getattr(resource, name)
            _, hard = resource.getrlimit(number)
            wanted = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(number, (wanted, wanted))
