"""Questions to a language model, and what its answers mean."""

from parity.doctor.detectors import DETECTORS
from parity.doctor.diagnosis import Answer, Diagnosis, examine
from parity.doctor.finding import Detector, Finding
from parity.doctor.flax_patient import flax_patient
from parity.doctor.loading import as_patient, load_patient
from parity.doctor.patient import AdamW, Decoder, Patient, Score
from parity.doctor.torch_patient import torch_patient
from parity.doctor.twin_patients import twin_patient

__all__ = [
    "DETECTORS",
    "AdamW",
    "Answer",
    "Decoder",
    "Detector",
    "Diagnosis",
    "Finding",
    "Patient",
    "Score",
    "as_patient",
    "examine",
    "flax_patient",
    "load_patient",
    "torch_patient",
    "twin_patient",
]
