"""Where the new tokens of one call stand, and what each of them may see.

Read beside torch_gpt/positions.py.

Dimension key: B batch, T new tokens, S cache slots.
"""

import dataclasses

import jax
import jax.numpy as jnp

NOWHERE = 2**31 - 1  # a slot that no cache has and a position that no table holds


@dataclasses.dataclass(frozen=True)
class Placement:
    """One call's answer to where tokens stand; computed once and read by every block.

    Attributes:
        real_BT: False where a token is padding.
        positions_BT: index into the position table; 0 for padding.
        slots_BT: cache slot to write; NOWHERE for padding.
        mask_BTS: True where query t of row b sees slot s.
    """

    real_BT: jax.Array
    positions_BT: jax.Array
    slots_BT: jax.Array
    mask_BTS: jax.Array


def place(
    num_tokens: int, num_slots: int, lengths_B: jax.Array, counts_B: jax.Array | None = None
) -> Placement:
    """Places `num_tokens` new tokens per row behind the `lengths_B` tokens already there.

    The one mask rule: query t of row b sees slot s when s < lengths_B[b] + t + 1, and never
    padding. With T = 3 over a row of length 2, 1 is seen, . is not:

        slot      0 1 2 3 4 5
        query 0   1 1 1 . . .
        query 1   1 1 1 1 . .
        query 2   1 1 1 1 1 .

    A prefill is the case of length 0; one new token sees all that is valid, and T = 1 builds one
    row. A batch axis of 1 in the results stands for every row.

    Args:
        num_tokens: T.
        num_slots: S, slots that the mask covers.
        lengths_B: valid slots of each row before this call.
        counts_B: real tokens per row in this call, the rest is padding on the right; None for T.
    """
    steps_1T = jnp.arange(num_tokens, dtype=jnp.int32)[None, :]
    slots_11S = jnp.arange(num_slots, dtype=jnp.int32)[None, None, :]
    lengths_B1 = lengths_B[:, None]
    counts_B1 = jnp.full((1, 1), num_tokens, jnp.int32) if counts_B is None else counts_B[:, None]
    real_BT = steps_1T < counts_B1
    slots_BT = jnp.where(real_BT, lengths_B1 + steps_1T, NOWHERE)
    # twin: only traced lengths can overflow here; elsewhere KVCache.check_room has raised.
    # A real token without a slot gets a position without a row, which makes its logits NaN.
    slots_BT = jnp.where(slots_BT < num_slots, slots_BT, NOWHERE)
    positions_BT = jnp.where(real_BT, slots_BT, 0)
    seen_BT = lengths_B1 + jnp.minimum(steps_1T + 1, counts_B1)
    return Placement(real_BT, positions_BT, slots_BT, slots_11S < seen_BT[:, :, None])
