"""The check of the check: faults that it must detect, locate and explain, and pairs that are right.

fault.py           a fault as data
twin_faults.toml   faults of the twins
plan_faults.toml   faults of their caches and decoders, in ways that only plans take
pair_faults.toml   faults of ports as users write them, and of their rules
pairs/             those ports
trial.py           one fault planted, one check
run.py             all of them, as a table
"""

from parity.faults.selftest.fault import FAULTS, PLAN_FAULTS, Fault
from parity.faults.selftest.run import SelfTest, clean, self_test
from parity.faults.selftest.trial import PAIRS, Outcome, pair_module, port, small_twins, trial

__all__ = [
    "FAULTS",
    "PAIRS",
    "PLAN_FAULTS",
    "Fault",
    "Outcome",
    "SelfTest",
    "clean",
    "pair_module",
    "port",
    "self_test",
    "small_twins",
    "trial",
]
