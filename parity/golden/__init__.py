"""Goldens: what one framework computed, in a file that the other is checked against alone.

file.py      Golden: its contents, written to and read from one safetensors file
record.py    run a module and keep what it computes
recorded.py  RecordedRunner: answers the levels from a golden
session.py   GoldenSession: a module that runs beside a golden
check.py     run the levels on such a session

Only the framework of the module that runs is ever imported.
"""

from parity.golden.check import check, weight_rules
from parity.golden.file import Golden, read
from parity.golden.record import record

__all__ = ["Golden", "check", "read", "record", "weight_rules"]
