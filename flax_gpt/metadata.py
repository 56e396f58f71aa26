"""Where the new tokens of one forward pass stand, what each of them sees, and what a call may ask.

Read beside torch_gpt/metadata.py.

Dimension key: B batch, T new tokens, S columns, K kv heads, Q query heads of one kv head, E pairs
of a head's numbers that a rotation turns. A column is a slot of the cache or a new token.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from flax_gpt.cache import KVCache, host_values

NOWHERE = 2**31 - 1  # a slot that no cache has and a position that no table holds


@dataclasses.dataclass(frozen=True)
class Rotation:
    """Cosine and sine of the angles by which each token's pairs turn, in float32 at least."""

    cos_BT1E: jax.Array
    sin_BT1E: jax.Array


@dataclasses.dataclass(frozen=True)
class AttentionMetadata:
    """Positions, slots and mask of one forward pass, computed once and shared by all blocks.

    The one mask rule: query t of row b sees slot s when s < lengths_B[b] + t + 1, and never
    padding. With T = 3 over a row of length 2, 1 is seen, . is not:

        slot      0 1 2 3 4 5
        query 0   1 1 1 . . .
        query 1   1 1 1 1 . .
        query 2   1 1 1 1 1 .

    What queries look at are columns, and a column knows the slot that it stands for, or NOWHERE.
    Where the tokens have been written, the columns are the slots. Where not, they are the slots as
    they were and after them the tokens; the call above over a cache of 4 slots:

        column    0 1 2 3 4 5 6
        slot      0 1 - - 2 3 4
        query 0   1 1 . . 1 . .
        query 1   1 1 . . 1 1 .
        query 2   1 1 . . 1 1 1

    A prefill is the case of length 0; one new token sees all that is valid, and T = 1 builds one
    row. A batch axis of 1 stands for every row.

    Attributes:
        real_BT: False where a token is padding.
        lengths_B: valid slots of each row before the call.
        ends_B: valid slots of each row after it.
        positions_BT: position of each token in its row, from 0; 0 for padding.
        slots_BT: cache slot to write; NOWHERE for padding.
        columns_BS: the slot that each column stands for; NOWHERE for none.
        mask_BTS: True where a query sees a column.
        rotation: of queries and keys, where positions are rotary.
        bias_BKQTS: added to the scores, where positions are a bias.
        score_cap: that scores do not reach, where they are bent.
        sinks_KQ: scores that take part in each head's softmax and have no value.
    """

    # twin: torch can tell on the host how far rows reach; jax cannot, in the programs it compiles.

    real_BT: jax.Array
    lengths_B: jax.Array
    ends_B: jax.Array
    positions_BT: jax.Array
    slots_BT: jax.Array
    columns_BS: jax.Array
    mask_BTS: jax.Array
    rotation: Rotation | None = None
    bias_BKQTS: jax.Array | None = None
    score_cap: float | None = None
    sinks_KQ: jax.Array | None = None

    def valid_ids(self, tokens_BT: jax.Array) -> jax.Array:
        """Replace ids of padding by 0, and by NOWHERE those whose embedding must be NaN."""
        # A negative id must not wrap around, and a token without a slot is no token.
        wrong_BT = (tokens_BT < 0) | (self.positions_BT == NOWHERE)
        return jnp.where(self.real_BT, jnp.where(wrong_BT, NOWHERE, tokens_BT), 0)

    def within(self, window: int | None) -> "AttentionMetadata":
        """Hide what lies `window` tokens back or more; nothing when None."""
        if window is None:
            return self
        first_BT = self.positions_BT - window + 1
        near_BTS = self.columns_BS[:, None, :] >= first_BT[:, :, None]
        return dataclasses.replace(self, mask_BTS=self.mask_BTS & near_BTS)


def attention_metadata(
    tokens_BT: jax.Array, cache: KVCache | None, counts_B: jax.Array | None, context_length: int
) -> AttentionMetadata:
    """Place the new tokens of each row right after the tokens that its cache holds."""
    num_tokens = tokens_BT.shape[1]
    num_slots = num_tokens if cache is None else min(cache.capacity, context_length)
    lengths_B = jnp.zeros(1, jnp.int32) if cache is None else cache.lengths_B
    lengths_B1 = lengths_B[:, None]
    counts_B1 = jnp.full((1, 1), num_tokens, jnp.int32) if counts_B is None else counts_B[:, None]
    steps_1T = jnp.arange(num_tokens, dtype=jnp.int32)[None, :]
    real_BT = steps_1T < counts_B1
    # twin: only traced lengths can overflow here; elsewhere KVCache.check_capacity has raised.
    # A real token without a slot gets a position without a row, which makes its logits NaN.
    slots_BT = lengths_B1 + steps_1T
    slots_BT = jnp.where(real_BT & (slots_BT < num_slots), slots_BT, NOWHERE)
    # twin: torch has written the tokens before it reads, so its columns are the slots; jax has not.
    columns_BS = slots_BT
    if cache is not None:
        slots = jnp.arange(cache.capacity, dtype=jnp.int32)[None, :]
        held = jnp.where(slots < lengths_B1, slots, NOWHERE)
        columns_BS = jnp.concatenate([held, slots_BT], axis=1)
    seen_BT = lengths_B1 + jnp.minimum(steps_1T + 1, counts_B1)
    return AttentionMetadata(
        real_BT=real_BT,
        lengths_B=lengths_B,
        ends_B=lengths_B + counts_B1[:, 0],
        positions_BT=jnp.where(real_BT, slots_BT, 0),
        slots_BT=slots_BT,
        columns_BS=columns_BS,
        mask_BTS=columns_BS[:, None, :] < seen_BT[:, :, None],
    )


def check_arguments(
    tokens_BT: jax.Array,
    cache: KVCache | None,
    counts_B: jax.Array | None,
    key: jax.Array | None,
    context_length: int,
) -> None:
    """Refuse a call that a model cannot answer, as far as its values can be read.

    Raises:
        ValueError: when a row would outgrow the cache or the context, when rows or counts do not
            fit the call, or for a key together with a cache.
    """
    batch_size, num_tokens = tokens_BT.shape
    check_counts(counts_B, batch_size, num_tokens)
    if cache is None:
        if num_tokens > context_length:
            raise ValueError(
                f"GPT: {num_tokens} tokens > context_length {context_length}. Positions end "
                "there. Cut the sequence or build a longer context."
            )
        return
    if batch_size != cache.batch_size:
        raise ValueError(
            f"GPT: {batch_size} rows of tokens and a cache of {cache.batch_size}. Each row "
            "continues its own. Select as many rows of the cache."
        )
    if key is not None:
        raise ValueError(
            "GPT: a key and a cache. Dropout is for training, which reads whole sequences. "
            "Leave one of them out."
        )
    cache.check_capacity(num_tokens, counts_B, context_length)


def check_counts(
    counts_B: jax.Array | None, batch_size: int, num_tokens: int, least: int = 0
) -> None:
    """Refuse counts that a call cannot have, wherever they can be read.

    Raises:
        ValueError: unless there is one per row, from `least` to `num_tokens`.
    """
    found_B = None if counts_B is None else host_values(counts_B)
    if found_B is None:
        return
    if found_B.shape != (batch_size,) or np.any(found_B < least) or np.any(found_B > num_tokens):
        raise ValueError(
            f"counts {found_B.tolist()} of a call with {batch_size} rows of {num_tokens} tokens. "
            f"Each row has from {least} to {num_tokens} real ones. Give one count per row."
        )
