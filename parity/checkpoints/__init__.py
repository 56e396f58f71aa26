"""Checkpoint folders of Hugging Face's transformers, in both directions.

hub           the folder of a name
families      each family of checkpoints as a table
config        config.json in both directions
rotary        its entries about rotary positions and kinds of layers
leftovers     names of tensors as tools leave them
adapter       products of low rank, added to weights
files         JSON and safetensors, checked as they are read
weights       what both kinds of folder offer, and the twins with their weights
folder        a folder of transformers
twin_folder   a folder with the weights of one twin
write         new folders, whole or not at all
tokens        text in and out
stream        both twins write in lockstep
pairs         both twins as a pair for the check
"""

from parity.checkpoints.families import FAMILIES
from parity.checkpoints.folder import Checkpoint
from parity.checkpoints.hub import folder_of
from parity.checkpoints.pairs import pair_of
from parity.checkpoints.stream import Choice, Writing, stream
from parity.checkpoints.tokens import Tokens
from parity.checkpoints.twin_folder import TwinFolder, open_checkpoint, write_twin
from parity.checkpoints.weights import Weights, flax_model, torch_model
from parity.checkpoints.write import check_new, save

__all__ = [
    "FAMILIES",
    "Checkpoint",
    "Choice",
    "Tokens",
    "TwinFolder",
    "Weights",
    "Writing",
    "check_new",
    "flax_model",
    "folder_of",
    "open_checkpoint",
    "pair_of",
    "save",
    "stream",
    "torch_model",
    "write_twin",
]
