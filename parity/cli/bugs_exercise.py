"""`parity bugs exercise` and `parity bugs grade`: a GPT with bugs to find, and its grader."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from parity.cli.options import Natural, check_outputs, in_one_line, write_output

if TYPE_CHECKING:
    from parity.exercise import Grade
    from parity.report import Report


def exercise(folder: Path, framework: str = "torch", level: int = 4, seed: Natural = 0) -> None:
    """Write a small GPT with bugs in it, to find and to fix.

    The folder stands alone: a model, a training loop that learns one sentence by heart, a loop that
    generates, a KV cache to be built in afterwards, tests that run, and the task. The same level
    and seed plant the same bugs in both frameworks.

    Options:
        folder: A new or empty folder for the starter.
        framework: flax or torch.
        level: How many bugs, 1 to 8. The first four are the interview's: labels, positions, mask,
            a silent typo; then the training loop, generation, and more of both kinds.
        seed: Of the choice of bugs.

    Exit codes: 0 written, 2 usage error.

    Examples:
        parity bugs exercise todo --level 4 --seed 7
        parity bugs exercise todo-flax --framework flax --level 4 --seed 7
    """
    with in_one_line(Console(stderr=True)):
        from parity.exercise import write_starter

        write_starter(folder, framework, level, seed)
        typer.echo(f"{folder}: begin with its README.md, end with: parity bugs grade {folder}")


def grade(
    folders: list[Path],
    hint: Annotated[int, typer.Option("--hint", count=True)] = 0,
    json: str | None = None,
) -> None:
    """Say which bugs of an exercise are fixed, which are open, and what was broken.

    It runs the code in a process with limits, which is no protection against malice, and compares
    numbers, part by part: any way to write a right solution is right. With a Flax folder and a
    PyTorch folder, both without bugs, it goes on to prove that the two are one function: weights,
    logits, gradients and the loss curve in float64, and cache and tokens where both have part 2.

    Options:
        folders: A folder that `parity bugs exercise` wrote, or one each.
        hint: A hint for each open bug; again for a clearer.
        json: Write the grades to this file; - for standard output.

    Exit codes: 0 no open bug, 1 open bugs or something broken, 2 usage error.

    Examples:
        parity bugs grade todo
        parity bugs grade todo --hint --hint
        parity bugs grade todo-flax todo --json grades.json
    """
    with in_one_line(Console(stderr=True)) as errors:
        check_outputs({"--json": json})
        if len(folders) > 2:
            raise ValueError(f"grade: {len(folders)} folders. One is graded, two are compared.")
        with errors.status("loading"):
            from parity.exercise import check_two, grade, prove

            by_framework = check_two(folders)
        grades = []
        for folder in folders:
            with errors.status(f"running {folder}"):
                grades.append(grade(folder))
        report = None
        if len(folders) == 2 and all(found.exit_code == 0 for found in grades):
            with errors.status("proving that the two are one function"):
                report = prove(by_framework["flax"], by_framework["torch"])
        console = Console(stderr=json == "-")
        for found in grades:
            console.print(found)
            for line in found.hints(hint):
                console.print(line, markup=False, highlight=False, style="cyan")
        if report is not None:
            console.print(report)
        elif len(folders) == 2:
            console.print("Whether the two are one function is asked when both are without bugs.")
        write_output(json, lambda: _document(grades, report))
        code = max(found.exit_code for found in grades)
    raise typer.Exit(max(code, min(report.exit_code, 1)) if report else code)


def _document(grades: "list[Grade]", report: "Report | None") -> str:
    """Return the grades, and the report where there is one, as one document."""
    import json

    document = {
        "schema": 1,
        "grades": [json.loads(found.to_json()) for found in grades],
        "proof": json.loads(report.to_json()) if report is not None else None,
    }
    return json.dumps(document, indent=1) + "\n"
