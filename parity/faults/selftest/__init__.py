"""The check checked: faults that it must see, place and name, and pairs at which it must be silent.

fault.py         a fault as data
twin_faults.py   in the twins
pair_faults.py   in ports as users write them, and in their rules
pairs/           those ports
trial.py         one fault planted, one check
run.py           all of them, as a table
"""

from parity.faults.selftest.fault import Fault
from parity.faults.selftest.pair_faults import PAIR_FAULTS
from parity.faults.selftest.run import SelfTest, clean, self_test
from parity.faults.selftest.trial import PAIRS, Outcome, pair_module, port, small_twins, trial
from parity.faults.selftest.twin_faults import TWIN_FAULTS

FAULTS = PAIR_FAULTS + TWIN_FAULTS

__all__ = [
    "FAULTS",
    "PAIRS",
    "PAIR_FAULTS",
    "TWIN_FAULTS",
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
