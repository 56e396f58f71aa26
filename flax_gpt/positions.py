"""Where the new tokens of one call stand, and what each of them may see.

Read beside torch_gpt/positions.py.

Dimension key: B batch, T new tokens, S cache slots.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_gpt.rotary import Rotation

NOWHERE = 2**31 - 1  # a slot that no cache has and a position that no table holds
_LOWEST_RUNG = 256  # slots; fewer would cost a step as much, and a program more to compile


@dataclasses.dataclass(frozen=True)
class Placement:
    """One call's answer to where tokens stand; computed once and read by every block.

    Attributes:
        real_BT: False where a token is padding.
        lengths_B: valid slots of each row before the call.
        ends_B: and after it.
        positions_BT: where each token stands in its row, from 0; 0 for padding.
        slots_BT: cache slot to write; NOWHERE for padding.
        columns_BS: the slot that each column stands for; NOWHERE for none.
        mask_BTS: True where query t of row b sees column s; see `place`.
        rungs: how many slots may be read, in rising order; the last reaches every token.
        rung: number of the lowest rung that reaches every token of every row.
        filled: whether all slots up to there are known to be valid in every row.
        all_seen: whether every token is known to see every column.
        padded: whether a token may be padding.
        exact: whether every call reads all slots, so that its sums have the same terms.
        turn: of queries and keys, where positions are rotary.
        bias_BKQTS: added to the scores, where positions are a bias; None where not.
    """

    real_BT: jax.Array
    lengths_B: jax.Array
    ends_B: jax.Array
    positions_BT: jax.Array
    slots_BT: jax.Array
    columns_BS: jax.Array
    mask_BTS: jax.Array
    rungs: tuple[int, ...]
    rung: int | jax.Array
    filled: bool
    all_seen: bool
    padded: bool
    exact: bool
    turn: Rotation | None = None
    bias_BKQTS: jax.Array | None = None


def place(
    num_tokens: int,
    num_slots: int,
    lengths_B: jax.Array,
    counts_B: jax.Array | None = None,
    cached: bool = True,
    exact: bool = False,
) -> Placement:
    """Places `num_tokens` new tokens per row behind the `lengths_B` tokens already there.

    The one mask rule: query t of row b sees slot s when s < lengths_B[b] + t + 1, and never
    padding. With T = 3 over a row of length 2, 1 is seen, . is not:

        slot      0 1 2 3 4 5
        query 0   1 1 1 . . .
        query 1   1 1 1 1 . .
        query 2   1 1 1 1 1 .

    What queries look at are columns, and a column knows the slot that it stands for, or NOWHERE.
    Where the tokens have been written, the columns are the slots. Where not, they are the slots as
    they were and behind them the tokens; the call above over a cache of 4 slots:

        column    0 1 2 3 4 5 6
        slot      0 1 - - 2 3 4
        query 0   1 1 . . 1 . .
        query 1   1 1 . . 1 1 .
        query 2   1 1 . . 1 1 1

    A prefill is the case of length 0; one new token sees all that is valid, and T = 1 builds one
    row. A batch axis of 1 in the results stands for every row.

    Args:
        num_tokens: T.
        num_slots: slots of the cache, or as many as there are positions; T without a cache.
        lengths_B: valid slots of each row before this call.
        counts_B: real tokens per row in this call, the rest is padding on the right; None for T.
        cached: False where there is no cache, hence no columns but those of the tokens.
        exact: the tokens are written first and every slot is a column, so that each sum has the
            same terms in the same order; a call of T tokens has padding before them, too, so that
            the token of slot s is number s % T.
    """
    rungs, rung, filled = (0,), 0, True
    if exact:
        rungs, filled = (num_slots,), False
    elif cached:
        rungs, rung, filled = reach(num_slots, lengths_B)
    steps_BT = jnp.arange(num_tokens, dtype=jnp.int32)[None, :]
    slots = jnp.arange(rungs[-1], dtype=jnp.int32)[None, :]
    lengths_B1 = lengths_B[:, None]
    if exact:
        # A token is always the same row of its call, by its slot: padding goes before it, too.
        steps_BT = steps_BT - lengths_B1 % num_tokens
    counts_B1 = jnp.full((1, 1), num_tokens, jnp.int32) if counts_B is None else counts_B[:, None]
    real_BT = (steps_BT >= 0) & (steps_BT < counts_B1)
    slots_BT = jnp.where(real_BT, lengths_B1 + steps_BT, NOWHERE)
    # twin: only traced lengths can overflow here; elsewhere KVCache.check_room has raised.
    # A real token without a slot gets a position without a row, which makes its logits NaN.
    slots_BT = jnp.where(slots_BT < num_slots, slots_BT, NOWHERE)
    positions_BT = jnp.where(real_BT, slots_BT, 0)
    seen_BT = lengths_B1 + jnp.minimum(jnp.maximum(steps_BT + 1, 0), counts_B1)
    ends_B = lengths_B + counts_B1[:, 0]
    # twin: torch has written the tokens by then; jax in an exact call only.
    columns_BS = slots if exact else slots_BT
    if cached and not exact:
        past = jnp.where(slots < lengths_B1, slots, NOWHERE)
        columns_BS = jnp.concatenate([past, slots_BT], axis=1)
    mask_BTS = columns_BS[:, None, :] < seen_BT[:, :, None]
    padded = counts_B is not None
    return Placement(
        real_BT, lengths_B, ends_B, positions_BT, slots_BT, columns_BS, mask_BTS, rungs, rung,
        filled, filled and not padded and num_tokens == 1, padded, exact,
    )  # fmt: skip


def windowed(placement: Placement, window: int) -> Placement:
    """The same tokens, of which each sees so many at most, itself among them."""
    first_BT = placement.positions_BT - window + 1
    seen_BTS = placement.columns_BS[:, None, :] >= first_BT[:, :, None]
    mask_BTS = placement.mask_BTS & seen_BTS
    all_seen = placement.all_seen and placement.rungs[-1] < window
    return dataclasses.replace(placement, mask_BTS=mask_BTS, all_seen=all_seen)


def reach(num_slots: int, lengths_B: jax.Array) -> tuple[tuple[int, ...], int | jax.Array, bool]:
    """How far a cache must be read, so that the cost follows its length and not its capacity.

    Returns:
        `rungs`, `rung` and `filled` of a Placement.
    """
    # twin: a compiled program has static shapes, so jax climbs a ladder to the lowest rung that
    # reaches the longest row; torch, where it can read the lengths, reads exactly so far.
    rungs = [0]
    size = _LOWEST_RUNG
    while size < num_slots:
        rungs.append(size)
        size *= 2
    rungs.append(num_slots)
    found_B = read(lengths_B)
    if found_B is None:
        return tuple(rungs), jnp.sum(jnp.max(lengths_B) > jnp.asarray(rungs[:-1])), False
    reached = next(rung for rung in rungs if rung >= found_B.max())
    return (reached,), 0, bool(np.all(found_B == reached))


def choose(index: int | jax.Array, branches: Sequence[Callable[..., Any]], *operands: Any) -> Any:
    """What one of some functions, by its number, makes of the operands.

    The last one must be right in every case. It is taken where an accelerator would have to tell
    the host which one to start.
    """
    # twin: under jax.jit a CPU branches as it runs; torch traces for accelerators only.
    if read(index) is not None:
        return branches[int(index)](*operands)
    return jax.lax.platform_dependent(
        *operands,
        cpu=lambda *operands: jax.lax.switch(jnp.int32(index), branches, *operands),
        default=branches[-1],
    )


def check_counts(
    counts_B: jax.Array | None, batch_size: int, num_tokens: int, least: int = 0
) -> None:
    """Refuses counts that a call cannot have, wherever they can be read.

    Raises:
        ValueError: unless there is one per row, from `least` to `num_tokens`.
    """
    found_B = None if counts_B is None else read(counts_B)
    if found_B is None:
        return
    if found_B.shape != (batch_size,) or np.any(found_B < least) or np.any(found_B > num_tokens):
        raise ValueError(
            f"counts {found_B.tolist()} of a call with {batch_size} rows of {num_tokens} tokens. "
            f"Each row has from {least} to {num_tokens} real ones. Give one count per row."
        )


def read(array: jax.Array) -> np.ndarray | None:
    """The values of a small array on the host; None where a compiler traces it."""
    return None if isinstance(array, jax.core.Tracer) else np.asarray(array)
