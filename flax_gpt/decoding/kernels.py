"""Ways to multiply a few tokens by a matrix, and the choice among them by measurement.

Read beside torch_gpt/decoding/kernels.py.

A step reads every weight once, and how fast it does so depends on processor, library, shape and
rows: a product that is twice as fast as the plain layer on one machine is half as fast on the next.
So the candidates are timed where they run.

Dimension key: B batch, T new tokens, I inputs, O outputs of a linear map.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

Clock = Callable[[], float]

TIMED_BYTES = 1 << 24  # of the matrices of one shape; all shapes together are more than caches hold
_SECONDS = 0.4  # for all rounds; copies are made before
_MIN_ROUNDS, _MAX_ROUNDS = 5, 9
_TIE = 0.03  # what is faster by less is as fast
_FEW = 32  # tokens of a call, up to which all time goes into reading weights


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A way to map tokens by a matrix.

    Attributes:
        product: maps tokens (B, T, I) by weights to (B, T, O).
        reads_rows: whether it reads weights as (O, I), not (I, O).
    """

    product: Callable[[jax.Array, jax.Array], jax.Array]
    reads_rows: bool


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
    if name == "outputs_first":
        return 1 < product.rows <= _FEW
    return name != ("out_in" if product.tied else "in_out")


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


def _inputs_first(x_BTI: jax.Array, weight_IO: jax.Array) -> jax.Array:
    return jnp.einsum("BTI,IO->BTO", x_BTI, weight_IO)


def _rows_first(x_BTI: jax.Array, weight_OI: jax.Array) -> jax.Array:
    return jnp.einsum("BTI,OI->BTO", x_BTI, weight_OI)


def _outputs_first(x_BTI: jax.Array, weight_OI: jax.Array) -> jax.Array:
    B, T, _ = x_BTI.shape
    if B * T > _FEW:
        return _rows_first(x_BTI, weight_OI)
    y_OBT = jnp.einsum("OI,BTI->OBT", weight_OI, x_BTI)
    return jnp.moveaxis(y_OBT, 0, 2)


# twin: torch starts each product by itself, reads (out, in), and leaves one row to one core; XLA
# compiles a step, and reads (in, out), of a tied head (out, in).

# In another order than the layer's, a copy is read; `outputs_first` multiplies from the left.
KERNELS = {
    "plain": Kernel(_inputs_first, False),
    "in_out": Kernel(_inputs_first, False),
    "out_in": Kernel(_rows_first, True),
    "outputs_first": Kernel(_outputs_first, True),
}
