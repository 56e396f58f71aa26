"""The table of docs/checkpoints.md: for each family the largest gaps of the twins' logits.

python -m tests.parity.checkpoints.matrix > table.md
"""

import dataclasses
import tempfile
from pathlib import Path

import jax
import numpy as np
import torch

import flax_gpt
import torch_gpt
from parity.checkpoints import Checkpoint, flax_model, torch_model
from tests.parity.checkpoints.library import MODELS, Wide, prompts, theirs

DTYPES = "float64", "float32"
LEVELS = "to transformers", "twin to twin", "cached to uncached"


def gaps(checkpoint: Checkpoint, expected: np.ndarray) -> list[float]:
    """Return the gaps of one family in one dtype, relative to its largest logit."""
    tokens, found, cached = prompts(), [], []
    twins = (flax_gpt, flax_model, jax.numpy.asarray), (torch_gpt, torch_model, torch.from_numpy)
    for package, build, array in twins:
        model = build(checkpoint)
        found.append(np.asarray(model(array(tokens))[0]))
        cache, parts = package.KVCache.empty(model.config, len(tokens), tokens.shape[1]), []
        for cut in (slice(0, 5), slice(5, 6), slice(6, None)):
            logits, cache = model(array(tokens[:, cut]), cache)
            parts.append(np.asarray(logits))
        cached.append(np.concatenate(parts, axis=1))
    size = np.max(np.abs(expected))
    pairs = [(x, expected) for x in found], [tuple(found)], list(zip(found, cached, strict=True))
    return [max(float(np.max(np.abs(a - b))) for a, b in level) / size for level in pairs]


def row(family: str, folder: Path) -> str:
    """Return the line of one family."""
    theirs(family).save_pretrained(folder)
    with Wide(), torch.no_grad():
        expected = theirs(family)(torch.from_numpy(prompts())).logits.numpy()
    cells = []
    with jax.enable_x64(True), torch.no_grad():
        opened = Checkpoint.open(folder)
        for dtype in DTYPES:
            config = dataclasses.replace(opened.config, dtype=dtype)
            cells += gaps(dataclasses.replace(opened, config=config), expected)
    return f"| {family} | " + " | ".join(f"{x:.0e}" for x in cells) + " |"


def main() -> None:
    """Print the table."""
    heads = [f"{level}, {dtype}" for dtype in DTYPES for level in LEVELS]
    print(f"| family | {' | '.join(heads)} |")
    print("|---" * (1 + len(heads)) + "|")
    for family in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            print(row(family, Path(folder) / family), flush=True)


if __name__ == "__main__":
    main()
