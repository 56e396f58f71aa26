"""A Flax NNX model with weights, a dtype and a device, which answers the levels in NumPy."""

import contextlib
import copy
from collections.abc import Callable
from typing import Any, Protocol, Self, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from parity.frameworks.batch import Batch
from parity.frameworks.capture import Backward, OnTrace, Trace
from parity.frameworks.flax.capture import backward_flax, capture_flax
from parity.frameworks.flax.leaves import flax_leaves, load_flax, state_leaves
from parity.frameworks.flax.purity import flax_purity
from parity.frameworks.flax.scope import Scoped, jax_scope
from parity.frameworks.flax.uses import flax_uses
from parity.frameworks.leaves import Arrays, CastLater, Leaves, cast_array
from parity.frameworks.protocols import Decoder, Trainer
from parity.frameworks.purity import Purity
from parity.frameworks.spec import ModelSpec
from parity.frameworks.uses import Uses
from parity.system.memory import is_large

FlaxSpec = ModelSpec[nnx.Module, jax.Array]


class _Program(Protocol):
    """A function under `jax.jit`, with a method that jax's stubs leave out."""

    def __call__(self, *arrays: Any) -> Any: ...

    def clear_cache(self) -> None: ...


class FlaxRunner:
    """A `LiveRunner` of a Flax NNX model, loaded when it is needed, and again after `release`.

    Its leaves may have any float type; `dtype` is the one to compute in.
    """

    def __init__(self, spec: FlaxSpec, leaves: Arrays, dtype: str, device: jax.Device):
        self.name = spec.name
        # As they were given: a copy in another type would be one more model in memory.
        self._spec, self._leaves = spec, leaves
        self._dtype, self._device = dtype, device
        self._loaded: tuple[nnx.Module, nnx.State] | None = None
        # What programs are compiled with: the same after every loading.
        self._fixed: tuple[nnx.GraphDef[nnx.Module], nnx.State] | None = None
        self._forward = cast(_Program, jax.jit(self._pure(spec.forward)))
        loss_and_gradients = jax.value_and_grad(self._pure(spec.loss))
        self._loss_and_gradients = cast(_Program, jax.jit(loss_and_gradients))

    def at(self, leaves: Arrays) -> Self:
        """Return the same model with other weights; what is compiled stays so."""
        if self._fixed is None:
            self._load_once()
        other = copy.copy(self)
        other._leaves, other._loaded = leaves, None
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

    def outputs(self, batch: Batch) -> np.ndarray:
        """Return the model's output."""
        with self._scope():
            return np.asarray(self._forward(self._parameters, *self._arrays(batch)))

    def gradients(self, batch: Batch) -> tuple[float, Leaves]:
        """Return the loss and its gradient by leaf."""
        with self._scope():
            loss, gradients = self._loss_and_gradients(self._parameters, *self._arrays(batch))
            return float(loss), state_leaves(gradients)

    def forward_purity(self, batch: Batch) -> Purity:
        """Count the operations of the forward pass that are not in float64."""
        with self._scope():
            return flax_purity(self._forward, self._parameters, *self._arrays(batch))

    def gradient_purity(self, batch: Batch) -> Purity:
        """Count the operations of the forward and backward pass that are not in float64."""
        with self._scope():
            return flax_purity(self._loss_and_gradients, self._parameters, *self._arrays(batch))

    def traces(self, batch: Batch, on_trace: OnTrace) -> None:
        """Pass inputs and output of every module in a forward pass to `on_trace`."""
        # A capture may have a thread of its own, and every thread has its own precision.
        with self._scope(), jax.default_matmul_precision("highest"):
            arrays = self._arrays(batch)
            capture_flax(self.module, lambda: self._spec.forward(self.module, *arrays), on_trace)

    def uses(self, batch: Batch) -> Uses:
        """Return how a forward pass uses each leaf."""
        with self._scope():
            arrays = self._arrays(batch)
            return flax_uses(self.module, lambda module: self._spec.forward(module, *arrays))

    def backward(self, batch: Batch) -> list[Backward]:
        """Return the gradients of the loss at every module's calls, last call first."""
        with self._scope(), jax.default_matmul_precision("highest"):
            arrays, loss = self._arrays(batch), self._pure(self._spec.loss)
            return backward_flax(self.module, lambda: loss(self._parameters, *arrays))

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

    def _make_decoder(self) -> Decoder:
        assert self._spec.decoder is not None, f"{self.name} has no cache"
        return self._spec.decoder(self.module)

    def _load(self) -> nnx.Module:
        with self._scope():
            module = self._spec.build(self._dtype)
            load_flax(module, CastLater(self._leaves, self._dtype))
            module.eval()
            return module

    def _load_once(self) -> tuple[nnx.Module, nnx.State]:
        """Return the module and its parameters."""
        if self._loaded is None:
            module = self._load()
            with self._scope():
                graphdef, parameters, rest = nnx.split(module, nnx.Param, ...)
            self._fixed = self._fixed or (graphdef, rest)
            self._loaded = module, parameters
        return self._loaded

    @property
    def _parameters(self) -> nnx.State:
        return self._load_once()[1]

    def _arrays(self, batch: Batch) -> tuple[jax.Array, ...]:
        return tuple(jnp.asarray(cast_array(array, self._dtype)) for array in batch.inputs)

    def _scope(self) -> contextlib.AbstractContextManager[None]:
        return jax_scope(self._dtype, self._device)

    def _pure(self, function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        """Return (parameters, *arrays) to what the function gives of a copy of the model."""

        def call(parameters: nnx.State, *arrays: jax.Array) -> jax.Array:
            assert self._fixed is not None, "programs run on parameters of a loaded model"
            graphdef, rest = self._fixed
            return function(nnx.merge(graphdef, parameters, rest, copy=True), *arrays)

        return call
