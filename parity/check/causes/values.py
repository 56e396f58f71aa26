"""Values of a torch module's own code in each other's place: an operand taken for another.

What comes between them is left out so too, such as a rotation that was forgotten.
"""

from collections.abc import Iterator, Sequence
from typing import cast

import torch

from parity.check.causes.replay import Changed, Done, Operation


def exchanged_values(operations: Sequence[Done]) -> Iterator[Changed]:
    """Yield changes that give the result of an operation up for a value known before it."""
    known: list[tuple[int, int | None, int, torch.Tensor, str]] = []
    seen: set[int] = set()
    for place, done in enumerate(operations):
        for number, x in enumerate(done.args):
            if _is_float(x) and id(x) not in seen:
                seen.add(id(x))
                words = f"operand {number + 1} of {done.name}"
                known.append((place, number, 0, x, _at_line(words, done)))
        result = done.result
        if _is_float(result):
            for source in known:
                if source[3].shape == result.shape and not torch.equal(source[3], result):
                    words = f"{source[4]} in place of {_at_line(done.name, done)}"
                    yield Changed(words, _Taken(source, place), inside=done.inside)
        parts = result if isinstance(result, tuple | list) else (result,)
        for number, x in enumerate(parts):
            if _is_float(x) and id(x) not in seen:
                seen.add(id(x))
                part = f"part {number + 1} of " if len(parts) > 1 else ""
                known.append((place, None, number, x, _at_line(f"{part}{done.name}", done)))


class _Taken:
    """A change that keeps a value of one operation and returns it in place of another's result."""

    def __init__(self, source: tuple[int, int | None, int, torch.Tensor, str], place: int):
        self._from, self._operand, self._part, *_ = source
        self._place, self._kept = place, cast(object, None)

    def __call__(self, at: int, operation: Operation) -> Operation | None:
        if at == self._place and at != self._from:
            return lambda *args, **kwargs: self._kept
        if at == self._place:
            return lambda *args, **kwargs: args[cast(int, self._operand)]
        if at != self._from:
            return None

        def keep(*args: object, **kwargs: object) -> object:
            result = operation(*args, **kwargs)
            if self._operand is not None:
                self._kept = args[self._operand]
            else:
                self._kept = result[self._part] if isinstance(result, tuple | list) else result
            return result

        return keep


def _is_float(x: object) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point() and x.ndim > 0


def _at_line(words: str, done: Done) -> str:
    return f"{words} ({done.line})" if done.line else words
