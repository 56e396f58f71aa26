"""The help of commands and of their options comes from docstrings."""

import subprocess
import sys
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from parity.bench.names import DTYPES as BENCH_DTYPES
from parity.cli import app
from parity.cli.convert import KINDS
from parity.cli.options import register
from parity.twins.names import DTYPES

RUNNER = CliRunner(env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"})


@pytest.mark.parametrize(
    "command, names",
    [
        ("convert", ", ".join(DTYPES)),
        ("convert", ", ".join(KINDS)),
        ("bench", ",".join(BENCH_DTYPES)),
    ],
)
def test_help_lists_the_names_that_an_option_takes(command, names):
    assert f"{names}." in RUNNER.invoke(app, [command, "--help"]).output


def test_a_docstring_describes_the_command_its_options_and_examples():
    def command(
        name: str, count: Annotated[int, typer.Option("--much", min=2)] = 3, loud: bool = False
    ) -> None:
        """Greet
        somebody.

        Options:
            name: Of somebody
                or other.
            count: How much.
            loud: In capitals.

        Examples:
            greet you
            greet them
                --loud
        """
        typer.echo(f"{name} {count} {loud}")

    tool = typer.Typer(rich_markup_mode="rich")
    register(tool.command, command)
    shown = RUNNER.invoke(tool, ["--help"]).output
    for part in (" Greet somebody.", "Of somebody or other.", "--much", "x>=2", "In capitals."):
        assert part in shown
    assert " greet you" in shown and " greet them --loud" in shown and "--no-loud" not in shown
    assert RUNNER.invoke(tool, ["you", "--loud"]).output == "you 3 True\n"
    assert RUNNER.invoke(tool, ["you", "--much", "1"]).exit_code == 2


_WRITES_ON = """
import typer
from rich.console import Console
from parity.cli.options import in_one_line

def write():
    with in_one_line(Console(stderr=True)):
        while True:
            typer.echo("to be or not to be")

typer.run(write)
"""


def test_a_reader_that_has_seen_enough_ends_a_command_quietly():
    command = [sys.executable, "-c", _WRITES_ON]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "to be or not to be\n"
    writer.stdout.close()
    assert writer.stderr.read() == ""
    writer.stderr.close()
    assert writer.wait(60) == 141
