"""Ways to multiply a few tokens by a matrix, and the choice among them by measurement.

Read beside flax_gpt/decoding/kernels.py.

A step reads every weight once, and how fast it does so depends on processor, library, shape and
rows: a product that is twice as fast as the plain layer on one machine is half as fast on the next.
So the candidates are timed where they run.

Dimension key: B batch, T new tokens, I inputs, O outputs of a linear map.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

Clock = Callable[[], float]

TIMED_BYTES = 1 << 24  # of the matrices of one shape; all shapes together are more than caches hold
_SECONDS = 0.4  # for all rounds; copies are made before
_MIN_ROUNDS, _MAX_ROUNDS = 5, 9
_TIE = 0.03  # what is faster by less is as fast


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A way to map tokens by a matrix.

    Attributes:
        lay: arranges weights (O, I), a bias (O) or None, for a number of rows, as `product` reads
            them.
        product: maps tokens (B, T, I) by what `lay` returned, (B, T, O).
        copies: whether what it reads is a copy of the weights.
        one_row: whether it is of use for one row; None for any number of them.
    """

    lay: Callable[[torch.Tensor, torch.Tensor | None, int], tuple[Any, ...]]
    product: Callable[..., torch.Tensor]
    copies: bool = False
    one_row: bool | None = None


class Product(NamedTuple):
    """What decides how fast a product is.

    Attributes:
        inputs: I.
        outputs: O of every matrix that reads the same inputs.
        rows: tokens of a step.
        dtype: of the weights.
        tied: whether the matrix is the embedding.
    """

    inputs: int
    outputs: tuple[int, ...]
    rows: int
    dtype: str
    tied: bool = False

    def __str__(self) -> str:
        outputs = "+".join(map(str, self.outputs))
        return f"{self.inputs} x {outputs}, {self.rows} rows, {self.dtype}"


@dataclasses.dataclass(frozen=True)
class Choice:
    """The kernel of all products of one kind.

    Attributes:
        product: the kind.
        kernel: name of the one that runs.
        ratios: time of each candidate over the plain layer's, the least of rounds in turns; empty
            where nothing was timed.
    """

    product: Product
    kernel: str
    ratios: Mapping[str, float]


def usable(name: str, product: Product) -> bool:
    """Tell whether a kernel can compute a product, in another way than the plain layer."""
    kernel = KERNELS[name]
    if name == "joined":
        return len(product.outputs) > 1
    if kernel.one_row is not None and kernel.one_row != (product.rows == 1):
        return False
    return name != "packed" or _can_pack(getattr(torch, product.dtype))


def fastest(ratios: Mapping[str, float]) -> str:
    """Return the candidate with the smallest ratio; the plain layer unless that is clearly less."""
    name = min(ratios, key=lambda name: ratios[name])
    return name if ratios[name] < 1 - _TIE else "plain"


def time_in_turns(
    calls: Mapping[tuple[Product, str], Callable[[], object]], clock: Clock = time.perf_counter
) -> dict[tuple[Product, str], list[float]]:
    """Call everything in every round, by kernels, so that no memory is read twice in succession.

    Returns:
        Seconds of each call by round; the first round, in which threads wake, does not count.
    """
    order = sorted(calls, key=lambda key: key[1])
    seconds: dict[tuple[Product, str], list[float]] = {key: [] for key in order}
    start = clock()
    for number in range(_MAX_ROUNDS + 1):
        for key in order:
            before = clock()
            calls[key]()
            seconds[key].append(clock() - before)
        order.reverse()
        if number >= _MIN_ROUNDS and clock() - start > _SECONDS:
            break
    return {key: times[1:] for key, times in seconds.items()}


def choices(
    products: Sequence[Product], seconds: Mapping[tuple[Product, str], Sequence[float]]
) -> list[Choice]:
    """Choose for every product, from the times of its candidates by round."""
    found = []
    for product in products:
        # The least of each, because what else the machine does only adds to a time.
        plain = min(seconds[product, "plain"])
        ratios = {name: min(x) / plain for (of, name), x in seconds.items() if of == product}
        found.append(Choice(product, fastest(ratios), ratios))
    return found


