"""A user's inputs as probes to compare outputs on and as batches to train on."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping

import numpy as np

from parity.frameworks.batch import Batch

# Draws from a function of a random generator: one input may miss what another reaches.
_DRAWS = 2


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Inputs of a pair.

    Attributes:
        probes: named inputs to compare outputs on; gradients are taken on the first.
        training_batch: number of a training step to its inputs.
    """

    probes: Mapping[str, Batch]
    training_batch: Callable[[int], Batch]


def as_inputs(given: object, seed: int = 0) -> Inputs:
    """Return the probes and training batches that a user's inputs stand for.

    Args:
        given: an array; a tuple of the arrays of one call; such by name; or a function of a NumPy
            random generator that returns one of these and is called for every batch.
        seed: of the generators.
    """
    takes_generator = callable(given) and bool(inspect.signature(given).parameters)

    def drawn(*path: int) -> dict[str, Batch]:
        if not callable(given):
            return _named(given)
        return _named(given(np.random.default_rng((seed, *path))) if takes_generator else given())

    probes = {}
    for number in range(_DRAWS if takes_generator else 1):
        extra = f", draw {number + 1}" if number else ""
        probes |= {name + extra: batch for name, batch in drawn(0, number).items()}
    if takes_generator:
        return Inputs(probes, lambda step: next(iter(drawn(1, step).values())))
    batches = list(probes.values())
    return Inputs(probes, lambda step: batches[step % len(batches)])


def _named(given: object) -> dict[str, Batch]:
    """Return one or more calls, by name."""
    calls = given if isinstance(given, Mapping) else {"inputs": given}
    if not calls:
        raise ValueError("inputs: none. A check needs at least one call. Give arrays.")
    return {str(name): Batch(_arrays(str(name), call)) for name, call in calls.items()}


def _arrays(name: str, call: object) -> tuple[np.ndarray, ...]:
    arrays = call if isinstance(call, tuple | list) else (call,)
    found = []
    for place, value in enumerate(arrays):
        where = f"inputs {name}, argument {place}"
        try:
            array = np.asarray(value)
        except Exception as error:  # whatever a tensor on another device raises
            raise ValueError(
                f"{where}: {type(value).__name__} does not become an array. Give NumPy arrays."
            ) from error
        if array.dtype.kind not in "fiub":
            raise ValueError(
                f"{where}: {array.dtype}. Both frameworks take floats, integers and booleans. Give "
                "arrays of these, a tuple of them for several arguments, or calls by name."
            )
        if array.dtype.kind == "f" and not np.all(np.isfinite(array)):
            raise ValueError(
                f"{where}: not finite. Nothing can be compared after it. Give other numbers."
            )
        found.append(array)
    return tuple(found)
