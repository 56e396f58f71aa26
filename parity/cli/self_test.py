"""`parity self-test`: is the check as good as it says?"""

import importlib.util
import os

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from parity.cli.options import Natural, PositiveOrNone, check_outputs, in_one_line, write_output


def self_test(
    only: str | None = None,
    seeds: Natural = 50,
    jobs: PositiveOrNone = None,
    json: str | None = None,
    markdown: str | None = None,
) -> None:
    """Plant faults in the twins and in five ports, and see how the check judges each.

    Every fault must be detected, 95 % of them located at the module and step where they were
    planted, 80 % called by their cause and none by another; and clean pairs must raise no alarm. It
    takes a while: a quarter of an hour on two cores.

    Options:
        only: Faults whose title, kind or model has these words.
        seeds: Clean pairs to check.
        jobs: Processes, of about 2 GB each; one per core, up to 4.
        json: Write the outcomes to this file; - for standard output.
        markdown: Write the table to this file; - for standard output.

    Exit codes: 0 as good as that, 1 not, 2 bad input.

    Examples:
        parity self-test --markdown docs/self_test.md
        parity self-test --only encoder --seeds 0
    """
    with in_one_line(Console(stderr=True)) as errors:
        check_outputs({"--json": json, "--markdown": markdown})
        if importlib.util.find_spec("transformers") is None:
            raise ValueError(
                "self-test: no transformers. One of the ports is of its GPT-2. Install the extra "
                "'bench'."
            )
        with errors.status("loading jax and torch"):
            from parity.faults.selftest import FAULTS
            from parity.faults.selftest import self_test as run

        words = (only or "").lower()
        faults = [x for x in FAULTS if words in f"{x.title} {x.kind} {x.subject}".lower()]
        if not faults and not seeds:
            raise ValueError(f"--only {only}: no such fault. Give words of a title, kind or model.")
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        with Progress(*columns, TimeRemainingColumn(), console=errors, transient=True) as bar:
            task = bar.add_task("")

            def show(title: str, done: int, total: int) -> None:
                bar.update(task, description=title, completed=done, total=total)

            result = run(faults, seeds, jobs or min(os.cpu_count() or 1, 4), show)
        console = Console(stderr="-" in (json, markdown))
        for outcome in result.outcomes:
            good = outcome.detected and outcome.located and not outcome.misled
            console.print(
                f"[{'green' if good else 'red'}]{'seen' if outcome.detected else 'MISSED'}[/]  "
                f"{outcome.fault.subject}: {outcome.fault.title}  [dim]{outcome.report.summary}[/]",
                highlight=False,
            )
        console.print(result.summary)
        write_output(json, result.to_json)
        write_output(markdown, result.to_markdown)
    raise typer.Exit(result.exit_code)
