"""The timed training steps: the Flax twin's jitted, the PyTorch twin's eager or compiled."""

import contextlib
import dataclasses
import itertools
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import torch

import flax_gpt
import torch_gpt
from parity.bench.machine import Unavailable, wait_for_torch
from parity.frameworks.flax.donation import OPTION, donated, has_option
from parity.system.devices import Devices
from parity.twins.flax import FlaxTwin
from parity.twins.torch import TorchTwin

Batch = TypeVar("Batch")
State = TypeVar("State")
Result = flax_gpt.StepResult | torch_gpt.StepResult


class TrainingStep(Generic[Batch, State]):
    """A twin's train_step in one of its forms.

    Args:
        name: in tables; its first word is the framework.
        ran: description of what is timed.
        step: from a batch and a state to a result and the next state.
        state: the first.
        batches: used in turn.
        wait: blocks until a state is computed.

    Attributes:
        compile_s: seconds of compilation; None if nothing is compiled.
        memory_bytes: what a step needs beyond weights, moments and batch; None where unknown.
    """

    def __init__(
        self,
        name: str,
        ran: str,
        step: Callable[[Batch, State], tuple[Result, State]],
        state: State,
        batches: Sequence[Batch],
        wait: Callable[[State], object],
    ):
        self.name, self.ran, self._state = name, ran, state
        self._program, self._batches, self._wait = step, itertools.cycle(batches), wait
        self.compile_s: float | None = None
        self.memory_bytes: int | None = None

    def losses(self) -> list[float]:
        """Run the first two steps and return their losses."""
        return [float(self._step().loss.mean) for _ in range(2)]

    def seconds(self, num_steps: int) -> float:
        """Time steps in a row, with one wait at their end, in seconds per step."""
        self._wait(self._state)
        start = time.perf_counter()
        for _ in range(num_steps):
            self._step()
        self._wait(self._state)
        return (time.perf_counter() - start) / num_steps

    def _step(self) -> Result:
        result, self._state = self._program(next(self._batches), self._state)
        return result


class _TorchStep(TrainingStep[torch_gpt.Batch, torch_gpt.TrainState]):
    """torch_gpt.train_step on its device, whose memory is unknown on a CPU.

    The seconds of compilation are those by which the first step is longer than the second.
    """

    compiles = False

    def losses(self) -> list[float]:
        """Return the losses of the first two steps.

        Raises:
            Unavailable: if there is no compiler.
        """
        start = time.perf_counter()
        with _compiling() if self.compiles else contextlib.nullcontext():
            first = float(self._step().loss.mean)
        middle = time.perf_counter()
        # The step frees the last gradients first, which would be subtracted from its own.
        self._state.optimizer.zero_grad()
        wait_for_torch()
        on_gpu, before = torch.cuda.is_initialized(), torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats() if on_gpu else None
        second = float(self._step().loss.mean)
        if on_gpu:
            self.memory_bytes = torch.cuda.max_memory_allocated() - before
        if self.compiles:
            self.compile_s = max(0.0, 2 * middle - start - time.perf_counter())
        return [first, second]


def training_steps(
    config: flax_gpt.GPTConfig,
    training: flax_gpt.TrainConfig,
    batches: Sequence[np.ndarray],
    devices: Devices,
) -> Iterator[TrainingStep]:
    """Make the step in every form, from the same weights.

    Args:
        config: of the model.
        training: of the optimizer.
        batches: of token ids (B, T), used in turn.
        devices: where to train; jax's is its default device.

    Yields:
        Each step as it is made.
    """
    twin = FlaxTwin.build(config, devices.flax, seed=0)
    leaves = twin.leaves()
    for donate in (False, True):
        state = flax_gpt.TrainState.create(twin.copy().model, training)
        yield _flax_step(state, batches, donate, devices.flax)
    constants = torch_gpt.TrainConfig(**dataclasses.asdict(training))
    for compiled in (False, True):
        model = TorchTwin.build(config, devices.torch, leaves=leaves.items()).model
        if compiled:
            # In place, so that train_step finds the model that it knows. Graphs of earlier models
            # count against a limit, beyond which torch stops compiling.
            torch.compiler.reset()
            model.compile(fullgraph=True)
        state = torch_gpt.TrainState.create(model, constants)
        yield _torch_step(state, batches, compiled, devices.torch)


def _flax_step(
    state: flax_gpt.TrainState, batches: Sequence[np.ndarray], donate: bool, device: jax.Device
) -> TrainingStep:
    """Compile flax_gpt.train_step to one program, which may write the new state over the old."""
    ran = "train_step as one program under jax.jit, "
    ran += "its state donated" if donate else "its new state beside the old"
    ran += f" and {OPTION} set" if donate and has_option(device) else ""
    made = [flax_gpt.Batch(jnp.asarray(x, jnp.int32)) for x in batches]

    # Looked up when it is traced, as a caller of the package would find it.
    def step(
        batch: flax_gpt.Batch, state: flax_gpt.TrainState
    ) -> tuple[flax_gpt.StepResult, flax_gpt.TrainState]:
        return flax_gpt.train_step(batch, state)

    program = donated(step, 1, device) if donate else jax.jit(step)
    start = time.perf_counter()
    compiled = program.lower(made[0], state).compile()
    seconds = time.perf_counter() - start
    name = "flax donated" if donate else "flax jit"
    found = TrainingStep(name, ran, compiled, state, made, jax.block_until_ready)
    found.compile_s, memory = seconds, compiled.memory_analysis()
    if memory is not None:
        fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
        found.memory_bytes = int(memory.temp_size_in_bytes + fresh)
    return found


def _torch_step(
    state: torch_gpt.TrainState, batches: Sequence[np.ndarray], compiled: bool, device: torch.device
) -> TrainingStep:
    """Return torch_gpt.train_step, eager or on a model that compiles."""
    ran = "train_step, eager"
    if compiled:
        ran = (
            "train_step, the model's forward and backward by torch.compile in one graph; loss, "
            "clipping and AdamW eager"
        )
    made = [torch_gpt.Batch(torch.from_numpy(np.array(x)).long().to(device)) for x in batches]
    name, step = "torch compiled" if compiled else "torch eager", torch_gpt.train_step
    found = _TorchStep(name, ran, step, state, made, wait_for_torch)
    found.compiles = compiled
    return found


@contextlib.contextmanager
def _compiling() -> Iterator[None]:
    """Compile without caches on disk, and without compilers' messages to their developers.

    Raises:
        Unavailable: if that fails.
    """
    variable, level = "TORCHINDUCTOR_CACHE_DIR", logging.root.manager.disable
    before = os.environ.get(variable)
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            # Without caches, torch leaves a folder for every graph.
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
            # Installed at import, where no type checker sees it.
            torch.compiler.config.patch(  # pyrefly: ignore[missing-attribute]
                force_disable_caches=True
            ),
        ):
            warnings.simplefilter("ignore")
            os.environ[variable] = folder
            yield
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise Unavailable(lines[0] if lines else type(error).__name__) from error
    finally:
        logging.disable(level)
        os.environ.pop(variable, None)
        if before is not None:
            os.environ[variable] = before
