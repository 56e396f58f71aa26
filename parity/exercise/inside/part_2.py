"""Whether a cache changes nothing but the cost, in either framework.

A starter is compared with itself: reading through the cache with reading at once.
"""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np

from . import probes

_BOUND = 1e-5  # as in grade.py: a library may have its softmax in float32
_WARM = 3  # tokens in a warm cache
_PROMPT, _NEW = 3, 8  # tokens given and chosen while rows are counted


def part_2(stages: ModuleType, modules: Any, reference: Any) -> dict[str, Any]:
    """What holds and what does not.

    Returns:
        Whether `generate_cached` has been written, and if so the checks: name, whether it holds
        (None where that could not be seen), and what was seen.
    """
    model = stages.build(modules)
    # Counted from the beginning: what is compiled before would be counted no more.
    with stages.counted_rows(model) as rows:
        return _checked(stages, modules, model, reference, rows)


def _checked(stages, modules, model, reference, rows) -> dict[str, Any]:
    try:
        modules.generate.generate_cached(model, stages.ids(probes.tokens(2, 1, 2)), 1)
    except NotImplementedError:
        return {"begun": False, "checks": []}
    except Exception:
        pass  # the first check will say so
    checks = {
        "tokens": _tokens,
        "pieces": _pieces,
        "positions": _positions,
        "mask": _mask,
        "a value": _value,
        "cost": _cost,
    }
    return {
        "begun": True,
        "checks": [
            [name, *_tried(check, stages, modules, model, reference, rows)]
            for name, check in checks.items()
        ],
    }


def _tried(check: Callable, *arguments: Any) -> tuple[bool | None, str]:
    try:
        return check(*arguments)
    except Exception as error:
        text = str(error).strip().partition("\n")[0][:200]
        return False, f"{type(error).__name__}: {text}"


def _tokens(stages, modules, model, reference, rows) -> tuple[bool, str]:
    """Cached and uncached choose the same."""
    number = 0
    for tokens, new in probes.CACHED_PROMPTS:
        cached = stages.array(modules.generate.generate_cached(model, stages.ids(tokens), new))
        plain = stages.array(reference.generate.generate(model, stages.ids(tokens), new))
        which = f"{new} tokens behind {tokens.shape[0]} x {tokens.shape[1]}"
        if cached.shape != plain.shape:
            return False, f"{which}: shape {list(cached.shape)} instead of {list(plain.shape)}"
        if (cached != plain).any():
            row, column = np.argwhere(cached != plain)[0]
            return False, (
                f"{which}: row {row} differs from its new token {column - tokens.shape[1] + 1} on, "
                f"{cached[row, column:].tolist()} instead of {plain[row, column:].tolist()}"
            )
        number += new * len(tokens)
    return True, f"{number} tokens are equal with and without the cache"


def _pieces(stages, modules, model, reference, rows) -> tuple[bool, str]:
    """Read in pieces, a text has the logits that it has at once."""
    tokens = probes.tokens(2, sum(probes.PIECES), 6)
    whole = stages.reader(model)(tokens)
    words = " + ".join(map(str, probes.PIECES))
    worst = 0.0
    for start, stop, logits in _read_in_pieces(stages, modules, model, tokens):
        if logits.shape != whole[:, start:stop].shape:
            return False, (
                f"tokens {start} to {stop - 1} have logits of shape {list(logits.shape)} instead "
                f"of {list(whole[:, start:stop].shape)}"
            )
        gap = float(np.max(np.abs(logits - whole[:, start:stop])))
        if not gap <= _BOUND:
            return False, (
                f"read as {words} tokens, those from {start} to {stop - 1} have logits that are "
                f"off by {gap:.1e}"
            )
        worst = max(worst, gap)
    return True, f"read as {words} tokens, logits are within {worst:.0e} of those read at once"


