"""A program that casts to float32 computes, lifted, what the same program computes in float64."""

import functools
import threading
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from parity.frameworks.batch import Batch
from parity.frameworks.capture import Trace
from parity.frameworks.flax.leaves import flax_leaves
from parity.frameworks.flax.lift import Log, lifted
from parity.frameworks.flax.module import spec
from parity.frameworks.flax.purity import flax_purity
from parity.frameworks.flax.runner import FlaxRunner
from parity.frameworks.flax.scope import jax_scope
from parity.frameworks.rounding import unrounded

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
        y = kind(x, f)
        return jnp.sum(jnp.sin(y)), y

    def run(x, f):
        return jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)(x, f)

    with jax_scope("float64", CPU):
        x = jnp.asarray(X)
        (_, expected), by_x = run(x, F64)
        with lifted() as log:
            (_, found), gradient = run(x, F32)
            for y in (found, kind(x, F32)):
                assert y.dtype == F64
                np.testing.assert_allclose(y, expected, rtol=1e-14, atol=1e-15)
            np.testing.assert_allclose(gradient, by_x, rtol=1e-13, atol=1e-15)
            purity = flax_purity(lambda x: loss(x, F32)[0], x)
    assert purity.impure == {} and purity.lifted and log
    assert not any(" constant at" in words for words in log)


def test_a_lifted_operation_is_named_by_the_line_that_asks_for_it():
    def cast(x):
        return norm(x, F32) + norm(x, F32)

    with jax_scope("float64", CPU), lifted():
        found = flax_purity(jax.jit(cast), jnp.asarray(X)).lifted
    line = norm.__code__.co_firstlineno + 1
    assert found == {f"float32 cast at norm (test_lift.py:{line})": 2}


def test_what_a_program_holds_in_float32_is_a_constant_unless_it_is_exact():
    table, factor, exact = (
        np.sin(X.astype(F32)),
        jnp.sin(jnp.arange(4, dtype=F32))[None],
        np.float32(0.5),
    )

    def held(x):
        return x * table + jnp.asarray(table, F32) * factor + exact * np.float32(0.1)

    with jax_scope("float64", CPU):
        x = jnp.asarray(X)
        wide = unrounded(table) * (X + unrounded(np.asarray(factor))) + 0.5 * 0.1
        for moves in (False, True):
            with lifted(Log(moves)) as log:
                found, jitted = held(x), jax.jit(held)(x)
            assert sum(n for words, n in log.items() if words.startswith("float32 constant")) == 2
            assert found.dtype == F64
            np.testing.assert_allclose(found, jitted, rtol=1e-15)
            gap = float(np.max(np.abs(found - wide)))
            assert 1e-9 < gap < 1e-6 if moves else gap < 1e-14


def test_integers_keep_the_32_bits_for_which_a_program_was_written():
    def indexed(x):
        end = jnp.zeros((), jnp.int32)
        filled = jax.lax.dynamic_update_slice(jnp.zeros((5, 4), x.dtype), x, (end, 0))
        carried = jax.lax.fori_loop(0, 3, lambda i, n: n + i, end)
        found = jnp.where(x[:, 0] > 0, jnp.argmax(x, -1), carried) + jnp.cumsum(x[:, 1] > 0)
        return filled, found + jnp.searchsorted(jnp.sort(x[0]), 0.1) + jnp.asarray(np.arange(5))

    def bits(x):
        return jnp.frexp(x)[0], jnp.signbit(x), jax.lax.bitcast_convert_type(x, jnp.int64)

    with jax_scope("float64", CPU):
        x = jnp.asarray(X)
        expected = bits(x)
        with lifted():
            for filled, found in (indexed(x), jax.jit(indexed)(x)):
                assert filled.dtype == F64 and found.dtype == jnp.int32
                assert np.array_equal(filled, X)
            assert all(map(np.array_equal, bits(x), expected))


def test_random_numbers_are_those_of_a_float32_run():
    def draw(dtype):
        key, shape = jax.random.key(3), (50,)
        kept = jax.random.bernoulli(key, 0.3, shape)
        return jax.random.uniform(key, shape, dtype), jax.random.normal(key, shape), kept

    narrow = draw(F32)
    with jax_scope("float64", CPU), lifted():
        wide = draw(F64)
        pure = flax_purity(lambda x: x * jax.random.uniform(jax.random.key(0)), jnp.asarray(X))
    assert wide[0].dtype == wide[1].dtype == F64 and pure.impure == {}
    np.testing.assert_allclose(wide[0], narrow[0], rtol=1e-7)
    np.testing.assert_allclose(wide[1], narrow[1], rtol=1e-5)
    assert np.array_equal(wide[2], narrow[2])


def test_leaving_restores_types_caches_and_settings_whatever_happens_inside():
    traced = []

    @jax.jit
    def cast(x):
        traced.append(x.dtype)
        return x.astype(F32) / 3

    def seen() -> tuple:
        return cast(jnp.ones(3)).dtype, jnp.arange(3).dtype, jnp.float32(0.1).dtype

    def patched() -> list:
        return [jax.core.Primitive.bind if hasattr(jax.core, "Primitive") else None, jnp.array]

    before, functions, x64 = seen(), patched(), jax.config.jax_enable_x64
    with lifted() as outer:
        inside = seen()
        with pytest.raises(ZeroDivisionError), lifted() as inner:
            cast(jnp.ones(4))
            1 / 0  # noqa: B018
        assert inner and inner is not outer
        with lifted(outer):
            assert seen() == inside  # by its program of before
        others = []
        thread = threading.Thread(target=lambda: others.append(seen()))
        thread.start()
        thread.join()
    assert before == others[0] == seen() == (F32, jnp.int32, F32)
    assert inside == (F64, jnp.int32, F64)
    assert functions == patched() and jax.config.jax_enable_x64 == x64
    assert traced == [F32, F64, F64]


