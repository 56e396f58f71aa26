"""Calls of any kind: what fits is found by the signature, what does not is refused in a line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx

from parity import ModuleUse, check_pair
from parity.frameworks.default_call import Signature

X = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
IDS = np.array([[0, 3, 1], [2, 2, 4]])
TRAINED = ("logits", "gradients", "optimizer")


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.dropout = torch.nn.Linear(4, 5), torch.nn.Dropout(0.5)

    def forward(self, x, scale=None, flip=False, mode="plain"):
        x = self.linear(x) if scale is None else self.linear(x) * scale
        x = -x if flip else x
        return self.dropout(x if mode == "plain" else 3 * x)


class Port(nnx.Module):
    ignores_flip = False

    def __init__(self):
        self.linear = nnx.Linear(4, 5, rngs=nnx.Rngs(0))
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(1))

    def __call__(self, x, scale=None, flip=False, mode="plain"):
        x = self.linear(x) if scale is None else self.linear(x) * scale
        x = -x if flip and not self.ignores_flip else x
        return self.dropout(x if mode == "plain" else 3 * x)


class DeafPort(Port):
    ignores_flip = True


CALLS = {
    "by name": {"x": X, "scale": 0.5, "flip": True, "mode": "other"},
    "by position": (X, None, True, "other"),
    "by both": ((X, np.float32(2.0)), {"flip": True}),
    "by one position and names": (X, {"flip": True}),
    "calls by name": {"a": {"x": X, "flip": True}, "b": (X, None, True), "c": X},
    "tensors": {"x": torch.tensor(X), "scale": jnp.asarray(2.0), "flip": True},
    "drawn": lambda rng: {"x": rng.normal(size=(2, 4)), "flip": True},
}


@pytest.mark.parametrize("name", CALLS)
def test_arguments_reach_both_modules_and_a_side_that_ignores_one_fails(name):
    forward = dict(levels=["logits"], dtypes=("float64",))
    assert check_pair(Net(), Port(), CALLS[name], **forward).ok
    assert check_pair(Net(), DeafPort(), CALLS[name], **forward).exit_code == 1


class Trained(Port):
    def __call__(self, x, *, train: bool = True, rngs):
        return self.dropout(self.linear(x), deterministic=not train, rngs=rngs)


class Deterministic(Port):
    def __call__(self, tokens, deterministic, key):
        drawn = 0.0 * jax.random.normal(key, ())
        return self.dropout(self.linear(tokens), deterministic=deterministic) + drawn


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x, train: bool):
        x = linen.Dense(5, name="linear")(x)
        return linen.Dropout(0.5, deterministic=not train)(x)


class Dropping(Net):
    def forward(self, x, training):
        return torch.nn.functional.dropout(self.linear(x), 0.5, training)


class Jitted(Port):
    @nnx.jit
    def __call__(self, x):
        return self.dropout(nnx.remat(lambda linear, x: linear(x))(self.linear, x))


def bridged() -> nnx.Module:
    module = nnx.bridge.ToNNX(Linen(), rngs=nnx.Rngs(params=0, dropout=1))
    return nnx.bridge.lazy_init(module, X, train=False)


@pytest.mark.parametrize(
    ("net", "port", "inputs"),
    [
        (Net, Trained, X),
        (Net, Deterministic, {"x": X}),
        (Net, bridged, X),
        (Dropping, Jitted, X),
    ],
)
def test_modes_and_random_streams_are_filled_in_and_training_drops_nothing(net, port, inputs):
    report = check_pair(net(), port(), inputs, levels=TRAINED, dtypes=("float64",))
    assert report.verdict == "PASS", report


def test_a_compiled_and_a_scripted_module_are_called_by_their_parameters():
    with pytest.warns(DeprecationWarning):
        scripted = torch.jit.script(torch.nn.Linear(4, 5))
    compiled = torch.compile(Net(), backend="eager")
    assert check_pair(compiled, Jitted(), {"x": X}, levels=["logits"], dtypes=("float64",)).ok
    assert Signature.of(scripted).required == ["input"]


class Tree(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(5, 4)

    def forward(self, batch):
        return self.embed(batch["ids"]) * batch["others"][0][:, None, None]


class TreePort(nnx.Module):
    def __init__(self):
        self.embed = nnx.Embed(5, 4, rngs=nnx.Rngs(0))

    def __call__(self, batch):
        return self.embed(batch["ids"]) * batch["others"][0][:, None, None]


def test_an_argument_can_be_a_tree_of_arrays_and_texts():
    batch = {"ids": IDS, "others": [np.arange(2.0), "a text", None]}
    for inputs in ({"batch": batch}, (batch,), batch):
        assert check_pair(Tree(), TreePort(), inputs, levels=TRAINED, dtypes=("float64",)).ok


class Renamed(Port):
    def __call__(self, tokens, factor, train):
        return self.linear(tokens) * factor


def test_other_names_and_axes_need_one_line_which_the_refusal_writes():
    inputs = {"x": X, "scale": np.float32(2.0)}
    line = (
        r"Renamed\(x float32\[6, 4\], scale float32\[\]\) raised TypeError.* "
        r"def call\(module, x, scale, train\): "
        r"return module\(tokens=x, factor=scale, train=train\), given as --flax-call"
    )
    with pytest.raises(ValueError, match=line) as caught:
        check_pair(Net(), Renamed(), inputs)
    assert "\n" not in str(caught.value)
    use = ModuleUse(call=lambda module, x, scale, train: module(x, scale, train))
    assert check_pair(Net(), Renamed(), inputs, flax=use, levels=["logits"]).ok


class Frozen(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.unused = (torch.nn.Linear(4, 4) for _ in range(3))
        self.a.requires_grad_(False)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


class FrozenPort(nnx.Module):
    def __init__(self, scale=1.0):
        rngs = nnx.Rngs(0)
        self.a, self.b, self.unused = (nnx.Linear(4, 4, rngs=rngs) for _ in range(3))
        self.scale = scale

    def __call__(self, x):
        return self.b(jnp.tanh(self.a(x)) * self.scale)


def test_what_one_side_freezes_is_named_and_trained_on_neither():
    report = check_pair(Frozen(), FrozenPort(), X, levels=TRAINED)
    assert report.verdict == "PASS", report
    notes = [record.note for record in report.levels[1].records]
    assert "frozen, without a gradient: a.weight, a.bias" in notes
    names = {record.name for record in report.levels[1].records}
    assert "b.kernel" in names and "a.kernel" not in names
    wrong = check_pair(Frozen(), FrozenPort(1.001), X, levels=["gradients"])
    assert wrong.exit_code == 1
