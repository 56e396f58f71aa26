"""The gallery: bugs that people really write, a file for each part of the program."""

import dataclasses
import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path

from parity.faults.catalogue import read_catalogue
from parity.faults.edit import Mutation, mutated_text, package_folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bug(Mutation):
    """A bug of the twins and its story.

    Attributes:
        symptom: what the person who has it sees, in one line.
        why: why it is wrong and why it has that symptom, in a few sentences.
        seen: where people met it: a repository and thread, a page, or a common trap.
        caught_by: detectors that are known to fire, in both frameworks, the most specific first.
        absent: why one framework cannot have it, where it has no edits.
    """

    symptom: str
    why: str
    seen: str
    caught_by: tuple[str, ...]
    absent: str = ""

    def diff(self, framework: str) -> str:
        """Return the lines of a twin that change, as a unified diff with two lines of context."""
        package, edits = f"{framework}_gpt", self.edits(framework)
        lines: list[str] = []
        for file in dict.fromkeys(edit.file for edit in edits):
            old = (package_folder(package) / file).read_text(encoding="utf-8")
            new = mutated_text(file, old, edits)
            names = f"{package}/{file}", f"{package}/{file} with {self.id}"
            lines += difflib.unified_diff(
                old.splitlines(), new.splitlines(), *names, lineterm="", n=2
            )
        return "\n".join(lines)


_CHAPTERS = "alignment", "masks", "positions", "blocks", "optimization", "cache"

GALLERY = {
    chapter: read_catalogue(Path(__file__).parent / "gallery" / f"{chapter}.toml", Bug)
    for chapter in _CHAPTERS
}
BUGS = tuple(bug for bugs in GALLERY.values() for bug in bugs)


def find(ids: Sequence[str]) -> Iterator[Bug]:
    """Find bugs by id, in the order of the gallery; all of them for none.

    Yields:
        The bugs.

    Raises:
        ValueError: no bug has one of the ids.
    """
    known = {bug.id: bug for bug in BUGS}
    for name in ids:
        if name not in known:
            near = difflib.get_close_matches(name, known, 3)
            raise ValueError(
                f"bugs: no bug {name!r}. "
                + (f"Did you mean {', '.join(near)}? " if near else "")
                + "`parity bugs list` has them all."
            )
    for name, bug in known.items():
        if not ids or name in ids:
            yield bug
