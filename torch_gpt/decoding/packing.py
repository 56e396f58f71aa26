"""Weights laid out for steps of few rows, in which all time goes into reading them.

Read beside flax_gpt/decoding/packing.py.

Dimension key: B batch, T new tokens, S cache slots, D embed dim, N query heads, K kv heads, Q query
heads of one kv head, H head dim, V vocab, I inputs, O outputs of a linear map.
"""

import copy
import functools
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from torch_gpt import fast_attention
from torch_gpt.cache import LayerCache
from torch_gpt.layers import RMSNormOfHeads, identity
from torch_gpt.metadata import AttentionMetadata
from torch_gpt.model import GPT, Attention, Block, copied


class PackedLinear(nn.Module):
    """The linear map of given weights, for calls without gradients."""

    # twin: XLA reads a matrix faster by its outputs, which takes a transposed copy; for torch it
    # lies so, but its product of one row uses one core, so the outputs are shared out, and of more
    # rows it takes a copy in the order of oneDNN.

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, batch_size: int):
        super().__init__()
        self._bias_O, self._packed = bias_O, None
        if batch_size > 1 and _can_pack(weight_OI.dtype):
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI, batch_size)
            self._num_bytes = weight_OI.nbytes
            return
        self._weight_OI = weight_OI
        # A matrix per core, and what is left over.
        self._num_cores = torch.get_num_threads()
        self._num_left = len(weight_OI) % self._num_cores
        num_shared = len(weight_OI) - self._num_left
        self._shares = weight_OI[:num_shared].unflatten(0, (self._num_cores, -1))
        self._biases = None if bias_O is None else bias_O[:num_shared].view(self._num_cores, -1, 1)
        self._left = weight_OI[num_shared:], None if bias_O is None else bias_O[num_shared:]

    @property
    def extra_bytes(self) -> int:
        """Memory that it takes beside what it was given."""
        return 0 if self._packed is None else self._num_bytes

    def forward(self, x_BTI: torch.Tensor) -> torch.Tensor:
        """Map every token, (B, T, O)."""
        B, T, num_inputs = x_BTI.shape
        if self._packed is not None:
            options = self._bias_O, "none", [], ""
            return torch.ops.mkldnn._linear_pointwise(x_BTI, self._packed, *options)
        if B * T > 1:
            return F.linear(x_BTI, self._weight_OI, self._bias_O)
        # As the transpose of a row, which BLAS reads as a vector.
        columns = x_BTI.expand(self._num_cores, 1, num_inputs).mT
        if self._biases is None:
            y_BTO = torch.bmm(self._shares, columns).view(1, 1, -1)
        else:
            y_BTO = torch.baddbmm(self._biases, self._shares, columns).view(1, 1, -1)
        if self._num_left:
            y_BTO = torch.cat([y_BTO, F.linear(x_BTI, *self._left)], dim=-1)
        return y_BTO


