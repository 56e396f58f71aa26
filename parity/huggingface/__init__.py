"""Checkpoint folders of Hugging Face's transformers, in both directions."""

from parity.huggingface.families import FAMILIES
from parity.huggingface.folder import STORED, Checkpoint, new_folder, save

__all__ = ["FAMILIES", "STORED", "Checkpoint", "new_folder", "save"]
