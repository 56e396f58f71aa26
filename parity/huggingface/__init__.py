"""Checkpoint folders of Hugging Face's transformers, in both directions."""

from parity.huggingface.families import FAMILIES
from parity.huggingface.folder import Checkpoint, Weights, check_new, save
from parity.huggingface.hub import folder_of
from parity.huggingface.pairs import pair_of
from parity.huggingface.stream import Choice, stream
from parity.huggingface.tokens import Tokens
from parity.huggingface.twin_folder import TwinFolder, open_checkpoint, write_twin

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
