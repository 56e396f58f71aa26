"""`parity bugs exercise` and `parity bugs grade`: a GPT with bugs to find, and its grader."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from parity.cli.options import check_outputs, in_one_line, write_output

if TYPE_CHECKING:
    from parity.exercise import Grade
    from parity.report import Report


def exercise(
    folder: Annotated[Path, typer.Argument(help="A new or empty folder for the starter.")],
    framework: Annotated[str, typer.Option(help="flax or torch.")] = "torch",
    level: Annotated[
        int,
        typer.Option(
            help="How many bugs, 1 to 8. The first four are the interview's: labels, positions, "
            "mask, a silent typo; then the training loop, generation, and more of both kinds."
        ),
    ] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Of the choice of bugs.")] = 0,
) -> None:
    """Write a small GPT with bugs in it, to find and to fix.

    The folder stands alone: a model, a training loop that learns one sentence by heart, a loop that
    generates, a KV cache to be built in afterwards, tests that run, and the task. The same level
    and seed plant the same bugs in both frameworks.

    Exit codes: 0 written, 2 usage error.

    Examples:

    parity bugs exercise todo --level 4 --seed 7

    parity bugs exercise todo-flax --framework flax --level 4 --seed 7
    """
    errors = Console(stderr=True)
    with in_one_line(errors):
        from parity.exercise import write_starter

        write_starter(folder, framework, level, seed)
        typer.echo(f"{folder}: begin with its README.md, end with: parity bugs grade {folder}")


def grade(
    folders: Annotated[
        list[Path], typer.Argument(help="A folder that `parity bugs exercise` wrote, or one each.")
    ],
    hint: Annotated[
        int,
        typer.Option("--hint", count=True, help="A hint for each open bug; again for a clearer."),
    ] = 0,
    json: Annotated[
        str | None, typer.Option(help="Write the grades to this file; - for standard output.")
    ] = None,
) -> None:
    """Say which bugs of an exercise are fixed, which are open, and what was broken.

    It runs the code in a process with limits, which is no protection against malice, and compares
    numbers, part by part: any way to write a right solution is right. With a Flax folder and a
    PyTorch folder, both without bugs, it goes on to prove that the two are one function: weights,
    logits, gradients and the loss curve in float64, and cache and tokens where both have part 2.

    Exit codes: 0 no open bug, 1 open bugs or something broken, 2 usage error.

    Examples:

    parity bugs grade todo

    parity bugs grade todo --hint --hint

    parity bugs grade todo-flax todo --json grades.json
    """
    errors = Console(stderr=True)
    with in_one_line(errors):
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
        _show(Console(stderr=json == "-"), grades, report, hint, len(folders) == 2)
        write_output(json, lambda: _document(grades, report))
        code = max(found.exit_code for found in grades)
    raise typer.Exit(max(code, min(report.exit_code, 1)) if report else code)


def _show(
    console: Console, grades: "list[Grade]", report: "Report | None", hint: int, two: bool
) -> None:
    for found in grades:
        console.print(found)
        for line in found.hints(hint):
            console.print(line, markup=False, highlight=False, style="cyan")
    if report is not None:
        console.print(report)
    elif two:
        console.print("Whether the two are one function is asked when both are without bugs.")


def _document(grades: "list[Grade]", report: "Report | None") -> str:
    """Return the grades, and the report where there is one, as one document."""
    import json

    document = {
        "schema": 1,
        "grades": [json.loads(found.to_json()) for found in grades],
        "proof": json.loads(report.to_json()) if report is not None else None,
    }
    return json.dumps(document, indent=1) + "\n"
