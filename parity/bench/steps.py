"""What is timed: one training step in each of its forms, behind the same four methods.

`losses` runs the first steps, `step` starts one more, `wait` waits until all are done, and
`memory_bytes` is what a step needs beyond weights, moments and batch, where that can be told.
"""

import contextlib
import dataclasses
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

import flax_gpt
import torch_gpt
from parity.frameworks.flax.donation import OPTION, donated, has_option
from parity.frameworks.flax.scope import jax_scope


class Unavailable(Exception):
    """This machine cannot run a contender; the message says why."""


class FlaxStep:
    """flax_gpt.train_step as one compiled program.

    Args:
        model: with its initial weights, which are copied.
        config: of the optimizer.
        batches: of token ids (B, T), used in turn.
        donate: whether the new state takes the memory of the old.
        device: where to train.

    Attributes:
        compile_s: seconds to trace and to compile.
    """

    framework = "flax"

    def __init__(
        self,
        model: nnx.Module,
        config: flax_gpt.TrainConfig,
        batches: Sequence[np.ndarray],
        donate: bool,
        device: jax.Device,
    ):
        self.name = "flax donated" if donate else "flax jit"
        self.ran = "train_step as one program under jax.jit, "
        self.ran += "its state donated" if donate else "its new state beside the old"
        with jax_scope(model.config.dtype, device):
            state = flax_gpt.TrainState.create(model, config)
            parameters = jax.tree.map(jnp.copy, state.parameters)  # the model is the caller's
            self._state = dataclasses.replace(state, parameters=parameters)
            self._batches = [flax_gpt.Batch(jnp.asarray(x, jnp.int32)) for x in batches]

            # Looked up when it is traced, as a caller of the package would find it.
            def step(batch: flax_gpt.Batch, state: flax_gpt.TrainState) -> tuple:
                return flax_gpt.train_step(batch, state)

            program = donated(step, 1, device) if donate else jax.jit(step)
            if donate and has_option(device):
                self.ran += f" and {OPTION} set"
            start = time.perf_counter()
            self._program = program.lower(self._batches[0], self._state).compile()
            self.compile_s = time.perf_counter() - start
        self._done = 0

    def losses(self, num_steps: int) -> list[float]:
        """The losses of the next steps."""
        return [float(self.step().loss.mean) for _ in range(num_steps)]

    def step(self) -> flax_gpt.StepResult:
        """Starts a step."""
        batch = self._batches[self._done % len(self._batches)]
        result, self._state = self._program(batch, self._state)
        self._done += 1
        return result

    def wait(self) -> None:
        """Until every step is done."""
        jax.block_until_ready(self._state)

    @property
    def memory_bytes(self) -> int | None:
        """By the compiler's own account; None where it keeps none."""
        found = self._program.memory_analysis()
        if found is None:
            return None
        fresh = found.output_size_in_bytes - found.alias_size_in_bytes
        return int(found.temp_size_in_bytes + fresh)


class TorchStep:
    """torch_gpt.train_step, eager or with a compiled model.

    Args:
        model: with its initial weights, on its device; it is trained.
        config: of the optimizer.
        batches: of token ids (B, T), used in turn.
        compiled: whether to compile the model's forward and backward pass.

    Attributes:
        compile_s: seconds by which the first step, which compiles, was longer than the second;
            None for eager. Compiled from nothing: what earlier runs left on disk is not used.
        memory_bytes: see the module; None on a CPU, where torch does not count.
    """

    framework = "torch"

    def __init__(
        self,
        model: torch.nn.Module,
        config: torch_gpt.TrainConfig,
        batches: Sequence[np.ndarray],
        compiled: bool,
    ):
        self.name = "torch compiled" if compiled else "torch eager"
        self.ran = "train_step, eager"
        if compiled:
            self.ran = (
                "train_step, the model's forward and backward by torch.compile in one graph; loss, "
                "clipping and AdamW eager"
            )
            # In place, so that train_step finds the model that it knows. Graphs of earlier models
            # count against a limit, behind which torch stops compiling.
            torch.compiler.reset()
            model.compile(fullgraph=True)
        self._compiled, self._device = compiled, next(model.parameters()).device
        self._state = torch_gpt.TrainState.create(model, config)
        self._batches = [
            torch_gpt.Batch(torch.from_numpy(np.array(x)).long().to(self._device)) for x in batches
        ]
        self._done = 0
        self.compile_s: float | None = None
        self.memory_bytes: int | None = None

    def losses(self, num_steps: int) -> list[float]:
        """The losses of the first steps, two at least.

        Raises:
            Unavailable: when there is nothing here to compile with.
        """
        start = time.perf_counter()
        try:
            with _cold_and_quiet() if self._compiled else contextlib.nullcontext():
                found = [float(self.step().loss.mean)]
        except RuntimeError as error:
            if not self._compiled:
                raise
            raise Unavailable(_first_line(error)) from error
        middle = time.perf_counter()
        with self._counted_memory():
            found.append(float(self.step().loss.mean))
        if self._compiled:
            self.compile_s = max(0.0, 2 * middle - start - time.perf_counter())
        return found + [float(self.step().loss.mean) for _ in range(num_steps - 2)]

    def step(self) -> torch_gpt.StepResult:
        """Starts a step."""
        batch = self._batches[self._done % len(self._batches)]
        result, self._state = torch_gpt.train_step(batch, self._state)
        self._done += 1
        return result

    def wait(self) -> None:
        """Until every step is done."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    @contextlib.contextmanager
    def _counted_memory(self) -> Iterator[None]:
        """Sets `memory_bytes` to what is allocated inside, at its peak."""
        if self._device.type != "cuda":
            yield
            return
        # The step drops the last gradients first; they are not to be subtracted from its own.
        self._state.optimizer.zero_grad()
        self.wait()
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        yield
        self.wait()
        self.memory_bytes = torch.cuda.max_memory_allocated(self._device) - before


@contextlib.contextmanager
def _cold_and_quiet() -> Iterator[None]:
    """Compiles without the caches on disk, and without what compilers say to their developers."""
    variable, level = "TORCHINDUCTOR_CACHE_DIR", logging.root.manager.disable
    before = os.environ.get(variable)
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            # Without caches, torch leaves a folder behind for every graph.
            tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
            torch.compiler.config.patch(force_disable_caches=True),
        ):
            warnings.simplefilter("ignore")
            os.environ[variable] = folder
            yield
    finally:
        logging.disable(level)
        os.environ.pop(variable, None)
        if before is not None:
            os.environ[variable] = before


def _first_line(error: BaseException) -> str:
    """An error's first line, without what torch adds for its own developers."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
