"""Any PyTorch module against any Flax NNX module.

infer.py     rules="auto": the weight map from names, shapes, types and experiment
pairs.py     two modules, what to call them with and a weight map: `check_pair`
convert.py   a file of one module's weights as a file of its port's

What one module needs alone, its half of a pair and its training, is in `parity/flax_side.py` and
`parity/torch_side.py`, which import one framework each.
"""

from parity.foreign.convert import convert_file
from parity.foreign.infer import infer_rules
from parity.foreign.pairs import check_pair, pair_of
from parity.inputs import Inputs, as_inputs

__all__ = ["Inputs", "as_inputs", "check_pair", "convert_file", "infer_rules", "pair_of"]
