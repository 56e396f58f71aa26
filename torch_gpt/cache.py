"""The KV cache as a value: a cache goes in, a longer one comes out, the old one stays valid.

Read beside flax_gpt/cache.py.

Dimension key: B batch, T new tokens, S cache slots, K kv heads, H head dim, R selected rows.

Rows are ragged without holes: row b holds lengths_B[b] valid slots, counted from slot 0. What lies
at and beyond a row's length is garbage that no query can see; the next append overwrites it.
"""

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils import _pytree as pytree

from torch_gpt.config import GPTConfig

if TYPE_CHECKING:
    from torch_gpt.metadata import AttentionMetadata


@dataclasses.dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer."""

    keys_BKSH: torch.Tensor
    values_BKSH: torch.Tensor
    # The right to write in place past the length, as the very lengths tensor that it goes with. An
    # allocation makes it, the first append spends it and passes a new one to its result. A handle
    # made in any other way, or with lengths of its own, has none and copies.
    _claim: list[torch.Tensor] = dataclasses.field(
        default_factory=list, init=False, repr=False, compare=False
    )

    def append(self, new: "LayerCache", metadata: "AttentionMetadata") -> "LayerCache":
        """Return this layer with the new tokens in their slots; padding is not written.

        Args:
            new: keys and values of the new tokens.
            metadata: where each token goes.

        Returns:
            The longer layer.
        """
        # twin: jax makes the value cheap by donation at the jit site; torch by ownership: the
        # newest handle writes in place past its own length, where no older handle can see, and
        # a stale handle copies first.
        keys_BKSH, values_BKSH = self.keys_BKSH, self.values_BKSH
        if self._must_copy() or not self._take_claim(metadata.lengths_B):
            keys_BKSH, values_BKSH = keys_BKSH.clone(), values_BKSH.clone()
        end = metadata.longest
        if end is not None and metadata.all_valid and not metadata.padded:
            start = end - new.keys_BKSH.shape[2]
            keys_BKSH[:, :, start:end] = new.keys_BKSH
            values_BKSH[:, :, start:end] = new.values_BKSH
        else:
            rows, steps = metadata.written_tokens()
            slots = metadata.slots_BT[rows, steps]
            keys_BKSH[rows, :, slots] = new.keys_BKSH[rows, :, steps].to(keys_BKSH.dtype)
            values_BKSH[rows, :, slots] = new.values_BKSH[rows, :, steps].to(values_BKSH.dtype)
        return LayerCache(keys_BKSH, values_BKSH)._owned(metadata.ends_B)

    def _owned(self, lengths: torch.Tensor) -> "LayerCache":
        """Give this handle the right to write after these lengths; for its maker alone."""
        self._claim.append(lengths)
        return self

    def _must_copy(self) -> bool:
        """Tell whether a write in place could spoil a backward graph, or is not allowed.

        Slots that were allocated in an inference mode cannot be written outside of it.

        Returns:
            Whether to copy first.
        """
        inference = not torch.compiler.is_compiling() and self.keys_BKSH.is_inference()
        if inference and not torch.is_inference_mode_enabled():
            return True
        held = self.keys_BKSH.requires_grad or self.values_BKSH.requires_grad
        return torch.is_grad_enabled() or held

    def _take_claim(self, lengths_B: torch.Tensor) -> bool:
        """Spend the claim; True for the first append after the lengths that it goes with."""
        try:
            if self._claim[0] is not lengths_B:
                return False
            self._claim.pop()  # atomic, so of two threads one gets it
        except IndexError:
            return False
        return True


@dataclasses.dataclass(frozen=True)
class CacheBytes:
    """Memory of one cache in bytes.

    Attributes:
        allocated: of all slots.
        valid: of the slots that hold tokens.
    """

    allocated: int
    valid: int


@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, and how many slots of each row are valid.

    Lengths, counts and rows are checked wherever their values can be read; under `jax.jit` they
    cannot, and the caller has checked them before.

    Attributes:
        layers: one LayerCache per block, all of the same shape.
        lengths_B: valid slots of each row. Moves in one place, `GPT.hidden`, once per call.
    """

    layers: tuple[LayerCache, ...]
    lengths_B: torch.Tensor

    @classmethod
    def empty(
        cls,
        config: GPTConfig,
        batch_size: int,
        capacity: int,
        dtype: str | None = None,
        device: torch.device | None = None,
    ) -> "KVCache":
        """Allocate a cache of length 0 in every row.

        Args:
            config: the model whose keys and values it will hold.
            batch_size: B, rows.
            capacity: S, slots allocated per row.
            dtype: of keys and values, by name; the model's own when None.
            device: where they live; the framework's default when None.

        Returns:
            The empty cache.

        Raises:
            ValueError: when there would be no row or no slot.
        """
        if batch_size < 1 or capacity < 1:
            raise ValueError(
                f"KVCache.empty: batch size {batch_size}, capacity {capacity}. Both must be at "
                "least 1. Allocate a row per prompt and a slot per token."
            )
        # Zeros, never uninitialised memory, which may hold NaN.
        shape = batch_size, config.kv_heads, capacity, config.head_width
        number = getattr(torch, dtype or config.dtype)
        lengths_B = torch.zeros(batch_size, dtype=torch.int64, device=device)
        layers = tuple(
            LayerCache(
                keys_BKSH=torch.zeros(shape, dtype=number, device=device),
                values_BKSH=torch.zeros(shape, dtype=number, device=device),
            )._owned(lengths_B)
            for _ in range(config.num_layers)
        )
        return cls(layers, lengths_B)

    @property
    def batch_size(self) -> int:
        """Rows, B."""
        return self.lengths_B.shape[0]

    @property
    def capacity(self) -> int:
        """Slots allocated per row, S."""
        return self.layers[0].keys_BKSH.shape[2]

    @property
    def num_bytes(self) -> CacheBytes:
        """Bytes of keys and values, 2 * L * B * K * S * H * itemsize, and those of valid slots."""
        allocated = sum(2 * layer.keys_BKSH.nbytes for layer in self.layers)
        slot = allocated // (self.batch_size * self.capacity)
        return CacheBytes(allocated, slot * int(self.lengths_B.sum()))

    def check_capacity(
        self,
        num_tokens: int,
        counts_B: torch.Tensor | None = None,
        context_length: int | None = None,
    ) -> None:
        """Refuse new tokens that would not fit.

        Args:
            num_tokens: T, new tokens of a row.
            counts_B: real ones among them; None for T.
            context_length: of the model; None for no limit but the capacity.

        Raises:
            ValueError: when a row would grow past the capacity, or past `context_length`.
        """
        # twin: lengths traced by jax.jit cannot be read; a row that overflows gets NaN logits.
        lengths_B = host_values(self.lengths_B)
        new_B = np.asarray([num_tokens]) if counts_B is None else host_values(counts_B)
        if lengths_B is None or new_B is None:
            return
        totals_B = lengths_B + new_B
        row = int(np.argmax(totals_B))
        held, total = lengths_B[row], totals_B[row]
        words = f"KVCache: row {row} holds {held} tokens + {total - held} new = {total}"
        if total > self.capacity:
            raise ValueError(
                f"{words} > capacity {self.capacity}. A cache never overwrites what it holds. Call "
                "grow first."
            )
        if context_length is not None and total > context_length:
            raise ValueError(
                f"{words} > context_length {context_length}. Positions end there. Call "
                "truncate first or build a longer context."
            )

    def truncate(self, lengths_B: torch.Tensor) -> "KVCache":
        """Cut this cache back to `lengths_B` tokens per row.

        Returns:
            The shorter cache, in the same slots.

        Raises:
            ValueError: when a new length is negative or beyond the row's own.
        """
        lengths_B = torch.as_tensor(lengths_B, device=self.lengths_B.device).long().clone()
        old_B, new_B = host_values(self.lengths_B), host_values(lengths_B)
        if old_B is not None and new_B is not None:
            if new_B.shape != old_B.shape or np.any(new_B < 0) or np.any(new_B > old_B):
                raise ValueError(
                    f"KVCache.truncate: lengths {old_B.tolist()} to {new_B.tolist()}. Each row "
                    "can only be cut, to no less than 0. Give one length per row."
                )
        return KVCache(self.layers, lengths_B)

    def select(self, rows_R: torch.Tensor) -> "KVCache":
        """Return a cache of the given rows, in that order; a row may be taken more than once.

        Returns:
            The rows, in slots of their own.

        Raises:
            ValueError: when a row does not exist.
        """
        rows_R = torch.as_tensor(rows_R, device=self.lengths_B.device).long()
        chosen_R = host_values(rows_R)
        if chosen_R is not None and (np.any(chosen_R < 0) or np.any(chosen_R >= self.batch_size)):
            raise ValueError(
                f"KVCache.select: rows {chosen_R.tolist()} of a cache of {self.batch_size}. Rows "
                f"count from 0. Take rows below {self.batch_size}."
            )
        lengths_R = self.lengths_B[rows_R]
        layers = tuple(
            LayerCache(layer.keys_BKSH[rows_R], layer.values_BKSH[rows_R])._owned(lengths_R)
            for layer in self.layers
        )
        return KVCache(layers, lengths_R)

    def grow(self, capacity: int) -> "KVCache":
        """Return this cache with `capacity` slots per row; nothing it holds changes.

        Returns:
            The larger cache, in slots of its own.

        Raises:
            ValueError: when that is less than it has.
        """
        if capacity < self.capacity:
            raise ValueError(
                f"KVCache.grow: capacity {self.capacity} to {capacity}. A cache only grows. Call "
                "truncate to drop tokens."
            )
        extra = capacity - self.capacity
        layers = tuple(
            LayerCache(
                _pad_slots(layer.keys_BKSH, extra), _pad_slots(layer.values_BKSH, extra)
            )._owned(self.lengths_B)
            for layer in self.layers
        )
        return KVCache(layers, self.lengths_B)


def _pad_slots(x_BKSH: torch.Tensor, extra: int) -> torch.Tensor:
    B, K, _, H = x_BKSH.shape
    return torch.cat([x_BKSH, x_BKSH.new_zeros(B, K, extra, H)], dim=2)


def host_values(array: torch.Tensor) -> np.ndarray | None:
    """Return the values of a small array on the host; None where a compiler traces it."""
    return None if torch.compiler.is_compiling() else array.detach().cpu().numpy()


pytree.register_dataclass(
    LayerCache, field_names=["keys_BKSH", "values_BKSH"], drop_field_names=["_claim"]
)
pytree.register_dataclass(KVCache)
