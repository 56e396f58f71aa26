"""Style of every matplotlib figure of the project, and writing it to a file."""

import io
from collections.abc import Iterable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from parity.system.files import write_file


def plain(axes: Iterable[Axes]) -> None:
    """Remove all that holds no data, except for a faint grid."""
    for axis in axes:
        axis.grid(alpha=0.25, linewidth=0.6)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all.

    Raises:
        OSError: when the folder or the disk refuses it.
    """
    picture = io.BytesIO()
    figure.savefig(picture, dpi=140, format="png")
    write_file(path, picture.getvalue())
