"""The objects that `package.module:name` and `folder/file.py:name` stand for."""

import difflib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

_PARITY = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


def load_attribute(target: str) -> Any:
    """Return what `package.module:name` or `folder/file.py:name` stands for."""
    place, colon, name = target.rpartition(":")
    if not colon or not place or not name:
        raise ValueError(
            f"{target}: no function. A target is a module and a name in it. Write my_pkg.net:build "
            "or net.py:build."
        )
    if place.endswith(".py") and not Path(place).is_file():
        raise ValueError(f"{target}: no file {place}. A target is a file that exists.")
    # For good: what is built may import more when it is called.
    for folder in (os.getcwd(), os.path.dirname(os.path.abspath(place))):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    try:
        module = _from_file(place) if place.endswith(".py") else importlib.import_module(place)
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"{target}: importing {place} raised {type(error).__name__}: {in_a_line(error)}"
        ) from error
    if not hasattr(module, name):
        raise ValueError(
            f"{target}: {place} has no {name}{closest(name, vars(module))}. A target is a name in "
            "a module."
        )
    return getattr(module, name)


def built(target: str, found: Any, kinds: tuple[type, ...]) -> Any:
    """Return what a target found, or the result of calling it if it is a function.

    What is of one of the `kinds` is not called.
    """
    if isinstance(found, kinds) or not callable(found):
        return found
    try:
        return found()
    except (Exception, SystemExit) as error:
        remedy = ". Write a function that builds it without" if _lacks_arguments(error) else ""
        raise ValueError(f"{target}: raised {raised(error)}{remedy}.") from error


def _lacks_arguments(error: BaseException) -> bool:
    return isinstance(error, TypeError) and "required positional argument" in str(error)


def closest(name: str, names: Iterable[str]) -> str:
    """Return ", but there is NAME" for the most similar of the names; "" where none is."""
    found = difflib.get_close_matches(name, names, 1)
    return f", but there is {found[0]}" if found else ""


def in_a_line(error: BaseException) -> str:
    """Return the first line of an exception's message."""
    return (str(error).strip().splitlines() or ["no message"])[0][:200]


def raised(error: BaseException) -> str:
    """Return an exception's type and first line, and the last line of the user's that led to it."""
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((_PARITY, "<")) and "site-packages" not in frame.filename
    ]
    place = f" at {os.path.basename(own[-1].filename)}:{own[-1].lineno}" if own else ""
    return f"{type(error).__name__}{place}: {in_a_line(error).removesuffix('.')}"


def _from_file(path: str) -> ModuleType:
    # Not by its own name, which may be that of another module.
    spec = importlib.util.spec_from_file_location(f"examined_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None  # of every file that ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
