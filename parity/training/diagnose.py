"""Where the numbers of a training step first leave the range."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

import flax_gpt
import torch_gpt
from parity.capture import Trace, capture_flax, capture_torch
from parity.environment import Devices, jax_scope
from parity.leaves import Leaves, dotted, load_flax, load_torch, to_numpy


def first_non_finite(
    config: Any,
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
    narrow = config.training["compute_dtype"] or config.model["dtype"]
    sizes = dict(config.model) | {"dtype": narrow}
    look = _flax if framework == "flax" else _torch
    with jax_scope(narrow, devices.flax):
        traces, gradients = look(sizes, parameters, inputs[0], devices)
    for trace in traces:
        if not np.all(np.isfinite(np.asarray(trace.output, np.float64))):
            return f"the output of {trace.path or 'the model'} on the way forward"
    order = {trace.path: place for place, trace in enumerate(traces)}
    bad = [name for name, leaf in gradients.items() if not np.all(np.isfinite(leaf))]
    if bad:
        last = max(bad, key=lambda leaf: order.get(leaf.rpartition(".")[0], -1))
        return f"the gradient of {last}"
    return "the norm of the gradient, whose parts are finite"


def _flax(
    sizes: dict[str, Any], parameters: Leaves, tokens: np.ndarray, devices: Devices
) -> tuple[list[Trace], Leaves]:
    model = flax_gpt.GPT(flax_gpt.GPTConfig(**sizes))
    dtype = jnp.dtype(sizes["dtype"])
    load_flax(model, {name: leaf.astype(dtype) for name, leaf in parameters.items()})
    tokens = jnp.asarray(tokens, jnp.int32)
    traces = capture_flax(model, lambda: model(tokens))
    graphdef, weights = nnx.split(model)

    def loss(weights):
        logits, _ = nnx.merge(graphdef, weights)(tokens)
        return flax_gpt.next_token_loss(logits, tokens).mean

    flat = nnx.to_flat_state(jax.jit(jax.grad(loss))(weights))
    return traces, {dotted(path): np.asarray(g[...], np.float64) for path, g in flat}


def _torch(
    sizes: dict[str, Any], parameters: Leaves, tokens: np.ndarray, devices: Devices
) -> tuple[list[Trace], Leaves]:
    model = torch_gpt.GPT(torch_gpt.GPTConfig(**sizes | {"dtype": "float64"}))
    load_torch(model, {name: leaf.astype(np.float64) for name, leaf in parameters.items()})
    model = model.to(getattr(torch, sizes["dtype"])).to(devices.torch)
    tokens = torch.from_numpy(tokens).long().to(devices.torch)
    traces = capture_torch(model, lambda: model(tokens))
    torch_gpt.next_token_loss(model(tokens)[0], tokens).mean.backward()
    grads = {name: to_numpy(p.grad).astype(np.float64) for name, p in model.named_parameters()}
    return traces, grads
