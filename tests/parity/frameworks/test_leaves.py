"""Leaves of modules as people build them: in containers, lazy, wrapped, shared, complex."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx

from parity import check_pair
from parity.frameworks.batch import Batch
from parity.frameworks.flax.leaves import cast_flax, find_leaf, flax_leaves, load_flax
from parity.frameworks.flax.module import compile_step
from parity.frameworks.flax.module import prepared as prepared_flax
from parity.frameworks.leaves import cast_array, different_leaves, neighbours
from parity.frameworks.spec import BY_DEFAULT
from parity.frameworks.torch.leaves import cast_torch, load_torch, torch_leaves
from parity.frameworks.torch.module import prepared as prepared_torch

BATCH = Batch((np.ones((2, 6), np.float32),))


@dataclasses.dataclass(frozen=True)
class Config:
    sizes: tuple[int, ...] = (6, 3)
    compute_dtype: object = jnp.float32


class Containers(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.tree = nnx.Param({"x": jnp.ones(3), "y": [jnp.zeros(2)]})
        self.by_number = nnx.data({1: nnx.Param(jnp.ones(2)), 2: nnx.Param(jnp.ones(2))})
        self.pair = nnx.data((nnx.Param(jnp.ones(2)), jnp.ones(3)))
        self.by_path = nnx.data({("a", "b"): jnp.ones(2), ("c",): nnx.Param(jnp.ones(2))})
        self.plain, self.numpy = jnp.ones(4), np.ones(4)
        self.state = nnx.data(nnx.State({"w": nnx.Param(jnp.ones(1))}))
        self.named = nnx.Dict({"layer.1": nnx.Linear(2, 2, rngs=rngs)})
        self.shared = self.named["layer.1"]
        self.scale, self.kind = nnx.Variable(0.5), nnx.Variable("relu")
        self.count, self.phase = nnx.Variable(3), nnx.Param(jnp.ones(2, jnp.complex64))
        self.dropout, self.key = nnx.Dropout(0.5, rngs=rngs), jax.random.key(0)
        self.linen = nnx.bridge.ToNNX(linen.Dense(3, dtype=jnp.float32), rngs=rngs)
        self.linen.lazy_init(jnp.ones((1, 2)))
        self.config, self.settings = Config(), {"param_dtype": "float32", "sizes": [1, 2]}


NAMES = {
    "tree.x", "tree.y.0", "by_number.1", "by_number.2", "pair.0", "pair.1", "by_path.a.b",
    "by_path.c", "plain", "numpy", "state.w", "scale", "count", "phase", "linen.kernel",
    "linen.bias",
}  # fmt: skip


@pytest.fixture
def containers():
    return Containers()


def test_leaves_of_all_containers_are_found_loaded_and_named_by_their_owner(containers):
    leaves = flax_leaves(containers)
    layers = {name for name in leaves if name.endswith(("kernel", "bias")) and "linen" not in name}
    assert leaves.keys() - layers == NAMES and len(layers) == 2  # shared, so under one name
    moved = {name: (leaf + 1).astype(leaf.dtype) for name, leaf in leaves.items()}
    load_flax(containers, moved)
    found = flax_leaves(containers)
    assert all(np.array_equal(found[name], moved[name]) for name in leaves)
    for name in leaves:
        where = find_leaf(containers, name)
        assert np.array_equal(where.array, moved[name]), name
    assert isinstance(find_leaf(containers, "linen.kernel").owner, nnx.bridge.ToNNX)
    with pytest.raises(KeyError):
        find_leaf(containers, "tree.z")


def test_a_cast_reaches_configs_and_leaves_the_module_alone(containers):
    with jax.enable_x64(True):
        casts = {}
        copies = [cast_flax(containers, "float64", casts) for _ in range(2)]
        types = {name: leaf.dtype for name, leaf in flax_leaves(copies[0]).items()}
    assert types.pop("phase") == np.complex128 and types.pop("count") == np.int32
    assert set(types.values()) == {np.dtype("float64")}
    assert copies[0].config.compute_dtype == jnp.float64 == copies[0].settings["param_dtype"]
    assert copies[0].linen.to_nnx__module.dtype == jnp.float64
    assert containers.config == Config() and containers.settings["param_dtype"] == "float32"
    # One program serves all copies, though nothing about a dict has a hash.
    graphs = [nnx.split(copy)[0] for copy in copies]
    program = compile_step(lambda model: 0.0, None)
    assert program(graphs[0]) is program(graphs[1])
    assert program(graphs[0]) is not program(nnx.split(containers)[0])


def test_two_leaves_of_one_name_are_refused():
    class Clash(nnx.Module):
        def __init__(self):
            self.a = nnx.data({"b.c": jnp.ones(1), "b": {"c": jnp.ones(1)}})

    with pytest.raises(ValueError, match=r"two leaves are called a\.b\.c"):
        flax_leaves(Clash())


def test_integers_of_another_width_are_loaded_as_the_module_holds_them():
    module = torch.nn.Module()
    module.register_buffer("index", torch.tensor([0, 2, 4]))
    load_torch(module, {"index": np.array([1, 3, 5], np.int32)})
    assert module.index.tolist() == [1, 3, 5] and module.index.dtype == torch.int64
    present = {"index": np.zeros(2, np.int32)}
    assert not different_leaves(present, {"index": np.array([1, 2], np.int64)})
    assert different_leaves(present, {"index": np.array([1, 1 << 40])})
    assert different_leaves(present, {"index": np.array([1.0, 2.0])})


def test_complex_numbers_stay_complex():
    array = np.array([1 + 2j], np.complex64)
    assert cast_array(array, "float64").dtype == np.complex128
    moved = neighbours({"z": array}, 0)["z"]
    assert moved.dtype == array.dtype and moved.real != 1 and moved.imag != 2
    module = torch.nn.Module()
    module.register_buffer("z", torch.tensor([1 + 2j]))
    assert cast_torch(module, "float64").z.tolist() == [1 + 2j]


class Net(torch.nn.Module):
    def __init__(self, wrap=lambda layer: layer):
        super().__init__()
        self.fc1, self.fc2 = torch.nn.Linear(6, 8), wrap(torch.nn.Linear(8, 3))

    def forward(self, x):
        return self.fc2(torch.tanh(self.fc1(x)))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
def test_what_is_compiled_or_lazy_is_made_plain_in_a_copy():
    inner = Net(torch.compile)
    for module in (inner, torch.compile(inner), torch.compile(Net())):
        plain = prepared_torch(module, BY_DEFAULT, BATCH)
        assert set(torch_leaves(plain)) == {
            "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}  # fmt: skip
    assert "fc2._orig_mod.weight" in inner.state_dict()
    lazy = torch.nn.LazyLinear(3)
    assert prepared_torch(lazy, BY_DEFAULT, BATCH).weight.shape == (3, 6)
    assert isinstance(lazy.weight, torch.nn.parameter.UninitializedParameter)
    bridge = nnx.bridge.ToNNX(linen.Dense(3), rngs=nnx.Rngs(0))
    assert prepared_flax(bridge, BY_DEFAULT, BATCH).kernel.shape == (6, 3)
    assert not hasattr(bridge, "kernel")


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
@pytest.mark.parametrize("make, words", [
    (lambda: torch.jit.trace(Net(), torch.ones(2, 6)), "is scripted"),
    (lambda: Net(lambda layer: layer.to("meta")), "fc2.weight is on the device meta"),
])  # fmt: skip
def test_what_cannot_be_checked_is_refused(make, words):
    with pytest.raises(ValueError, match=words):
        prepared_torch(make(), BY_DEFAULT, BATCH)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
def test_a_module_that_keeps_a_tensor_of_its_last_call_is_cast():
    layer = torch.nn.utils.weight_norm(torch.nn.Linear(6, 3))
    layer(torch.ones(2, 6))
    copied = cast_torch(layer, "float64")
    assert copied(torch.ones(2, 6, dtype=torch.float64)).dtype == torch.float64
    assert not layer.weight.is_leaf and set(torch_leaves(copied)) == set(torch_leaves(layer))


class Turning(torch.nn.Module):
    """Multiplies by complex weights, of which a part is a buffer."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.randn(6, 3, dtype=torch.complex64))
        self.register_buffer("b", torch.randn(3, dtype=torch.complex64))

    def forward(self, x):
        return ((x.to(self.w.dtype) @ self.w + self.b) * 1j).real


