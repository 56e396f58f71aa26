"""Run a student's code in a process of its own, with limits, and read what it did there.

This limits accidents: endless loops, a full memory or disk, a crash, a call of `sys.exit`, a
changed global. It is no security boundary. The code runs as the same user on the same files and
network, could find the parent process, and could even forge its own results. Grade strangers' code
inside a container or a virtual machine.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from parity.exercise import inside
from parity.exercise.inside.probes import Values

STAGE_SECONDS = 60.0  # the slowest right stage, part 2 in Flax, takes ten on a slow core
START_SECONDS = 120.0  # to load a framework from a cold disk
_GRACE = 5.0  # after which code that does not heed its alarm is killed
_GIB = 1 << 30

# Address space, not memory: both frameworks reserve far more than they use, some of it per core.
LIMITS = {
    "RLIMIT_AS": 16 * _GIB + (os.cpu_count() or 1) * _GIB // 4,
    "RLIMIT_CPU": 600,
    "RLIMIT_FSIZE": 64 << 20,
    "RLIMIT_NOFILE": 256,
    "RLIMIT_CORE": 0,
}
_KEPT = "PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "SYSTEMROOT", "XLA_FLAGS"
_LARGEST_FILE = 1 << 20  # of a student's files; larger ones are left behind
_LARGEST_RESULT = 64 << 20


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of one stage.

    Attributes:
        values: plain numbers by name; None when it did not come to an end.
        error: how it ended then, in one line.
    """

    values: Values | None
    error: str | None = None


def observe(
    folder: Path,
    framework: str,
    reference: Mapping[str, str],
    stages: Sequence[str],
    stage_seconds: float = STAGE_SECONDS,
) -> dict[str, Outcome]:
    """Run stages on a copy of a student's folder.

    Args:
        folder: with the student's files; only Python files of its top level are copied.
        framework: flax or torch.
        reference: the right starter's files, by name.
        stages: names that parity/exercise/inside knows.
        stage_seconds: that one stage may take.

    Returns:
        An outcome for every stage: a stage that kills its process costs the others nothing.

    Raises:
        ValueError: the sandbox itself does not start.
    """
    found: dict[str, Outcome] = {}
    with workspace(folder) as (place, (copy,)):
        while missing := [stage for stage in stages if stage not in found]:
            events = place / "events.jsonl"
            events.unlink(missing_ok=True)
            job = {
                "framework": framework,
                "folder": str(copy),
                "reference": dict(reference),
                "stages": missing,
                "seconds": stage_seconds,
                "limits": LIMITS,
                "events": str(events),
            }
            (place / "job.json").write_text(json.dumps(job), encoding="utf-8")
            code = _driver_code(place / "job.json")
            ending = run(code, place, stage_seconds + _GRACE, events)
            begun = None
            for event in _read_events(events):
                if event["event"] == "begun":
                    begun = event["stage"]
                elif event["event"] == "done":
                    found[event["stage"]] = Outcome(event.get("values"), event.get("error"))
            if begun is None:  # no code of the student's has run yet
                raise ValueError(
                    f"grade: the sandbox could not start: {ending}. It needs {framework} and the "
                    f"Python that runs this, {sys.executable}. Try `python -I -c 'import "
                    f"{framework}'` with it."
                )
            if begun not in found:
                found[begun] = Outcome(None, ending)
    return {stage: found[stage] for stage in stages}


@contextlib.contextmanager
def workspace(*folders: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Make a temporary folder with copies of the Python files of students' folders."""
    with tempfile.TemporaryDirectory(prefix="exercise-") as name:
        place = Path(name).resolve()
        copies = [place / f"starter_{number}" for number in range(len(folders))]
        for folder, copy in zip(folders, copies, strict=True):
            copy.mkdir()
            for source in sorted(folder.glob("*.py")):
                if source.is_file() and source.stat().st_size <= _LARGEST_FILE:
                    shutil.copyfile(source, copy / source.name)
        yield place, copies


def _driver_code(job: Path) -> str:
    """Return code that loads `inside` as a package of its own, without the rest of parity."""
    folder = Path(inside.__file__).parent
    return (
        "import importlib.util as util, sys\n"
        f"spec = util.spec_from_file_location('inside', {str(folder / '__init__.py')!r}, "
        f"submodule_search_locations=[{str(folder)!r}])\n"
        "sys.modules['inside'] = util.module_from_spec(spec)\n"
        "spec.loader.exec_module(sys.modules['inside'])\n"
        "from inside.driver import main\n"
        f"main({str(job)!r})\n"
    )


def run(code: str, place: Path, patience: float, events: Path | None = None) -> str:
    """Run code in a process of its own until its end, or until it has been silent for too long.

    The code sets its own resource limits, by `inside.driver.limit`.

    Args:
        code: Python.
        place: where it runs, and where its output goes.
        patience: seconds that it may take; with events, between two of them.
        events: a file that grows as the code gets on.

    Returns:
        How it ended, in one line; "" for well.
    """
    environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
    environment |= {
        "HOME": str(place),
        "TMPDIR": str(place),
        "CUDA_VISIBLE_DEVICES": "",
        "JAX_PLATFORMS": "cpu",
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "4",
    }
    with open(place / "output.txt", "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-c", code],
            cwd=place,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        size, since = 0, time.monotonic()
        while process.poll() is None:
            now = events.stat().st_size if events is not None and events.exists() else 0
            if now != size:
                size, since = now, time.monotonic()
            waited = time.monotonic() - since
            if waited > (patience if size or events is None else START_SECONDS):
                return f"not done after {waited:.0f} seconds, and killed"
            time.sleep(0.02)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # and whatever it has started
        process.wait()
    if process.returncode == 0:
        return ""
    if process.returncode < 0:
        return f"the process was ended by {signal.Signals(-process.returncode).name}"
    lines = (place / "output.txt").read_bytes()[-2000:].decode("utf-8", "replace").split("\n")
    said = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f"the process ended with exit code {process.returncode}: {said[:300]}".rstrip(": ")


def _read_events(path: Path) -> Iterator[Values]:
    """Yield the events of complete lines."""
    if not path.exists() or path.stat().st_size > _LARGEST_RESULT:
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict) and event.get("event") in ("ready", "begun", "done"):
                yield event
