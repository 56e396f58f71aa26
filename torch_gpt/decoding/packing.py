"""Weights laid out for steps of few rows, in which all time goes into reading them.

Read beside flax_gpt/decoding/packing.py.

Dimension key: B batch, T new tokens, S cache slots, D embed dim, N query heads, K kv heads, Q query
heads of one kv head, H head dim, V vocab, I inputs, O outputs of a linear map.
"""

import copy
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from torch_gpt import fast_attention
from torch_gpt.cache import LayerCache
from torch_gpt.decoding.kernels import (
    KERNELS,
    TIMED_BYTES,
    Choice,
    Clock,
    Product,
    choices,
    time_in_turns,
    usable,
)
from torch_gpt.layers import RMSNormOfHeads, identity
from torch_gpt.metadata import AttentionMetadata
from torch_gpt.model import GPT, Attention, Block, copied

Matrix = tuple[torch.Tensor, torch.Tensor | None]  # weights (O, I) and bias (O)

_measured: dict[tuple[Product, int], Choice] = {}  # with the number of threads


class PackedLinear(nn.Module):
    """The linear map of given weights by one of `KERNELS`, for calls without gradients.

    Args:
        matrix: weights and bias.
        product: its kind.
        kernel: name of the one that runs.

    Attributes:
        extra_bytes: of memory beside what it was given.
    """

    def __init__(self, matrix: Matrix, product: Product, kernel: str):
        super().__init__()
        weight_OI, bias_O = matrix
        self._operands = KERNELS[kernel].lay(weight_OI, bias_O, product.rows)
        self._product = KERNELS[kernel].product
        self.extra_bytes = weight_OI.nbytes if KERNELS[kernel].copies else 0

    def forward(self, x_BTI: torch.Tensor) -> torch.Tensor:
        """Map every token, (B, T, O)."""
        return self._product(x_BTI, *self._operands)


