"""Checkpoint folders of Hugging Face's transformers, in both directions."""

from parity.huggingface.families import FAMILIES
from parity.huggingface.folder import STORED, Checkpoint, Weights, save
from parity.huggingface.hub import folder_of
from parity.huggingface.twin_folder import TwinFolder, open_checkpoint, write_twin

__all__ = [
    "FAMILIES",
    "STORED",
    "Checkpoint",
    "TwinFolder",
    "Weights",
    "folder_of",
    "open_checkpoint",
    "save",
    "write_twin",
]
