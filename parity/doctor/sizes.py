"""Find a model's name, vocabulary size, context length and logits when they are not given."""

from collections.abc import Callable, Iterable, Mapping
from typing import TypedDict

from parity.doctor.model import LanguageModel, Loss, Output

# Where models keep their sizes, and what they call them.
_PLACES = "config", "cfg", "args", "params", "hparams"
_CONTEXTS = (
    *("context_length", "n_positions", "max_position_embeddings", "block_size"),
    *("max_seq_len", "max_seq_length", "n_ctx", "seq_len"),
)

FEWEST_IDS, SHORTEST = 5, 10  # with fewer, healthy models fail


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
    matrices: Iterable[str],
    tables: Mapping[str, int],
) -> None:
    """Set the attributes of a model: as given, as its config says, or as its tables do.

    Args:
        model: to set them of.
        module: that may say its sizes itself, or in its `config`.
        options: as given.
        matrices: names of the weights with two axes or more.
        tables: rows of each embedding layer's weight.

    Raises:
        ValueError: when a size is not to be found, or too small to ask anything.
    """
    model.name = options.get("name") or type(module).__name__
    model.seed, model.trained = options.get("seed", 0), options.get("trained", False)
    if (ignored := options.get("ignore_index")) is not None:
        model.ignore_index = ignored
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
    # A matrix whose name says so, or an embedding of something else than tokens.
    named = [name for name in matrices if _is_position(name)]
    others = [name for name, rows in tables.items() if rows != vocab_size]
    model.position_table = next(iter(named + others), None)


def _said(module: object, names: tuple[str, ...]) -> int | None:
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
