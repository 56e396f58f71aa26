"""The stages: what the grader has a starter do, in either framework.

A stage gets the module of the framework (`in_flax` or `in_torch`), the student's files and the
right ones. It returns plain numbers by name.
"""

from types import ModuleType
from unittest import mock

from . import probes
from .part_2 import part_2
from .probes import Model, Starter, Values
from .symptoms import symptoms


def run_stage(name: str, framework: ModuleType, modules: Starter, reference: Starter) -> Values:
    """Run one stage by its name."""
    return _STAGES[name](framework, modules, reference)


def initial_weights(framework: ModuleType, modules: Starter, reference: Starter) -> Values:
    """Return the mean and deviation of every leaf of a new model."""
    model = modules.model.GPT(modules.model.Config(**probes.START_SIZES), seed=3)
    return probes.spread(framework.leaves(model, probes.START_SIZES))


def forward_pass(framework: ModuleType, modules: Starter, reference: Starter) -> Values:
    """Return logits of several lengths, and the gradient of every leaf."""
    model = framework.build(modules)
    read, found = framework.reader(model), {}
    for rows, width in ((1, 13), (2, 1)):
        found[f"logits of {rows} x {width} tokens"] = read(probes.tokens(rows, width, 0)).tolist()
    logits_BTV, gradients = framework.logits_and_gradients(model, probes.tokens(3, 7, 0))
    found["logits of 3 x 7 tokens"] = logits_BTV.tolist()
    digests = probes.digest(probes.from_native(gradients, framework.NAME))
    return found | {f"gradient of {name}": numbers for name, numbers in digests.items()}


def loss(framework: ModuleType, modules: Starter, reference: Starter) -> Values:
    """Return the loss of given logits and its gradient."""
    value, gradient_BTV = framework.loss_and_gradient(
        modules.train.next_token_loss, probes.logits(3, 7, 0), probes.tokens(3, 7, 0)
    )
    return {"loss": value, "gradient of the logits": gradient_BTV.tolist()}


def training(framework: ModuleType, modules: Starter, reference: Starter) -> Values:
    """Take a few steps of the starter's loop with the right model and the right loss."""
    with mock.patch.object(modules.train, "next_token_loss", reference.train.next_token_loss):
        return _trained(framework, modules, framework.build(reference))


def together(framework: ModuleType, modules: Starter, reference: Starter) -> Values:
    """Take the same steps with the starter's own model and loss."""
    return _trained(framework, modules, framework.build(modules))


def _trained(framework: ModuleType, modules: Starter, model: Model) -> Values:
    losses = modules.train.train(
        model, framework.ids(probes.tokens(3, 7, 0)), probes.NUM_STEPS, probes.LEARNING_RATE
    )
    digests = probes.digest(framework.leaves(model))
    found = {f"{name} after training": numbers for name, numbers in digests.items()}
    return {"losses": [float(x) for x in losses]} | found


def generation(framework: ModuleType, modules: Starter, reference: Starter) -> Values:
    """Return the tokens that the starter's loop generates with the right model."""
    model = framework.build(reference)
    return {
        f"{number} tokens after {tokens.shape[0]} x {tokens.shape[1]}": framework.array(
            modules.generate.generate(model, framework.ids(tokens), number)
        ).tolist()
        for tokens, number in probes.PROMPTS
    }


_STAGES = {
    "initial weights": initial_weights,
    "forward pass": forward_pass,
    "loss": loss,
    "training": training,
    "generation": generation,
    "symptoms": symptoms,
    "together": together,
    "part_2": part_2,
}