def _read_in_pieces(stages, modules, model, tokens) -> Iterator[tuple[int, int, np.ndarray]]:
    cache, start = modules.cache.KVCache.empty(model.config, len(tokens)), 0
    for width in probes.PIECES:
        logits, cache = stages.read_on(model, tokens[:, start : start + width], cache)
        yield start, start + width, logits
        start += width


def _warm(stages, modules, model) -> Any:
    """A cache of a few tokens."""
    cache = modules.cache.KVCache.empty(model.config, 2)
    return stages.read_on(model, probes.tokens(2, _WARM, 7), cache)[1]


def _positions(stages, modules, model, reference, rows) -> tuple[bool, str]:
    """A token behind a cache stands where it stands in the text."""
    cache, token = _warm(stages, modules, model), probes.tokens(2, 1, 8)

    def moves(position: int) -> bool:
        with stages.moved_position(model, position):
            moved, _ = stages.read_on(model, token, cache)
        return not np.max(np.abs(moved - still)) <= _BOUND

    still, _ = stages.read_on(model, token, cache)
    used = [position for position in range(_WARM + 1) if moves(position)]
    found = " and ".join(map(str, used)) or "none"
    said = f"a token behind {_WARM} in the cache is read at position {found}"
    return used == [_WARM], said if used == [_WARM] else f"{said} instead of {_WARM}"


def _mask(stages, modules, model, reference, rows) -> tuple[bool, str]:
    """Several tokens over a warm cache see the cache and what comes before them, no more."""
    cache, tokens = _warm(stages, modules, model), probes.tokens(2, 3, 9)
    logits, _ = stages.read_on(model, tokens, cache)
    later = tokens.copy()
    later[:, -1] = (later[:, -1] + 1) % probes.SIZES["vocab_size"]
    changed, _ = stages.read_on(model, later, cache)
    gap = float(np.max(np.abs(changed - logits)[:, :-1]))
    if not gap <= _BOUND:
        return False, f"of 3 tokens over a warm cache the last changes the others by {gap:.1e}"
    earlier = tokens.copy()
    earlier[:, 0] = (earlier[:, 0] + 1) % probes.SIZES["vocab_size"]
    changed, _ = stages.read_on(model, earlier, cache)
    if np.max(np.abs(changed - logits)[:, -1]) <= _BOUND:
        return False, "of 3 tokens over a warm cache the last does not see the first"
    return True, "3 tokens over a warm cache see it and each other, never ahead"


def _value(stages, modules, model, reference, rows) -> tuple[bool, str]:
    """A cache can be continued twice, and what came of it the first time stays too."""
    cache, tokens, token = (
        _warm(stages, modules, model),
        probes.tokens(2, 3, 9),
        probes.tokens(2, 1, 8),
    )
    first, longer = stages.read_on(model, tokens, cache)
    further, _ = stages.read_on(model, token, longer)
    stages.read_on(model, token, cache)
    further_again, _ = stages.read_on(model, token, longer)
    again, _ = stages.read_on(model, tokens, cache)
    gap = max(float(np.max(np.abs(x))) for x in (again - first, further_again - further))
    if not gap <= _BOUND:
        return False, f"a cache that was continued before gives logits that are off by {gap:.1e}"
    return True, "a cache that has been continued is as it was"


def _cost(stages, modules, model, reference, rows) -> tuple[bool | None, str]:
    """A new token costs one token."""
    tokens, before = probes.tokens(2, _PROMPT, 1), rows()
    modules.generate.generate_cached(model, stages.ids(tokens), _NEW)
    read = (rows() - before) / len(tokens)
    naive = sum(_PROMPT + new for new in range(_NEW))
    if not read:
        return None, "no token went through a linear layer of the framework: cost was not seen"
    said = (
        f"{read:.0f} tokens went through the linear layers for {_NEW} new ones behind {_PROMPT} "
        f"(without a cache: {naive})"
    )
    return read <= _PROMPT + _NEW, said
