"""How every picture here looks, and how it gets to its file."""

import io
from collections.abc import Iterable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from parity.system.files import write_atomically


def plain(axes: Iterable[Axes]) -> None:
    """Takes away what holds no data, but for a faint grid."""
    for axis in axes:
        axis.grid(alpha=0.25, linewidth=0.6)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG, whole or not at all.

    Raises:
        OSError: when the folder or the disk does not take it.
    """
    picture = io.BytesIO()
    figure.savefig(picture, dpi=140, format="png")
    write_atomically(path, picture.getvalue())
