"""Goldens: what one framework computed, in a file that the other is checked against alone.

file.py       the format: one safetensors file
record.py     runs a module and keeps what it computed
recorded.py   answers the levels from a file, as a run answers them from a model
check.py      climbs the levels with one module that runs and one that was recorded
in_flax.py    what both need of Flax; in_torch.py the same of PyTorch

Only the framework of the module that runs is ever imported.
"""

from parity.golden.check import check, weight_rules
from parity.golden.file import Golden, read
from parity.golden.record import record

__all__ = ["Golden", "check", "read", "record", "weight_rules"]
