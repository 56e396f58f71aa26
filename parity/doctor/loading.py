"""Turn `my_pkg.net:build` into a language model under examination."""

import copy
from typing import Unpack, cast

import torch
from flax import nnx
from torch import nn

from parity.doctor.flax import FlaxModel
from parity.doctor.model import LanguageModel
from parity.doctor.probes import tokens
from parity.doctor.sizes import NotLogits, Options
from parity.doctor.torch import TorchModel
from parity.doctor.transformers import TransformersModel, is_causal_lm
from parity.system.import_target import built, in_a_line, load_attribute


def load_model(
    target: str, loss_target: str | None = None, **options: Unpack[Options]
) -> LanguageModel:
    """Return the model that a target names.

    Args:
        target: of a function that returns a torch module, an NNX module or a LanguageModel.
        loss_target: target of a loss, (logits, labels, counts) to a mean; None for the model's own.
        options: of `TorchModel` and `FlaxModel`.

    Raises:
        ValueError: when it does not load, raises, or returns something else.
    """
    found = load_attribute(target)
    if loss_target:
        options["loss"] = loss = load_attribute(loss_target)
        if not callable(loss):
            raise ValueError(
                f"{loss_target}: an object of type {type(loss).__name__}. A loss is a function of "
                "logits, labels and counts."
            )
    return as_model(built(target, found, (nn.Module, nnx.Module)), target, **options)


def as_model(model: object, target: str, **options: Unpack[Options]) -> LanguageModel:
    """Return a module wrapped by its kind, which was seen to return logits.

    A model in half precision is examined in float32: the questions are about the program, and one
    of them is about types. A compiled one is examined as the program that was compiled.

    Raises:
        ValueError: when it is no model, or returns no logits.
    """
    if isinstance(model, LanguageModel):
        if any(value for option, value in options.items() if option != "trained"):
            raise ValueError(
                f"{target}: gave a LanguageModel, which has a loss and sizes of its own. Give them "
                "where it is made."
            )
        found = copy.copy(model)
        found.trained = options.get("trained") or model.trained
    elif isinstance(model, nn.Module):
        model = cast(nn.Module, getattr(model, "_orig_mod", model))  # of torch.compile
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise ValueError(
                f"{target}: {type(model).__name__} has an encoder, which sees a whole text. The "
                "doctor examines models of the next token. Give its decoder alone."
            )
        if any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()):
            model = copy.deepcopy(model).float()
        kind = TransformersModel if is_causal_lm(model) else TorchModel
        found = kind(model, **options)
    elif isinstance(model, nnx.Module):
        found = FlaxModel(model, **options)
        if found.dtype != "float64":
            found = found.cast("float32")
    else:
        raise ValueError(
            f"{target}: gave an object of type {type(model).__name__}. The doctor examines a "
            "torch.nn.Module, a flax.nnx.Module or a parity.doctor.LanguageModel. Return one of "
            "them."
        )
    try:
        with torch.compiler.set_stance("force_eager"):
            found.logits(tokens(found, 2, 16), None)
    except NotLogits:
        raise
    except Exception as error:
        raise ValueError(
            f"{target}: called with tokens, {found.name} raised {type(error).__name__}: "
            f"{in_a_line(error)}"
        ) from error
    return found