# Models


class Net(nnx.Module):
    """A model that casts in all ways that layers have, and scans its blocks."""

    def __init__(self, epsilon: float = 1e-6):
        rngs = nnx.Rngs(0)

        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def blocks(rngs):
            return Block(epsilon, rngs)

        self.blocks = blocks(rngs)
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(4, dtype=F32, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, block):
            return nnx.remat(lambda block, x: block(x))(block, x)

        y = self.attention(self.norm(run(x.astype(jnp.bfloat16), self.blocks)))
        return jax.nn.softmax(y.astype(F32), -1)


class Block(nnx.Module):
    def __init__(self, epsilon, rngs):
        self.linear, self.epsilon = nnx.Linear(4, 4, rngs=rngs), epsilon

    def __call__(self, x):
        y = self.linear(x).astype(F32)
        return x + (y * jax.lax.rsqrt(jnp.mean(y**2, -1, keepdims=True) + self.epsilon))


class Asks(nnx.Module):
    """A model that refuses to be lifted."""

    def __init__(self):
        self.linear = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

    def __call__(self, x):
        y = self.linear(x).astype(F32)
        if y.dtype != F32:
            raise TypeError("in float32, please")
        return y


class Calls(nnx.Module):
    """A model that leaves jax."""

    def __init__(self):
        self.linear = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

    def __call__(self, x):
        y = self.linear(x)
        return y + jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, F32), jnp.asarray(X))


BATCH = Batch((X[None],), np.ones(1, bool))


def runner(module: nnx.Module, dtype: str = "float64") -> FlaxRunner:
    """A lifted runner of a module's own weights."""
    return FlaxRunner(spec(module), flax_leaves(module), dtype, CPU, lift=True)


@pytest.fixture(scope="module")
def run() -> FlaxRunner:
    return runner(Net())


def test_a_model_that_casts_is_pure_when_its_runner_lifts_it(run):
    found = run.gradient_purity(BATCH)
    assert found.impure == {}
    assert sum("cast at Block.__call__ (test_lift.py" in words for words in found.lifted) == 1
    assert any("bfloat16 cast at Net.__call__" in words for words in found.lifted)
    outputs, (_, gradients) = run.outputs(BATCH), run.gradients(BATCH)
    assert {x.dtype.name for x in (*outputs.values(), *gradients.values())} == {"float64"}


def test_modules_called_one_by_one_compute_what_the_lifted_program_does(run):
    traces: list[Trace] = []
    run.traces(BATCH, traces.append)
    (output,) = run.outputs(BATCH).values()
    np.testing.assert_allclose(traces[-1].output, output, rtol=1e-14)
    assert {trace.output.dtype.name for trace in traces} == {"float64"}
    root = run.backward(BATCH)[-1]
    assert root.path == "" and root.inputs[0].dtype == F64


def test_a_small_difference_shows_through_casts(run):
    (right,), (wrong,) = (x.outputs(BATCH).values() for x in (run, runner(Net(1e-5))))
    assert 1e-8 < np.max(np.abs(right - wrong)) < 1e-3


def test_training_is_lifted_too(run):
    trainer = run.trainer(2)
    losses = [trainer.step(X[None]) for _ in range(2)]
    assert losses[0] == pytest.approx(run.gradients(BATCH)[0], rel=1e-14)
    assert {leaf.dtype.name for leaf in trainer.parameters().values()} == {"float64"}


def test_a_model_that_does_not_run_lifted_runs_as_it_is_and_says_so():
    run = runner(Asks())
    (output,) = run.outputs(BATCH).values()
    assert output.dtype == F32
    impure = run.forward_purity(BATCH).impure
    line = Asks.__call__.__code__.co_firstlineno
    assert f"TypeError at Asks.__call__ (test_lift.py:{line + 3})" in impure
    assert f"convert_element_type at Asks.__call__ (test_lift.py:{line + 1})" in impure


def test_what_leaves_jax_stays_narrow_and_is_named():
    impure = runner(Calls()).forward_purity(BATCH).impure
    line = Calls.__call__.__code__.co_firstlineno + 2
    assert f"pure_callback at Calls.__call__ (test_lift.py:{line})" in impure


class Table(nnx.Module):
    """A model with a table that its code computes."""

    def __init__(self):
        self.linear = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        self.table = jnp.sin(jnp.arange(4, dtype=F32))[None, None]

    def __call__(self, x):
        return self.linear(x) + self.table


def test_a_table_that_code_computed_is_a_constant_that_can_be_moved():
    module = Table()
    given = spec(module), flax_leaves(module), "float64", CPU
    run = FlaxRunner(*given, lift=True, code_leaves=("table",))
    assert run.forward_purity(BATCH).lifted == {"float32 constant table": 1}
    (found,), (moved,) = (x.outputs(BATCH).values() for x in (run, run.moved()))
    assert 1e-9 < np.max(np.abs(found - moved)) < 1e-7
    weights = FlaxRunner(*given, lift=True)  # of which the other model has the same
    assert weights.forward_purity(BATCH).lifted == {}
    (found,), (same,) = (x.outputs(BATCH).values() for x in (weights, weights.moved()))
    assert np.array_equal(found, same)


def test_a_model_that_raises_raises_its_own_error():
    class Broken(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

        def __call__(self, x):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        runner(Broken()).outputs(BATCH)


def test_only_float64_is_lifted():
    run = runner(Asks(), "float32")
    assert run.forward_purity(BATCH).lifted == {}
    (output,) = run.outputs(BATCH).values()
    assert output.dtype == F32
