"""The bugs of the exercise as data: several of every category, each in both frameworks.

A stage is a part of the starter whose behaviour the grader watches on its own. A bug changes what
one stage does, in the same way in both frameworks.
"""

import dataclasses
import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from parity.faults.catalogue import read_catalogue
from parity.faults.edit import FRAMEWORKS, Edit, Mutation, mutated_text

FILES = "model.py", "cache.py", "train.py", "generate.py"
STAGES = "initial weights", "forward pass", "loss", "training", "generation"

# The category of each bug of a level: the interview's four first.
ORDER = (
    "labels", "positions", "mask", "typo", "optimization", "generation", "typo", "positions",
)  # fmt: skip
CATEGORIES = {
    "labels": "which token each prediction is compared with",
    "positions": "the position table: how it starts, learns and is used",
    "mask": "the causal mask",
    "typo": "a silent typo in the model: nothing crashes, and it even learns",
    "optimization": "the training loop",
    "generation": "choosing the next token",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plant(Mutation):
    """A bug of the exercise.

    Attributes:
        category: one of `CATEGORIES`, or "mishap" for a bug that is never planted.
        stage: one of `STAGES`, the one whose behaviour it changes.
        hints: three, from vague to clear.
        answer: why it is wrong, and what it does.
    """

    category: str
    stage: str
    hints: tuple[str, str, str]
    answer: str


_HERE = Path(__file__).parent
_ALL = read_catalogue(_HERE / "plants.toml", Plant)
PLANTS = tuple(plant for plant in _ALL if plant.category != "mishap")
MISHAPS = tuple(plant for plant in _ALL if plant.category == "mishap")
(_SOLUTION,) = read_catalogue(_HERE / "solution.toml", Mutation)


def files(framework: str, edits: Sequence[Edit] = ()) -> dict[str, str]:
    """Return the Python files of a starter by name, with edits in them; the right ones without.

    Raises:
        ValueError: an edit's old text is not in its file exactly once.
    """
    folder = _HERE / framework
    return {name: mutated_text(name, (folder / name).read_text("utf-8"), edits) for name in FILES}


def mutated_files(framework: str, plants: Sequence[Plant]) -> dict[str, str]:
    """Return the Python files of a starter with bugs in them.

    Raises:
        ValueError: two bugs change the same lines.
    """
    return files(framework, [edit for plant in plants for edit in plant.edits(framework)])


def solved(framework: str, more: Sequence[Edit] = ()) -> dict[str, str]:
    """Return the files of a starter without bugs and with part 2, and with more edits on top.

    For the grader, never for a student: it hands this model to a student's loops, since it can be
    called with a cache and without.
    """
    return files(framework, [*_SOLUTION.edits(framework), *more])


def chosen(level: int, seed: int) -> tuple[Plant, ...]:
    """Choose the bugs of an exercise, the same in both frameworks.

    Args:
        level: how many bugs, from 1 to 8; categories in the order of `ORDER`.
        seed: of the choice within each category.

    Returns:
        A bug per category, in that order.

    Raises:
        ValueError: there is no such level.
    """
    if not 1 <= level <= len(ORDER):
        raise ValueError(
            f"exercise: level {level}. A level is a number of bugs. Choose one from 1 to "
            f"{len(ORDER)}."
        )
    taken: list[Plant] = []
    for number, category in enumerate(ORDER[:level]):
        # A string is hashed the same way in every process, and a lower level is a higher one's
        # beginning.
        order = random.Random(f"{seed}.{number}.{category}")
        of_category = [plant for plant in PLANTS if plant.category == category]
        candidates = order.sample(of_category, len(of_category))
        taken.append(next(plant for plant in candidates if fits(plant, taken)))
    return tuple(taken)


def fits(plant: Plant, others: Sequence[Plant]) -> bool:
    """Return whether a bug can stand beside others: none changes another's lines."""
    if plant in others:
        return False
    try:
        for framework in FRAMEWORKS:
            mutated_files(framework, [*others, plant])
            mutated_files(framework, [plant, *others])
    except ValueError:
        return False
    return True


def subsets(plants: Sequence[Plant]) -> Iterator[tuple[Plant, ...]]:
    """Yield all choices of some bugs, none first."""
    for size in range(len(plants) + 1):
        yield from itertools.combinations(plants, size)