class TurningPort(nnx.Module):
    def __init__(self, phase=1j):
        self.w = nnx.Param(jnp.ones((6, 3), jnp.complex64))
        self.b, self.phase = nnx.Variable(jnp.ones(3, jnp.complex64)), phase

    def __call__(self, x):
        return ((x @ self.w[...] + self.b[...][None]) * self.phase).real


RULES = """
[[rule]]
torch = "w"
flax = "w"

[[rule]]
torch = "b"
flax = "b"
"""


def test_complex_weights_have_torchs_gradients_and_updates(tmp_path):
    (tmp_path / "rules.toml").write_text(RULES)
    settings = dict(rules=tmp_path / "rules.toml", dtypes=("float64",), steps=2)
    x = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    assert check_pair(Turning(), TurningPort(), x, **settings).ok
    wrong = check_pair(Turning(), TurningPort(-1j), x, levels=["logits"], **settings)
    assert wrong.divergence is not None and wrong.divergence.phase == "forward"


class Normed(nnx.Module):
    def __init__(self, epsilon):
        rngs = nnx.Rngs(0)
        self.linear = nnx.WeightNorm(nnx.Linear(2, 3, rngs=rngs), epsilon=epsilon, rngs=rngs)


def test_an_epsilon_that_float32_does_not_see_is_none_in_float64():
    port = Normed(1e-12)
    assert cast_flax(port, "float64").linear.epsilon == 0.0
    assert cast_flax(port, "float32").linear.epsilon == port.linear.epsilon == 1e-12
    assert cast_flax(Normed(1e-8), "float64").linear.epsilon == 1e-8


class Table(nnx.Module):
    def __init__(self):
        self.order, self.linear = np.array([2, 0, 1]), nnx.Linear(6, 3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.linear(x)[:, self.order]


class TorchTable(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(6, 3)

    def forward(self, x):
        return self.linear(x)[:, [2, 0, 1]]


def test_long_integers_of_numpy_that_a_module_holds_are_trained_beside():
    levels = ("logits", "optimizer")
    assert check_pair(TorchTable(), Table(), BATCH.inputs, levels=levels).ok
