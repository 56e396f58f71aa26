"""Progress of a command: a live line on a terminal, a line per step in a log; and interrupts."""

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

# A level's name and the fraction of it that is done.
Show = Callable[[str, float], None]


@contextlib.contextmanager
def shown(console: Console, levels: Sequence[str]) -> Iterator[Show]:
    """Yield the function to call with one of `levels` and its fraction done."""
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
def interruptible(progress: Show) -> Iterator[Show]:
    """Yield `progress`, which raises KeyboardInterrupt if an interrupt came before.

    Python drops an interrupt that arrives inside a garbage collection, where jax has a callback, so
    that Ctrl-C would now and then do nothing.
    """

    def interrupt(came: list[int]) -> None:
        raise KeyboardInterrupt

    def checked(level: str, fraction: float) -> None:
        if came:
            raise KeyboardInterrupt
        progress(level, fraction)

    with _on_interrupt(interrupt) as came:
        yield checked


@contextlib.contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """Yield a function that is true once the user has asked to stop; a second Ctrl-C raises."""

    def ask(came: list[int]) -> None:
        if len(came) > 1:
            raise KeyboardInterrupt

    with _on_interrupt(ask) as came:
        yield lambda: bool(came)


@contextlib.contextmanager
def _on_interrupt(react: Callable[[list[int]], None]) -> Iterator[list[int]]:
    """Yield the interrupts so far, which every new one joins before `react` is called with them."""
    came: list[int] = []

    def interrupt(number: int, _: object) -> None:
        came.append(number)
        react(came)

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, before)
