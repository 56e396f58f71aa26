"""Part 2: does a cache change nothing but the cost? A starter is compared with itself uncached."""

import dataclasses
from collections.abc import Callable, Iterator
from types import ModuleType

import numpy as np

from . import probes
from .probes import Model, Starter, Values

_BOUND = 1e-5  # as in grade.py: a library may have its softmax in float32
_WARM = 3  # tokens in a warm cache
_PROMPT, _NEW = 3, 8  # tokens given and chosen while rows are counted


def part_2(framework: ModuleType, modules: Starter, reference: Starter) -> Values:
    """Run the checks of a cache.

    Args:
        framework: `in_flax` or `in_torch`.
        modules: the student's files.
        reference: the right ones.

    Returns:
        Whether `generate_cached` has been written, and if so the checks: name, whether it holds
        (None where that could not be seen), and what was seen.
    """
    model = framework.build(modules)
    # Counted from the beginning: layers that are compiled before that would not be counted.
    with framework.counted_rows(model) as rows:
        try:
            tokens = framework.ids(probes.tokens(2, 1, 2))
            modules.generate.generate_cached(model, tokens, 1)
        except NotImplementedError:
            return {"begun": False, "checks": []}
        except Exception:
            pass  # the first check reports it
        student = _Student(framework, modules, reference, model, rows)
        checks = {
            "tokens": student.tokens,
            "pieces": student.pieces,
            "positions": student.positions,
            "mask": student.mask,
            "a value": student.value,
            "cost": student.cost,
        }
        return {"begun": True, "checks": [[name, *_tried(x)] for name, x in checks.items()]}


def _tried(check: Callable[[], tuple[bool | None, str]]) -> tuple[bool | None, str]:
    try:
        return check()
    except Exception as error:
        text = str(error).strip().partition("\n")[0][:200]
        return False, f"{type(error).__name__}: {text}"


