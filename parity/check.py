"""Climbs the levels: are these two models the same function, and if not, where do they part?"""

import time
from collections.abc import Callable, Iterable

from parity.compare import BAD, Record, Verdict
from parity.environment import Devices, choose_devices, fingerprint, pinned_precision
from parity.evidence import ModuleGaps
from parity.levels import LEVELS, logits
from parity.localize import gaps_by_module
from parity.pair import Pair
from parity.report import Divergence, Level, Report
from parity.subject import Subject

Progress = Callable[[str, float], None]


def check(
    pair: Pair,
    *,
    levels: Iterable[str] = tuple(LEVELS),
    dtypes: tuple[str, ...] = ("float64", "float32"),
    devices: Devices | None = None,
    seed: int = 0,
    steps: int = 100,
    evidence: bool = False,
    progress: Progress = lambda level, fraction: None,
) -> Report:
    """Compares a pair, level by level; a level that fails blocks those after it.

    Args:
        pair: the models, the weight map and the inputs.
        levels: names from `LEVELS`; climbed in the order of the ladder.
        dtypes: float64 first, which decides; float32 is judged by it.
        devices: where to run; the CPU when None.
        seed: of the random weights.
        steps: of the trajectory.
        evidence: keep the numbers that the plots of the report's page are made of.
        progress: called with a level's name and how far it is, from 0 to 1.

    Returns:
        A value that prints as a table and goes to JSON and to a page.

    Raises:
        ValueError: for a level that does not exist, or dtypes that do not start with float64.
    """
    wanted = set(levels)
    if unknown := wanted - set(LEVELS):
        raise ValueError(
            f"check: no level {', '.join(sorted(unknown))}. There are {', '.join(LEVELS)}."
        )
    if dtypes not in (("float64",), ("float64", "float32")):
        raise ValueError(
            f"check: dtypes {', '.join(dtypes)}. float64 is the truth that judges float32. "
            "Ask for float64, or for float64 and float32."
        )
    devices = devices or choose_devices("cpu")
    subject = Subject(pair, devices, dtypes=dtypes, seed=seed, steps=steps)
    finished: list[Level] = []
    divergence: Divergence | None = None
    with pinned_precision():
        for name, module in LEVELS.items():
            if name not in wanted:
                continue
            if any(level.verdict in BAD for level in finished):
                finished.append(Level(name, 0.0, (), blocked=True))
                continue
            subject.progress = lambda fraction, name=name: progress(name, fraction)
            subject.progress(0.0)
            level, divergence = _climb(name, module, subject)
            finished.append(level)
            if evidence and name == "logits":
                subject.evidence.modules = _module_gaps(subject, level.records)
        environment = fingerprint(devices)
    about = {
        "torch": pair.torch.name,
        "flax": pair.flax.name,
        "num_params": subject.num_params,
        "config": dict(pair.config),
    }
    seen = subject.evidence if evidence else None
    return Report(environment, about, tuple(finished), divergence, seen)


def _climb(name: str, module, subject: Subject) -> tuple[Level, Divergence | None]:
    """One level. A model that raises is an ERROR of its level, with the message kept.

    What failed before it raised is still known to differ.
    """
    start = time.perf_counter()
    records: list[Record] = []
    divergence = None
    try:
        for record in module.records(subject):
            records.append(record)
    except Exception as error:
        records.append(_error(name, error))
    if any(record.verdict is Verdict.FAIL for record in records):
        try:
            divergence = module.locate(subject, records)
        except Exception as error:
            # That they differ is known; where, is not.
            detail = f"The search for the place ended with {_error(name, error).note}."
            divergence = Divergence("an unknown place", "", 0, float("nan"), detail=detail)
    return Level(name, time.perf_counter() - start, tuple(records)), divergence


def _module_gaps(subject: Subject, records: Iterable[Record]) -> ModuleGaps:
    """On the probe that failed or the first one; what cannot be captured changes no verdict."""
    probe, bound = logits.failed_probe(subject, records), logits.float64_bound(subject)
    try:
        gaps = gaps_by_module(subject, subject.pair.probes[probe])
    except Exception as error:
        return ModuleGaps(probe, (), bound, note=_error("modules", error).note)
    return ModuleGaps(probe, tuple(gaps), bound)


def _error(name: str, error: Exception) -> Record:
    """An exception as a record, in one line."""
    first_line = str(error).strip().partition("\n")[0]
    note = f"{type(error).__name__}: {first_line}"
    return Record(name, "", "ran", None, None, 0, Verdict.ERROR, note=note)
