"""A program that casts to float32 computes, lifted, what the same program computes in float64."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parity.frameworks.flax.lift import lifted
from parity.frameworks.flax.purity import flax_purity
from parity.frameworks.flax.scope import jax_scope

CPU = jax.devices("cpu")[0]
F32, F64 = jnp.float32, jnp.float64
X = np.random.default_rng(0).normal(size=(5, 4))
Function = Callable[[jax.Array, type], jax.Array]

# Each takes an array and the float type that the program names.


def norm(x, f):
    y = x.astype(f)
    return (y * jax.lax.rsqrt(jnp.mean(y**2, -1, keepdims=True) + 1e-6)).astype(x.dtype)


def constants(x, f):
    table = jnp.full((4,), 0.1, f) + jnp.linspace(0, 1, 4, dtype=f) + jnp.arange(4, dtype=f) / 3
    return x * jnp.array(0.3, f) + f(1 / 3) * jnp.ones_like(x, f) * table[None] + jnp.sqrt(5)


def softmax(x, f):
    masked = jnp.where(jnp.tri(5, dtype=bool), x @ x.T, jnp.finfo(f).min)
    return jax.nn.softmax(masked.astype(f), -1).astype(x.dtype)


def attention(x, f):
    q = x.reshape(1, 5, 2, 2).astype(f)
    if f is F32:
        return jax.nn.dot_product_attention(q, q, q, is_causal=True)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, q) / np.sqrt(2)
    scores = jnp.where(jnp.tri(5, dtype=bool)[None, None], scores, -jnp.inf)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, -1), q)


def scan(x, f):
    def body(carry, row):
        carry = carry * f(0.3) + row.astype(f)
        return carry, jnp.sin(carry)

    return jax.lax.scan(body, jnp.zeros(4, f), x)[1]


def loops(x, f):
    y = jax.lax.fori_loop(0, 3, lambda i, y: y * 0.1 + i, x.astype(f))
    table = jnp.asarray(X[:1], f) if f is F64 else jnp.full((1, 4), 1, f)
    table = jnp.ones_like(table)
    count = jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] / 3), (0, table))[1]
    return y + count + jax.lax.map(lambda row: row.astype(f) / 3, x)


def branches(x, f):
    def then(y):
        return y.astype(f) / 3

    return jax.lax.cond(x.sum() > 100, lambda y: jnp.zeros((5, 4), f), then, x)


def rotary(x, f):
    complex_type = jnp.complex64 if f is F32 else jnp.complex128
    angles = jnp.outer(jnp.arange(5, dtype=f), 1 / 10000 ** (jnp.arange(2, dtype=f) / 2))
    turned = jax.lax.complex(x[:, :2].astype(f), x[:, 2:].astype(f))
    turned = turned * jnp.exp(1j * angles).astype(complex_type)
    return jnp.concatenate([turned.real, turned.imag], -1)


def derivatives(x, f):
    @jax.custom_vjp
    def scaled(x):
        return x.astype(f) * 0.1

    scaled.defvjp(lambda x: (scaled(x), x), lambda x, g: ((g * f(0.1)).astype(x.dtype),))

    @jax.custom_jvp
    def cubed(x):
        return x.astype(f) ** 3

    cubed.defjvp(lambda x, t: (cubed(*x), (3 * x[0].astype(f) ** 2 * t[0]).astype(f)))
    return jax.checkpoint(functools.partial(norm, f=f))(scaled(x)) + cubed(x)


def products(x, f):
    half = jnp.bfloat16 if f is F32 else f
    y = jnp.dot(x.astype(half), x.T.astype(half), preferred_element_type=f)
    image = y.astype(f)[None, None]
    ones = jnp.full((1, 1, 2, 2), 0.1, f)
    y = jax.lax.conv_general_dilated(image, ones, (1, 1), "SAME", preferred_element_type=f)
    groups = jax.lax.ragged_dot(
        x.astype(f), jnp.full((2, 4, 3), 0.1, f), jnp.array([2, 3]), preferred_element_type=f
    )
    return jnp.concatenate([y[0, 0], groups], -1)


def rounded(x, f):
    return jax.lax.reduce_precision(x, 8, 7) if f is F32 else x


def jitted(x, f):
    inner = jax.jit(lambda x, scale: norm(x, f) * scale, static_argnums=())
    return jax.vmap(lambda row: inner(row, 2))(x) + jax.jit(lambda: jnp.full((), 0.1, f))()


def resized(x, f):
    return jax.image.resize(x.astype(f), (10, 8), "bilinear")


KINDS = [
    norm, constants, softmax, attention, scan, loops, branches, rotary, derivatives, products,
    rounded, jitted, resized,
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_program_that_names_float32_computes_as_the_same_in_float64(kind: Function):
    def loss(x, f):
        return jnp.sum(jnp.sin(kind(x, f)))

    with jax_scope("float64", CPU):
        x = jnp.asarray(X)
        expected = kind(x, F64)
        by_x = jax.grad(loss)(x, F64)
        with lifted() as log:
            for got in (kind(x, F32), jax.jit(kind, static_argnums=1)(x, F32)):
                assert got.dtype == F64
                np.testing.assert_allclose(got, expected, rtol=1e-14, atol=1e-15)
            for gradient in (jax.grad(loss), jax.jit(jax.grad(loss), static_argnums=1)):
                np.testing.assert_allclose(gradient(x, F32), by_x, rtol=1e-13, atol=1e-15)
            assert flax_purity(lambda x: kind(x, F32), x).impure == {}
    assert log and not any("constant" in words for words in log)
