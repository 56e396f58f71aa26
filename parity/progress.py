"""Tells a person how far a check is: a live line on a terminal, a line per level in a log."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


@contextlib.contextmanager
def shown(console: Console) -> Iterator[Callable[[str, float], None]]:
    """Yields the function to call with a level's name and its fraction done."""
    if not console.is_terminal:
        started: set[str] = set()

        def log(level: str, fraction: float) -> None:
            if level not in started:
                started.add(level)
                console.print(f"{level} ...", style="dim")

        yield log
        return
    columns = SpinnerColumn(), TextColumn("{task.description:10}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=1.0)

        def show(level: str, fraction: float) -> None:
            bar.update(task, description=level, completed=fraction)

        yield show
