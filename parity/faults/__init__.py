"""Known bugs as data: edits of a program, catalogues of them, and what detects them.

`matrix` asks every detector about every bug, `compare_training` trains a healthy model and broken
ones on the same batches, and `selftest` measures the check. They load both frameworks, which a list
of bugs does not need, so each is imported by its own name.
"""

from parity.faults.bug import BUGS, GALLERY, Bug, find
from parity.faults.edit import Edit, mutated

__all__ = ["BUGS", "GALLERY", "Bug", "Edit", "find", "mutated"]
