"""Where the new tokens of one forward pass stand, what each of them sees, and what a call may ask.

Read beside flax_gpt/metadata.py.

Dimension key: B batch, T new tokens, S columns, K kv heads, Q query heads of one kv head, E pairs
of a head's numbers that a rotation turns. A column is a slot of the cache or a new token.
"""

import dataclasses

import numpy as np
import torch

from torch_gpt.cache import KVCache, host_values

NOWHERE = 2**31 - 1  # a slot that no cache has and a position that no table holds


@dataclasses.dataclass(frozen=True)
class Rotation:
    """Cosine and sine of the angles by which each token's pairs turn, in float32 at least."""

    cos_BT1E: torch.Tensor
    sin_BT1E: torch.Tensor


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

    real_BT: torch.Tensor
    lengths_B: torch.Tensor
    ends_B: torch.Tensor
    positions_BT: torch.Tensor
    slots_BT: torch.Tensor
    columns_BS: torch.Tensor
    mask_BTS: torch.Tensor
    padded: bool  # whether a token may be padding
    longest: int | None = None  # tokens of the longest row after the call, where known
    all_valid: bool = True  # whether all rows are known to be that long
    all_seen: bool = False  # whether every token is known to see all slots up to there
    rotation: Rotation | None = None
    bias_BKQTS: torch.Tensor | None = None
    score_cap: float | None = None
    sinks_KQ: torch.Tensor | None = None

    def valid_ids(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Replace ids of padding by 0, and by NOWHERE those whose embedding must be NaN."""
        # A negative id must not wrap around, and a token without a slot is no token.
        wrong_BT = (tokens_BT < 0) | (self.positions_BT == NOWHERE)
        return torch.where(self.real_BT, torch.where(wrong_BT, NOWHERE, tokens_BT), 0)

    def within(self, window: int | None) -> "AttentionMetadata":
        """Hide what lies `window` tokens back or more; nothing when None."""
        if window is None:
            return self
        first_BT = self.positions_BT - window + 1
        near_BTS = self.columns_BS[:, None, :] >= first_BT[:, :, None]
        all_seen = self.all_seen and (self.longest or 0) <= window
        return dataclasses.replace(self, mask_BTS=self.mask_BTS & near_BTS, all_seen=all_seen)

    def written_tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rows and steps of the tokens that have a slot, as indices of (B, T)."""
        if self.padded:
            rows, steps = torch.nonzero(self.slots_BT != NOWHERE, as_tuple=True)
            return rows, steps
        rows, steps = (torch.arange(n, device=self.slots_BT.device) for n in self.slots_BT.shape)
        return rows[:, None], steps[None, :]


def attention_metadata(
    tokens_BT: torch.Tensor,
    cache: KVCache | None,
    counts_B: torch.Tensor | None,
    context_length: int,
) -> AttentionMetadata:
    """Place the new tokens of each row right after the tokens that its cache holds."""
    num_tokens = tokens_BT.shape[1]
    num_slots = num_tokens if cache is None else min(cache.capacity, context_length)
    lengths_B = tokens_BT.new_zeros(1) if cache is None else cache.lengths_B
    lengths_B1 = lengths_B[:, None]
    steps_1T = torch.arange(num_tokens, device=tokens_BT.device)[None, :]
    counts_B1 = steps_1T.new_full((1, 1), num_tokens) if counts_B is None else counts_B[:, None]
    real_BT = steps_1T < counts_B1
    # twin: only traced lengths can overflow here; elsewhere KVCache.check_capacity has raised.
    # A real token without a slot gets a position without a row, which makes its logits NaN.
    slots_BT = lengths_B1 + steps_1T
    slots_BT = torch.where(real_BT & (slots_BT < num_slots), slots_BT, NOWHERE)
    # twin: torch has written the tokens before it reads, so its columns are the slots; jax has not.
    columns_BS = slots_BT
    ends = None
    if cache is not None:
        columns_BS = torch.arange(cache.capacity, device=tokens_BT.device)[None, :]
        held = host_values(lengths_B)
        added = num_tokens if counts_B is None else host_values(counts_B)
        ends = None if held is None or added is None else held + added
    seen_BT = lengths_B1 + torch.minimum(steps_1T + 1, counts_B1)
    longest = None if ends is None else int(ends.max())
    all_valid = ends is not None and bool(np.all(ends == longest))
    return AttentionMetadata(
        real_BT=real_BT,
        lengths_B=lengths_B,
        ends_B=lengths_B + counts_B1[:, 0],
        positions_BT=torch.where(real_BT, slots_BT, 0),
        slots_BT=slots_BT,
        columns_BS=columns_BS,
        mask_BTS=columns_BS[:, None, :] < seen_BT[:, :, None],
        padded=counts_B is not None,
        longest=longest,
        all_valid=all_valid,
        all_seen=all_valid and counts_B is None and num_tokens == 1,
    )


def check_arguments(
    tokens_BT: torch.Tensor,
    cache: KVCache | None,
    counts_B: torch.Tensor | None,
    key: torch.Tensor | None,
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
    counts_B: torch.Tensor | None, batch_size: int, num_tokens: int, least: int = 0
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
