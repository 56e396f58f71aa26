"""Ten ways to misuse the command: one line, exit code 2, and everything as it was before."""

import random

import numpy as np
import pytest
import torch
from flax import nnx
from typer.testing import CliRunner

from parity import check_pair
from parity.cli import app

MODELS = """
import jax.numpy as jnp, numpy as np, torch
from flax import nnx
from torch import nn

class Net(nn.Module):
    def __init__(self, change=lambda x: x):
        super().__init__()
        self.fc, self.change = nn.Linear(4, 3), change

    def forward(self, x):
        return self.change(self.fc(x))

class Port(nnx.Module):
    def __init__(self, change=lambda x: x):
        self.fc, self.change = nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.static(change)
        self.dropout = nnx.Dropout(0.5, deterministic=False, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.change(self.fc(x))

class Needs(Net):
    def __init__(self, width):
        super().__init__()

def refuse(x):
    raise ValueError("this model is not finished")

def refusing(): return Net(refuse)
def refusing_port(): return Port(refuse)
def drawing(): return Net(lambda x: x + torch.rand(()))
def drawing_numpy(): return Net(lambda x: x * np.random.rand())
def dropping(): return Net(lambda x: nn.functional.dropout(x, 0.5))
def without_numbers(): return Net(lambda x: x / 0 * 0)
def on_meta(): return Net().to("meta")
def mixed(): return Net(lambda x: x + torch.ones(3, device="meta"))

class Dropping(Port):
    def __call__(self, x):
        self.dropout.deterministic = False
        return self.dropout(super().__call__(x))

number = 3
def make(rng): return rng.normal(size=(2, 4))
def wide(rng): return rng.normal(size=(2, 5))
def rarely(): return Net(lambda x: x + 1e-3 if torch.rand(()) < 1e-3 else x)
def refuse_inputs(rng): raise RuntimeError("no data")
"""
RULES = """
[[rule]]
torch = "fc.wieght"
flax = "fc.kernel"
layout = "transposed"

[[rule]]
torch = "fc.bias"
flax = "fc.bias"
"""
SUM = 'rest = "auto"\nsum = [{term = "fc.biax", original = "fc.bias"}]'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("misuse")
    (folder / "models.py").write_text(MODELS)
    (folder / "rules.toml").write_text(RULES)
    (folder / "sum.toml").write_text(SUM)
    return folder


CASES = [
    ("a target that is no module", "number", "Port", "make", [], ("--torch", "int", "module")),
    ("a target that is not there", "Nit", "Port", "make", [], ("models.py has no Nit", "Net")),
    ("a class that needs arguments", "Needs", "Port", "make", [], ("'width'", "function")),
    ("wrong shapes", "Net", "Port", "wide", [], ("TypeError at models.py:20", "[2, 5]")),
    ("a net that raises", "refusing", "Port", "make", [],
     ("ValueError at models.py:27: this model is not finished",)),
    ("a port that raises", "Net", "refusing_port", "make", [],
     ("ValueError at models.py:27: this model is not finished",)),
    ("a net that draws", "drawing", "Port", "make", [], ("torch: Net", "random")),
    ("a net that draws from NumPy", "drawing_numpy", "Port", "make", [], ("torch: Net", "random")),
    ("a net whose dropout is on", "dropping", "Port", "make", [], ("torch: Net", "random")),
    ("a port whose dropout is on", "Net", "Dropping", "make", [], ("flax: Dropping", "random")),
    ("NaN", "without_numbers", "Port", "make", [], ("NaN", "the model itself")),
    ("weights without numbers", "on_meta", "Port", "make", [], ("fc.weight", "meta")),
    ("two devices", "mixed", "Port", "make", [], ("RuntimeError at models.py", "meta")),
    ("no such inputs", "Net", "Port", "mke", [], ("models.py has no mke", "make")),
    ("a typo in the rules", "Net", "Port", "make", ["--rules", "rules.toml"],
     ("fc.wieght", "matches nothing, but there is fc.weight")),
    ("a net that draws one time in many", "rarely", "Port", "make", [], ("torch: Net", "random")),
    ("inputs that raise", "Net", "Port", "refuse_inputs", [],
     ("RuntimeError at models.py:47: no data",)),
    ("a term that is not there", "Net", "Port", "make", ["--rules", "sum.toml"],
     ("fc.biax does not exist, but there is fc.bias",)),
    ("two of one framework", "Net", "Net", "make", [], ("--flax", "Net", "flax module")),
]  # fmt: skip


@pytest.mark.parametrize("torch_name, flax_name, inputs, more, words",
                         [case[1:] for case in CASES], ids=[case[0] for case in CASES])  # fmt: skip
def test_misuse_is_one_line_and_exit_code_2(
    torch_name, flax_name, inputs, more, words, folder, monkeypatch
):
    monkeypatch.chdir(folder)
    before = states()
    result = CliRunner().invoke(app, [
        "check", "--torch", f"models.py:{torch_name}", "--flax", f"models.py:{flax_name}",
        "--inputs", f"models.py:{inputs}", "--steps", "2", "--level", "weights", "--level",
        "logits", *more])  # fmt: skip
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    lines = [x for x in result.output.splitlines() if x.startswith("parity:")]
    assert len(lines) == 1 and "Traceback" not in result.output, result.output
    assert all(word in lines[0] for word in words), lines[0]
    assert states() == before


def states() -> tuple[object, ...]:
    """The state of every generator that a user shares with a check."""
    return (
        random.getstate(),
        np.random.get_state()[1].tobytes(),
        torch.get_rng_state().numpy().tobytes(),
    )


class Writing(torch.nn.Module):
    """Writes into its input."""

    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(x.mul_(2.0))


class Doubling(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.fc, self.dropout = nnx.Linear(4, 3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.fc(2.0 * self.dropout(x))


def test_inputs_models_and_generators_are_as_they_were():
    net, port, x = Writing(), Doubling(), np.ones((2, 4), np.float32)
    own = [leaf.clone() for leaf in net.state_dict().values()]
    theirs = [np.asarray(nnx.state(port)["fc"][name][...]) for name in ("kernel", "bias")]
    count, before = int(port.dropout.rngs.count[...]), states()
    report = check_pair(net, port, x, levels=["weights", "logits"], dtypes=("float64",))
    assert report.ok, report
    assert np.array_equal(x, np.ones((2, 4))) and states() == before
    assert all(torch.equal(a, b) for a, b in zip(own, net.state_dict().values(), strict=True))
    assert all(np.array_equal(a, nnx.state(port)["fc"][name][...])
               for a, name in zip(theirs, ("kernel", "bias"), strict=True))  # fmt: skip
    assert int(port.dropout.rngs.count[...]) == count
    assert net.training and not port.dropout.deterministic
