"""Checkpoint folders of Hugging Face's transformers, in both directions."""

from parity.checkpoints.families import FAMILIES
from parity.checkpoints.folder import Checkpoint, Weights, check_new, save
from parity.checkpoints.hub import folder_of
from parity.checkpoints.pairs import pair_of
from parity.checkpoints.stream import Choice, stream
from parity.checkpoints.tokens import Tokens
from parity.checkpoints.twin_folder import TwinFolder, open_checkpoint, write_twin

__all__ = [
    "FAMILIES",
    "Checkpoint",
    "Choice",
    "Tokens",
    "TwinFolder",
    "Weights",
    "check_new",
    "folder_of",
    "open_checkpoint",
    "pair_of",
    "save",
    "stream",
    "write_twin",
]
