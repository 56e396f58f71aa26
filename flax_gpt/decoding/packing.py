"""Weights laid out for steps of few rows, in which all time goes into reading them.

Read beside torch_gpt/decoding/packing.py.

Dimension key: B batch, T new tokens, S cache slots, D embed dim, N query heads, K kv heads, Q query
heads of one kv head, H head dim, V vocab, I inputs, O outputs of a linear map.
"""

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_gpt.decoding.kernels import (
    KERNELS,
    TIMED_BYTES,
    Choice,
    Clock,
    Product,
    choices,
    time_in_turns,
    usable,
)
from flax_gpt.model import GPT

Matrix = tuple[jax.Array, jax.Array | None]  # weights as they lie in their layer, and bias (O)

# Bytes of all products of a kind, below which they stay in the caches and nothing is timed.
_SMALL_BYTES = 1 << 22
_measured: dict[tuple[Product, str], Choice] = {}  # with the kind of device


class PackedLinear(nnx.Module):
    """The linear map of given weights by one of `KERNELS`, for calls without gradients.

    Args:
        matrix: weights and bias.
        product: its kind.
        kernel: name of the one that runs.

    Attributes:
        extra_bytes: of memory beside what it was given.
    """

    def __init__(self, matrix: Matrix, product: Product, kernel: str):
        weight, bias_O = matrix
        self.weight = nnx.Param(_laid(weight, product, kernel))
        self.bias = None if bias_O is None else nnx.Param(bias_O)
        self._product = KERNELS[kernel].product
        self.extra_bytes = weight.nbytes if KERNELS[kernel].reads_rows != product.tied else 0

    def __call__(self, x_BTI: jax.Array) -> jax.Array:
        """Map every token, (B, T, O)."""
        y_BTO = self._product(x_BTI, self.weight[...])
        return y_BTO if self.bias is None else y_BTO + self.bias[...][None, None, :]


class PackedGPT(GPT):
    """The same function as another GPT, whose other weights it shares.

    Args:
        model: whose weights are laid out.
        batch_size: rows of a step.
        kernels: a choice for every product of the model.
    """

    def __init__(self, model: GPT, batch_size: int, kernels: Sequence[Choice]):
        chosen = {choice.product: choice.kernel for choice in kernels}
        shared = nnx.merge(*nnx.split(model))
        for name, part in vars(shared).items():
            if name != "head" and not name.startswith("_"):
                setattr(self, name, part)

        def packed(matrix: Matrix, tied: bool = False) -> PackedLinear | None:
            """Lay one matrix out."""
            product = _product(matrix, batch_size, tied)
            kernel = chosen[product]
            # None where it stays in its layer.
            return None if kernel == "plain" else PackedLinear(matrix, product, kernel)

        # twin: XLA makes one program of all operations, which is as fast without; torch starts each
        # of them by itself, and has one for attention.
        for part in (part for block in self.blocks for part in (block.attention, block.mlp)):
            for name, linear in list(vars(part).items()):
                if isinstance(linear, nnx.Linear):
                    setattr(part, name, packed(_matrix(linear)) or linear)
        self.head = packed(_head(model), model.head is None) or shared.head

    @property
    def extra_bytes(self) -> int:
        """Memory that it takes beside what it was given."""
        parts = (x for _, x in nnx.iter_modules(self))
        return sum(x.extra_bytes for x in parts if isinstance(x, PackedLinear))


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
    devices = model.token_embedding.embedding[...].devices()
    on_cpu = all(device.platform == "cpu" for device in devices)
    if isinstance(model, PackedGPT) or not on_cpu:
        return ()
    kinds: dict[Product, list[Matrix]] = {}
    for matrix in _all_matrices(model):
        kinds.setdefault(_product(matrix, batch_size), []).append(matrix)
    head = _head(model)
    kinds.setdefault(_product(head, batch_size, model.head is None), []).append(head)
    num_bytes = sum(weight.nbytes for matrices in kinds.values() for weight, _ in matrices)
    if kernel is None and (num_bytes < _SMALL_BYTES or len(devices) > 1):
        kernel = "plain"
    if kernel is not None:
        names = {product: kernel if usable(kernel, product) else "plain" for product in kinds}
        return tuple(Choice(product, name, {}) for product, name in names.items())
    device = next(iter(devices)).device_kind
    new = {x: matrices for x, matrices in kinds.items() if (x, device) not in _measured}
    found = choices(list(new), time_in_turns(_calls(new), clock)) if new else []
    _measured.update({(choice.product, device): choice for choice in found})
    return tuple(_measured[product, device] for product in kinds)


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
    kinds: Mapping[Product, Sequence[Matrix]],
) -> dict[tuple[Product, str], Callable[[], object]]:
    """Return, by product and candidate, a call that multiplies by several of the matrices."""
    calls: dict[tuple[Product, str], Callable[[], object]] = {}
    for product, matrices in kinds.items():
        num_bytes = matrices[0][0].nbytes
        weights = [
            _cut(weight, product.tied) for weight, _ in matrices[: 1 + TIMED_BYTES // num_bytes]
        ]
        x_BTI = jnp.ones((product.rows, 1, product.inputs), weights[0].dtype)
        for name in ("plain", *(x for x in KERNELS if x != "plain" and usable(x, product))):
            kernel = "out_in" if name == "plain" and product.tied else name
            laid = [_laid(weight, product, kernel) for weight in weights]
            program = jax.jit(KERNELS[kernel].product).lower(x_BTI, laid[0]).compile()
            calls[product, name] = functools.partial(_call_all, program, x_BTI, laid)
    return calls


def _call_all(program: jax.stages.Compiled, x_BTI: jax.Array, laid: Sequence[jax.Array]) -> None:
    jax.block_until_ready([program(x_BTI, weight) for weight in laid])


def _cut(weight: jax.Array, tied: bool) -> jax.Array:
    """Return a matrix of as many outputs as take `TIMED_BYTES`."""
    axis = 0 if tied else 1
    end = max(1, int(weight.shape[axis] * min(1.0, TIMED_BYTES / weight.nbytes)))
    return weight[:end] if tied else weight[:, :end]


def _laid(weight: jax.Array, product: Product, kernel: str) -> jax.Array:
    """Return a matrix in the order that a kernel reads; itself where it lies so."""
    return weight if KERNELS[kernel].reads_rows == product.tied else weight.T


def _product(matrix: Matrix, batch_size: int, tied: bool = False) -> Product:
    weight = matrix[0]
    num_inputs, num_outputs = weight.shape[::-1] if tied else weight.shape
    return Product(num_inputs, (num_outputs,), batch_size, weight.dtype.name, tied)


def _all_matrices(model: GPT) -> Iterator[Matrix]:
    """Yield the matrices of every block."""
    for part in (part for block in model.blocks for part in (block.attention, block.mlp)):
        yield from (_matrix(x) for x in vars(part).values() if isinstance(x, nnx.Linear))


def _head(model: GPT) -> Matrix:
    """Return the matrix of the head, which is the embedding where it is tied."""
    if model.head is None:
        return model.token_embedding.embedding[...], None
    return _matrix(model.head)


def _matrix(linear: Any) -> Matrix:
    return linear.kernel[...], None if linear.bias is None else linear.bias[...]
