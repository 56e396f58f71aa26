"""Where the new tokens of one call stand, and what each of them may see.

Read beside flax_gpt/positions.py.

Dimension key: B batch, T new tokens, S cache slots.
"""

import dataclasses

import numpy as np
import torch

NOWHERE = 2**31 - 1  # a slot that no cache has and a position that no table holds


@dataclasses.dataclass(frozen=True)
class Placement:
    """One call's answer to where tokens stand; computed once and read by every block.

    Attributes:
        real_BT: False where a token is padding.
        lengths_B: valid slots of each row before the call.
        ends_B: and after it.
        positions_BT: index into the position table; 0 for padding.
        slots_BT: cache slot to write; NOWHERE for padding.
        mask_BTS: True where query t of row b sees slot s.
    """

    real_BT: torch.Tensor
    lengths_B: torch.Tensor
    ends_B: torch.Tensor
    positions_BT: torch.Tensor
    slots_BT: torch.Tensor
    mask_BTS: torch.Tensor


def place(
    num_tokens: int, num_slots: int, lengths_B: torch.Tensor, counts_B: torch.Tensor | None = None
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
    device = lengths_B.device
    steps_1T = torch.arange(num_tokens, device=device)[None, :]
    slots_11S = torch.arange(num_slots, device=device)[None, None, :]
    lengths_B1 = lengths_B[:, None]
    counts_B1 = steps_1T.new_full((1, 1), num_tokens) if counts_B is None else counts_B[:, None]
    real_BT = steps_1T < counts_B1
    slots_BT = torch.where(real_BT, lengths_B1 + steps_1T, NOWHERE)
    # twin: only traced lengths can overflow here; elsewhere KVCache.check_room has raised.
    # A real token without a slot gets a position without a row, which makes its logits NaN.
    slots_BT = torch.where(slots_BT < num_slots, slots_BT, NOWHERE)
    positions_BT = torch.where(real_BT, slots_BT, 0)
    seen_BT = lengths_B1 + torch.minimum(steps_1T + 1, counts_B1)
    ends_B = lengths_B + counts_B1[:, 0]
    mask_BTS = slots_11S < seen_BT[:, :, None]
    return Placement(real_BT, lengths_B, ends_B, positions_BT, slots_BT, mask_BTS)


def check_counts(
    counts_B: torch.Tensor | None, batch_size: int, num_tokens: int, least: int = 0
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


def read(array: torch.Tensor) -> np.ndarray | None:
    """The values of a small array on the host; None where jax.jit traces it."""
    return array.detach().cpu().numpy()
