"""The levels of a check in their order, whatever happens on the way."""

import time
from collections.abc import Callable, Iterable, Mapping

from parity.check.session import Session
from parity.report import Divergence, Level
from parity.report.record import BAD, Record, Verdict

Progress = Callable[[str, float], None]
Compare = Callable[[Session], Iterable[Record]]
Locate = Callable[[Session, list[Record]], Divergence | None]


def run_levels(
    rungs: Mapping[str, tuple[Compare, Locate]],
    session: Session,
    progress: Progress,
    done: Callable[[Level], None] = lambda level: None,
) -> tuple[tuple[Level, ...], Divergence | None]:
    """All levels; one that fails blocks those after it.

    Args:
        rungs: by name, what gives a level's records and what says after a failure where the models
            part.
        session: what is under test.
        progress: called with a level's name and how far it is, from 0 to 1.
        done: called after each level that was not blocked.

    Returns:
        The levels, and where the models part if they do.
    """
    finished: list[Level] = []
    divergence: Divergence | None = None
    for name, (compare, locate) in rungs.items():
        if any(level.verdict in BAD for level in finished):
            finished.append(Level(name, 0.0, (), blocked=True))
            continue
        session.progress = lambda fraction, name=name: progress(name, fraction)
        session.progress(0.0)
        level, divergence = _level(name, compare, locate, session)
        session.release()
        finished.append(level)
        done(level)
    return tuple(finished), divergence


def _level(
    name: str, compare: Compare, locate: Locate, session: Session
) -> tuple[Level, Divergence | None]:
    """One level. A model that raises is an ERROR of its level, with the message kept.

    What failed before it raised is still known to differ.
    """
    start = time.perf_counter()
    records: list[Record] = []
    divergence = None
    try:
        for record in compare(session):
            records.append(record)
    except Exception as error:
        records.append(error_record(name, error))
    if any(record.verdict is Verdict.FAIL for record in records):
        try:
            divergence = locate(session, records)
        except Exception as error:
            # That they differ is known; where, is not.
            detail = f"The search for the place ended with {error_record(name, error).note}."
            divergence = Divergence("an unknown place", "", 0, float("nan"), detail=detail)
    return Level(name, time.perf_counter() - start, tuple(records)), divergence


def error_record(name: str, error: Exception) -> Record:
    """An exception as a record, in one line."""
    first_line = str(error).strip().partition("\n")[0]
    note = f"{type(error).__name__}: {first_line}"
    return Record(name, "", "ran", None, None, 0, Verdict.ERROR, note=note)
