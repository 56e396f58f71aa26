"""Every leaf is used once, fits, keeps its bits both ways, and lies the right way round."""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from parity.compare import Record, Verdict, different_bits, judge, max_abs
from parity.environment import jax_scope
from parity.leaves import flax_leaves, from_numpy, load_flax, load_torch, to_numpy, torch_leaves
from parity.report import Divergence
from parity.subject import Subject
from parity.transplant import Link, TransplantError

# One product per output element in float64, each of at most a few thousand terms.
_ORIENTATION = 1e-12


def records(subject: Subject) -> Iterator[Record]:
    """The map is complete, the round trips are bitwise, and each matrix acts as its twin does."""
    try:
        links = subject.weight_map.links
    except TransplantError as error:
        problems = error.problems
        yield judge("every leaf once", "float32", "problems", len(problems), 0, len(problems),
                    note="; ".join(problems))  # fmt: skip
        return
    used = sum(len(link.flax) for link in links)
    ignored = subject.weight_map.ignored
    note = f"ignored by the rules: {', '.join(ignored)}" if ignored else None
    yield judge("every leaf once", "float32", "problems", 0, 0, used, note=note)
    subject.progress(0.2)

    flax_model, torch_model = subject.build_flax(), subject.pair.torch.build("float32")
    start = subject.flax_leaves
    load_torch(torch_model, subject.torch_leaves)
    there = torch_leaves(torch_model)
    with jax_scope("float32", subject.devices.flax):
        load_flax(flax_model, subject.weight_map.to_flax(there))
    back = flax_leaves(flax_model)
    bits = sum(different_bits(start[name], back[name]) for name in start)
    size = sum(leaf.size for leaf in start.values())
    yield judge("flax to torch to flax", "float32", "different bits", bits, 0, size)
    again = subject.weight_map.to_torch(back)
    bits = sum(different_bits(there[name], leaf) for name, leaf in again.items())
    size = sum(leaf.size for leaf in again.values())
    yield judge("torch to flax to torch", "float32", "different bits", bits, 0, size)
    subject.progress(0.5)
    yield from _orientations(subject)


def _orientations(subject: Subject) -> Iterator[Record]:
    """Runs both owners of each matrix on one input: shapes cannot tell W from its transpose."""
    flax_run, torch_run = subject.runs("float64")
    rng = np.random.default_rng(0)
    unknown = []
    for link in subject.weight_map.links:
        owners = [_flax_owner(flax_run.module, name) for name in link.flax]
        torch_owner = torch_run.module.get_submodule(link.torch.rpartition(".")[0])
        alone = isinstance(torch_owner, torch.nn.Linear | torch.nn.Embedding) or (
            type(torch_owner).__name__ == "Conv1D"  # transformers' linear layer of GPT-2
        )
        if not alone or not all(isinstance(owner, nnx.Linear | nnx.Embed) for owner in owners):
            if subject.flax_leaves[link.flax[0]].ndim >= 2:
                unknown.append(link.torch)
            continue
        if not link.flax[0].endswith((".kernel", ".embedding")):
            continue
        with jax_scope("float64", subject.devices.flax):
            x, outputs = _drive_flax(owners, rng)
        with torch.no_grad():
            device = next(torch_owner.parameters()).device
            tensor = from_numpy(x).to(device)
            torch_output = to_numpy(torch_owner(tensor))
        yield judge(
            f"{link.torch} acts as {', '.join(link.flax)}",
            "float64",
            "max_abs",
            max_abs(torch_output, outputs),
            _ORIENTATION,
            outputs.size,
            noise=_transposed_gap(subject, link, x),
            where=link.torch,
        )
    if unknown:
        yield Record("orientation of " + ", ".join(unknown), "float64", "max_abs", None, None, 0,
                     Verdict.ABSTAIN, note="no way known to run these modules alone")  # fmt: skip


def _drive_flax(owners: list[Any], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An input for the owners, and their outputs side by side."""
    if isinstance(owners[0], nnx.Embed):
        x = np.arange(min(owners[0].num_embeddings, 64), dtype=np.int64)
    else:
        x = rng.normal(size=(3, owners[0].in_features))
    return x, np.concatenate([np.asarray(owner(jnp.asarray(x))) for owner in owners], axis=-1)


def _transposed_gap(subject: Subject, link: Link, x: np.ndarray) -> float | None:
    """What a square kernel turned the wrong way would have shown."""
    kernel = subject.flax_leaves[link.flax[0]]
    if len(link.flax) > 1 or x.ndim < 2 or kernel.shape[0] != kernel.shape[1]:
        return None
    wide = kernel.astype(np.float64)
    return max_abs(x @ wide, x @ wide.T)


def _flax_owner(module: nnx.Module, leaf: str) -> Any:
    path = leaf.split(".")[:-1]
    for step in path:
        module = module[int(step)] if step.isdigit() else getattr(module, step)
    return module


def locate(subject: Subject, records: list[Record]) -> Divergence | None:
    """The leaf whose comparison failed."""
    bad = next(record for record in records if record.verdict is Verdict.FAIL)
    return Divergence(bad.where or "the weight map", "weights", 0, bad.value, detail=bad.note or "")
