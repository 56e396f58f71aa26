"""Find a model's vocabulary size, context length and logits when they are not given."""

from collections.abc import Mapping
from typing import Any

# Where models keep their sizes, and what they call them.
_PLACES = "config", "cfg", "args", "params", "hparams"
_CONTEXTS = (
    *("context_length", "n_positions", "max_position_embeddings", "block_size"),
    *("max_seq_len", "max_seq_length", "n_ctx", "seq_len"),
)

FEWEST_IDS, SHORTEST = 5, 10  # with fewer, healthy models fail


class NotLogits(ValueError):
    """A call that returns something else than logits."""


def find_sizes(
    module: Any,
    vocab_size: int | None,
    context_length: int | None,
    embeddings: Mapping[str, int],
) -> tuple[int, int]:
    """Find the vocabulary and context of a model: given, in its config, or by its tables.

    Args:
        module: that may say so itself, or in its `config`.
        vocab_size: as given.
        context_length: as given.
        embeddings: rows of each of its embedding layers' weights.

    Raises:
        ValueError: when one of them is not to be found, or too small to ask anything.
    """
    of_tokens = (rows for name, rows in embeddings.items() if not _is_position(name))
    of_positions = (rows for name, rows in embeddings.items() if _is_position(name))
    vocab_size = vocab_size or _said(module, ("vocab_size",)) or next(of_tokens, None)
    context_length = context_length or _said(module, _CONTEXTS) or next(of_positions, None)
    missing = [
        option
        for option, value in (("vocab_size", vocab_size), ("context_length", context_length))
        if value is None
    ]
    if missing:
        raise ValueError(
            f"doctor: {type(module).__name__} does not say its {' and '.join(missing)}. A probe is "
            "ids below the one and no longer than the other. Give "
            + " and ".join(f"--{name.replace('_', '-')}" for name in missing)
            + "."
        )
    if vocab_size < FEWEST_IDS or context_length < SHORTEST:
        raise ValueError(
            f"doctor: vocabulary {vocab_size}, context {context_length}. The questions need "
            f"{FEWEST_IDS} ids to tell tokens apart and {SHORTEST} positions to read and write in. "
            "Build the model larger for an examination."
        )
    return int(vocab_size), int(context_length)


def _said(module: Any, names: tuple[str, ...]) -> int | None:
    """Return the first of these sizes that a module knows."""
    for place in (*(getattr(module, place, None) for place in _PLACES), module):
        for name in names:
            found = place.get(name) if isinstance(place, Mapping) else getattr(place, name, None)
            if isinstance(found, int) and found > 0:
                return found
    return None


def _is_position(name: str) -> bool:
    words = "position", "pos_emb", "pos_table", "wpe"
    return any(word in name.lower() for word in words) or "pos" in name.split(".")


def find_position_table(
    leaves: Mapping[str, Any], embeddings: Mapping[str, int], vocab_size: int
) -> str | None:
    """Find the leaf with a row per position: an embedding of no tokens, or so named.

    Args:
        leaves: all weights by name.
        embeddings: rows of each embedding layer's weight.
        vocab_size: V.
    """
    matrices = [name for name, leaf in leaves.items() if leaf.ndim >= 2]
    named = [name for name in matrices if _is_position(name)]
    others = [name for name, rows in embeddings.items() if rows != vocab_size]
    return next(iter(named + others), None)


def logits_of(output: Any, shape: tuple[int, int], vocab_size: int) -> Any:
    """Return the logits (B, T, V) of an output: itself, its field `logits`, or its first item.

    Raises:
        NotLogits: when there is nothing of that shape.
    """
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    elif hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, tuple | list) and output:
        output = output[0]
    found = tuple(getattr(output, "shape", ()))
    if len(found) != 3 or found[:2] != tuple(shape) or found[2] < vocab_size:
        call = "module(tokens, tokens)[0]" if found[:2] == (shape[0], 1) else "..."
        raise NotLogits(
            f"doctor: tokens of shape {tuple(shape)} gave {type(output).__name__}{list(found)}. A "
            f"language model gives logits (B, T, {vocab_size}), alone, first in a tuple, or as "
            "`logits`. Wrap the model, or return a subclass of parity.doctor.TorchModel or "
            f"FlaxModel in which `forward(self, module, tokens, counts)` returns {call}."
        )
    return output[..., :vocab_size]
