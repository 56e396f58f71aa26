"""A Flax NNX model with weights, a dtype and a device, which answers the levels in NumPy."""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Collection, Iterator
from typing import Any, Protocol, Self, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from parity.frameworks.batch import Batch, Outputs
from parity.frameworks.capture import Backward, OnTrace, Trace
from parity.frameworks.flax.calls import Arguments, arguments, returning_leaves
from parity.frameworks.flax.capture import backward_flax, capture_flax
from parity.frameworks.flax.leaves import flax_leaves, load_flax, state_leaves
from parity.frameworks.flax.lift import Log, is_narrow, line_of_error
from parity.frameworks.flax.program import Program
from parity.frameworks.flax.purity import flax_purity
from parity.frameworks.flax.scope import jax_scope, lowered
from parity.frameworks.flax.uses import flax_uses
from parity.frameworks.leaves import Arrays, CastLater, Leaves
from parity.frameworks.protocols import Decoder, NotCompared, Trainer
from parity.frameworks.purity import Purity
from parity.frameworks.scoped import Scoped
from parity.frameworks.spec import ModelSpec
from parity.frameworks.uses import Uses
from parity.system.import_target import raised
from parity.system.memory import is_large

FlaxSpec = ModelSpec[nnx.Module, jax.Array]
Result = TypeVar("Result")
Tree = TypeVar("Tree")


def is_trained(path: tuple[object, ...], variable: object) -> bool:
    """Whether a variable of a module is a parameter of floats or complex numbers."""
    types = [getattr(x, "dtype", type(x)) for x in jax.tree.leaves(variable)]
    return isinstance(variable, nnx.Param) and all(jnp.issubdtype(x, jnp.inexact) for x in types)


def conjugated(gradients: Tree) -> Tree:
    """Return gradients as torch defines them for complex numbers: jax has their conjugates."""
    return jax.tree.map(lambda x: x.conj() if jnp.iscomplexobj(x) else x, gradients)


class _Program(Protocol):
    """A function under `jax.jit`, with a method that jax's stubs leave out."""

    def __call__(self, *arrays: Any) -> Any: ...

    def clear_cache(self) -> None: ...


