"""Find the tensor of a training step that is the first not to be finite."""

import dataclasses

import numpy as np

from parity.frameworks.batch import Batch
from parity.frameworks.capture import Trace
from parity.frameworks.flax.runner import FlaxRunner
from parity.frameworks.leaves import Leaves
from parity.frameworks.torch.runner import TorchRunner
from parity.system.devices import Devices
from parity.training.run import RunConfig
from parity.twins.both import HANDLES
from parity.twins.pair import spec

_RUNNERS = {"flax": FlaxRunner, "torch": TorchRunner}


def first_non_finite(
    config: RunConfig,
    framework: str,
    parameters: Leaves,
    inputs: tuple[np.ndarray, ...],
    devices: Devices,
) -> str:
    """Return the name of the first tensor of a step that holds a number that is not finite.

    Looks at the weights, then at every module's output in the forward pass, then at the gradients
    from the last module to the first. Without dropout, so that a mask cannot hide it.

    Args:
        config: of the run.
        framework: flax or torch.
        parameters: weights before the step.
        inputs: of the step.
        devices: where to run.
    """
    for name, leaf in parameters.items():
        if not np.all(np.isfinite(leaf)):
            return f"the weight {name}"
    model = spec(
        HANDLES[framework], config.model, constants=lambda _: dataclasses.asdict(config.training)
    )
    dtype = config.training.compute_dtype or config.model.dtype
    run = _RUNNERS[framework](model, parameters, dtype, getattr(devices, framework))
    order: dict[str, int] = {}
    bad_outputs: list[str] = []

    def look(trace: Trace) -> None:
        order[trace.path] = len(order)
        if not np.all(np.isfinite(trace.output.astype(np.float64))):
            bad_outputs.append(trace.path or "the model")

    run.traces(Batch(inputs), look)
    if bad_outputs:
        return f"the output of {bad_outputs[0]} in the forward pass"
    _, gradients = run.gradients(Batch(inputs))
    bad = [x for x, leaf in gradients.items() if not np.all(np.isfinite(leaf.astype(np.float64)))]
    if bad:
        last = max(bad, key=lambda leaf: order.get(leaf.rpartition(".")[0], -1))
        return f"the gradient of {last}"
    return "the loss or the norm of the gradient, whose parts are finite"