@dataclasses.dataclass
class _Student:
    """A student's cache. Each check returns whether it holds, and what was seen."""

    framework: ModuleType
    modules: Starter
    reference: Starter
    model: Model
    rows: Callable[[], float]

    def tokens(self) -> tuple[bool, str]:
        """Check that cached and uncached generation choose the same tokens."""
        number = 0
        for tokens, new in probes.CACHED_PROMPTS:
            given = self.framework.ids(tokens)
            cached = self.framework.array(
                self.modules.generate.generate_cached(self.model, given, new)
            )
            plain = self.framework.array(self.reference.generate.generate(self.model, given, new))
            which = f"{new} tokens after {tokens.shape[0]} x {tokens.shape[1]}"
            if cached.shape != plain.shape:
                return False, f"{which}: shape {list(cached.shape)} instead of {list(plain.shape)}"
            if (cached != plain).any():
                row, column = np.argwhere(cached != plain)[0]
                return False, (
                    f"{which}: row {row} differs from its new token "
                    f"{column - tokens.shape[1] + 1} on, {cached[row, column:].tolist()} instead "
                    f"of {plain[row, column:].tolist()}"
                )
            number += new * len(tokens)
        return True, f"{number} tokens are equal with and without the cache"

    def pieces(self) -> tuple[bool, str]:
        """Check that a text read in pieces has the logits of one pass."""
        tokens = probes.tokens(2, sum(probes.PIECES), 6)
        whole = self.framework.reader(self.model)(tokens)
        widths = " + ".join(map(str, probes.PIECES))
        worst = 0.0
        for start, stop, logits in self._read_in_pieces(tokens):
            if logits.shape != whole[:, start:stop].shape:
                return False, (
                    f"tokens {start} to {stop - 1} have logits of shape {list(logits.shape)} "
                    f"instead of {list(whole[:, start:stop].shape)}"
                )
            gap = float(np.max(np.abs(logits - whole[:, start:stop])))
            if not gap <= _BOUND:
                return False, (
                    f"read as {widths} tokens, those from {start} to {stop - 1} have logits that "
                    f"are off by {gap:.1e}"
                )
            worst = max(worst, gap)
        return True, f"read as {widths} tokens, logits are within {worst:.0e} of those read at once"

    def positions(self) -> tuple[bool, str]:
        """Check that a token after a cache has its position in the text."""
        cache, token = self._warm(), probes.tokens(2, 1, 8)
        still, _ = self._read(token, cache)

        def moves(position: int) -> bool:
            with self.framework.moved_position(self.model, position):
                moved, _ = self._read(token, cache)
            return not np.max(np.abs(moved - still)) <= _BOUND

        used = [position for position in range(_WARM + 1) if moves(position)]
        found = " and ".join(map(str, used)) or "none"
        said = f"a token after {_WARM} in the cache is read at position {found}"
        return used == [_WARM], said if used == [_WARM] else f"{said} instead of {_WARM}"

    def mask(self) -> tuple[bool, str]:
        """Check that tokens over a warm cache see the cache and what comes before them, no more."""
        cache, tokens = self._warm(), probes.tokens(2, 3, 9)
        logits, _ = self._read(tokens, cache)
        changed, _ = self._read(_changed(tokens, -1), cache)
        gap = float(np.max(np.abs(changed - logits)[:, :-1]))
        if not gap <= _BOUND:
            return False, f"of 3 tokens over a warm cache the last changes the others by {gap:.1e}"
        changed, _ = self._read(_changed(tokens, 0), cache)
        if np.max(np.abs(changed - logits)[:, -1]) <= _BOUND:
            return False, "of 3 tokens over a warm cache the last does not see the first"
        return True, "3 tokens over a warm cache see it and each other, never ahead"

    def value(self) -> tuple[bool, str]:
        """Check that a cache can be continued twice, and that the first continuation stays."""
        cache, tokens, token = self._warm(), probes.tokens(2, 3, 9), probes.tokens(2, 1, 8)
        first, longer = self._read(tokens, cache)
        further, _ = self._read(token, longer)
        self._read(token, cache)
        further_again, _ = self._read(token, longer)
        again, _ = self._read(tokens, cache)
        gap = max(float(np.max(np.abs(x))) for x in (again - first, further_again - further))
        if not gap <= _BOUND:
            return False, f"a cache continued before gives logits that are off by {gap:.1e}"
        return True, "a cache that has been continued is as it was"

    def cost(self) -> tuple[bool | None, str]:
        """Check that a new token costs one token."""
        tokens, before = probes.tokens(2, _PROMPT, 1), self.rows()
        self.modules.generate.generate_cached(self.model, self.framework.ids(tokens), _NEW)
        read = (self.rows() - before) / len(tokens)
        naive = sum(_PROMPT + new for new in range(_NEW))
        if not read:
            return None, "no token went through a linear layer of the framework: cost was not seen"
        said = (
            f"{read:.0f} tokens went through the linear layers for {_NEW} new ones after {_PROMPT}"
            f" (without a cache: {naive})"
        )
        return read <= _PROMPT + _NEW, said

    def _read(self, tokens: np.ndarray, cache: object) -> tuple[np.ndarray, object]:
        return self.framework.read_on(self.model, tokens, cache)

    def _empty(self, rows: int) -> object:
        return self.modules.cache.KVCache.empty(self.model.config, rows)

    def _warm(self) -> object:
        return self._read(probes.tokens(2, _WARM, 7), self._empty(2))[1]

    def _read_in_pieces(self, tokens: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
        cache, start = self._empty(len(tokens)), 0
        for width in probes.PIECES:
            logits, cache = self._read(tokens[:, start : start + width], cache)
            yield start, start + width, logits
            start += width


def _changed(tokens: np.ndarray, column: int) -> np.ndarray:
    changed = tokens.copy()
    changed[:, column] = (changed[:, column] + 1) % probes.SIZES["vocab_size"]
    return changed
