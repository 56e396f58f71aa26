"""Turn `my_pkg.net:build` into a language model under examination."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from flax import nnx
from torch import nn

from parity.doctor.finding import tokens
from parity.doctor.flax import FlaxModel
from parity.doctor.model import LanguageModel
from parity.doctor.sizes import NotLogits
from parity.doctor.torch import TorchModel
from parity.doctor.transformers import TransformersModel, is_causal_lm
from parity.system.import_target import built, in_a_line, load_attribute


def load_model(target: str, loss: str | None = None, **options: Any) -> LanguageModel:
    """Build the model that a target names.

    Args:
        target: of a function that returns a torch module, an NNX module or a LanguageModel.
        loss: target of a loss, (logits, labels, counts) to a mean; None for the model's own.
        options: of `TorchModel` and `FlaxModel`.

    Raises:
        ValueError: when it does not load, raises, or returns something else.
    """
    found, score = load_attribute(target), loss and load_attribute(loss)
    if loss and not callable(score):
        raise ValueError(
            f"{loss}: an object of type {type(score).__name__}. A loss is a function of "
            "logits, labels and counts."
        )
    return as_model(built(target, found, (nn.Module, nnx.Module)), target, score, **options)


def as_model(
    model: Any,
    name: str,
    loss: Callable[..., Any] | None = None,
    *,
    trained: bool = False,
    **options: Any,
) -> LanguageModel:
    """Wrap a module by its kind, and see that it returns logits.

    A torch model in half precision is examined in float32: the questions are about the program, and
    one of them is about types.

    Raises:
        ValueError: when it is no model, or returns no logits.
    """
    if isinstance(model, LanguageModel):
        if loss or any(options.values()):
            raise ValueError(
                f"{name}: gave a LanguageModel, which has a loss and sizes of its own. Give them "
                "where it is made."
            )
        found = copy.copy(model)
        found.trained = trained or model.trained
    elif isinstance(model, nn.Module):
        if any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()):
            model = copy.deepcopy(model).float()
        kind = TransformersModel if is_causal_lm(model) else TorchModel
        found = kind(model, loss=loss, trained=trained, **options)
    elif isinstance(model, nnx.Module):
        found = FlaxModel(model, loss=loss, trained=trained, **options)
    else:
        raise ValueError(
            f"{name}: gave an object of type {type(model).__name__}. The doctor examines a "
            "torch.nn.Module, a flax.nnx.Module or a parity.doctor.LanguageModel. Return one of "
            "them."
        )
    try:
        found.logits(tokens(found, 2, 16), None)
    except NotLogits:
        raise
    except Exception as error:
        raise ValueError(
            f"{name}: called with tokens, {found.name} raised {type(error).__name__}: "
            f"{in_a_line(error)}"
        ) from error
    return found
