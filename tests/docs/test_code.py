"""README.md, docs/ and examples/ are true: their code runs and prints what they say."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from parity.cli import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)
SHELL = re.compile(r"```sh\n(.*?)```", re.DOTALL)
# Runs the blocks of a page, one after the other in one namespace. Each is compiled at its own line,
# so that an error and a cause name a line of the page.
RUN = """
import pathlib, re, sys
page, path = pathlib.Path(sys.argv[1]).read_text(), sys.argv[1]
names = {"__name__": "__main__"}
for found in re.finditer(sys.argv[2], page, re.DOTALL):
    print(sys.argv[3])
    lines = page.count("\\n", 0, found.start(1))
    exec(compile("\\n" * lines + found[1], path, "exec"), names)
"""
NEXT = "---- next block"


def blocks(page: Path) -> list[tuple[str, str]]:
    """The Python blocks of a page, each with what it prints."""
    return BLOCK.findall(page.read_text())


def named(page: Path) -> str:
    """The name of a page in a test's id."""
    return page.relative_to(ROOT).as_posix()


def rounded(text: str) -> str:
    """The text without what is different on another machine: digits of a rounding error."""
    return re.sub(r"\b\d(\.\d+)?e-1[4-9]\b", "rounding", text)


def run(*command: str) -> str:
    """What a Python program prints; a warning is an error."""
    done = subprocess.run(
        [sys.executable, "-W", "error", *command], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=named)
def test_every_python_block_runs_and_prints_what_it_says(page):
    printed = run("-c", RUN, str(page), BLOCK.pattern, NEXT).split(NEXT + "\n")[1:]
    assert [rounded(x) for x in printed] == [rounded(said) for _, said in blocks(page)]


@pytest.mark.parametrize("example", EXAMPLES, ids=named)
def test_every_example_runs_and_says_how(example):
    assert f"python {named(example)}" in example.read_text()
    assert run(str(example))


def test_the_examples_are_short_and_listed():
    listed = (ROOT / "examples" / "README.md").read_text()
    for example in EXAMPLES:
        assert f"python {named(example)}`" in listed
        assert len(example.read_text().splitlines()) < 60


def commands() -> list[str]:
    """Every call of `parity` in a shell block, continued lines joined."""
    texts = [*PAGES, ROOT / "CONTRIBUTING.md"]
    lines = [
        line.split("&&")[-1].strip().removeprefix(".venv/bin/")
        for page in texts
        for block in SHELL.findall(page.read_text())
        for line in block.replace("\\\n", " ").splitlines()
    ]
    return sorted({line for line in lines if line.startswith("parity ")})


@pytest.mark.parametrize("line", commands())
def test_every_command_has_the_options_that_it_is_given(line):
    command, args = typer.main.get_command(app), shlex.split(line, comments=True)[1:]
    context = command.make_context("parity", [], resilient_parsing=True)
    while args and args[0] in getattr(command, "commands", ()):
        command = command.commands[args.pop(0)]
        context = command.make_context(command.name, [], context, resilient_parsing=True)
    context.resilient_parsing = False
    _, rest, _ = command.make_parser(context).parse_args(args)
    assert not rest or not hasattr(command, "commands"), f"no command {rest[0]}"