class FlaxRunner:
    """A `LiveRunner` of a Flax NNX model, loaded when it is needed, and again after `release`.

    Its leaves may have any float type; `dtype` is the one to compute in. With `lift`, float64 runs
    are lifted; where the model raises on that account, they are not, and its purity says so.

    Args:
        spec: of the model.
        leaves: its weights.
        dtype: to compute in.
        device: to compute on.
        lift: run in float64 what the model asks for in a narrower type, where dtype is float64.
        code_leaves: leaves that the model's code computed when it was built, in their own type.
    """

    def __init__(
        self,
        spec: FlaxSpec,
        leaves: Arrays,
        dtype: str,
        device: jax.Device,
        lift: bool = False,
        code_leaves: Collection[str] = (),
    ):
        self.name = spec.name
        # As they were given: a copy in another type would be one more model in memory.
        self._spec, self._leaves = spec, leaves
        self._dtype, self._device, self._code_leaves = dtype, device, code_leaves
        self._log = Log() if lift and dtype == "float64" else None
        self._raised_lifted: list[str] = []  # shared with copies at other weights
        self._loaded: tuple[nnx.Module, nnx.State] | None = None
        # What programs are compiled with: the same after every loading.
        self._fixed: tuple[nnx.GraphDef[nnx.Module], nnx.State] | None = None
        self._forward = cast(_Program, jax.jit(self._pure(returning_leaves(spec.forward))))
        loss_and_gradients = jax.value_and_grad(self._pure(spec.loss))
        self._loss_and_gradients = cast(_Program, jax.jit(loss_and_gradients))

    def at(self, leaves: Arrays) -> Self:
        """Return the same model with other weights; what is compiled stays so.

        Programs hold what is no parameter, such as statistics, fixed. They are compiled anew where
        that is other.
        """
        if self._fixed is None:
            self._load_once()
        assert self._fixed is not None
        names = state_leaves(self._fixed[1])
        if not all(np.array_equal(leaves[x], self._leaves[x], equal_nan=True) for x in names):
            return self._anew(leaves, self._log)
        other = copy.copy(self)
        other._leaves, other._loaded = leaves, None
        return other

    def moved(self) -> Self:
        """Return the same model with the constants that it holds in a narrow type moved."""
        return self._anew(self._leaves, None if self._log is None else Log(moves=True))

    def _anew(self, leaves: Arrays, log: Log | None) -> Self:
        """Return a runner with programs of its own, lifted if there is a log."""
        code = self._code_leaves
        other = type(self)(self._spec, leaves, self._dtype, self._device, code_leaves=code)
        other._log = log
        return other

    @property
    def module(self) -> nnx.Module:
        """The model itself."""
        return self._load_once()[0]

    def leaves(self) -> Leaves:
        """Return the model's weights in its dtype."""
        with self._scope():
            return flax_leaves(self.module)

    def release(self) -> None:
        """Free the model's memory until it is asked for again, and a large one's programs."""
        self._loaded = None
        if is_large(self._leaves.values()):
            self._forward.clear_cache()
            self._loss_and_gradients.clear_cache()

    def outputs(self, batch: Batch) -> Outputs:
        """Return the model's output, leaf by leaf."""

        def run() -> Outputs:
            call = self._call(batch)
            try:
                return self._forward(*call).outputs()
            except jax.errors.JAXTypeError:  # it looks at numbers, which a program does not have
                return self._pure(returning_leaves(self._spec.forward))(*call).outputs()

        return self._attempt(run)

    def gradients(self, batch: Batch) -> tuple[float, Leaves]:
        """Return the loss and its gradient by leaf."""
        try:
            loss, gradients = self._attempt(lambda: self._loss_and_gradients(*self._call(batch)))
        except jax.errors.JAXTypeError as error:
            raise NotCompared(
                f"{self.name} looks at numbers on its way, so jax has no gradient of it: "
                f"{raised(error)}"
            ) from error
        with self._scope():
            return float(loss), conjugated(state_leaves(gradients))

    def forward_purity(self, batch: Batch) -> Purity:
        """Count the operations of the forward pass that are not in float64."""
        return self._purity(self._forward, batch)

    def gradient_purity(self, batch: Batch) -> Purity:
        """Count the operations of the forward and backward pass that are not in float64."""
        try:
            return self._purity(self._loss_and_gradients, batch)
        except NotCompared:  # there is no loss
            return self.forward_purity(batch)

    def traces(self, batch: Batch, on_trace: OnTrace) -> None:
        """Pass inputs and output of every module in a forward pass to `on_trace`."""
        # A capture may have a thread of its own, and every thread has its own precision.
        with self._scope(), jax.default_matmul_precision("highest"):
            call, forward, module = self._arguments(batch), self._spec.forward, self.module
            capture_flax(module, lambda: forward(module, *call.inputs, **call.keywords), on_trace)

    def uses(self, batch: Batch) -> Uses:
        """Return how a forward pass uses each leaf."""
        with self._scope():
            call, forward = self._arguments(batch), returning_leaves(self._spec.forward)
            return flax_uses(self.module, lambda x: forward(x, *call.inputs, **call.keywords))

    @contextlib.contextmanager
    def program(self, batch: Batch) -> Iterator[Program]:
        """Yield a forward pass as a program that can be changed."""
        with self._scope(), jax.default_matmul_precision("highest"):
            call, forward = self._arguments(batch), self._spec.forward
            yield Program(self.module, lambda x: forward(x, *call.inputs, **call.keywords))

    def backward(self, batch: Batch) -> list[Backward]:
        """Return the gradients of the loss at every module's calls, last call first."""
        with self._scope(), jax.default_matmul_precision("highest"):
            call, loss = self._arguments(batch), self._pure(self._spec.loss)
            return backward_flax(self.module, lambda: loss(self._parameters, call))

    def trainer(self, num_steps: int) -> Trainer:
        """Return a trainer, with a copy of the model, for a schedule of `num_steps`."""
        assert self._spec.trainer is not None, f"{self.name} is not trained"
        with self._scope():
            return cast(Trainer, Scoped(self._spec.trainer(self._load(), num_steps), self._scope))

    def decoder(self) -> Decoder:
        """Return the model's decoder."""
        with self._scope():
            return cast(Decoder, Scoped(self._make_decoder(), self._scope))

    def decoder_traces(self, call: Callable[[Decoder], object]) -> list[Trace]:
        """Return inputs and output of every module while `call` uses the model's decoder."""
        traces: list[Trace] = []
        with self._scope(), jax.disable_jit():
            capture_flax(self.module, lambda: call(self._make_decoder()), traces.append)
        return traces

    def _purity(self, program: _Program, batch: Batch) -> Purity:
        try:
            found = self._attempt(lambda: flax_purity(program, *self._call(batch)))
        except jax.errors.JAXTypeError as error:
            return Purity(1, {f"operations that jax cannot list, {raised(error)}": 1})
        raised_lifted = dict.fromkeys(self._raised_lifted, 1)
        found = dataclasses.replace(found, impure=raised_lifted | found.impure)
        if self._log is not None:
            log = Log()
            self._held(log)
            found.lifted.update(log)
            parts = (part for _, part in nnx.iter_modules(self.module))
            if any(isinstance(x, nnx.WeightNorm) and not x.epsilon for x in parts):
                found.lifted["nnx.WeightNorm without its epsilon, which torch lacks"] = 1
        return found

    def _held(self, log: Log) -> Leaves:
        """Return the floats that the model computed when it was built, widened."""
        held = {name: self._leaves[name] for name in self._code_leaves}
        return {name: log.wide(x, name) for name, x in held.items() if is_narrow(x.dtype)}

    def _attempt(self, run: Callable[[], Result]) -> Result:
        """Run in the scope; no more lifted from here on, if it raises only lifted."""
        try:
            with self._scope():
                return lowered(run)
        except Exception as error:
            if self._log is None or self._raised_lifted:
                raise
            self._raised_lifted.append(f"{type(error).__name__} at {line_of_error(error)}")
            first = error
        self._loaded = None
        try:
            with self._scope():
                return lowered(run)
        except Exception:
            self._raised_lifted.clear()
            raise first from None

    def _make_decoder(self) -> Decoder:
        assert self._spec.decoder is not None, f"{self.name} has no cache"
        return self._spec.decoder(self.module)

    def _load(self) -> nnx.Module:
        with self._scope():
            module = self._spec.build(self._dtype)
            held = self._held(self._log) if self._log is not None else {}
            load_flax(module, CastLater({**self._leaves, **held}, self._dtype))
            module.eval()
            return module

    def _load_once(self) -> tuple[nnx.Module, nnx.State]:
        """Return the module and its parameters."""
        if self._loaded is None:
            module = self._load()
            with self._scope():
                graphdef, parameters, rest = nnx.split(module, is_trained, ...)
            self._fixed = self._fixed or (graphdef, rest)
            self._loaded = module, parameters
        return self._loaded

    @property
    def _parameters(self) -> nnx.State:
        return self._load_once()[1]

    def _call(self, batch: Batch) -> tuple[nnx.State, Arguments]:
        return self._parameters, self._arguments(batch)

    def _arguments(self, batch: Batch) -> Arguments:
        return arguments(batch.inputs, batch.keywords, self._dtype)

    def _scope(self) -> contextlib.AbstractContextManager[None]:
        log = None if self._raised_lifted else self._log
        return jax_scope(self._dtype, self._device, log)

    def _pure(self, function: Callable[..., Result]) -> Callable[[nnx.State, Arguments], Result]:
        """Return (parameters, arguments) to what the function gives of a copy of the model."""

        def call(parameters: nnx.State, given: Arguments) -> Result:
            assert self._fixed is not None, "programs run on parameters of a loaded model"
            graphdef, rest = self._fixed
            model = nnx.merge(graphdef, parameters, rest, copy=True)
            return function(model, *given.inputs, **given.keywords)

        return call
