"""A float64 run is proven to be one, and what spoils it is named."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

import torch_gpt
from parity.frameworks.flax.leaves import cast_flax
from parity.frameworks.flax.purity import flax_purity
from parity.frameworks.flax.scope import jax_scope
from parity.frameworks.torch.leaves import cast_torch
from parity.frameworks.torch.purity import torch_purity

CPU = jax.devices("cpu")[0]


def test_a_pure_program_is_pure_and_its_operations_are_counted():
    with jax_scope("float64", CPU):
        found = flax_purity(lambda x: jnp.sum(jax.nn.softmax(x @ x)), jnp.ones((3, 3)))
    assert found.num_operations > 3 and found.impure == {}
    found = torch_purity(lambda x: torch.softmax(x @ x, -1).sum(), torch.ones(3, 3).double())
    assert found.num_operations == 3 and found.impure == {}


def test_jax_stock_attention_is_caught_computing_its_softmax_in_float32():
    def attend(x):
        return jax.nn.dot_product_attention(x, x, x)

    with jax_scope("float64", CPU):
        found = flax_purity(attend, jnp.ones((1, 5, 2, 4)))
    assert any(name.startswith("convert_element_type") for name in found.impure)


def test_a_narrow_operation_inside_a_loop_inside_jit_is_found():
    @jax.jit
    def loop(x):
        return jax.lax.fori_loop(0, 3, lambda _, y: y.astype(jnp.float32).astype(y.dtype), x)

    with jax_scope("float64", CPU):
        assert flax_purity(loop, jnp.ones(3)).impure


def test_rounding_without_a_narrow_type_and_callbacks_are_found():
    def rounded(x):
        return jax.lax.reduce_precision(x, 8, 23)

    def outside(x):
        return jax.pure_callback(lambda y: y, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    with jax_scope("float64", CPU):
        assert flax_purity(rounded, jnp.ones(3)).impure
        assert flax_purity(outside, jnp.ones(3)).impure


def test_a_narrow_operation_in_a_torch_backward_pass_is_found():
    class Narrow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            return (gradient.float() * 2).double()

    def backward(x):
        torch.autograd.grad(Narrow.apply(x).sum(), x)

    assert torch_purity(backward, torch.ones(3, dtype=torch.float64, requires_grad=True)).impure


def test_a_float64_copy_of_a_flax_module_computes_in_float64():
    class Net(nnx.Module):
        def __init__(self, rngs):
            # nnx.Embed fixes its compute dtype when it is made; a new weight does not change it.
            self.embed = nnx.Embed(7, 5, rngs=rngs)
            self.linear = nnx.Linear(5, 3, dtype=jnp.float32, rngs=rngs)

        def __call__(self, ids):
            return self.linear(self.embed(ids))

    net = Net(nnx.Rngs(0))
    with jax_scope("float64", CPU):
        twin = cast_flax(net, "float64")
        graphdef, state = nnx.split(twin)
        ids = jnp.arange(7)
        assert not flax_purity(lambda s: nnx.merge(graphdef, s)(ids), state).impure
        kernel = np.asarray(net.linear.kernel[...])
        assert np.array_equal(np.asarray(twin.linear.kernel[...]), kernel.astype(np.float64))
    assert net.linear.kernel[...].dtype == jnp.float32 and net.linear.dtype == jnp.float32


def test_a_float64_copy_of_a_torch_module_leaves_the_original_alone():
    linear = torch.nn.Linear(3, 2)
    twin = cast_torch(linear, "float64")
    assert twin.weight.dtype == torch.float64 and linear.weight.dtype == torch.float32
    assert not torch_purity(twin, torch.ones(1, 3).double()).impure


def test_a_float32_cache_under_a_float64_model_is_found():
    config = torch_gpt.GPTConfig(
        vocab_size=61, context_length=29, embed_dim=15, num_layers=1, num_heads=3, mlp_dim=23,
        dtype="float64",
    )  # fmt: skip
    model = torch_gpt.GPT(config, torch_gpt.random.key(0))
    tokens = torch.arange(5)[None]
    for dtype, pure in (("float64", True), ("float32", False)):
        cache = torch_gpt.KVCache.empty(config, 1, 8, dtype)
        with torch.no_grad():
            assert (not torch_purity(model, tokens, cache).impure) is pure
