"""From `my_pkg.net:build` to a patient."""

import copy
import dataclasses
from typing import Any

import torch
from flax import nnx
from torch import nn

from parity.doctor.finding import tokens
from parity.doctor.flax_patient import flax_patient
from parity.doctor.huggingface import causal_lm_patient, is_causal_lm
from parity.doctor.patient import Patient
from parity.doctor.sizes import NotLogits
from parity.doctor.torch_patient import torch_patient
from parity.system.import_target import built, in_a_line, load_attribute


def load_patient(target: str, loss: str | None = None, **options: Any) -> Patient:
    """The patient that a function builds.

    Args:
        target: of a function that gives a torch module, an NNX module or a Patient.
        loss: target of a loss, (logits, labels, counts) to a mean; None for the model's own.
        options: of `torch_patient` and `flax_patient`; `trained` too.

    Raises:
        ValueError: when it does not load, raises, or gives something else.
    """
    found, score = load_attribute(target), loss and load_attribute(loss)
    if loss and not callable(score):
        raise ValueError(
            f"{loss}: an object of type {type(score).__name__}. A loss is a function of "
            "logits, labels and counts."
        )
    model = built(target, found, (nn.Module, nnx.Module))
    return as_patient(model, target, score, **options)


def as_patient(
    model: Any, name: str, loss: Any = None, *, trained: bool = False, **options: Any
) -> Patient:
    """A model as a patient, by what it is, that has given logits once.

    A torch model in half precision is examined in float32: the questions are about the program, and
    one of them is about types.

    Raises:
        ValueError: when it is no model, or gives no logits.
    """
    if isinstance(model, Patient):
        if loss or any(options.values()):
            raise ValueError(
                f"{name}: gave a Patient, which has a loss and sizes of its own. Give them where "
                "it is made."
            )
        patient = model
    elif isinstance(model, nn.Module):
        if any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()):
            model = copy.deepcopy(model).float()
        make = causal_lm_patient if is_causal_lm(model) else torch_patient
        patient = make(model, loss=loss, **options)
    elif isinstance(model, nnx.Module):
        patient = flax_patient(model, loss=loss, **options)
    else:
        raise ValueError(
            f"{name}: gave an object of type {type(model).__name__}. The doctor examines "
            "a torch.nn.Module, a flax.nnx.Module or a parity.doctor.Patient. Return one of them."
        )
    try:
        patient.logits(tokens(patient, 2, 16), None)
    except NotLogits:
        raise
    except Exception as error:
        raise ValueError(
            f"{name}: called with tokens, {patient.name} raised {type(error).__name__}: "
            f"{in_a_line(error)}"
        ) from error
    return dataclasses.replace(patient, trained=trained or patient.trained)
