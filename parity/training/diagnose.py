"""Where the numbers of a training step first leave the range."""

from types import ModuleType

import numpy as np

import flax_gpt
import torch_gpt
from parity.frameworks.capture import Trace
from parity.frameworks.flax.runner import FlaxRunner
from parity.frameworks.leaves import Leaves
from parity.frameworks.spec import Batch, ModelSpec
from parity.frameworks.torch.runner import TorchRunner
from parity.system.devices import Devices
from parity.training.run import RunConfig


def first_non_finite(
    config: RunConfig,
    framework: str,
    parameters: Leaves,
    inputs: tuple[np.ndarray, ...],
    devices: Devices,
) -> str:
    """The first tensor of a step that holds a number that is not finite, in words.

    Looks at the weights, then at every module's output on the way forward, then at the gradients
    on the way back. Without dropout, so that a mask cannot hide it.

    Args:
        config: the run's.
        framework: flax or torch.
        parameters: weights before the step.
        inputs: of the step.
        devices: where to run.
    """
    for name, leaf in parameters.items():
        if not np.all(np.isfinite(leaf)):
            return f"the weight {name}"
    dtype = config.training["compute_dtype"] or config.model["dtype"]
    if framework == "flax":
        run = FlaxRunner(_side(flax_gpt, config), parameters, dtype, devices.flax)
    else:
        run = TorchRunner(_side(torch_gpt, config), parameters, dtype, devices.torch)
    batch = Batch(inputs)
    order: dict[str, int] = {}
    bad_outputs: list[str] = []

    def look(trace: Trace) -> None:
        order[trace.path] = len(order)
        if not np.all(np.isfinite(trace.output.astype(np.float64))):
            bad_outputs.append(trace.path or "the model")

    run.traces(batch, look)
    if bad_outputs:
        return f"the output of {bad_outputs[0]} on the way forward"
    _, gradients = run.gradients(batch)
    bad = [x for x, leaf in gradients.items() if not np.all(np.isfinite(leaf.astype(np.float64)))]
    if bad:
        last = max(bad, key=lambda leaf: order.get(leaf.rpartition(".")[0], -1))
        return f"the gradient of {last}"
    return "the loss or the norm of the gradient, whose parts are finite"


def _side(package: ModuleType, config: RunConfig) -> ModelSpec:
    """A twin as the harness runs it."""
    return ModelSpec(
        name=package.__name__,
        build=lambda dtype: package.GPT(package.GPTConfig(**config.model | {"dtype": dtype})),
        forward=lambda model, tokens: model(tokens)[0],
        loss=lambda model, tokens: package.next_token_loss(model(tokens)[0], tokens).mean,
    )
