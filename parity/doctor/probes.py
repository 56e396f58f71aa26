"""What the questions ask with: ids, random weights, and how far two answers may be apart."""

from typing import TypeVar

import numpy as np

from parity.doctor.model import Array, LanguageModel
from parity.frameworks.leaves import Leaves
from parity.weights.randomize import randomized

# With fewer ids, or a context that is shorter, healthy models fail.
FEWEST_IDS, SHORTEST = 5, 10
Model = TypeVar("Model", bound=LanguageModel)

ROWS, LENGTH = 4, 16  # one shape for nearly all probes, because jax compiles for each
LONGEST = 1024  # a full context beyond this would take minutes


def shaken(model: Model) -> Model:
    """Return the model with random weights: fresh ones hide what is zero or nearly so.

    Masks, frequencies and other constants stay as they are.
    """
    return model.with_weights(drawn(model))


def drawn(model: LanguageModel) -> Leaves:
    """Return its leaves, those that training changes with random numbers in them."""
    leaves, trained = model.weights(), model.trained_names()
    return leaves | randomized({x: leaf for x, leaf in leaves.items() if x in trained}, model.seed)


def tokens(model: LanguageModel, rows: int = ROWS, length: int = LENGTH, seed: int = 0) -> Array:
    """Draw ids (rows, length) from the whole vocabulary but padding, cut to the context."""
    rng = np.random.default_rng((model.seed, seed))
    length = min(length, model.context_length)
    ids = rng.integers(0, model.vocab_size, (rows, length)).astype(np.int32)
    return without_padding(model, ids)


def without_padding(model: LanguageModel, ids: Array) -> Array:
    """Return ids with another one in the place of padding, which some models do not count."""
    return np.where(ids == model.pad_id, (ids + 1) % FEWEST_IDS, ids).astype(ids.dtype)


def token_leaves(model: LanguageModel, leaves: Leaves) -> set[str]:
    """Return names of embeddings and heads: a row per token, of a padded vocabulary or not."""
    tables = model.tables()
    rows = {model.vocab_size, *(len(leaves[x]) for x in tables if x in leaves)}
    padded = {x for x in rows if x >= model.vocab_size}
    return {x for x, leaf in leaves.items() if x in tables or padded & set(leaf.shape)}


def is_finite(array: Array) -> bool:
    """Whether every number is finite, of any float type."""
    return bool(np.all(np.isfinite(np.asarray(array, np.float64))))


def gap(left: Array, right: Array) -> float:
    """Return the largest difference, in units of the right side's standard deviation."""
    left, right = (np.asarray(x, np.float64) for x in (left, right))
    if left.shape != right.shape or not right.size:
        return float("nan")
    return float(np.max(np.abs(left - right)) / (float(np.std(right)) or 1.0))


def tolerance(model: LanguageModel) -> float:
    """Return how far two ways to compute the same logits may differ, in standard deviations.

    In float32 a thousand units in the last place, where a model of a hundred layers needs a few
    hundred; in float64 what a float32 somewhere inside would exceed.
    """
    return {"float64": 1e-9, "float32": 1e-4, "float16": 0.1, "bfloat16": 0.5}[model.dtype]
