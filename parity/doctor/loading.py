"""From `my_pkg.net:build` to a patient."""

import copy
import dataclasses
import importlib
import importlib.util
import os
import sys
from pathlib import Path
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


def load_attribute(target: str) -> Any:
    """What `package.module:name` or `folder/file.py:name` stands for.

    Raises:
        ValueError: when there is no such module or name, or the module does not import.
    """
    place, colon, name = target.rpartition(":")
    if not colon or not place or not name:
        raise ValueError(
            f"{target}: no function. A target is a module and a name in it. Write my_pkg.net:build "
            "or net.py:build."
        )
    if place.endswith(".py") and not Path(place).is_file():
        raise ValueError(f"{target}: no file {place}. A target is a file that exists.")
    # For good: what is built may import more when it is called.
    for folder in (os.getcwd(), os.path.dirname(os.path.abspath(place))):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    try:
        module = (
            _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        )
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"{target}: importing {place} raised {type(error).__name__}: {_line(error)}"
        ) from error
    if not hasattr(module, name):
        raise ValueError(f"{target}: {place} has no {name}. A target is a name in a module.")
    return getattr(module, name)


def load_patient(target: str, loss: str | None = None, **options: Any) -> Patient:
    """The patient that a function builds.

    Args:
        target: of a function that gives a torch module, an NNX module or a Patient.
        loss: target of a loss, (logits, labels, counts) to a mean; None for the model's own.
        options: of `torch_patient` and `flax_patient`; `trained` too.

    Raises:
        ValueError: when it does not load, raises, or gives something else.
    """
    build, score = load_attribute(target), loss and load_attribute(loss)
    if loss and not callable(score):
        raise ValueError(
            f"{loss}: an object of type {type(score).__name__}. A loss is a function of "
            "logits, labels and counts."
        )
    made = isinstance(build, nn.Module | nnx.Module) or not callable(build)
    try:
        model = build if made else build()
    except (Exception, SystemExit) as error:
        raise ValueError(f"{target}: raised {type(error).__name__}: {_line(error)}") from error
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
            f"{_line(error)}"
        ) from error
    return dataclasses.replace(patient, trained=trained or patient.trained)


def _from_file(path: Path) -> Any:
    # Not by its own name, which may be that of a module that somebody else needs.
    spec = importlib.util.spec_from_file_location(f"examined_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:200]