def _as_it_lies(
    weight_OI: torch.Tensor, bias_O: torch.Tensor | None, rows: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    return weight_OI, bias_O


def _transposed(
    weight_OI: torch.Tensor, bias_O: torch.Tensor | None, rows: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    return weight_OI.T.contiguous(), bias_O


def _vector(
    x_BTI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None
) -> torch.Tensor:
    if x_BTI.shape[:2].numel() > 1:
        return F.linear(x_BTI, weight_OI, bias_O)
    x_I = x_BTI.reshape(-1)
    y_O = torch.mv(weight_OI, x_I) if bias_O is None else torch.addmv(bias_O, weight_OI, x_I)
    return y_O.view(1, 1, -1)


def _outputs_first(
    x_BTI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None
) -> torch.Tensor:
    B, T, _ = x_BTI.shape
    columns = x_BTI.flatten(0, 1).T
    if bias_O is None:
        return torch.mm(weight_OI, columns).T.contiguous().view(B, T, -1)
    return torch.addmm(bias_O[:, None], weight_OI, columns).T.contiguous().view(B, T, -1)


def _inputs_first(
    x_BTI: torch.Tensor, weight_IO: torch.Tensor, bias_O: torch.Tensor | None
) -> torch.Tensor:
    B, T, _ = x_BTI.shape
    rows = x_BTI.flatten(0, 1)
    if bias_O is None:
        return torch.mm(rows, weight_IO).view(B, T, -1)
    return torch.addmm(bias_O, rows, weight_IO).view(B, T, -1)


def _shared_out(
    weight_OI: torch.Tensor, bias_O: torch.Tensor | None, rows: int
) -> tuple[torch.Tensor | None, ...]:
    """Return a matrix per core and its bias, what is left over, and all of it for more rows."""
    num_cores = torch.get_num_threads()
    num_shared = len(weight_OI) // num_cores * num_cores
    shares = weight_OI[:num_shared].unflatten(0, (num_cores, -1))
    left = None if num_shared == len(weight_OI) else weight_OI[num_shared:]
    if bias_O is None:
        return weight_OI, None, shares, None, left, None
    biases = bias_O[:num_shared].view(num_cores, -1, 1)
    return weight_OI, bias_O, shares, biases, left, bias_O[num_shared:]


def _split(
    x_BTI: torch.Tensor,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None,
    shares: torch.Tensor,
    biases: torch.Tensor | None,
    left: torch.Tensor | None,
    left_bias: torch.Tensor | None,
) -> torch.Tensor:
    B, T, num_inputs = x_BTI.shape
    if B * T > 1:
        return F.linear(x_BTI, weight_OI, bias_O)
    # As the transpose of a row, which BLAS reads as a vector.
    columns = x_BTI.expand(len(shares), 1, num_inputs).mT
    if biases is None:
        y_BTO = torch.bmm(shares, columns).view(1, 1, -1)
    else:
        y_BTO = torch.baddbmm(biases, shares, columns).view(1, 1, -1)
    if left is not None:
        y_BTO = torch.cat([y_BTO, F.linear(x_BTI, left, left_bias)], dim=-1)
    return y_BTO


def _reordered(
    weight_OI: torch.Tensor, bias_O: torch.Tensor | None, rows: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.ops.mkldnn._reorder_linear_weight(weight_OI, rows), bias_O


def _packed(
    x_BTI: torch.Tensor, weights: torch.Tensor, bias_O: torch.Tensor | None
) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x_BTI, weights, bias_O, "none", [], "")


@functools.cache
def _can_pack(dtype: torch.dtype) -> bool:
    """Tell whether this build of torch has oneDNN's order and computes the same in it."""
    weight_OI, x_BI = torch.eye(8, dtype=dtype), torch.arange(16).reshape(2, 8).to(dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI, 2)
        found_BO = torch.ops.mkldnn._linear_pointwise(x_BI, packed, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return False
    return torch.equal(found_BO, x_BI)


# twin: torch starts each product by itself, reads (out, in), and leaves one row to one core; XLA
# compiles a step, and reads (in, out), of a tied head (out, in).

# `mv` is the matrix times a vector, `split` shares the outputs out among cores, `outputs_first`
# multiplies from the left, `in_out` reads a transposed copy, `packed` one in the order of oneDNN,
# which has no public name. All but `plain` make one product of queries, keys and values; `joined`
# does nothing else.
KERNELS = {
    "plain": Kernel(_as_it_lies, F.linear),
    "joined": Kernel(_as_it_lies, F.linear),
    "mv": Kernel(_as_it_lies, _vector, one_row=True),
    "split": Kernel(_shared_out, _split, one_row=True),
    "outputs_first": Kernel(_as_it_lies, _outputs_first, one_row=False),
    "in_out": Kernel(_transposed, _inputs_first, copies=True),
    "packed": Kernel(_reordered, _packed, copies=True),
}
