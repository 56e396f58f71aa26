"""Run the stages on a student's folder, one after the other, and record what each returned.

One line of JSON per event, so that what was known before is kept, whatever ends this process:
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
from types import FrameType, ModuleType

from .probes import Starter, Values
from .stages import run_stage

NAMES = "cache", "model", "generate", "train"  # each may import those before it

_LONGEST = 300  # characters of an error
_LARGEST = 4_000_000  # characters of a stage's values


class OutOfTime(BaseException):
    """A stage ran too long. Not an Exception, so that `except Exception` does not swallow it."""


class CannotImport(Exception):
    """A file of the student cannot be imported, for the reason given."""


class Student(Starter):
    """A starter's files, imported at their first use."""

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
                # Not again in every stage: an import that hangs would cost the time of each. None
                # is Python's "not to be imported", which its stubs do not know.
                sys.modules[name] = None  # pyrefly: ignore[unsupported-operation]
                said = "it does not end" if isinstance(error, OutOfTime) else None
                said = said or in_one_line(error, str(self.folder))
                self._failures[name] = f"{name}.py cannot be imported: {said}"
        raise CannotImport(self._failures[name])


def loaded(texts: Mapping[str, str]) -> Starter:
    """Load a starter's files from their texts by file name; `sys.modules` is left as it was."""
    before = {name: sys.modules.get(name) for name in NAMES}
    found: dict[str, ModuleType] = {}
    try:
        for name in NAMES:
            module = found[name] = sys.modules[name] = ModuleType(name)
            exec(compile(texts[f"{name}.py"], f"{name}.py", "exec"), module.__dict__)
    finally:
        for name, earlier in before.items():
            sys.modules.pop(name, None)
            if earlier is not None:
                sys.modules[name] = earlier
    return Starter(**found)


def main(job_file: str) -> None:
    """Do a job that parity/exercise/sandbox.py has written.

    Args:
        job_file: JSON with framework, folder, reference, stages, seconds, limits, events.
    """
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    limit(job["limits"])
    signal.signal(signal.SIGALRM, _out_of_time)
    with open(job["events"], "a", encoding="utf-8") as events:
        framework = _framework(job["framework"])
        with framework.scope():
            reference = loaded(job["reference"])
        student = Student(Path(job["folder"]))

        def emit(**event: object) -> None:
            text = json.dumps(event)
            if len(text) > _LARGEST:
                event = {key: event[key] for key in ("event", "stage")}
                text = json.dumps(event | {"error": f"gave {len(text):,} characters of numbers"})
            events.write(f"{text}\n")
            events.flush()

        emit(event="ready")
        for stage in job["stages"]:
            emit(event="begun", stage=stage)
            with framework.scope():
                values, error = attempt(
                    lambda stage=stage: run_stage(stage, framework, student, reference),
                    job["seconds"],
                    str(student.folder),
                )
            emit(event="done", stage=stage, values=values, error=error)


def _framework(name: str) -> ModuleType:
    """Import the module of one framework, on the CPU."""
    if name == "flax":
        import jax

        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_disable_most_optimizations", True)  # compiles twice as fast
    return importlib.import_module(f".in_{name}", __package__)


def attempt(
    call: Callable[[], Values], seconds: float, folder: str
) -> tuple[Values | None, str | None]:
    """Return what a call returns, or how it ended instead, in one line."""
    try:
        with _alarm(seconds):
            return call(), None
    except OutOfTime:
        return None, f"not done after {seconds:.0f} seconds"
    except BaseException as error:
        return None, in_one_line(error, folder)


def in_one_line(error: BaseException, folder: str) -> str:
    """Describe an exception, and where in the student's files it was raised."""
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
    """Set resource limits by their names in `resource`, as far as the system has them."""
    for name, value in limits.items():
        with contextlib.suppress(AttributeError, ValueError, OSError):
            number = getattr(resource, name)
            _, hard = resource.getrlimit(number)
            wanted = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(number, (wanted, wanted))
