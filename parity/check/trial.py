"""One call of both modules before a check: a module that cannot be called is refused in a line."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Generic, Self, TypeVar

import numpy as np

from parity.check.outputs import paired
from parity.frameworks.batch import Argument, Batch, Outputs
from parity.frameworks.capture import leaves_of
from parity.frameworks.default_call import Signature
from parity.frameworks.handle import Handle
from parity.frameworks.protocols import Unusable
from parity.frameworks.spec import ModuleUse
from parity.pair.inputs import OTHER_SIZE, Inputs, as_inputs
from parity.system.import_target import raised
from parity.system.random_state import kept_random_state

Result = TypeVar("Result")
ModuleT = TypeVar("ModuleT")
FlaxT = TypeVar("FlaxT")
TorchT = TypeVar("TorchT")


@dataclasses.dataclass(frozen=True)
class Side(Generic[ModuleT]):
    """One of two modules, as it is called."""

    handle: Handle
    module: ModuleT
    use: ModuleUse

    def outputs(self, batch: Batch) -> tuple[Outputs, set[str]]:
        """Return the output of a call, and the paths of the arrays of the framework in it.

        Raises:
            ValueError: for a module that raises, with what was tried and the line to write.
        """
        return self._run(
            batch, lambda: self.handle.tried(self.handle.spec(self.module, self.use), batch)
        )

    def prepared(self, batch: Batch) -> Self:
        """Return the side with a module that can be checked; raises as `outputs`."""
        module = self._run(batch, lambda: self.handle.prepared(self.module, self.use, batch))
        return dataclasses.replace(self, module=module)

    def _run(self, batch: Batch, call: Callable[[], Result]) -> Result:
        try:
            with kept_random_state():
                return call()
        except Unusable as error:
            about = f"{self.handle.NAME}: {type(self.module).__name__}"
            raise ValueError(f"{about}: {error}.") from error
        except Exception as error:
            name, by_user = self.handle.NAME, self.use.call
            called = type(self.module).__name__ if by_user is None else f"the call of {name}"
            names = _names(Signature.of(self.module, by_user), batch)
            given = zip(names, (*batch.inputs, *batch.keywords.values()), strict=True)
            shown = ", ".join(f"{x} {_shown(value)}" for x, value in given)
            raise ValueError(
                f"{name}: {called}({shown}) raised {raised(error)}. Both modules are called with "
                "the same arguments. Mend the inputs, or write how this one is called: "
                f"{_line(Signature.of(self.module), names)}, given as --{name}-call file.py:call "
                f"or {name}=ModuleUse(call=call)."
            ) from error


def called(
    sides: tuple[Side[FlaxT], Side[TorchT]], inputs: object, seed: int
) -> tuple[Inputs, tuple[Side[FlaxT], Side[TorchT]], list[list[str]]]:
    """Return a user's inputs as calls of both sides, the sides prepared, and `scored_leaves`.

    A mapping that is neither a call nor several is one argument.

    Raises:
        ValueError: see `Side.outputs`.
    """
    signatures = [Signature.of(side.module, side.use.call) for side in sides]

    def tried(
        whole: bool,
    ) -> tuple[Inputs, tuple[Side[FlaxT], Side[TorchT]], list[list[str]]]:
        calls = as_inputs(inputs, seed, signatures, whole)
        first = next(iter(calls.probes.values()))
        prepared = sides[0].prepared(first), sides[1].prepared(first)
        return calls, prepared, scored_leaves(prepared, first)

    try:
        return tried(whole=False)
    except ValueError as error:
        with contextlib.suppress(ValueError):
            return tried(whole=True)
        raise error from error.__cause__


def with_other_size(sides: Sequence[Side], calls: Inputs) -> Inputs:
    """Return calls with one more, of another number of rows, if both modules take it.

    What depends on the batch size by mistake is equal for any one size.
    """
    name, first = next(iter(calls.probes.items()))
    other = first.resized() if len({x.num_rows for x in calls.probes.values()}) == 1 else None
    if other is None:
        return calls
    try:
        for side in sides:
            side.outputs(other)
    except ValueError:
        return calls
    return dataclasses.replace(calls, probes={**calls.probes, name + OTHER_SIZE: other})


def scored_leaves(sides: Sequence[Side], batch: Batch) -> list[list[str]]:
    """Return the paths of the leaves that are floats with a gradient on both sides, in one order.

    Raises:
        ValueError: see `Side.outputs`.
    """
    (flax, ours), (torch, theirs) = (side.outputs(batch) for side in sides)
    scored: list[list[str]] = [[], []]
    for leaf in paired(flax, torch):
        arrays = [x for x in (leaf.flax, leaf.torch) if x is not None and x.dtype.kind in "fc"]
        if len(arrays) == 2 and leaf.flax_path in ours and leaf.torch_path in theirs:
            scored[0].append(leaf.flax_path)
            scored[1].append(leaf.torch_path)
    return scored


def _names(signature: Signature, batch: Batch) -> list[str]:
    """Return the name of each argument, of the module's where it is given by position."""
    known = list(signature.defaults)[: len(batch.inputs)]
    known += [f"x{place}" for place in range(len(known), len(batch.inputs))]
    return known + list(batch.keywords)


def _line(signature: Signature, names: list[str]) -> str:
    """Return a function that calls a module with arguments of these names, by its own names."""
    free = [x for x in signature.required + list(signature.defaults) if x not in names]
    own = iter(dict.fromkeys(x for x in free if not signature.is_filled(x)))
    filled = [x for x in signature.required if signature.is_filled(x) and x not in names]
    passed = [
        x if x in signature.defaults or (mine := next(own, None)) is None else f"{mine}={x}"
        for x in names
    ] + [f"{x}={x}" for x in filled]
    return f"def call(module, {', '.join(names + filled)}): return module({', '.join(passed)})"


def _shown(value: Argument) -> str:
    """Return the type and shape of an argument."""
    arrays = [x for x in leaves_of(value) if isinstance(x, np.ndarray)]
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    return f"{type(value).__name__} of {len(arrays)} arrays" if arrays else repr(value)[:40]
