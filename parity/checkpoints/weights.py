"""Weights of a checkpoint as both twins take them, whatever the folder's own names are."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import jax
import ml_dtypes
import numpy as np
import torch
from flax import nnx
from numpy.typing import DTypeLike

import flax_gpt
import torch_gpt
from flax_gpt import GPTConfig
from parity.frameworks.flax.scope import jax_scope
from parity.frameworks.leaves import Leaves, dotted
from parity.twins.flax import FlaxTwin
from parity.twins.torch import TorchTwin
from parity.weights.rules import Rule, Rules
from parity.weights.tables import TWINS


class Weights(Protocol):
    """A folder whose config and headers have been checked, and whose tensors are yet to be read."""

    @property
    def path(self) -> Path:
        """The folder."""

    @property
    def family(self) -> str:
        """Key in FAMILIES of the rules that hold."""

    @property
    def config(self) -> GPTConfig:
        """Of the model, in the dtype that the folder was stored in or that was asked for."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What was ignored, a line each."""

    def leaves(self, dtype: str | None = None) -> Iterator[tuple[str, np.ndarray]]:
        """Yield Flax leaves by name, one after the other, so that few are in memory at once.

        Args:
            dtype: to cast to; that of the config when None.

        Raises:
            ValueError: for numbers that are not finite, or a file that ends too early.
        """


def flax_model(weights: Weights, device: jax.Device | None = None) -> flax_gpt.GPT:
    """Return the Flax twin with the weights of a checkpoint; on the CPU by default."""
    return FlaxTwin.build(weights.config, device, leaves=weights.leaves()).model


def torch_model(weights: Weights, device: torch.device | None = None) -> torch_gpt.GPT:
    """Return the PyTorch twin with the weights of a checkpoint; on the CPU by default."""
    return TorchTwin.build(weights.config, device, leaves=weights.leaves()).model


def checked(weights: Weights, name: str, leaf: np.ndarray, dtype: str | None) -> np.ndarray:
    """Return a leaf in a dtype; that of the config when None.

    Raises:
        ValueError: for numbers that are not finite.
    """
    if bad := int(np.count_nonzero(~np.isfinite(leaf))):
        raise ValueError(
            f"checkpoint {weights.path}: {bad} of {leaf.size} numbers in {name} are not finite. "
            "Nothing can be computed with them. Get the file again."
        )
    dtype = dtype or weights.config.dtype
    with np.errstate(over="ignore"):  # an error of ours, in the next line
        cast = leaf.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype, copy=False)
    if cast is not leaf and not np.all(np.isfinite(cast)):
        raise ValueError(
            f"checkpoint {weights.path}: numbers in {name} are too large for {dtype}. They would "
            "become infinite. Take a wider type."
        )
    return cast


def blank(shape: Sequence[int], dtype: DTypeLike = np.float32) -> np.ndarray:
    """Return an array of a shape that takes no memory."""
    return np.broadcast_to(np.zeros((), dtype), tuple(shape))


def flax_blanks(config: GPTConfig) -> Leaves:
    """Return leaves of the Flax twin in float32 that take no memory."""
    with jax_scope("float32", jax.devices("cpu")[0]):
        config = dataclasses.replace(config, dtype="float32")
        state = nnx.state(nnx.eval_shape(lambda: flax_gpt.GPT(config)))
    return {dotted(path): blank(x.shape) for path, x in nnx.to_flat_state(state)}


def torch_blanks(rules: Rules, leaves: Leaves) -> Leaves:
    """Return the tensors that rules make of Flax leaves, as arrays that take no memory."""
    shapes = {name: leaf.shape for name, leaf in leaves.items()}
    return {
        name: blank(link.torch_shape(shapes), leaves[link.flax[0]].dtype)
        for rule in rules.rules
        for link in rule.links(leaves, "flax", _stacked(rule, leaves))
        for name in link.torch
    }


def _stacked(rule: Rule, leaves: Leaves) -> list[str]:
    """Return the tensors that a rule makes of stacked Flax leaves, along whose first axis they lie.

    Without a torch model, nothing else tells how many there are.
    """
    return [
        re.sub(r"\[\w+\]", str(number), name)
        for link in rule.links(leaves, "flax")
        for name in link.torch
        for number in range(leaves[link.flax[0]].shape[0] if "[" in name else 0)
    ]


def twin_blanks(config: GPTConfig) -> Leaves:
    """Return leaves of the PyTorch twin in float32 that take no memory."""
    return torch_blanks(TWINS, flax_blanks(config))
