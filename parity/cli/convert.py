"""`parity convert`: a checkpoint as a folder of another kind."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from parity.cli.options import DTYPES, check_dtype, in_one_line

KINDS = "flax", "torch", "hf"


def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder of transformers (config.json and safetensors), one that this command "
            "wrote, or a name of the Hugging Face hub."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The new folder.")],
    to: Annotated[str, typer.Option(help=f"Kind of the new folder: {', '.join(KINDS)}.")],
    dtype: Annotated[
        str | None,
        typer.Option(help=f"Store weights in: {', '.join(DTYPES)}. Default: as they are."),
    ] = None,
) -> None:
    """Convert a checkpoint: into the names of a twin, or back into a folder of transformers.

    Families: gpt2, llama, mistral, qwen2, qwen3 and bloom. Every tensor goes to one place, bit for
    bit unless --dtype rounds it (types that differ go into the widest), and the tokenizer's files
    go along. A pickle is never opened. The
    new folder appears whole or not at all.

    Exit codes: 0 written, 2 bad input.

    Examples:

    parity convert ./llama --to flax ./llama-flax

    parity convert ./llama-flax --to hf ./llama-again --dtype bfloat16

    In Python: parity.huggingface.open_checkpoint(Path("llama-flax")).flax()
    """
    errors = Console(stderr=True)
    with in_one_line(errors):
        if to not in KINDS:
            raise ValueError(f"--to {to}: there are {', '.join(KINDS)}. Choose one of them.")
        if dtype is not None:
            check_dtype(dtype)
        with errors.status("loading jax and torch"):
            from parity.huggingface import check_new, folder_of, open_checkpoint, save, write_twin

            check_new(out)
            weights = open_checkpoint(folder_of(source), dtype)
        for note in weights.notes:
            errors.print(note, style="yellow", highlight=False, soft_wrap=True)
        with errors.status("converting"):
            if to == "hf":
                leaves = dict(weights.leaves())
                save(out, weights.family, weights.config, leaves, weights.path)
            else:
                write_twin(out, to, weights)
        size = sum(file.stat().st_size for file in out.iterdir()) / 1e6
        errors.print(
            f"{out}: {weights.family} for {to}, {weights.config.dtype}, {size:,.1f} MB",
            style="dim", highlight=False, soft_wrap=True,
        )  # fmt: skip
