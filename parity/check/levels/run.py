"""Running levels in their order: a failure blocks those after it, and an exception is a record."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from parity.check.session import Session
from parity.frameworks.protocols import NotCompared, Runner
from parity.report import Divergence, Level
from parity.report.record import BAD, Record, Verdict, abstain, error

# The levels that need what an earlier one found; a failure of that blocks all after it.
_NEEDED_BY = {
    "weights": ("logits", "gradients", "optimizer", "trajectory", "cache", "tokens"),
    "logits": ("gradients", "optimizer", "trajectory", "cache", "tokens"),
    "gradients": ("optimizer", "trajectory"),
    "cache": ("tokens",),
}

AnySession = TypeVar("AnySession", bound=Session[Runner, Runner])
Progress = Callable[[str, float], None]
Compare = Callable[[AnySession], Iterable[Record]]
Locate = Callable[[AnySession, list[Record]], Divergence | None]


def run_levels(
    levels: Mapping[str, tuple[Compare[AnySession], Locate[AnySession]]],
    session: AnySession,
    progress: Progress,
    on_level: Callable[[Level], None] = lambda level: None,
) -> tuple[tuple[Level, ...], Divergence | None]:
    """Run all levels; one that fails blocks those after it, an error those that need the level.

    Args:
        levels: by name, the functions that compare and that locate a failure.
        session: the models under test.
        progress: called with a level's name and the share of it that is done, from 0 to 1.
        on_level: called after each level that was not blocked.

    Returns:
        The levels, and where the models diverge if they do.
    """
    finished: list[Level] = []
    divergence: Divergence | None = None
    for name, (compare, locate) in levels.items():
        if any(_blocks(level, name) for level in finished):
            finished.append(Level(name, 0.0, (), blocked=True))
            continue
        session.progress = lambda fraction, name=name: progress(name, fraction)
        session.progress(0.0)
        level, divergence = _level(name, compare, locate, session)
        session.release()
        finished.append(level)
        on_level(level)
    return tuple(finished), divergence


def _blocks(level: Level, later: str) -> bool:
    failed, erred = level.verdict is Verdict.FAIL, level.verdict in BAD or level.blocked
    return failed or (erred and later in _NEEDED_BY.get(level.name, ()))


def _level(
    name: str, compare: Compare[AnySession], locate: Locate[AnySession], session: AnySession
) -> tuple[Level, Divergence | None]:
    """Run one level; a model that raises is an ERROR of its level, with the message kept."""
    start = time.perf_counter()
    records: list[Record] = []
    divergence = None
    try:
        for record in compare(session):  # what failed before it raised is still known to differ
            records.append(record)
    except NotCompared as reason:
        records.append(abstain(name, str(reason)))
    except Exception as exception:
        records.append(error(name, exception))
    if any(record.verdict is Verdict.FAIL for record in records):
        try:
            divergence = locate(session, records)
        except Exception as exception:
            # That they differ is known; where, is not.
            detail = f"The search for the place ended with {error(name, exception).note}."
            divergence = Divergence("an unknown place", "", 0, float("nan"), detail=detail)
    return Level(name, time.perf_counter() - start, tuple(records)), divergence
