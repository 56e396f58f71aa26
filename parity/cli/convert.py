"""`parity convert`: write a checkpoint as a folder of another kind."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from parity.cli.options import check_dtype, check_outputs, in_one_line
from parity.system.import_target import built, load_attribute

KINDS = "flax", "torch", "hf"


def convert(
    source: str,
    out: Path,
    to: Annotated[str, typer.Option()],
    dtype: str | None = None,
    torch: str | None = None,
    flax: str | None = None,
    rules: str = "auto",
    adapter: Path | None = None,
) -> None:
    """Convert a checkpoint: into the names of a twin, back into a folder of transformers, or a file
    of weights from your module to its port.

    Families: docs/checkpoints.md lists them. Every tensor goes to one place, bit for bit unless
    --dtype rounds it (types that differ go into the widest), and the tokenizer's files go along. A
    pickle is never opened. The new folder appears whole or not at all.

    Options:
        source: A folder of transformers (config.json and safetensors), one that this command
            wrote, or a name of the Hugging Face hub.
        out: The new folder.
        to: Kind of the new folder: flax, torch, hf.
        dtype: Store weights in: float64, float32, bfloat16, float16. Default: as they are.
        torch: For a file of weights: your PyTorch module, net.py:build.
        flax: And your Flax NNX module.
        rules: Which weight is which: a rules file, or auto to go by names.
        adapter: A folder of peft whose products (LoRA) are added to the weights.

    Exit codes: 0 written, 2 bad input.

    Examples:
        parity convert ./llama --to flax ./llama-flax
        parity convert ./llama-flax --to hf ./llama-again --dtype bfloat16
        parity convert ./llama ./llama-merged --to hf --adapter ./lora
        parity convert net.safetensors port.safetensors --to flax --torch net.py:build --flax
            port.py:build

    In Python: parity.checkpoints.flax_model(parity.checkpoints.open_checkpoint(Path("llama-flax")))
    """
    with in_one_line(Console(stderr=True)) as errors:
        if to not in KINDS:
            raise ValueError(f"--to {to}: there are {', '.join(KINDS)}. Choose one of them.")
        if dtype is not None:
            check_dtype(dtype)
        if torch is not None or flax is not None:
            if torch is None or flax is None or to == "hf" or dtype is not None:
                raise ValueError(
                    "--torch and --flax: both, with --to torch or flax and no --dtype. A file of "
                    "weights goes from a module to its port, bit for bit. Give these."
                )
            check_outputs({"out": str(out)})
            with errors.status("loading jax and torch"):
                count = _convert_file(Path(source), out, to, (torch, flax), rules)
            line = f"{out}: {count} tensors for {to}"
            errors.print(line, style="dim", highlight=False, soft_wrap=True)
            return
        with errors.status("loading jax and torch"):
            from parity.checkpoints import check_new, folder_of, open_checkpoint, save, write_twin

            check_new(out)
            weights = open_checkpoint(folder_of(source), dtype, adapter)
        for note in weights.notes:
            errors.print(note, style="yellow", highlight=False, soft_wrap=True)
        with errors.status("converting"):
            if to == "hf":
                leaves = dict(weights.leaves())
                save(out, weights.family, weights.config, leaves, weights.path)
            else:
                write_twin(out, to, weights)
        size = sum(file.stat().st_size for file in out.iterdir()) / 1e6
        line = f"{out}: {weights.family} for {to}, {weights.config.dtype}, {size:,.1f} MB"
        errors.print(line, style="dim", highlight=False, soft_wrap=True)


def _convert_file(source: Path, out: Path, to: str, targets: tuple[str, str], rules: str) -> int:
    """Convert a file of one module's weights into that of its port; return their number."""
    from flax import nnx
    from torch import nn

    from parity.weights.convert import convert_file
    from parity.weights.rules import Rules

    port, original = (built(x, load_attribute(x), (nn.Module, nnx.Module)) for x in targets)
    found = None if rules == "auto" else Rules.load(Path(rules))
    return convert_file(source, out, port, original, to, found)