class PackedAttention(Attention):
    """An attention with one product for queries, keys and values, and few operations per step.

    A step of GPT-2 spends a tenth of its time on starting operations.

    Args:
        attention: whose weights are laid out.
        batch_size: rows of a step.

    Attributes:
        extra_bytes: of memory for the weights of that product, where it has not packed them.
    """

    # twin: XLA makes one program of all operations, which is as fast without; torch starts each of
    # them by itself, and has one for attention.

    def __init__(self, attention: Attention, batch_size: int):
        nn.Module.__init__(self)
        self.num_heads, self.num_kv_heads = attention.num_heads, attention.num_kv_heads
        self.dropout = attention.dropout
        inside = attention.query, attention.key, attention.value
        weight_OI = torch.cat([linear.weight.detach() for linear in inside])
        bias_O = None
        if attention.query.bias is not None:
            bias_O = torch.cat([linear.bias.detach() for linear in inside])
        self.qkv = PackedLinear(weight_OI, bias_O, batch_size)
        self.extra_bytes = 0 if self.qkv.extra_bytes else weight_OI.nbytes
        self.out = _packed(attention.out, batch_size)
        self.query_norm, self.key_norm = attention.query_norm, attention.key_norm
        self.query_scale, self.scores = attention.query_scale, attention.scores
        self.positions, self.attend = attention.positions, attention.attend
        self._sizes = [linear.out_features for linear in inside]
        self._head_width = attention.query.out_features // attention.num_heads

    def project(self, x_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries, keys and values of every token."""
        B, T, _ = x_BTD.shape
        parts = self.qkv(x_BTD).split_with_sizes(self._sizes, dim=-1)
        q_BTNH, k_BTKH, v_BTKH = (part.view(B, T, -1, self._head_width) for part in parts)
        return q_BTNH, k_BTKH, v_BTKH

    def forward(
        self,
        x_BTD: torch.Tensor,
        metadata: AttentionMetadata,
        layer: LayerCache | None = None,
        key: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, LayerCache | None]:
        """Compute `Attention`; in fewer operations for one token per row that sees all slots."""
        short = layer is not None and metadata.all_seen and metadata.bias_BKQTS is None
        short = short and self.scores is identity and not isinstance(self.key_norm, RMSNormOfHeads)
        if not short or self.attend is not fast_attention.attend:
            return super().forward(x_BTD, metadata, layer, key)
        # The axis of one token can stand after the heads as well as before them.
        B, K = x_BTD.shape[0], self.num_kv_heads
        queries, keys, values = self.qkv(x_BTD).split_with_sizes(self._sizes, dim=-1)
        q_BKQH = queries.view(B, K, -1, self._head_width)
        k_BKTH, v_BKTH = keys.view(B, K, 1, -1), values.view(B, K, 1, -1)
        q_BKQH = self.positions.rotate(self.query_scale(self.query_norm(q_BKQH)), metadata)
        k_BKTH = self.positions.rotate(self.key_norm(k_BKTH), metadata)
        layer = layer.append(LayerCache(k_BKTH, v_BKTH), metadata)
        keys_BKSH = layer.keys_BKSH[:, :, : metadata.longest].to(q_BKQH.dtype)
        values_BKSH = layer.values_BKSH[:, :, : metadata.longest].to(q_BKQH.dtype)
        values_BKQH = F.scaled_dot_product_attention(q_BKQH, keys_BKSH, values_BKSH)
        return self.out(values_BKQH.reshape(B, 1, -1)), layer


class PackedGPT(GPT):
    """The same function as another GPT, whose other weights it shares.

    Args:
        model: whose weights are laid out.
        batch_size: rows of a step.
    """

    def __init__(self, model: GPT, batch_size: int):
        self.__dict__.update(copied(model).__dict__)
        shared = {id(x): x for x in (*model.parameters(), model.config)}
        self.blocks = copy.deepcopy(model.blocks, shared)
        for block in cast("list[Block]", self.blocks):
            block.attention = PackedAttention(block.attention, batch_size)
            for name, linear in list(block.mlp.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(block.mlp, name, _packed(linear, batch_size))
        # A tied head reads the embedding, which lies as it should.
        if model.head is None:
            self.head = PackedLinear(model.token_embedding.weight.detach(), None, batch_size)
        else:
            self.head = _packed(model.head, batch_size)

    @property
    def extra_bytes(self) -> int:
        """Memory that it takes beside what it was given."""
        parts = PackedLinear, PackedAttention
        return sum(x.extra_bytes for x in self.modules() if isinstance(x, parts))


def pack(model: GPT, batch_size: int) -> GPT:
    """Lay a model out for steps of `batch_size` rows, where that is known to be faster.

    Args:
        model: itself returned where no other layout is known to be faster.
        batch_size: rows of a step.

    Returns:
        The same function.
    """
    if isinstance(model, PackedGPT) or model.token_embedding.weight.device.type != "cpu":
        return model
    return PackedGPT(model, batch_size)


def _packed(linear: Any, batch_size: int) -> PackedLinear:
    bias_O = None if linear.bias is None else linear.bias.detach()
    return PackedLinear(linear.weight.detach(), bias_O, batch_size)


@functools.cache
def _can_pack(dtype: torch.dtype) -> bool:
    """Tell whether this build of torch has oneDNN's layout and computes the same in it."""
    weight_OI, x_BI = torch.eye(8, dtype=dtype), torch.arange(16).reshape(2, 8).to(dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI, 2)
        found_BO = torch.ops.mkldnn._linear_pointwise(x_BI, packed, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return False
    return torch.equal(found_BO, x_BI)
