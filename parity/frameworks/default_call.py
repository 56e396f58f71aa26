"""Defaults for calling a module, reducing its output to a scalar loss and training it."""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Self

import numpy as np

# AdamW's. Stated, because the frameworks' own defaults differ (weight decay: torch 1e-2, optax
# 1e-4).
LEARNING_RATE, BETA1, BETA2, EPSILON, WEIGHT_DECAY = 1e-3, 0.9, 0.95, 1e-8, 0.1

# Parameters of a call that say what a module's own mode says, and their values in evaluation and in
# training. Nothing is dropped in training either.
_MODES = dict.fromkeys(("train", "training", "is_training", "is_train"), (False, True))
_MODES |= {"use_running_average": (True, False)}
_MODES |= dict.fromkeys(("deterministic", "inference"), (True, True))

# Parameters that ask for random numbers.
STREAMS = "rngs", "key", "rng", "prng_key", "rng_key", "dropout_key", "dropout_rng", "generator"

_BY_NAME = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY


def projection(size: int) -> np.ndarray:
    """Return `size` fixed random weights whose dot product with an output is a scalar loss.

    The loss is about as large as one element of the output, and every element has a gradient of
    its own.
    """
    return np.random.default_rng(0).normal(size=size) / np.sqrt(max(size, 1))


@dataclasses.dataclass(frozen=True)
class Signature:
    """The parameters of a call, without the module.

    Attributes:
        defaults: what can be given by name, in order, and its default; `inspect.Parameter.empty`
            where there is none.
        takes_any: whether other names are accepted too.
    """

    defaults: Mapping[str, object] = dataclasses.field(default_factory=dict)
    takes_any: bool = False

    @classmethod
    def of(cls, module: object, call: Callable[..., object] | None = None) -> Self:
        """Return the signature of a module's call, or of a function (module, ...) in its place."""
        if call is not None:
            found = _parameters(call)[1:]
        else:
            module = getattr(module, "_orig_mod", module)  # which torch.compile wraps
            if type(module).__name__ == "ToNNX":  # nnx.bridge wraps a module of linen
                name = "to_nnx__module" if hasattr(module, "to_nnx__module") else "module"
                module = getattr(module, name)
            found = [x for method in _methods(module) for x in method]
        defaults: dict[str, object] = {}
        for parameter in found:
            if parameter.kind in _BY_NAME:
                defaults.setdefault(parameter.name, parameter.default)
        return cls(defaults, any(x.kind is inspect.Parameter.VAR_KEYWORD for x in found))

    @property
    def required(self) -> list[str]:
        """Names that a call has to give."""
        return [x for x, default in self.defaults.items() if default is inspect.Parameter.empty]

    def is_filled(self, name: str) -> bool:
        """Whether a parameter gets its argument from `arguments` where a call has to give it."""
        return name in _MODES or name in STREAMS

    def arguments(
        self,
        inputs: tuple,
        keywords: Mapping[str, object],
        in_training: bool,
        streams: Callable[[str], object],
    ) -> dict[str, object]:
        """Return the keywords of a call: those given, by the module's names, modes and streams.

        A name that the module lacks goes to the one parameter that nothing else is for.

        Args:
            inputs: arguments by position.
            keywords: arguments by name.
            in_training: whether training steps call.
            streams: name of a parameter in `STREAMS` to what draws random numbers.
        """
        free = list(self.defaults)[len(inputs) :]
        open_ = [x for x in free if x not in keywords]
        wanted = [x for x in self.required if x in open_ and not self.is_filled(x)]
        unknown = [] if self.takes_any else [x for x in keywords if x not in self.defaults]
        renamed = (
            dict(zip(unknown, wanted, strict=True)) if len(unknown) == len(wanted) == 1 else {}
        )
        found = {renamed.get(name, name): value for name, value in keywords.items()}
        for name in open_:
            default = self.defaults[name]
            is_required = default is inspect.Parameter.empty
            if name in _MODES and (is_required or isinstance(default, bool)):
                found[name] = _MODES[name][in_training]
            elif name in STREAMS and is_required and name not in found:
                found[name] = streams(name)
        return found


def _methods(module: object) -> Iterator[list[inspect.Parameter]]:
    """Yield the parameters of a module's call, and of its parents' where it takes any name."""
    name = "forward" if hasattr(module, "forward") else "__call__"
    found = _parameters(getattr(module, name))
    yield found
    for parent in type(module).__mro__[1:]:
        if all(x.kind is not inspect.Parameter.VAR_KEYWORD for x in found):
            return
        if name in vars(parent) and parent.__name__ != "Module":
            found = _parameters(vars(parent)[name])[1:]
            yield found


def _parameters(function: Callable[..., object]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        pass
    found = []
    for argument in getattr(getattr(function, "schema", None), "arguments", ())[1:]:  # scripted
        has_default = argument.has_default_value()
        default = argument.default_value if has_default else inspect.Parameter.empty
        found.append(inspect.Parameter(argument.name, _BY_NAME[0], default=default))
    return found
