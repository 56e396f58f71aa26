"""`parity bugs`: break a transformer on purpose, see what that looks like and what finds it."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group
from rich.padding import Padding
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from parity.cli.bugs_exercise import exercise, grade
from parity.cli.options import (
    Data,
    check_data,
    check_outputs,
    frameworks,
    in_one_line,
    unwrapped,
    write_output,
)

bugs = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    help="Break a transformer on purpose: what it looks like, and what finds it.",
)

Ids = Annotated[list[str] | None, typer.Argument(help="Bugs by id; all of them for none.")]


def list_bugs(
    category: Annotated[
        str | None, typer.Option(help="Only this part of the program, such as masks.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """List the bugs: id, what one sees, where it was seen in the wild.

    Examples:

    parity bugs list

    parity bugs list --category masks
    """
    errors = Console(stderr=True)
    with in_one_line(errors):
        from parity.faults import GALLERY

        if category is not None and category not in GALLERY:
            raise ValueError(f"--category {category}: there are {', '.join(GALLERY)}.")
        chosen = {name: found for name, found in GALLERY.items() if category in (None, name)}
        if json:
            import json as encoder

            rows = [
                dict(id=bug.id, category=name, title=bug.title, symptom=bug.symptom,
                     seen=bug.seen, frameworks=bug.frameworks, caught_by=bug.caught_by)
                for name, found in chosen.items() for bug in found
            ]  # fmt: skip
            typer.echo(encoder.dumps(rows, indent=2))
            return
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for heading in ("id", "what one sees", "seen in the wild"):
            table.add_column(heading, no_wrap=heading == "id")
        for name, found in chosen.items():
            table.add_row(Text(name, style="bold"), "", "")
            for bug in found:
                table.add_row(f"  {bug.id}", bug.symptom, Text(bug.seen, style="dim"))
        Console().print(table)


def show(
    ids: Annotated[list[str], typer.Argument(help="Bugs by id.")],
    framework: Annotated[
        str | None, typer.Option(help="The lines of one twin alone: flax or torch.")
    ] = None,
) -> None:
    """Show a bug: its lines, wrong and right, why it is wrong, what one sees, what finds it.

    Examples:

    parity bugs show no-shift

    parity bugs show offset-zero mask-zero --framework torch
    """
    errors = Console(stderr=True)
    with in_one_line(errors):
        chosen = frameworks(framework)
        with errors.status("loading"):
            from parity.doctor import DETECTORS
            from parity.faults import GALLERY, find

        asks = {detector.name: detector.asks for detector in DETECTORS}
        for bug in find(ids):
            category = next(name for name, found in GALLERY.items() if bug in found)
            parts = [
                Text.assemble((bug.id, "bold red"), f"  {bug.title}  ", (category, "dim")),
                Text(""),
                Text.assemble(("what one sees  ", "bold"), bug.symptom),
                Text.assemble(("why  ", "bold"), bug.why),
                Text.assemble(("seen  ", "bold"), bug.seen),
            ]
            parts.append(Text("what finds it", style="bold"))
            for name in bug.caught_by:
                parts.append(Padding(Text.assemble((name, "green"), f"  {asks[name]}"), (0, 2)))
            for name in chosen:
                parts += [Text(""), Text(f"{name}_gpt", style="bold")]
                if bug.edits(name):
                    parts.append(Syntax(bug.diff(name), "diff", background_color="default"))
                else:
                    parts.append(Text(bug.absent))
            Console().print(Group(*parts, Text("")))


def run(
    ids: Annotated[
        list[str] | None, typer.Argument(help="Bugs by id; the exercise's four for none.")
    ] = None,
    framework: Annotated[str, typer.Option(help="flax or torch.")] = "torch",
    steps: Annotated[int, typer.Option(min=20, help="Training steps of each model.")] = 300,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights, batches and text.")] = 0,
    data: Data = None,
    plot: Annotated[bool, typer.Option("--plot", help="Draw the curves, to --out.")] = False,
    out: Annotated[str, typer.Option(help="The picture that --plot draws.")] = "bugs.png",
) -> None:
    """Train a healthy model and broken ones side by side, and show what each learned.

    Loss on the batch as the model's own loss tells it, loss on text held out as a trusted loss
    tells it, how far the cache drifts from reading at once, what it writes, and which detectors
    fire. Without ids: the four of the exercise this project comes from.

    Examples:

    parity bugs run --plot

    parity bugs run no-shift double-shift shift-backwards --plot --out alignment.png

    parity bugs run offset-zero --framework flax --steps 100
    """
    errors = Console(stderr=True)
    with in_one_line(errors):
        check_data(data)
        (framework,) = frameworks(framework)
        if plot:
            check_outputs({"--out": out})
        classic = ("no-shift", "position-std-one", "mask-missing", "residual-from-norm")
        with errors.status("loading jax and torch"):
            from parity.faults import find
            from parity.faults.compare_training import compare_training, draw
            from parity.pair.text import Corpus
            from parity.system.progress import interruptible, shown

            chosen = list(find(ids or classic))
            corpus = Corpus.load(data)
        if cannot := [bug for bug in chosen if not bug.edits(framework)]:
            raise ValueError(f"--framework {framework}: {cannot[0].id}: {cannot[0].absent}")
        names = ["healthy", *(bug.id for bug in chosen)]
        with shown(errors, names) as show, interruptible(show) as progress:
            found = compare_training(
                corpus, chosen, framework, steps=steps, seed=seed, progress=progress
            )
        Console().print(found)
        if plot:
            draw(found, Path(out))
            errors.print(f"drawn to {out}", style="dim", highlight=False)


def matrix(
    ids: Ids = None,
    framework: Annotated[
        str | None, typer.Option(help="One twin alone: flax or torch. Default: both.")
    ] = None,
    healthy: Annotated[int, typer.Option(min=0, help="Healthy models among the broken.")] = 20,
    json: Annotated[
        str | None, typer.Option(help="Write every answer to this file; - for standard output.")
    ] = None,
    markdown: Annotated[str | None, typer.Option(help="Write tables to this file.")] = None,
    png: Annotated[str | None, typer.Option(help="Draw the matrix to this file.")] = None,
) -> None:
    """Plant every bug in both twins and put every question to each; healthy models among them.

    Exit codes: 0 every bug seen and no false alarm, 1 not so, 2 bad input. All of it takes half an
    hour, nearly all in flax, which runs operation by operation; torch alone takes three minutes.

    Examples:

    parity bugs matrix --framework torch

    parity bugs matrix mask-missing mask-zero --healthy 0

    parity bugs matrix --markdown matrix.md --png matrix.png --json matrix.json
    """
    errors = Console(stderr=True)
    with in_one_line(errors):
        check_outputs({"--json": json, "--markdown": markdown, "--png": png})
        chosen = frameworks(framework)
        with errors.status("loading jax and torch"):
            from parity.faults import find
            from parity.faults.matrix import draw, measure
            from parity.system.progress import interruptible, shown

        chosen_bugs = list(find(ids or ()))
        with shown(errors, chosen) as show, interruptible(show) as progress:
            found = measure(chosen_bugs, chosen, range(healthy), progress)
        Console(stderr=json == "-").print(found)
        write_output(json, found.to_json)
        write_output(markdown, lambda: found.to_markdown() + "\n")
        if png is not None:
            draw(found, Path(png))
    raise typer.Exit(found.exit_code)


bugs.command("list", help=unwrapped(list_bugs))(list_bugs)
for command in (show, run, matrix, exercise, grade):
    bugs.command(help=unwrapped(command))(command)
