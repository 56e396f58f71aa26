"""Weights laid out for steps of few rows, in which all time goes into reading them.

Read beside flax_gpt/packing.py.

Dimension key: B batch, T new tokens, D embed dim, V vocab, I inputs, O outputs of a linear map.
"""

import copy
import functools

import torch
from torch import nn
from torch.nn import functional as F

from torch_gpt.model import GPT


class PackedLinear(nn.Module):
    """The linear map of given weights, for calls without gradients.

    Attributes:
        extra_bytes: of memory that it takes beside the given weights.
    """

    # twin: of one row XLA reads a matrix faster by its outputs, which takes a transposed copy; for
    # torch it lies so, but its product of one row uses one core, so the outputs are shared out.
    # Of more rows XLA is at its best, and torch takes a copy in the order of oneDNN.

    def __init__(self, weight_OI: torch.Tensor, bias_O: torch.Tensor | None, batch_size: int):
        super().__init__()
        self._weight_OI, self._bias_O, self._packed = weight_OI, bias_O, None
        # A matrix per core, and what is left over.
        self._num_cores = torch.get_num_threads()
        self._num_left = len(weight_OI) % self._num_cores
        num_shared = len(weight_OI) - self._num_left
        self._shares = weight_OI[:num_shared].unflatten(0, (self._num_cores, -1))
        self._biases = None if bias_O is None else bias_O[:num_shared].view(self._num_cores, -1, 1)
        self._left = weight_OI[num_shared:], None if bias_O is None else bias_O[num_shared:]
        if batch_size > 1 and _can_pack(weight_OI.dtype):
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI, batch_size)

    @property
    def extra_bytes(self) -> int:
        return 0 if self._packed is None else self._weight_OI.nbytes

    def forward(self, x_BTI: torch.Tensor) -> torch.Tensor:
        """The map of every token, (B, T, O)."""
        B, T, num_inputs = x_BTI.shape
        if B * T == 1:
            # As the transpose of a row, which BLAS reads as a vector.
            columns = x_BTI.expand(self._num_cores, 1, num_inputs).mT
            if self._biases is None:
                y_BTO = torch.bmm(self._shares, columns).view(1, 1, -1)
            else:
                y_BTO = torch.baddbmm(self._biases, self._shares, columns).view(1, 1, -1)
            if self._num_left:
                y_BTO = torch.cat([y_BTO, F.linear(x_BTI, *self._left)], dim=-1)
            return y_BTO
        if self._packed is None:
            return F.linear(x_BTI, self._weight_OI, self._bias_O)
        return torch.ops.mkldnn._linear_pointwise(x_BTI, self._packed, self._bias_O, "none", [], "")


class PackedGPT(GPT):
    """The same function as another GPT, whose other weights it shares.

    Args:
        model: whose weights are laid out.
        batch_size: rows of a step.

    Attributes:
        extra_bytes: of memory that it takes beside the model.
    """

    def __init__(self, model: GPT, batch_size: int):
        nn.Module.__init__(self)
        shared = {id(x): x for x in (*model.parameters(), model.config)}
        self.config = model.config
        self.token_embedding = model.token_embedding
        self.position_embedding = model.position_embedding
        self.distance_embedding = model.distance_embedding
        self.embedding_norm = model.embedding_norm
        self.blocks = copy.deepcopy(model.blocks, shared)
        self.norm = model.norm
        self.head = model.head
        parts = [self, *(part for x in self.blocks for part in (x.attention, x.mlp))]
        for part in parts:
            for name, linear in list(part.named_children()):
                if isinstance(linear, nn.Linear):
                    bias_O = None if linear.bias is None else linear.bias.detach()
                    setattr(part, name, PackedLinear(linear.weight.detach(), bias_O, batch_size))
        # twin: XLA reads the embedding as fast as it lies; torch needs it shared out, too.
        if self.head is None:
            self.head = PackedLinear(model.token_embedding.weight.detach(), None, batch_size)

    @property
    def extra_bytes(self) -> int:
        return sum(x.extra_bytes for x in self.modules() if isinstance(x, PackedLinear))


def pack(model: GPT, batch_size: int) -> GPT:
    """The model for steps of so many rows: itself where no other layout is known to be faster."""
    if isinstance(model, PackedGPT) or model.token_embedding.weight.device.type != "cpu":
        return model
    return PackedGPT(model, batch_size)


@functools.cache
def _can_pack(dtype: torch.dtype) -> bool:
    """Whether this build of torch has oneDNN's layout and computes the same in it."""
    weight_OI, x_BI = torch.eye(8, dtype=dtype), torch.arange(16).reshape(2, 8).to(dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI, 2)
        found_BO = torch.ops.mkldnn._linear_pointwise(x_BI, packed, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return False
    return torch.equal(found_BO, x_BI)
