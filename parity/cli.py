"""The `parity` command. Heavy imports wait until a command needs them, so that help is instant."""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

# Two thread pools share the cores: torch's waiting threads must sleep and not spin, and jax must
# not take the whole GPU. Only before the frameworks are imported, and only if nobody else chose.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

# The names of parity.levels.LEVELS, flax_gpt.PRESETS; a test holds them equal.
LEVELS = "weights", "logits", "gradients", "optimizer", "trajectory", "cache", "tokens"
PRESETS = "tiny", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"


def main() -> None:
    """The console script: exit code 1 always means that two models differ, never a crash."""
    try:
        app()
    except Exception:
        traceback.print_exc()
        sys.exit(2)


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
    """Are these two models the same function, and if not, where do they part?

    Exit codes: 0 the same function, 1 they differ, 2 usage error or no answer.
    """


@app.command()
def check(
    data: Annotated[
        Path | None,
        typer.Option(help="UTF-8 text to test on; without it, Python's own language reference."),
    ] = None,
    preset: Annotated[
        str,
        typer.Option(
            help=f"Model size: {', '.join(PRESETS)}. Beyond tiny, a CPU takes hours unless --steps "
            "and --tokens are small."
        ),
    ] = "tiny",
    level: Annotated[
        list[str] | None,
        typer.Option(help=f"Climb only this level; repeat for more: {', '.join(LEVELS)}."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float64 decides; float64,float32 also judges float32 by it.")
    ] = "float64,float32",
    steps: Annotated[int, typer.Option(min=1, help="Training steps of the trajectory.")] = 100,
    tokens: Annotated[
        int, typer.Option(min=1, help="Tokens to generate behind each of four prompts.")
    ] = 256,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the weights and of the text passages.")
    ] = 0,
    device: Annotated[
        str, typer.Option(help="auto (GPUs if both frameworks have one), cpu or cuda.")
    ] = "auto",
    json: Annotated[
        str | None, typer.Option(help="Write the report to this file; - for standard output.")
    ] = None,
    markdown: Annotated[
        str | None,
        typer.Option(help="Write the table to this file, for a README; - for standard output."),
    ] = None,
) -> None:
    """Prove that the Flax twin and the PyTorch twin are the same function.

    Both get the same random weights and climb these levels; a failure blocks the rest.

    [bold]weights[/]     each leaf used once, bit for bit, matrices right way round
    [bold]logits[/]      equal outputs: full context, padding, repetition, one token
    [bold]gradients[/]   equal gradients by leaf
    [bold]optimizer[/]   equal updates and moments over three AdamW steps
    [bold]trajectory[/]  equal losses over --steps training steps
    [bold]cache[/]       reading in ragged pieces equals reading at once
    [bold]tokens[/]      equal greedy tokens: flax, torch, cached, uncached

    Examples:

    parity check

    parity check --data shakespeare.txt --json report.json

    parity check --level logits --level gradients --dtype float64
    """
    errors = Console(stderr=True)
    files = {"--json": json, "--markdown": markdown}
    try:
        for option, name in files.items():
            if name not in (None, "-") and Path(name).is_dir():
                raise ValueError(f"{option} {name}: that is a folder. Name a file in it.")
            if name not in (None, "-") and not Path(name).parent.is_dir():
                folder = Path(name).parent
                raise ValueError(f"{option} {name}: no folder {folder}. Make it or name another.")
        report = _run_check(errors, data, preset, level, dtype, steps, tokens, seed, device)
        Console(stderr="-" in files.values()).print(report)
        _write(json, report.to_json)
        _write(markdown, report.to_markdown)
    except (ValueError, OSError) as error:
        errors.print(f"parity: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt:
        errors.print("parity: interrupted, nothing was written.", style="red")
        sys.stdout.flush()
        sys.stderr.flush()
        # Not by an exception: a Python that was interrupted inside exec(), as in an import, kills
        # itself with the signal at its end, whatever exit code was asked for.
        os._exit(130)
    raise typer.Exit(report.exit_code)


def _write(name: str | None, text: Callable[[], str]) -> None:
    """Writes a form of the report where it was asked for."""
    from parity.report import write_atomically

    if name == "-":
        typer.echo(text(), nl=False)
    elif name is not None:
        write_atomically(Path(name), text())


def _run_check(errors: Console, data, preset, level, dtype, steps, tokens, seed, device):
    """The report, with a live progress line on the error stream."""
    dtypes = tuple(name.strip() for name in dtype.split(","))
    if dtypes not in (("float64",), ("float64", "float32")):
        raise ValueError(f"--dtype {dtype}: choose float64 or float64,float32.")
    if unknown := set(level or ()) - set(LEVELS):
        raise ValueError(f"--level {min(unknown)}: no such level. Choose {', '.join(LEVELS)}.")
    levels = [name for name in LEVELS if not level or name in level]
    if data is not None and not data.is_file():
        raise ValueError(f"data file {data}: no such file. Give a UTF-8 text file.")
    with errors.status("loading jax and torch"):
        from parity.check import check as run
        from parity.corpus import Corpus
        from parity.environment import choose_devices
        from parity.twins import preset_config, twins

        devices = choose_devices(device)
        corpus = Corpus.load(data)
        config = preset_config(corpus, preset)
        pair = twins(corpus, config, seed=seed, max_new_tokens=tokens)
    from parity.progress import interruptible, shown

    with shown(errors, levels) as show, interruptible(show) as progress:
        return run(
            pair,
            levels=levels,
            dtypes=dtypes,
            devices=devices,
            seed=seed,
            steps=steps,
            progress=progress,
        )
