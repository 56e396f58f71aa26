"""The interview exercise: a small GPT with planted bugs, and a grader that judges by behaviour.

    write_starter("todo", "torch", level=4, seed=7)
    grade("todo").open

A starter is a copy of the right files in `torch/` or `flax/` with some bugs of `plants.toml` in it.
Grading runs it in a process of its own (`sandbox.py`), where `inside/` watches it stage by stage;
`grade.py` compares the numbers with those of right and wrong starters.
"""

from parity.exercise.grade import Grade, grade
from parity.exercise.proof import check_two, prove
from parity.exercise.starter import write_starter

__all__ = ["Grade", "check_two", "grade", "prove", "write_starter"]