class PackedAttention(Attention):
    """An attention with one product for queries, keys and values, and few operations per step.

    A step of GPT-2 spends a tenth of its time on starting operations.

    Args:
        attention: whose weights are laid out.
        product: of queries, keys and values.
        kernel: that computes it; the plain layer makes three products.
        out: the last map, laid out.

    Attributes:
        extra_bytes: of memory for the weights side by side, where no kernel has copied them again.
    """

    # twin: XLA makes one program of all operations, which is as fast without; torch starts each of
    # them by itself, and has one for attention.

    def __init__(self, attention: Attention, product: Product, kernel: str, out: PackedLinear):
        nn.Module.__init__(self)
        self.num_heads, self.num_kv_heads = attention.num_heads, attention.num_kv_heads
        self.dropout = attention.dropout
        self.qkv: PackedLinear | None = None
        self.extra_bytes = 0
        if kernel == "plain":
            self.query, self.key, self.value = attention.query, attention.key, attention.value
        else:
            matrix = _side_by_side(_inside(attention))
            self.qkv = PackedLinear(matrix, product, kernel)
            self.extra_bytes = 0 if self.qkv.extra_bytes else matrix[0].nbytes
        self.out = out
        self.query_norm, self.key_norm = attention.query_norm, attention.key_norm
        self.query_scale, self.scores = attention.query_scale, attention.scores
        self.positions, self.attend = attention.positions, attention.attend
        self._sizes = [len(weight_OI) for weight_OI, _ in _inside(attention)]
        self._head_width = attention.query.out_features // attention.num_heads

    def project(self, x_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries, keys and values of every token."""
        B, T, _ = x_BTD.shape
        q_BTNH, k_BTKH, v_BTKH = (x.view(B, T, -1, self._head_width) for x in self._parts(x_BTD))
        return q_BTNH, k_BTKH, v_BTKH

    def _parts(self, x_BTD: torch.Tensor) -> Sequence[torch.Tensor]:
        if self.qkv is None:
            return self.query(x_BTD), self.key(x_BTD), self.value(x_BTD)
        return self.qkv(x_BTD).split_with_sizes(self._sizes, dim=-1)

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
        if layer is None or not short or self.attend is not fast_attention.attend:
            return super().forward(x_BTD, metadata, layer, key)
        # The axis of one token can stand after the heads as well as before them.
        B, K = x_BTD.shape[0], self.num_kv_heads
        queries, keys, values = self._parts(x_BTD)
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
        kernels: a choice for every product of the model.
    """

    def __init__(self, model: GPT, batch_size: int, kernels: Sequence[Choice]):
        chosen = {choice.product: choice.kernel for choice in kernels}
        self.__dict__.update(copied(model).__dict__)
        shared = {id(x): x for x in (*model.parameters(), model.config)}
        self.blocks = copy.deepcopy(model.blocks, shared)

        def packed(matrix: Matrix, tied: bool = False) -> PackedLinear:
            """Lay one matrix out."""
            product = _product([matrix], batch_size, tied)
            return PackedLinear(matrix, product, chosen[product])

        for block in cast("list[Block]", self.blocks):
            product = _product(_inside(block.attention), batch_size)
            out = packed(_matrix(block.attention.out))
            block.attention = PackedAttention(block.attention, product, chosen[product], out)
            for name, linear in list(block.mlp.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(block.mlp, name, packed(_matrix(linear)))
        self.head = packed(_head(model), model.head is None)

    @property
    def extra_bytes(self) -> int:
        """Memory that it takes beside what it was given."""
        parts = PackedLinear, PackedAttention
        return sum(x.extra_bytes for x in self.modules() if isinstance(x, parts))


def choose_kernels(
    model: GPT, batch_size: int, kernel: str | None = None, clock: Clock = time.perf_counter
) -> tuple[Choice, ...]:
    """Choose how each product of a step is computed, by timing candidates on the model's weights.

    What was timed once in this process is not timed again. Candidates' copies are dropped.

    Args:
        model: whose products.
        batch_size: rows of a step.
        kernel: one of `KERNELS` to take wherever it can be, untimed; None for the fastest.
        clock: returns seconds.

    Returns:
        A choice for each kind of product; none for a model that is laid out, or not on a CPU.

    Raises:
        ValueError: for a kernel that does not exist.
    """
    if kernel is not None and kernel not in KERNELS:
        raise ValueError(
            f"Decoder: kernel {kernel!r}. There are {', '.join(KERNELS)}. Choose one of them, or "
            "None for the fastest."
        )
    if isinstance(model, PackedGPT) or model.token_embedding.weight.device.type != "cpu":
        return ()
    kinds: dict[Product, list[Sequence[Matrix]]] = {}
    for matrices in _all_matrices(model):
        kinds.setdefault(_product(matrices, batch_size), []).append(matrices)
    head = _head(model)
    kinds.setdefault(_product([head], batch_size, model.head is None), []).append([head])
    if kernel is not None:
        names = {product: kernel if usable(kernel, product) else "plain" for product in kinds}
        return tuple(Choice(product, name, {}) for product, name in names.items())
    threads = torch.get_num_threads()
    new = {x: matrices for x, matrices in kinds.items() if (x, threads) not in _measured}
    found = choices(list(new), time_in_turns(_calls(new), clock)) if new else []
    _measured.update({(choice.product, threads): choice for choice in found})
    return tuple(_measured[product, threads] for product in kinds)


def pack(model: GPT, batch_size: int, kernels: Sequence[Choice]) -> GPT:
    """Lay a model out for steps of `batch_size` rows.

    Args:
        model: itself returned where nothing was chosen.
        batch_size: rows of a step.
        kernels: those of `choose_kernels`.

    Returns:
        The same function.
    """
    return PackedGPT(model, batch_size, kernels) if kernels else model


def _calls(
    kinds: Mapping[Product, Sequence[Sequence[Matrix]]],
) -> dict[tuple[Product, str], Callable[[], object]]:
    """Return, by product and candidate, a call that multiplies by several of the matrices."""
    calls: dict[tuple[Product, str], Callable[[], object]] = {}
    for product, groups in kinds.items():
        x_BTI = torch.ones(product.rows, 1, product.inputs, dtype=groups[0][0][0].dtype)
        num_bytes = sum(weight_OI.nbytes for weight_OI, _ in groups[0])
        groups = [_shortened(group, num_bytes) for group in groups[: 1 + TIMED_BYTES // num_bytes]]
        for name in ("plain", *(x for x in KERNELS if x != "plain" and usable(x, product))):
            pieces = groups if name == "plain" else [[_side_by_side(group)] for group in groups]
            linears = [PackedLinear(matrix, product, name) for x in pieces for matrix in x]
            calls[product, name] = functools.partial(_call_all, linears, x_BTI)
    return calls


@torch.no_grad()
def _call_all(linears: Sequence[PackedLinear], x_BTI: torch.Tensor) -> None:
    for linear in linears:
        linear(x_BTI)


def _shortened(group: Sequence[Matrix], num_bytes: int) -> list[Matrix]:
    """Return matrices cut to as many outputs as take `TIMED_BYTES` in all."""
    share = min(1.0, TIMED_BYTES / num_bytes)
    ends = [max(1, int(len(weight_OI) * share)) for weight_OI, _ in group]
    return [
        (weight_OI[:end], None if bias_O is None else bias_O[:end])
        for (weight_OI, bias_O), end in zip(group, ends, strict=True)
    ]


def _side_by_side(group: Sequence[Matrix]) -> Matrix:
    """Return one matrix of the outputs of all; itself where there is one."""
    if len(group) == 1:
        return group[0]
    biases = [bias_O for _, bias_O in group if bias_O is not None]
    weight_OI = torch.cat([weight_OI for weight_OI, _ in group])
    return weight_OI, torch.cat(biases) if biases else None


def _product(group: Sequence[Matrix], batch_size: int, tied: bool = False) -> Product:
    weight_OI = group[0][0]
    dtype = str(weight_OI.dtype).removeprefix("torch.")
    return Product(weight_OI.shape[1], tuple(len(x) for x, _ in group), batch_size, dtype, tied)


def _all_matrices(model: GPT) -> Iterator[list[Matrix]]:
    """Yield the matrices of every block."""
    for block in cast("list[Block]", model.blocks):
        yield _inside(block.attention)  # together, for they read the same inputs
        yield [_matrix(block.attention.out)]
        linears = (x for x in block.mlp.children() if isinstance(x, nn.Linear))
        yield from ([_matrix(linear)] for linear in linears)


def _inside(attention: Attention) -> list[Matrix]:
    return [_matrix(linear) for linear in (attention.query, attention.key, attention.value)]


def _head(model: GPT) -> Matrix:
    """Return the matrix of the head, which is the embedding where it is tied."""
    return (
        (model.token_embedding.weight.detach(), None) if model.head is None else _matrix(model.head)
    )


def _matrix(linear: Any) -> Matrix:
    return linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
