"""Tells a person how far a check is: a live line on a terminal, a line per level in a log."""

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


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


@contextlib.contextmanager
def watched(console: Console, num_steps: int) -> Iterator[Callable[[Any], None]]:
    """Yields the function to call with every `Reading` of a training."""
    if not console.is_terminal:

        def log(reading: Any) -> None:
            if reading.step == 1 or reading.step % max(num_steps // 10, 1) == 0:
                console.print(
                    f"step {reading.step}/{num_steps}  {_words(reading)}", style="dim",
                    highlight=False, soft_wrap=True,
                )  # fmt: skip

        yield log
        return
    columns = SpinnerColumn(), BarColumn(bar_width=20), TextColumn("{task.description}")
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("compiling", total=num_steps)

        def show(reading: Any) -> None:
            words = f"{reading.step}/{num_steps}  {_words(reading)}"
            bar.update(task, description=words, completed=reading.step)

        yield show


def _words(reading: Any) -> str:
    """Loss, gradient norm and speed of each framework, and the gap between them."""
    sides = [
        f"{name} {loss:.4f} |g| {reading.gradient_norms[name]:.2f}"
        + (f" {reading.rates[name]:,.0f} tok/s" if reading.rates[name] else "")
        for name, loss in reading.losses.items()
    ]
    gap = [f"gap {reading.gap:.1e}"] if len(reading.losses) > 1 else []
    return "  ".join(sides + gap)


@contextlib.contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """Yields a question: has the user asked to stop? A second Ctrl-C does not wait for it."""
    came: list[int] = []

    def ask(number: int, _) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGINT, before)
