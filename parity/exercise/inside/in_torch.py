"""A PyTorch starter's model, for the stages. `in_flax` has the same functions."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from unittest import mock

import numpy as np
import torch

from . import probes
from .probes import Array, Leaves, Model, Starter

NAME = "torch"


@contextlib.contextmanager
def scope() -> Iterator[None]:
    """Compute in float64, with one thread, which is enough for small models."""
    before, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    try:
        with torch.enable_grad():
            yield
    finally:
        torch.set_default_dtype(before)
        torch.set_num_threads(threads)


def array(x: Array) -> np.ndarray:
    """Copy an array to the host."""
    return x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)


def ids(tokens: np.ndarray) -> torch.Tensor:
    """Convert tokens to an array of the framework."""
    return torch.from_numpy(np.array(tokens)).long()


def build(modules: Starter) -> Model:
    """Build the starter's model with the grader's weights."""
    model = modules.model.GPT(modules.model.Config(**probes.SIZES), seed=0)
    leaves(model)
    wanted = probes.to_native(probes.weights(), NAME)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(wanted[name]))
    return model


def leaves(model: Model, sizes: Mapping[str, int] = probes.SIZES) -> Leaves:
    """Return the model's parameters."""
    found = {name: array(parameter).copy() for name, parameter in model.named_parameters()}
    return probes.from_native(found, NAME, sizes)


def logits_and_gradients(model: Model, tokens: np.ndarray) -> tuple[np.ndarray, Leaves]:
    """Return logits and the gradient of a fixed sum of them, by the framework's names."""
    logits_BTV = probes.logits_of(model(ids(tokens)))
    direction_BTV = torch.from_numpy(probes.direction("logits", tuple(logits_BTV.shape)))
    (logits_BTV * direction_BTV).sum().backward()
    gradients = {
        name: np.zeros(tuple(parameter.shape)) if parameter.grad is None else array(parameter.grad)
        for name, parameter in model.named_parameters()
    }
    return array(logits_BTV), gradients


def loss_and_gradient(
    loss: Callable[..., torch.Tensor], logits: np.ndarray, tokens: np.ndarray
) -> tuple[float, np.ndarray]:
    """Return the loss of logits and its gradient."""
    logits_BTV = torch.from_numpy(logits).requires_grad_()
    value = loss(logits_BTV, ids(tokens))
    value.backward()
    return value.item(), array(logits_BTV.grad)


def reader(model: Model) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function from tokens to logits, without gradients."""

    def read(tokens: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return array(probes.logits_of(model(ids(tokens))))

    return read


def read_on(model: Model, tokens: np.ndarray, cache: object) -> tuple[np.ndarray, object]:
    """Return logits, and the cache with the tokens in it."""
    with torch.no_grad():
        logits_BTV, cache = model(ids(tokens), cache)
    return array(logits_BTV), cache


@contextlib.contextmanager
def moved_position(model: Model, position: int) -> Iterator[None]:
    """Change the vector of one position."""
    weight = model.position_embedding.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight[position] += torch.from_numpy(probes.direction("moved", (weight.shape[1],)))
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(before)


@contextlib.contextmanager
def counted_rows(model: Model) -> Iterator[Callable[[], float]]:
    """Count the tokens that go through the linear layers; each layer counts for its share.

    Yields:
        The function that returns the count so far.
    """
    number = sum(isinstance(module, torch.nn.Linear) for module in model.modules())
    rows: list[float] = []
    forward = torch.nn.Linear.forward

    def counting(self: torch.nn.Linear, input: torch.Tensor) -> torch.Tensor:
        rows.append(input.numel() / input.shape[-1] / number)
        return forward(self, input)

    with mock.patch.object(torch.nn.Linear, "forward", counting):
        yield lambda: sum(rows)
