"""Write the exercise: a folder with a broken starter, its tests and the task."""

import dataclasses
import json
import string
from pathlib import Path

from parity.exercise.plants import CATEGORIES, ORDER, chosen, mutated_files
from parity.faults.edit import FRAMEWORKS
from parity.system.files import write_file

RECORD = ".exercise.json"
CATEGORIES_NAMED = 4  # the highest level whose categories the task names

_NUMBERS = "no bugs", "one bug", *(
    f"{word} bugs" for word in ("two", "three", "four", "five", "six", "seven", "eight")
)  # fmt: skip
_NEEDS = {
    "flax": "`flax`, `optax`, and `pytest` for the tests",
    "torch": "`torch`, `numpy`, and `pytest` for the tests",
}
_FLOAT64 = {
    "flax": "`jax_enable_x64`",
    "torch": "by `torch.set_default_dtype`",
}


@dataclasses.dataclass(frozen=True)
class Exercise:
    """The choices that determine the bugs of a folder."""

    framework: str
    level: int
    seed: int


def write_starter(folder: Path | str, framework: str, level: int, seed: int) -> None:
    """Write a starter with bugs into a new or empty folder.

    Args:
        folder: to write to.
        framework: flax or torch.
        level: how many bugs.
        seed: of the choice of bugs.

    Raises:
        ValueError: there is no such framework or level, or the folder is not empty.
    """
    folder = Path(folder)
    if framework not in FRAMEWORKS:
        raise ValueError(
            f"exercise: framework {framework!r}. There are {' and '.join(FRAMEWORKS)}. Choose one."
        )
    plants = chosen(level, seed)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"exercise: {folder} is a file. A starter is a folder. Name another.")
    held = len(list(folder.iterdir())) if folder.exists() else 0
    if held:
        raise ValueError(
            f"exercise: {folder} holds {held} entries. A starter never overwrites anything. Name "
            "a new or an empty folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    here = Path(__file__).parent
    texts = mutated_files(framework, plants)
    texts["test_starter.py"] = (here / framework / "test_starter.py").read_text(encoding="utf-8")
    texts["README.md"] = _task(Exercise(framework, level, seed))
    texts[RECORD] = json.dumps({"schema": 1, **vars(Exercise(framework, level, seed))}) + "\n"
    for name, text in texts.items():
        write_file(folder / name, text)


def read_exercise(folder: Path | str) -> Exercise:
    """Read the record that `write_starter` left in a folder.

    Returns:
        The choices.

    Raises:
        ValueError: the folder has no such record.
    """
    path = Path(folder) / RECORD
    try:
        if path.stat().st_size > 10_000:
            raise ValueError("too large")
        record = json.loads(path.read_text(encoding="utf-8"))
        found = Exercise(record["framework"], record["level"], record["seed"])
        if record["schema"] != 1 or found.framework not in FRAMEWORKS:
            raise ValueError("of another schema")
        if type(found.level) is not int or type(found.seed) is not int:
            raise ValueError("of another schema")
        chosen(found.level, found.seed)
    except FileNotFoundError:
        raise ValueError(
            f"grade: {folder} has no {RECORD}. It says which bugs were put there. Give a folder "
            "that `parity bugs exercise` wrote."
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"grade: {path} cannot be read ({error}). It says which bugs were put there. Write the "
            "exercise again, with its level and seed, and copy your files into it."
        ) from None
    return found


def _task(exercise: Exercise) -> str:
    """Return the README of a starter."""
    template = Path(__file__).with_name("starter_readme.md").read_text(encoding="utf-8")
    count = _NUMBERS[exercise.level]
    one = exercise.level == 1
    about = "".join(f"- {CATEGORIES[category]}\n" for category in ORDER[: exercise.level])
    named = f"{'It is about' if one else 'They are about'}\n\n{about}"
    unnamed = "They may be anywhere in `model.py`, `train.py` and `generate.py`."
    return string.Template(template).substitute(
        count=count,
        what=f"there {'is' if one else 'are'} {count}",
        where=f"There {'is' if one else 'are'} {count}. "
        + (named if exercise.level <= CATEGORIES_NAMED else unnamed),
        needs=_NEEDS[exercise.framework],
        float64=_FLOAT64[exercise.framework],
        level=exercise.level,
        seed=exercise.seed,
    )
