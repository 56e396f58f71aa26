"""A user's inputs as probes to compare outputs on and as batches to train on."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence, Set
from typing import TypeGuard

import numpy as np

from parity.frameworks.batch import Argument, Batch
from parity.frameworks.default_call import Signature
from parity.system.import_target import raised

# Draws from a function of a random generator: one input may miss what another reaches.
_DRAWS = 2
# What the name of a call ends with whose number of rows is none that the user gave.
OTHER_SIZE = ", another batch size"


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Inputs of a pair.

    Attributes:
        probes: named inputs to compare outputs on; gradients are taken on the first.
        training_batch: number of a training step to its inputs.
    """

    probes: Mapping[str, Batch]
    training_batch: Callable[[int], Batch]


def as_inputs(
    given: object, seed: int = 0, signatures: Sequence[Signature] = (), whole: bool = False
) -> Inputs:
    """Return the probes and training batches that a user's inputs stand for.

    Args:
        given: what `check_pair` takes: one call, several by name, or a function that gives these.
        seed: of the generators.
        signatures: of the modules. A mapping whose keys are parameters of theirs is one call with
            keywords; any other names calls.
        whole: whether a mapping that names calls is one argument instead.
    """
    takes_generator = callable(given) and bool(inspect.signature(given).parameters)
    names = {name for signature in signatures for name in signature.defaults}

    def drawn(*path: int) -> dict[str, Batch]:
        found = _called(given, np.random.default_rng((seed, *path)) if takes_generator else None)
        is_argument = whole and isinstance(found, Mapping) and not _are_keywords(found, names)
        return _named((found,) if is_argument else found, names)

    probes: dict[str, Batch] = {}
    for number in range(_DRAWS if takes_generator else 1):
        extra = f", draw {number + 1}" if number else ""
        probes |= {name + extra: batch for name, batch in drawn(0, number).items()}
    if takes_generator:
        return Inputs(probes, lambda step: next(iter(drawn(1, step).values())))
    batches = list(probes.values())
    return Inputs(probes, lambda step: batches[step % len(batches)])


def _called(given: object, generator: np.random.Generator | None) -> object:
    """Return inputs, or what a function returns for them."""
    if not callable(given):
        return given
    try:
        return given() if generator is None else given(generator)
    except Exception as error:
        name = getattr(given, "__name__", "the function")
        raise ValueError(
            f"inputs: {name} raised {raised(error)}. It gives what both modules are called with. "
            "Mend it."
        ) from error


def _named(given: object, names: Set[str]) -> dict[str, Batch]:
    """Return one or more calls, by name."""
    calls: Mapping[str, object] = {"inputs": given}
    if isinstance(given, Mapping) and not _are_keywords(given, names):
        calls = given
    if not calls:
        raise ValueError("inputs: none. A check needs at least one call. Give arrays.")
    return {str(name): _batch(str(name), call, names) for name, call in calls.items()}


def _are_keywords(given: object, names: Set[str]) -> TypeGuard[Mapping[str, object]]:
    return isinstance(given, Mapping) and bool(given) and set(given) <= names


def _batch(name: str, call: object, names: Set[str]) -> Batch:
    """Return the arguments of one call: by position, by name, or both as (positions, names)."""
    positions: Sequence[object] = call if isinstance(call, tuple | list) else (call,)
    keywords: Mapping[str, object] = {}
    if len(positions) and _are_keywords(last := positions[-1], names):
        positions, keywords = positions[:-1], last
        if len(positions) == 1 and isinstance(positions[0], tuple | list):
            positions = positions[0]
    where = f"inputs {name}, argument"
    by_position = tuple(_argument(f"{where} {place}", x) for place, x in enumerate(positions))
    by_name = {key: _argument(f"{where} {key}", x) for key, x in keywords.items()}
    return Batch(by_position, keywords=by_name)


def _argument(where: str, value: object) -> Argument:
    """Return an argument with NumPy arrays for those of any framework; other values stay."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {key: _argument(f"{where}, {key}", x) for key, x in value.items()}
    if isinstance(value, tuple | list) and not _is_table(value):
        items = [_argument(f"{where}, {place}", x) for place, x in enumerate(value)]
        return items if isinstance(value, list) else getattr(value, "_make", tuple)(items)
    try:
        if callable(detach := getattr(value, "detach", None)):  # a torch tensor
            tensor = detach().cpu().resolve_conj()
            value = tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor
        array = np.asarray(value)
        array = array.astype(np.float32) if array.dtype.kind == "V" else array  # bfloat16 of jax
    except Exception as error:  # whatever a tensor on another device raises
        raise ValueError(
            f"{where}: {type(value).__name__} does not become an array. Give NumPy arrays."
        ) from error
    if array.dtype.kind not in "fiubc":
        raise ValueError(
            f"{where}: {array.dtype}. Both frameworks take floats, integers and booleans. Give "
            "arrays of these, a tuple of them for several arguments, a dict of them by the names "
            "of parameters, or calls by name."
        )
    if array.dtype.kind in "fc" and np.any(np.isnan(array)):
        raise ValueError(
            f"{where}: not finite, it holds NaN. Nothing can be compared after it. Give numbers."
        )
    return array


def _is_table(value: Sequence[object]) -> bool:
    """Whether a list is an array that is written out."""
    if isinstance(value, tuple) or not value:
        return False
    return all(
        isinstance(x, bool | int | float) or (isinstance(x, list) and _is_table(x)) for x in value
    )
