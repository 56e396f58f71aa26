"""Bugs that people write, as data, and how they are planted in a twin.

What is done with them needs both frameworks, which the list of them should not wait for, so it is
imported from its own place: `matrix` puts every bug to every detector, `exhibit` trains a healthy
model and broken ones side by side, `exercise` writes and grades the exercise.
"""

from parity.faults.edit import Bug, Edit, planted
from parity.faults.gallery import BUGS, GALLERY, find

__all__ = ["BUGS", "GALLERY", "Bug", "Edit", "find", "planted"]
