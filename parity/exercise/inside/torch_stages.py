"""What the grader has a PyTorch starter do, stage by stage. Read beside flax_stages.py.

A stage gives plain numbers by name. Modules have a starter's files as attributes: model, cache,
train, generate.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from . import probes

FRAMEWORK = "torch"


@contextlib.contextmanager
def scope() -> Iterator[None]:
    """Everything in float64; one thread, for it is little."""
    before, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    try:
        with torch.enable_grad():
            yield
    finally:
        torch.set_default_dtype(before)
        torch.set_num_threads(threads)


def array(x: Any) -> np.ndarray:
    """Any array on the host."""
    return x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)


def ids(tokens: np.ndarray) -> torch.Tensor:
    """Tokens as the framework takes them."""
    return torch.from_numpy(tokens).long()


def build(modules: Any) -> Any:
    """The starter's model with the grader's weights."""
    model = modules.model.GPT(modules.model.Config(**probes.SIZES), seed=0)
    leaves(model)
    wanted = probes.to_native(probes.weights(), FRAMEWORK)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(wanted[name]))
    return model


def leaves(model: Any, sizes: Mapping[str, int] = probes.SIZES) -> probes.Leaves:
    """The model's parameters."""
    found = {name: array(parameter).copy() for name, parameter in model.named_parameters()}
    return probes.from_native(found, FRAMEWORK, sizes)


def initial_weights(modules: Any, reference: Any) -> dict[str, Any]:
    """Mean and deviation of everything that a new model holds."""
    model = modules.model.GPT(modules.model.Config(**probes.START_SIZES), seed=3)
    return probes.spread(leaves(model, probes.START_SIZES))


def forward_pass(modules: Any, reference: Any) -> dict[str, Any]:
    """Logits of several lengths, and the gradient by every parameter."""
    model = build(modules)
    read, found = reader(model), {}
    for rows, width in ((1, 13), (2, 1)):
        found[f"logits of {rows} x {width} tokens"] = read(probes.tokens(rows, width, 0)).tolist()
    logits_BTV, gradients = _logits_and_gradients(model, probes.tokens(3, 7, 0))
    found["logits of 3 x 7 tokens"] = logits_BTV.tolist()
    digests = probes.digest(gradients)
    return found | {f"gradient of {name}": numbers for name, numbers in digests.items()}


def _logits_and_gradients(model: Any, tokens: np.ndarray) -> tuple[np.ndarray, probes.Leaves]:
    logits_BTV = logits_of(model(ids(tokens)))
    weighed_BTV = torch.from_numpy(probes.direction("logits", tuple(logits_BTV.shape)))
    (logits_BTV * weighed_BTV).sum().backward()
    gradients = {
        name: np.zeros(tuple(parameter.shape)) if parameter.grad is None else array(parameter.grad)
        for name, parameter in model.named_parameters()
    }
    return array(logits_BTV), probes.from_native(gradients, FRAMEWORK)


def loss(modules: Any, reference: Any) -> dict[str, Any]:
    """The loss of given logits, and its gradient by them."""
    logits_BTV = torch.from_numpy(probes.logits(3, 7, 0)).requires_grad_()
    value = modules.train.next_token_loss(logits_BTV, ids(probes.tokens(3, 7, 0)))
    value.backward()
    return {"loss": value.item(), "gradient of the logits": array(logits_BTV.grad).tolist()}


def training(modules: Any, reference: Any) -> dict[str, Any]:
    """A few steps of the starter's loop on a right model with a right loss."""
    own = modules.train.next_token_loss
    modules.train.next_token_loss = reference.train.next_token_loss
    try:
        return _trained(modules, build(reference))
    finally:
        modules.train.next_token_loss = own


def together(modules: Any, reference: Any) -> dict[str, Any]:
    """The same with the starter's own model and loss."""
    return _trained(modules, build(modules))


def _trained(modules: Any, model: Any) -> dict[str, Any]:
    losses = modules.train.train(
        model, ids(probes.tokens(3, 7, 0)), probes.NUM_STEPS, probes.LEARNING_RATE
    )
    digests = probes.digest(leaves(model))
    found = {f"{name} after training": numbers for name, numbers in digests.items()}
    return {"losses": [float(x) for x in losses]} | found


def generation(modules: Any, reference: Any) -> dict[str, Any]:
    """Tokens that the starter's loop has a right model choose."""
    model = build(reference)
    return {
        f"{number} tokens behind {tokens.shape[0]} x {tokens.shape[1]}": array(
            modules.generate.generate(model, ids(tokens), number)
        ).tolist()
        for tokens, number in probes.PROMPTS
    }


def logits_of(found: Any) -> torch.Tensor:
    """What a model gave, without the cache that it may have given too."""
    return found[0] if isinstance(found, tuple) else found


def reader(model: Any) -> Callable[[np.ndarray], np.ndarray]:
    """Tokens to logits, without gradients."""

    def read(tokens: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return array(logits_of(model(ids(tokens))))

    return read


def read_on(model: Any, tokens: np.ndarray, cache: Any) -> tuple[np.ndarray, Any]:
    """Logits, and the cache with the tokens in it."""
    with torch.no_grad():
        logits_BTV, cache = model(ids(tokens), cache)
    return array(logits_BTV), cache


@contextlib.contextmanager
def moved_position(model: Any, position: int) -> Iterator[None]:
    """The model with another vector at one position."""
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
def counted_rows(model: Any) -> Iterator[Callable[[], float]]:
    """Yields the function that says how many tokens went through the linear layers so far.

    Each layer counts for its share of all of them.
    """
    number = sum(isinstance(module, torch.nn.Linear) for module in model.modules())
    rows: list[float] = []
    forward = torch.nn.Linear.forward

    def counting(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        rows.append(x.numel() / x.shape[-1] / number)
        return forward(self, x)

    torch.nn.Linear.forward = counting
    try:
        yield lambda: sum(rows)
    finally:
        torch.nn.Linear.forward = forward
