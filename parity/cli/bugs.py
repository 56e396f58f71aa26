"""`parity bugs`: break a transformer on purpose, see what that looks like and what finds it."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from parity.cli.bugs_exercise import exercise, grade
from parity.cli.options import (
    Data,
    Natural,
    check_data,
    check_outputs,
    frameworks,
    in_one_line,
    register,
    write_output,
)
from parity.system.progress import interruptible, shown

bugs = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    help="Break a transformer on purpose: what it looks like, and what finds it.",
)

Ids = Annotated[list[str] | None, typer.Argument()]


def list_bugs(category: str | None = None, json: bool = False) -> None:
    """List the bugs: id, what one sees, where it was seen in the wild.

    Options:
        category: Only this part of the program, such as masks.
        json: For machines.

    Examples:
        parity bugs list
        parity bugs list --category masks
    """
    with in_one_line(Console(stderr=True)):
        from parity.faults import GALLERY

        if category is not None and category not in GALLERY:
            raise ValueError(f"--category {category}: there are {', '.join(GALLERY)}.")
        chosen = {name: found for name, found in GALLERY.items() if category in (None, name)}
        if json:
            import json as encoder

            fields = "title", "symptom", "seen", "frameworks", "caught_by"
            rows = [
                {"id": bug.id, "category": name} | {field: getattr(bug, field) for field in fields}
                for name, found in chosen.items()
                for bug in found
            ]
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


def show(ids: list[str], framework: str | None = None) -> None:
    """Show a bug: its lines, wrong and right, why it is wrong, what one sees, what finds it.

    Options:
        ids: Bugs by id.
        framework: The lines of one twin alone: flax or torch.

    Examples:
        parity bugs show no-shift
        parity bugs show offset-zero mask-zero --framework torch
    """
    with in_one_line(Console(stderr=True)) as errors:
        chosen = frameworks(framework)
        with errors.status("loading"):
            from parity.doctor import DETECTORS
            from parity.faults import GALLERY, find

        asks = {detector.name: detector.asks for detector in DETECTORS}
        for bug in find(ids):
            category = next(name for name, found in GALLERY.items() if bug in found)
            parts: list[RenderableType] = [
                Text.assemble((bug.id, "bold red"), f"  {bug.title}  ", (category, "dim")),
                Text(""),
                Text.assemble(("what one sees  ", "bold"), bug.symptom),
                Text.assemble(("why  ", "bold"), bug.why),
                Text.assemble(("seen  ", "bold"), bug.seen),
                Text("what finds it", style="bold"),
            ]
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
    ids: Ids = None,
    framework: str = "torch",
    steps: Annotated[int, typer.Option(min=20)] = 300,
    seed: Natural = 0,
    data: Data = None,
    plot: bool = False,
    out: str = "bugs.png",
) -> None:
    """Train a healthy model and broken ones side by side, and show what each learned.

    Loss on the batch as the model's own loss tells it, loss on text held out as a trusted loss
    tells it, how far the cache drifts from reading at once, what it writes, and which detectors
    fire. Without ids: the four of the exercise this project comes from.

    Options:
        ids: Bugs by id; the exercise's four for none.
        framework: flax or torch.
        steps: Training steps of each model.
        seed: Seed of weights, batches and text.
        plot: Draw the curves, to --out.
        out: The picture that --plot draws.

    Examples:
        parity bugs run --plot
        parity bugs run no-shift double-shift shift-backwards --plot --out alignment.png
        parity bugs run offset-zero --framework flax --steps 100
    """
    with in_one_line(Console(stderr=True)) as errors:
        check_data(data)
        (framework,) = frameworks(framework)
        if plot:
            check_outputs({"--out": out})
        classic = ("no-shift", "position-std-one", "mask-missing", "residual-from-norm")
        with errors.status("loading jax and torch"):
            from parity.faults import find
            from parity.faults.compare_training import compare_training, draw
            from parity.pair.text import Corpus

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
    framework: str | None = None,
    healthy: Natural = 20,
    json: str | None = None,
    markdown: str | None = None,
    png: str | None = None,
) -> None:
    """Plant every bug in both twins and put every question to each; healthy models among them.

    Exit codes: 0 every bug seen and no false alarm, 1 not so, 2 bad input. All of it takes half an
    hour, nearly all in flax, which runs operation by operation; torch alone takes three minutes.

    Options:
        ids: Bugs by id; all of them for none.
        framework: One twin alone: flax or torch. Default: both.
        healthy: Healthy models among the broken.
        json: Write every answer to this file; - for standard output.
        markdown: Write tables to this file.
        png: Draw the matrix to this file.

    Examples:
        parity bugs matrix --framework torch
        parity bugs matrix mask-missing mask-zero --healthy 0
        parity bugs matrix --markdown matrix.md --png matrix.png --json matrix.json
    """
    with in_one_line(Console(stderr=True)) as errors:
        check_outputs({"--json": json, "--markdown": markdown, "--png": png})
        chosen = frameworks(framework)
        with errors.status("loading jax and torch"):
            from parity.faults import find
            from parity.faults.matrix import draw, measure

        chosen_bugs = list(find(ids or ()))
        with shown(errors, chosen) as show, interruptible(show) as progress:
            found = measure(chosen_bugs, chosen, range(healthy), progress)
        Console(stderr=json == "-").print(found)
        write_output(json, found.to_json)
        write_output(markdown, lambda: found.to_markdown() + "\n")
        if png is not None:
            draw(found, Path(png))
    raise typer.Exit(found.exit_code)


register(bugs.command, list_bugs, name="list")
for command in (show, run, matrix, exercise, grade):
    register(bugs.command, command)
