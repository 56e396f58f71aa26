"""The interview exercise: a small GPT with planted bugs, and a grader that judges by behaviour.

    write_starter("todo", "torch", level=4, seed=7)
    grade("todo").open

A starter is written from the right files in `torch/` or `flax/` with some of `plants.py` in them.
Grading runs it in a process of its own (`sandbox.py`), where the files of `inside/` have it do what
`grade.py` then compares with right and wrong starters.
"""

from parity.exercise.grade import Grade, grade
from parity.exercise.proof import check_two, prove
from parity.exercise.starter import write_starter

__all__ = ["Grade", "check_two", "grade", "prove", "write_starter"]
