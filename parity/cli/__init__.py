"""The `parity` command. Heavy imports wait until a command needs them, so that help is instant.

One file per command; each turns options into one call of the package and a value into an exit code.
"""

import os
import sys
import traceback
from typing import Annotated

import typer

# Before the frameworks are imported, and only if nobody else chose: two thread pools share the
# cores, and jax must not take the whole GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from parity.cli import (
    bench,
    bugs,
    check,
    convert,
    doctor,
    generate,
    precision,
    record,
    self_test,
    train,
)
from parity.cli.options import register
from parity.system.threads import use_passive_threads

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def main() -> None:
    """The console script: exit code 1 always means that two models differ, never a crash."""
    try:
        app()
    except Exception:
        traceback.print_exc()
        sys.exit(2)


use_passive_threads()


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        names = "parity-gpt", "jax", "flax", "torch"
        typer.echo("  ".join(f"{name} {version(name)}" for name in names))
        raise typer.Exit()


@app.callback()
def parity(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print versions.")
    ] = False,
) -> None:
    """Are these two models the same function, and if not, where do they diverge?

    Exit codes: 0 the same function, 1 they differ, 2 usage error or no answer.
    """


for module in (check, train, generate, convert, precision, doctor, record, self_test):
    register(app.command, getattr(module, module.__name__.rpartition(".")[2]))
app.add_typer(bench.bench, name="bench")
app.add_typer(bugs.bugs, name="bugs")
