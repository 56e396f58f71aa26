"""Tells a person how far a check is: a live line on a terminal, a line per level in a log."""

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


@contextlib.contextmanager
def shown(console: Console, levels: Sequence[str]) -> Iterator[Callable[[str, float], None]]:
    """Yields the function to call with the name of one of `levels` and its fraction done."""
    names = [f"{level} ({number} of {len(levels)})" for number, level in enumerate(levels, 1)]
    labels = dict(zip(levels, names, strict=True))
    if not console.is_terminal:
        started: set[str] = set()

        def log(level: str, fraction: float) -> None:
            if level not in started:
                started.add(level)
                console.print(f"{labels[level]} ...", style="dim")

        yield log
        return
    columns = SpinnerColumn(), TextColumn("{task.description:20}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=1.0)

        def show(level: str, fraction: float) -> None:
            bar.update(task, description=labels[level], completed=fraction)

        yield show


@contextlib.contextmanager
def interruptible(progress: Callable[[str, float], None]) -> Iterator[Callable[[str, float], None]]:
    """Yields `progress`, which raises KeyboardInterrupt if an interrupt came since.

    Python drops an interrupt that arrives inside a garbage collection, where jax has a callback, so
    that Ctrl-C would now and then do nothing.
    """
    came: list[int] = []

    def interrupt(number: int, _) -> None:
        came.append(number)
        raise KeyboardInterrupt

    def checked(level: str, fraction: float) -> None:
        if came:
            raise KeyboardInterrupt
        progress(level, fraction)

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield checked
    finally:
        signal.signal(signal.SIGINT, before)
