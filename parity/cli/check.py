"""`parity check`: are the two twins the same function?"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from parity.cli.options import PRESETS, Data, Device, Task, check_data, check_outputs, in_one_line
from parity.cli.record import check_golden

# The names of parity.levels.LEVELS; a test holds them equal.
LEVELS = "weights", "logits", "gradients", "optimizer", "trajectory", "cache", "tokens"


def check(
    data: Data = None,
    preset: Annotated[
        str,
        typer.Option(
            help=f"Model size: {', '.join(PRESETS)}. Beyond tiny, a CPU takes hours unless --steps "
            "and --tokens are small."
        ),
    ] = "tiny",
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="The weights and sizes of a folder of transformers (gpt2, llama, mistral, qwen2, "
            "qwen3, bloom), of one that `parity convert` made, or of a name of the hub."
        ),
    ] = None,
    task: Task = "next-token",
    golden: Annotated[
        Path | None,
        typer.Option(
            help="A file of `parity record`: checks one module of yours, named by --torch or "
            "--flax, against it, in float64, without the other framework."
        ),
    ] = None,
    torch: Annotated[
        str | None, typer.Option(help="Your PyTorch module: net.py:build or my_pkg.net:build.")
    ] = None,
    flax: Annotated[
        str | None, typer.Option(help="Your Flax NNX module: port.py:build or my_pkg.port:build.")
    ] = None,
    rules: Annotated[
        Path | None,
        typer.Option(help="The weight map, a TOML file; none for a golden of the same framework."),
    ] = None,
    level: Annotated[
        list[str] | None,
        typer.Option(help=f"Climb only this level; repeat for more: {', '.join(LEVELS)}."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float64 decides; float64,float32 also judges float32 by it.")
    ] = "float64,float32",
    steps: Annotated[int, typer.Option(min=1, help="Training steps of the trajectory.")] = 100,
    dropout: Annotated[
        float, typer.Option(help="Dropout in training, with the same masks in both.")
    ] = 0.0,
    tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens to generate behind each of four prompts. Default: 256, or half of a "
            "checkpoint's context where that is less.",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the weights and of the text passages.")
    ] = 0,
    device: Device = "auto",
    json: Annotated[
        str | None, typer.Option(help="Write the report to this file; - for standard output.")
    ] = None,
    markdown: Annotated[
        str | None,
        typer.Option(help="Write the table to this file, for a README; - for standard output."),
    ] = None,
    html: Annotated[
        str | None,
        typer.Option(help="Write a page to this file, with plots of gaps, losses and margins."),
    ] = None,
) -> None:
    """Prove that the Flax twin and the PyTorch twin are the same function.

    Both get the same random weights, or those of a checkpoint, and climb these levels; a failure
    blocks the rest.

    [bold]weights[/]     each leaf used once, bit for bit, matrices right way round
    [bold]logits[/]      equal outputs: full context, padding, repetition, one token
    [bold]gradients[/]   equal gradients by leaf
    [bold]optimizer[/]   equal updates and moments over four AdamW steps
    [bold]trajectory[/]  equal losses over --steps training steps
    [bold]cache[/]       reading in ragged pieces equals reading at once
    [bold]tokens[/]      equal tokens: flax, torch, cached, uncached, greedy, sampled

    Training runs with warm-up, cosine, clipping, a decay mask, label smoothing, accumulation over
    ragged parts and labels that are not scored; --dropout adds dropout.

    Examples:

    parity check

    parity check --data shakespeare.txt --html report.html --json report.json

    parity check --steps 1000 --dropout 0.1 --level trajectory

    parity check --level logits --level gradients --dtype float64

    parity check --checkpoint ./llama --steps 3

    parity check --golden net.safetensors --flax port.py:build --rules rules.toml
    """
    errors = Console(stderr=True)
    files = {"--json": json, "--markdown": markdown, "--html": html}
    with in_one_line(errors):
        check_outputs(files)
        if golden is not None:
            if data is not None or checkpoint is not None:
                raise ValueError(
                    f"--golden {golden} with --data or --checkpoint: a golden has inputs and weights "
                    "of its own. Leave the others out."
                )
            report = check_golden(errors, golden, torch, flax, rules, _levels(level))
        else:
            if torch or flax or rules:
                raise ValueError("--torch, --flax, --rules: without --golden. Give one.")
            report = _run(
                errors,
                data,
                preset,
                checkpoint,
                task,
                level,
                dtype,
                steps,
                dropout,
                tokens,
                seed,
                device,
                evidence=html is not None,
            )
        Console(stderr="-" in files.values()).print(report)
        _write(json, report.to_json)
        _write(markdown, report.to_markdown)
        _write(html, report.to_html)
    raise typer.Exit(report.exit_code)


def _levels(wanted: list[str] | None) -> list[str]:
    """The levels of --level, in their order; all without it.

    Raises:
        ValueError: for one that there is not.
    """
    if unknown := set(wanted or ()) - set(LEVELS):
        raise ValueError(f"--level {min(unknown)}: no such level. Choose {', '.join(LEVELS)}.")
    return [name for name in LEVELS if not wanted or name in wanted]


def _write(name: str | None, text: Callable[[], str]) -> None:
    """Writes a form of the report where it was asked for."""
    from parity.files import write_atomically

    if name == "-":
        typer.echo(text(), nl=False)
    elif name is not None:
        write_atomically(Path(name), text())


def _run(
    errors: Console, data, preset, checkpoint, task, level, dtype, steps, dropout, tokens, seed,
    device, *, evidence,
):  # fmt: skip
    """The report, with a live progress line on the error stream."""
    dtypes = tuple(name.strip() for name in dtype.split(","))
    if dtypes not in (("float64",), ("float64", "float32")):
        raise ValueError(f"--dtype {dtype}: choose float64 or float64,float32.")
    levels = _levels(level)
    check_data(data)
    if checkpoint is not None and (preset != "tiny" or task != "next-token"):
        raise ValueError(
            f"--checkpoint {checkpoint} with --preset or --task: a checkpoint has sizes of its own "
            "and predicts the next token. Leave the others out."
        )
    with errors.status("loading jax and torch"):
        from parity.check import check as run
        from parity.corpus import Corpus
        from parity.environment import choose_devices
        from parity.twins import preset_config, twins

        devices = choose_devices(device)
        corpus = Corpus.load(data)
        if checkpoint is None:
            config = preset_config(corpus, preset, dropout=dropout)
            pair = twins(corpus, config, task=task, seed=seed, max_new_tokens=tokens or 256)
        else:
            from parity.huggingface import folder_of, open_checkpoint, pair_of

            weights = open_checkpoint(folder_of(checkpoint))
            for note in weights.notes:
                errors.print(note, style="yellow", highlight=False, soft_wrap=True)
            pair = pair_of(weights, corpus, dropout=dropout, seed=seed, max_new_tokens=tokens)
    from parity.progress import interruptible, shown

    with shown(errors, levels) as show, interruptible(show) as progress:
        return run(
            pair,
            levels=levels,
            dtypes=dtypes,
            devices=devices,
            seed=seed,
            steps=steps,
            evidence=evidence,
            progress=progress,
        )
