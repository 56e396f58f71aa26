"""What the grader gives to starters of both frameworks: sizes, weights and inputs, in NumPy.

Every size differs from every other, so that no axis can stand in for another. Leaves have names
and layouts of neither framework, so that the two can be compared.
"""

import dataclasses
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np

Leaves = dict[str, np.ndarray]
Values = dict[str, Any]  # what a stage returns: numbers, text and lists of these
Model = Any  # a starter's GPT, in either framework
Array = Any  # of either framework


@dataclasses.dataclass
class Starter:
    """The files of a starter, as modules."""

    cache: ModuleType
    generate: ModuleType
    model: ModuleType
    train: ModuleType


SIZES = dict(
    vocab_size=11, context_length=13, embed_dim=12, num_layers=2, num_heads=3, mlp_dim=20
)  # fmt: skip
# Large enough for a standard deviation to be known to one or two percent.
START_SIZES = dict(
    vocab_size=67, context_length=61, embed_dim=48, num_layers=2, num_heads=4, mlp_dim=80
)  # fmt: skip

# Of training: few steps, for errors grow, but enough for momentum that is lost to be missed.
NUM_STEPS, LEARNING_RATE = 4, 0.05

_STREAM = 0.1  # size of the numbers in the residual stream

# How the frameworks call a leaf, by its kind.
_WORDS = {
    "torch": {"table": "weight", "matrix": "weight", "scale": "weight", "bias": "bias"},
    "flax": {"table": "embedding", "matrix": "kernel", "scale": "scale", "bias": "bias"},
}


def weights(sizes: Mapping[str, int] = SIZES) -> Leaves:
    """Draw numbers for every leaf, matrices as (in, out).

    Vectors are drawn too, for initial weights hide what is never used. The stream is small, so that
    the epsilon of the norms matters.

    Returns:
        The leaves, by names of neither framework.
    """
    rng, found = np.random.default_rng(5), {}
    D, F = sizes["embed_dim"], sizes["mlp_dim"]

    def add_norm(name: str) -> None:
        found[f"{name}.scale"] = 1.0 + rng.normal(0.0, 0.3, D)
        found[f"{name}.bias"] = rng.normal(0.0, 0.1, D)

    def add_linear(name: str, in_dim: int, out_dim: int, scale: float = 1.0) -> None:
        kernel = rng.normal(0.0, 1.2 * in_dim**-0.5, (in_dim, out_dim))
        found[f"{name}.matrix"] = kernel * scale
        found[f"{name}.bias"] = rng.normal(0.0, 0.1, out_dim) * scale

    found["token_embedding.table"] = rng.normal(0.0, _STREAM, (sizes["vocab_size"], D))
    found["position_embedding.table"] = rng.normal(0.0, 0.8 * _STREAM, (sizes["context_length"], D))
    for index in range(sizes["num_layers"]):
        block = f"blocks.{index}"
        add_norm(f"{block}.norm_1")
        for name in ("query", "key", "value"):
            add_linear(f"{block}.attention.{name}", D, D)
        add_linear(f"{block}.attention.out", D, D, _STREAM)
        add_norm(f"{block}.norm_2")
        add_linear(f"{block}.mlp.up", D, F)
        add_linear(f"{block}.mlp.down", F, D, _STREAM)
    add_norm("norm")
    return found


def to_native(leaves: Mapping[str, np.ndarray], framework: str) -> Leaves:
    """Rename leaves as a framework does, in its own layout."""
    return {
        _native(name, framework): _turned(leaf, name, framework) for name, leaf in leaves.items()
    }


def from_native(
    leaves: Mapping[str, np.ndarray], framework: str, sizes: Mapping[str, int] = SIZES
) -> Leaves:
    """Undo `to_native`, for the leaves of a model of given sizes.

    Returns:
        The leaves, by names of neither framework.

    Raises:
        ValueError: names or shapes are not the starter's; lists them all.
    """
    names = weights(sizes)
    wanted = {name: leaf.shape for name, leaf in to_native(names, framework).items()}
    problems = [f"no {name}" for name in wanted if name not in leaves]
    problems += [f"{name} is new" for name in leaves if name not in wanted]
    problems += [
        f"{name} is {list(leaves[name].shape)} and was {list(shape)}"
        for name, shape in wanted.items()
        if name in leaves and leaves[name].shape != shape
    ]
    if problems:
        raise ValueError(
            f"parameters: {'; '.join(problems)}. The grader sets weights by name. Keep the "
            "starter's names and shapes."
        )
    return {name: _turned(leaves[_native(name, framework)], name, framework) for name in names}


def _native(name: str, framework: str) -> str:
    module, _, kind = name.rpartition(".")
    return f"{module}.{_WORDS[framework][kind]}"


def _turned(leaf: np.ndarray, name: str, framework: str) -> np.ndarray:
    turned = framework == "torch" and name.endswith(".matrix")
    return np.ascontiguousarray(leaf.T) if turned else leaf


def tokens(rows: int, width: int, seed: int) -> np.ndarray:
    """Draw token ids (rows, width)."""
    rng = np.random.default_rng((seed, rows, width))
    return rng.integers(0, SIZES["vocab_size"], (rows, width)).astype(np.int32)


def logits(rows: int, width: int, seed: int) -> np.ndarray:
    """Draw logits (rows, width, V) of a plausible size."""
    return np.random.default_rng((seed, rows, width, 1)).normal(
        0.0, 1.5, (rows, width, SIZES["vocab_size"])
    )


def direction(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Draw fixed weights for the sum of an array, by its name."""
    return np.random.default_rng((*name.encode(), *shape)).normal(size=shape)


def digest(leaves: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    """Return two numbers per leaf that change when it does: its norm, and a weighted sum."""
    return {
        name: [float(np.linalg.norm(leaf)), float(np.sum(leaf * direction(name, leaf.shape)))]
        for name, leaf in leaves.items()
    }


def spread(leaves: Mapping[str, np.ndarray]) -> dict[str, list[float]]:
    """Return the mean and standard deviation of every leaf."""
    return {name: [float(leaf.mean()), float(leaf.std())] for name, leaf in leaves.items()}


def logits_of(found: Array) -> Array:
    """Return the logits of a call, without the cache that a model may return too."""
    return found[0] if isinstance(found, tuple) else found


# Given tokens and how many to add: short ones, one, enough to fill the context, enough to leave
# it, and more than it holds to begin with.
PROMPTS = (
    (tokens(2, 3, 1), 5),
    (tokens(2, 1, 2), 12),
    (tokens(2, 12, 3), 6),
    (tokens(2, 15, 4), 6),
)
# For a cache, which is never asked to leave the context; and how rows of context_length tokens are
# read in pieces. Few widths, and always as many rows, for each shape is compiled.
CACHED_PROMPTS = (tokens(2, 1, 2), 12), (tokens(2, 3, 1), 5)
PIECES = 3, 1, 3, 3, 3
