"""Any PyTorch module against any Flax NNX module.

sides.py      a module, a way to call it and an optimizer as one half of a pair
trainers.py   training of either module, with all of its state as named arrays
inputs.py     what the user gives to call the modules with, as probes and batches
infer.py      rules="auto": the weight map from names, shapes, types and experiment
pairs.py      all of it together: `check_pair`
"""

from parity.foreign.convert import convert_file
from parity.foreign.infer import infer_rules
from parity.foreign.inputs import Inputs, as_inputs
from parity.foreign.pairs import check_pair, pair_of

__all__ = ["Inputs", "as_inputs", "check_pair", "convert_file", "infer_rules", "pair_of"]
