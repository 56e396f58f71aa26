"""The progress of a training: a live line on a terminal, ten lines in a log."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from parity.training.loop import Reading


@contextlib.contextmanager
def watched(console: Console, num_steps: int) -> Iterator[Callable[[Reading], None]]:
    """Yield the function to call with every step of a training."""
    if not console.is_terminal:

        def log(reading: Reading) -> None:
            if reading.step == 1 or reading.step % max(num_steps // 10, 1) == 0:
                line = f"step {reading.step}/{num_steps}  {_numbers(reading)}"
                console.print(line, style="dim", highlight=False, soft_wrap=True)

        yield log
        return
    columns = SpinnerColumn(), BarColumn(bar_width=20), TextColumn("{task.description}")
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("compiling", total=num_steps)

        def show(reading: Reading) -> None:
            line = f"{reading.step}/{num_steps}  {_numbers(reading)}"
            bar.update(task, description=line, completed=reading.step)

        yield show


def _numbers(reading: Reading) -> str:
    """Format loss, gradient norm and speed of each framework, and the gap between them."""
    sides = [
        f"{name} {loss:.4f} |g| {reading.gradient_norms[name]:.2f}"
        + (f" {reading.rates[name]:,.0f} tok/s" if reading.rates[name] else "")
        for name, loss in reading.losses.items()
    ]
    gap = [f"gap {reading.gap:.1e}"] if len(reading.losses) > 1 else []
    return "  ".join(sides + gap)
