"""Weights laid out for steps of few rows, in which all time goes into reading them.

Read beside torch_gpt/decoding/packing.py.

Dimension key: B batch, T new tokens, S cache slots, D embed dim, N query heads, K kv heads, Q query
heads of one kv head, H head dim, V vocab, I inputs, O outputs of a linear map.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_gpt.model import GPT

_FEW = 32  # tokens of a call, up to which all time goes into reading weights


class PackedLinear(nnx.Module):
    """The linear map of given weights, for calls without gradients."""

    # twin: XLA reads a matrix faster by its outputs, which takes a transposed copy; for torch it
    # lies so, but its product of one row uses one core, so the outputs are shared out, and of more
    # rows it takes a copy in the order of oneDNN.

    def __init__(self, weight_OI: jax.Array, bias_O: jax.Array | None, batch_size: int):
        self.weight = nnx.Param(weight_OI)
        self.bias = None if bias_O is None else nnx.Param(bias_O)

    @property
    def extra_bytes(self) -> int:
        """Memory that it takes beside what it was given."""
        return self.weight[...].nbytes

    def __call__(self, x_BTI: jax.Array) -> jax.Array:
        """Map every token, (B, T, O)."""
        B, T, _ = x_BTI.shape
        if 1 < B * T <= _FEW:
            # XLA reads it faster where its outputs come first: 1.1 to 1.8 times for 2 to 32 tokens
            # and the matrices of gpt2; for more tokens slower.
            y_OBT = jnp.einsum("OI,BTI->OBT", self.weight[...], x_BTI)
            y_BTO = jnp.moveaxis(y_OBT, 0, 2)
        else:
            y_BTO = jnp.einsum("BTI,OI->BTO", x_BTI, self.weight[...])
        return y_BTO if self.bias is None else y_BTO + self.bias[...][None, None, :]


class PackedGPT(GPT):
    """The same function as another GPT, whose other weights it shares.

    Args:
        model: whose weights are laid out.
        batch_size: rows of a step.
    """

    def __init__(self, model: GPT, batch_size: int):
        shared = nnx.merge(*nnx.split(model))
        for name, part in vars(shared).items():
            if name != "head" and not name.startswith("_"):
                setattr(self, name, part)
        # twin: XLA makes one program of all operations, which is as fast without; torch starts each
        # of them by itself, and has one for attention.
        for part in (part for block in self.blocks for part in (block.attention, block.mlp)):
            for name, linear in list(vars(part).items()):
                if isinstance(linear, nnx.Linear):
                    setattr(part, name, _packed(linear, batch_size))
        self._shared_bytes = 0
        # A tied head reads the embedding, which lies as it should.
        if model.head is None:
            head = PackedLinear(model.token_embedding.embedding[...], None, batch_size)
            self.head, self._shared_bytes = head, head.extra_bytes
        else:
            self.head = _packed(model.head, batch_size)

    @property
    def extra_bytes(self) -> int:
        """Memory that it takes beside what it was given."""
        parts = [x for _, x in nnx.iter_modules(self) if isinstance(x, PackedLinear)]
        return sum(x.extra_bytes for x in parts) - self._shared_bytes


def pack(model: GPT, batch_size: int) -> GPT:
    """Lay a model out for steps of `batch_size` rows, where that is known to be faster.

    Args:
        model: itself returned where no other layout is known to be faster.
        batch_size: rows of a step.

    Returns:
        The same function.
    """
    devices = model.token_embedding.embedding[...].devices()
    on_cpu = all(device.platform == "cpu" for device in devices)
    if isinstance(model, PackedGPT) or batch_size > _FEW or not on_cpu:
        return model
    return PackedGPT(model, batch_size)


def _packed(linear: Any, batch_size: int) -> PackedLinear:
    bias_O = None if linear.bias is None else linear.bias[...]
    return PackedLinear(linear.kernel[...].T, bias_O, batch_size)
