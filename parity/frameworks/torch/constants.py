"""Tensors that a PyTorch module computes when it is built, and no weight overwrites.

Tables of angles, factors and masks are mostly in float32, whatever the module is cast to later, so
that its float64 run starts from rounded numbers. Built again with float64 as the default type, the
same code gives the numbers themselves.
"""

import contextlib
import inspect
import random
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch

from parity.frameworks.purity import AGAIN
from parity.frameworks.torch.lift import is_narrow, is_rounded, lifted

# Buffers that are weights: what a batch norm has learned of its inputs.
STATISTICS = "running_mean", "running_var", "num_batches_tracked"

# How far rounding may take a table from the numbers that it stands for, of its largest one.
_ROUNDED = 1e-3

Tensors = dict[str, torch.Tensor]
Build = Callable[[], torch.nn.Module]


def constants(module: torch.nn.Module, build: Build | None = None) -> Tensors:
    """Return the float buffers and attributes of a module that are no weights, by name.

    One is in float64 if it could be computed so: where building its module again, or one around
    it, gives the same bits, building that lifted gives the numbers before rounding.

    Args:
        module: stays as it is.
        build: builds the whole module again. Without it, classes are called with those attributes
            that have the names of their arguments.
    """
    found, tried = _copied(module), {}
    rounded = [name for name, x in found.items() if is_rounded(x)]
    for name in rounded:
        for prefix, again in _builders(module, name, build):
            if again not in tried:
                tried[again] = _twice(again)
            inner = name.removeprefix(f"{prefix}.") if prefix else name
            held, (plain, exact) = found[name], (x.get(inner) for x in tried[again])
            if plain is not None and exact is not None and _is_before(exact, plain, held):
                found[name] = exact
                break
    return found


def put_constants(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Let a module hold its constants as `constants` gives them.

    Returns:
        Words on those that are in float64 now, such as "float32 constant rope.angles, rounded by
        3e-08, computed again", each with a 1.
    """
    found = {}
    for name, tensor in tensors.items():
        path, _, attribute = name.rpartition(".")
        owner = module.get_submodule(path)
        held = getattr(owner, attribute)
        if attribute in owner._buffers or not is_narrow(tensor):  # else it holds it as it was
            setattr(owner, attribute, tensor.clone().to(held.device))
        finite = torch.isfinite(tensor)
        if not is_narrow(tensor) and finite.any():
            change = (tensor - held.to(tensor))[finite].abs().max() / tensor[finite].abs().max()
            if change > 0:
                found[f"float32 constant {name}, rounded by {change:.0e}, {AGAIN}"] = 1
    return found


def tensors_of(module: torch.nn.Module) -> Tensors:
    """Return the floats among the buffers and attributes of a module, the weights left out."""
    found = {}
    for path, owner in module.named_modules():
        if isinstance(owner, torch.jit.ScriptModule):
            continue
        for name, x in {**vars(owner), **owner._buffers}.items():
            is_float = isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex())
            if is_float and name not in STATISTICS and not isinstance(x, torch.nn.Parameter):
                found[f"{path}.{name}".lstrip(".")] = x
    return found


def _copied(module: torch.nn.Module) -> Tensors:
    return {name: x.detach().cpu() for name, x in tensors_of(module).items()}


def _is_before(exact: torch.Tensor, plain: torch.Tensor, held: torch.Tensor) -> bool:
    """Whether a tensor is what was rounded to the one that is held."""
    if not exact.shape == plain.shape == held.shape or plain.dtype != held.dtype:
        return False
    if exact.dtype not in (torch.float64, torch.complex128) or not torch.equal(plain, held):
        return False
    wide = held.to(exact)
    near = _ROUNDED * float(wide[torch.isfinite(wide)].abs().max())
    return bool(torch.isclose(exact, wide, rtol=0.0, atol=near).all())


def _builders(
    module: torch.nn.Module, name: str, build: Build | None
) -> Iterator[tuple[str, "Build"]]:
    """Yield ways to build the owner of a tensor or a module around it, the smallest first."""
    path = name.rpartition(".")[0]
    while True:
        owner = module.get_submodule(path)
        if (again := _Again(owner)).is_known:
            yield path, again
        if not path:
            break
        path = path.rpartition(".")[0]
    if build is not None:
        yield "", build


class _Again:
    """Builds a module again by its class, equal for equal modules."""

    def __init__(self, module: torch.nn.Module):
        self._module = module
        self._arguments = _arguments(module)

    @property
    def is_known(self) -> bool:
        """Whether the module has an attribute for every argument that must be given."""
        return self._arguments is not None

    def __call__(self) -> torch.nn.Module:
        return type(self._module)(**self._arguments or {})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Again) and other._module is self._module

    def __hash__(self) -> int:
        return id(self._module)


def _arguments(module: torch.nn.Module) -> dict[str, object] | None:
    """Return arguments for the class of a module, by its attributes; None where one is missing."""
    found = {}
    try:
        parameters = inspect.signature(type(module)).parameters.values()
    except (TypeError, ValueError):
        return None
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.kind is parameter.POSITIONAL_ONLY:
            return None
        if hasattr(module, parameter.name):
            value = getattr(module, parameter.name)
            if isinstance(value, torch.nn.Module | torch.Tensor):
                return None
            found[parameter.name] = value
        elif parameter.default is parameter.empty:
            return None
    return found


def _twice(build: Build) -> tuple[Tensors, Tensors]:
    """Build a module as it is and lifted; return the tensors of both, or none if it raises."""
    made = []
    for scope in (contextlib.nullcontext, lifted):
        try:
            with _kept_random_state(), torch.no_grad(), scope():
                made.append(_copied(build()))
        except Exception:  # of the user's code, which may need what it no longer has
            return {}, {}
    return made[0], made[1]


@contextlib.contextmanager
def _kept_random_state() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
