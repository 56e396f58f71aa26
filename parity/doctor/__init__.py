"""Questions to a language model, and what its answers mean."""

from parity.doctor.detectors import DETECTORS
from parity.doctor.diagnosis import Answer, Diagnosis, examine
from parity.doctor.finding import Detector, Finding
from parity.doctor.flax import FlaxModel
from parity.doctor.loading import as_model, load_model
from parity.doctor.model import AdamW, LanguageModel, Score
from parity.doctor.torch import TorchModel
from parity.doctor.twins import twin_model

__all__ = [
    "DETECTORS",
    "AdamW",
    "Answer",
    "Detector",
    "Diagnosis",
    "Finding",
    "FlaxModel",
    "LanguageModel",
    "Score",
    "TorchModel",
    "as_model",
    "examine",
    "load_model",
    "twin_model",
]
