"""The gallery: bugs that people really write, by the part of the program that they sit in."""

import difflib
from collections.abc import Iterator, Sequence

from parity.faults.edit import Bug
from parity.faults.gallery import alignment, blocks, cache, masks, optimization, positions

GALLERY: dict[str, tuple[Bug, ...]] = {
    "alignment": alignment.BUGS,
    "masks": masks.BUGS,
    "positions": positions.BUGS,
    "blocks": blocks.BUGS,
    "optimization": optimization.BUGS,
    "cache": cache.BUGS,
}

BUGS: tuple[Bug, ...] = tuple(bug for bugs in GALLERY.values() for bug in bugs)


def find(ids: Sequence[str]) -> Iterator[Bug]:
    """The bugs of these names, in the order of the gallery; all of them for none.

    Raises:
        ValueError: for a name that no bug has.
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
