"""The framework of a module, imported when it is asked for and not before."""

import importlib
from types import ModuleType
from typing import Any

NAMES = "flax", "torch"


def framework(name: str) -> ModuleType:
    """`in_flax.py` or `in_torch.py`.

    Raises:
        ValueError: when the framework cannot be imported here.
    """
    try:
        return importlib.import_module(f"parity.golden.in_{name}")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{name}: {error}. The module under check runs in its framework. Install it."
        ) from error


def framework_of(module: Any) -> str:
    """The name of the framework that a module is of.

    Raises:
        ValueError: for anything else.
    """
    packages = {base.__module__.partition(".")[0] for base in type(module).__mro__}
    for name in NAMES:
        if name in packages and isinstance(module, framework(name).MODULE):
            return name
    raise ValueError(
        f"{type(module).__name__}: no module. A golden is of a torch.nn.Module or a "
        "flax.nnx.Module. Give one of these."
    )
