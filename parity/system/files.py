"""Files that appear whole or not at all."""

import contextlib
import os
import tempfile
from pathlib import Path


def write_atomically(path: Path, data: str | bytes) -> None:
    """Write beside `path` and rename, so that there is never half a file.

    If the process ends on the way, what was there before stays as it was.
    """
    data = data.encode("utf-8") if isinstance(data, str) else data
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=unfinished(path))
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename, too, survives a loss of power
    finally:
        os.close(folder)


def unfinished(path: Path) -> str:
    """Return how the name of a file begins while it is written; a killed process leaves one."""
    return f".{path.name}."
