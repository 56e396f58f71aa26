"""Outputs that appear whole or not at all, and paths that are more than plain files."""

import contextlib
import os
import stat
import sys
import tempfile
from pathlib import Path


def write_file(path: Path, data: str | bytes) -> None:
    """Write to a path: a plain file whole or not at all, anything else as it is.

    A plain file is written beside its place and renamed, so that there is never half a file; if
    the process ends on the way, what was there before stays as it was. A link is followed and
    stays a link. A device, a pipe and standard output are opened and written, never replaced.

    Raises:
        OSError: with the path in its message, when the folder, the disk or the reader refuses it.
    """
    data = data.encode("utf-8") if isinstance(data, str) else data
    try:
        if _is_renamed_over(path):
            _replace(path.resolve(), data)
        else:
            sys.stdout.flush()  # which may be what is written to
            # Not truncated: standard output may be a file that already holds a part.
            keep = os.O_APPEND if _is_stream(path) else os.O_TRUNC
            with os.fdopen(os.open(path, os.O_WRONLY | keep), "wb") as file:
                file.write(data)
    except OSError as error:
        # A full disk is reported without a name, a refused folder with that of a temporary file.
        raise type(error)(error.errno, error.strerror, str(path)) from error


def check_writable(path: Path) -> None:
    """Refuse a path that `write_file` could not write to, before the work whose result goes there.

    Raises:
        ValueError: for a folder, a path in no folder, and one without the right to write.
    """
    if path.is_dir():
        raise ValueError(f"{path}: that is a folder. Name a file in it.")
    place = path.resolve()
    if not path.exists() and not place.parent.is_dir():
        folder = place.parent if path.is_symlink() else path.parent
        raise ValueError(f"{path}: no folder {folder}. Make it or name another.")
    if not os.access(path if path.exists() else place.parent, os.W_OK):
        raise ValueError(f"{path}: no right to write there. Name another place.")


def unfinished(path: Path) -> str:
    """Return how the name of a file begins while it is written; a killed process leaves one."""
    return f".{path.name}."


def _is_renamed_over(path: Path) -> bool:
    """Whether a path is a plain file or nothing yet, in a folder where files can be made."""
    if _is_stream(path) or not os.access(path.resolve().parent, os.W_OK):
        return False
    return not path.exists() or stat.S_ISREG(path.stat().st_mode)


def _is_stream(path: Path) -> bool:
    """Whether a path leads to an open file of the process, such as /dev/stdout, by its links."""
    step = path.absolute()
    for _ in range(40):  # as many links as Linux follows
        folder = step.parent.resolve()
        if folder.name == "fd" and folder.parts[1] in ("dev", "proc"):
            return True
        if not step.is_symlink():
            return False
        step = folder / step.readlink()
    return False


def _replace(path: Path, data: bytes) -> None:
    mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o644
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=unfinished(path))
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, mode)
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
