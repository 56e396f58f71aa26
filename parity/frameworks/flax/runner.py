"""A Flax NNX model with weights, a dtype and a device: it answers the levels in NumPy.

Read beside parity/torch_run.py; the two classes have the same methods.
"""

import contextlib
import copy
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from parity.frameworks.capture import Backward, OnTrace, Trace
from parity.frameworks.flax.capture import backward_flax, capture_flax
from parity.frameworks.flax.leaves import load_flax, state_leaves
from parity.frameworks.flax.purity import flax_purity
from parity.frameworks.flax.scope import Scoped, jax_scope
from parity.frameworks.leaves import CastLater, Leaves, cast_array
from parity.frameworks.protocols import Decoder, Trainer
from parity.frameworks.purity import Purity
from parity.frameworks.spec import Batch, ModelSpec
from parity.system.memory import is_large


class FlaxRunner:
    """One model. Training and decoding start from fresh copies of it.

    It is loaded when it is needed, and again after it was released.
    """

    def __init__(
        self, side: ModelSpec, leaves: Mapping[str, np.ndarray], dtype: str, device: jax.Device
    ):
        self.name = side.name
        # As they were given: a copy in another type would be one more model in memory.
        self._spec, self._leaves = side, leaves
        self._dtype, self._device = dtype, device
        self._parts: tuple[nnx.Module, nnx.State] | None = None
        # What programs are compiled with: the same after every loading.
        self._fixed: tuple[nnx.GraphDef, nnx.State] | None = None
        self._forward = jax.jit(self._call(side.forward))
        self._loss_and_gradients = jax.jit(jax.value_and_grad(self._call(side.loss)))

    def at(self, leaves: Mapping[str, np.ndarray]) -> "FlaxRunner":
        """The same model with other weights; what is compiled stays so."""
        if self._fixed is None:
            self._loaded()
        other = copy.copy(self)
        other._leaves, other._parts = leaves, None
        return other

    @property
    def module(self) -> nnx.Module:
        """The model itself."""
        return self._loaded()[0]

    def release(self) -> None:
        """Gives the model's memory back until it is asked for again, and a large one's programs."""
        self._parts = None
        if is_large(self._leaves.values()):
            self._forward.clear_cache()
            self._loss_and_gradients.clear_cache()

    def outputs(self, batch: Batch) -> np.ndarray:
        """The model's output."""
        with self._scope():
            return np.asarray(self._forward(self._parameters, *self._arrays(batch)))

    def gradients(self, batch: Batch) -> tuple[float, Leaves]:
        """The loss, and its gradient by leaf."""
        with self._scope():
            loss, gradients = self._loss_and_gradients(self._parameters, *self._arrays(batch))
            return float(loss), state_leaves(gradients)

    def forward_purity(self, batch: Batch) -> Purity:
        """What the forward pass is made of."""
        with self._scope():
            return flax_purity(self._forward, self._parameters, *self._arrays(batch))

    def gradient_purity(self, batch: Batch) -> Purity:
        """What the forward and backward pass are made of."""
        with self._scope():
            return flax_purity(self._loss_and_gradients, self._parameters, *self._arrays(batch))

    def traces(self, batch: Batch, on_trace: OnTrace) -> None:
        """Tells inputs and outputs of every module in a forward pass."""
        # A capture may have a thread of its own, and every thread has its own precision.
        with self._scope(), jax.default_matmul_precision("highest"):
            arrays = self._arrays(batch)
            capture_flax(self.module, lambda: self._spec.forward(self.module, *arrays), on_trace)

    def backward(self, batch: Batch) -> list[Backward]:
        """The gradients of the loss that every module passes back, the last call first."""
        with self._scope(), jax.default_matmul_precision("highest"):
            arrays, loss = self._arrays(batch), self._call(self._spec.loss)
            return backward_flax(self.module, lambda: loss(self._parameters, *arrays))

    def trainer(self, num_steps: int) -> Trainer:
        """The side's trainer for a training of `num_steps`, on weights of its own."""
        with self._scope():
            return Scoped(self._spec.trainer(self._load(), num_steps), self._scope)

    def decoder(self) -> Decoder:
        """The side's decoder."""
        with self._scope():
            return Scoped(self._spec.decoder(self.module), self._scope)

    def decoder_traces(self, call: Callable[[Decoder], object]) -> list[Trace]:
        """Inputs and outputs of every module while `call` uses the side's decoder."""
        traces: list[Trace] = []
        with self._scope(), jax.disable_jit():
            capture_flax(self.module, lambda: call(self._spec.decoder(self.module)), traces.append)
        return traces

    def _load(self) -> nnx.Module:
        with self._scope():
            module = self._spec.build(self._dtype)
            load_flax(module, CastLater(self._leaves, self._dtype))
            module.eval()
            return module

    def _loaded(self) -> tuple[nnx.Module, nnx.State]:
        """The module and its parameters."""
        if self._parts is None:
            module = self._load()
            with self._scope():
                graphdef, parameters, rest = nnx.split(module, nnx.Param, ...)
            self._fixed = self._fixed or (graphdef, rest)
            self._parts = module, parameters
        return self._parts

    @property
    def _parameters(self) -> nnx.State:
        return self._loaded()[1]

    def _arrays(self, batch: Batch) -> tuple[jax.Array, ...]:
        return tuple(jnp.asarray(cast_array(array, self._dtype)) for array in batch.inputs)

    def _scope(self) -> contextlib.AbstractContextManager:
        return jax_scope(self._dtype, self._device)

    def _call(self, function):
        def call(parameters: nnx.State, *arrays: jax.Array):
            graphdef, rest = self._fixed
            return function(nnx.merge(graphdef, parameters, rest, copy=True), *arrays)

        return call
