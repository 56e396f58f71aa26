"""Find a model's name, vocabulary size, context length and logits when they are not given."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TypedDict

import numpy as np

from parity.doctor.model import Array, LanguageModel, Loss, Output
from parity.doctor.probes import FEWEST_IDS, SHORTEST

# Where models keep their sizes, and what they call them.
_PLACES = "config", "cfg", "args", "params", "hparams"
_CONTEXTS = (
    *("context_length", "n_positions", "max_position_embeddings", "block_size"),
    *("max_seq_len", "max_seq_length", "n_ctx", "seq_len"),
)

# Two rows of ids that are nowhere their own position, to see what layers are called with.
PROBE_BT = np.array([[4, 3, 0, 2, 1, 4, 0, 3], [2, 0, 4, 1, 3, 2, 4, 0]], np.int32)
# Of each embedding's weight, what it was called with; None for something else than ids.
Lookups = dict[str, list[Array | None]]


class NotLogits(ValueError):
    """A call that returns something else than logits."""


class Options(TypedDict, total=False):
    """What can be said about a module.

    Attributes:
        name: for the report; the class when empty.
        vocab_size: V; looked for in the module's config and first embedding when None.
        context_length: longest sequence; looked for in the module's config when None.
        loss: (logits_BTV, labels_BT, counts_B) to a mean, or to a total and a number of tokens;
            labels are the tokens themselves, since the loss shifts. None for the class's.
        ignore_index: a label that the loss does not score; None for the class's.
        seed: of the probes.
        trained: whether the weights are trained.
    """

    name: str
    vocab_size: int | None
    context_length: int | None
    loss: Callable[..., Loss] | None
    ignore_index: int | None
    seed: int
    trained: bool


def identify(
    model: LanguageModel,
    module: object,
    options: Options,
    tables: Mapping[str, int],
) -> None:
    """Set the attributes of a model: as given, as its config says, or as its tables do.

    Args:
        model: to set them of.
        module: that may say its sizes itself, or in its `config`.
        options: as given.
        tables: rows of each embedding layer's weight.

    Raises:
        ValueError: when a size is not to be found, or too small to ask anything.
    """
    model.name = options.get("name") or type(module).__name__
    model.seed, model.trained = options.get("seed", 0), options.get("trained", False)
    if (ignored := options.get("ignore_index")) is not None:
        model.ignore_index = ignored
    model.pad_id = _said(module, ("pad_token_id",), least=0)
    tokens = (rows for name, rows in tables.items() if not _is_position(name))
    places = (rows for name, rows in tables.items() if _is_position(name))
    vocab_size = options.get("vocab_size") or _said(module, ("vocab_size",)) or next(tokens, None)
    context = options.get("context_length") or _said(module, _CONTEXTS) or next(places, None)
    if vocab_size is None or context is None:
        sizes = {"vocab_size": vocab_size, "context_length": context}
        missing = [name for name, size in sizes.items() if size is None]
        raise ValueError(
            f"doctor: {type(module).__name__} does not say its {' and '.join(missing)}. A probe is "
            "ids below the one and no longer than the other. Give "
            + " and ".join(f"--{name.replace('_', '-')}" for name in missing)
            + "."
        )
    if vocab_size < FEWEST_IDS or context < SHORTEST:
        raise ValueError(
            f"doctor: vocabulary {vocab_size}, context {context}. The questions need {FEWEST_IDS} "
            f"ids to tell tokens apart and {SHORTEST} positions to read and write in. Build the "
            "model larger for an examination."
        )
    model.vocab_size, model.context_length = vocab_size, context


def _said(module: object, names: tuple[str, ...], least: int = 1) -> int | None:
    """Return the first of these sizes that a module knows."""
    for place in (*(getattr(module, place, None) for place in _PLACES), module):
        for name in names:
            found = place.get(name) if isinstance(place, Mapping) else getattr(place, name, None)
            if isinstance(found, int) and found >= least:
                return found
    return None


def positions_of(matrices: Iterable[str], lookups: Lookups) -> str | None:
    """Return the table of absolute positions: one that was looked up by them, or says so.

    Args:
        matrices: names of the weights with two axes or more.
        lookups: what embedding layers were called with for `PROBE_BT`.
    """
    calls = {name: [x for x in seen if x is not None] for name, seen in lookups.items()}
    found = (name for name, seen in calls.items() if any(_counts_up(ids) for ids in seen))
    said = (
        name
        for name in matrices
        if _is_position(name)
        and "rel" not in name.lower()
        and not any(_is_of_pairs(ids) for ids in calls.get(name, []))
    )
    return next(iter((*found, *said)), None)


def _counts_up(ids: Array) -> bool:
    """Whether ids are the positions of `PROBE_BT`, from any first one, along either axis."""
    rows, steps = PROBE_BT.shape
    ids = np.squeeze(ids)
    ids = ids.T if ids.shape == (steps, rows) else ids
    return ids.shape in ((steps,), (rows, steps)) and bool(np.all(np.diff(ids, axis=-1) == 1))


def _is_of_pairs(ids: Array) -> bool:
    """Whether ids are one for each pair of positions."""
    return ids.shape[-2:] == (PROBE_BT.shape[1],) * 2


def is_recurrent(part: object) -> bool:
    """Whether a module is of a class that is called a recurrent layer."""
    words = r"RNN|GRU|LSTM|Recurren"
    return any(re.search(words, x.__name__) for x in type(part).__mro__)


def _is_position(name: str) -> bool:
    words = "position", "pos_emb", "pos_table", "wpe"
    return any(word in name.lower() for word in words) or "pos" in name.split(".")


def logits_of(output: Output, shape: tuple[int, ...], vocab_size: int) -> Output:
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
