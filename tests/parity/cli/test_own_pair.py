"""The commands and the fixture, as a user meets them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import parity.faults.selftest.pairs
from parity.cli import app
from parity.faults.selftest import pair_module
from parity.frameworks.torch.leaves import torch_leaves

PAIR = Path(parity.faults.selftest.pairs.__file__).parent / "mlp.py"
OWN = ["--torch", f"{PAIR}:torch_net", "--flax", f"{PAIR}:flax_net"]
FORWARD = ["--level", "weights", "--level", "logits", "--dtype", "float64"]


def run(*arguments: object):
    return CliRunner().invoke(app, [str(x) for x in arguments])


def test_check_of_own_modules_writes_its_rules_and_takes_them_back(tmp_path):
    rules, report = tmp_path / "rules.toml", tmp_path / "report.json"
    first = run("check", *OWN, "--inputs", f"{PAIR}:inputs", *FORWARD, "--save-rules", rules)
    assert first.exit_code == 0, first.output
    again = run("check", *OWN, "--inputs", f"{PAIR}:inputs", *FORWARD, "--rules", rules,
                "--json", report)  # fmt: skip
    assert again.exit_code == 0 and json.loads(report.read_text())["verdict"] == "PASS"
    text = rules.read_text().replace('flax = "mix.kernel"\nlayout = "transposed"',
                                     'flax = "mix.kernel"')  # fmt: skip
    rules.write_text(text)
    wrong = run("check", *OWN, "--inputs", f"{PAIR}:inputs", *FORWARD, "--rules", rules)
    assert wrong.exit_code == 1 and "3.weight" in wrong.output


@pytest.mark.parametrize("arguments, complaint", [
    (OWN, "--inputs: missing"),
    ([*OWN[:2], "--inputs", f"{PAIR}:inputs"], "--flax: missing"),
    ([*OWN, "--inputs", f"{PAIR}:nothing"], "has no nothing"),
    ([*OWN, "--inputs", f"{PAIR}:inputs", "--rules", "nowhere.toml"], "--rules nowhere.toml: no"),
    ([*OWN[:3], f"{PAIR}:torch_net", "--inputs", f"{PAIR}:inputs"], "must be a flax module"),
    (["--rules", "rules.toml"], "the twins have their own"),
    ([*OWN, "--inputs", f"{PAIR}:inputs", "--preset", "gpt2"], "those are of the twins"),
])  # fmt: skip
def test_bad_targets_are_refused_in_a_line(arguments, complaint):
    result = run("check", *arguments)
    assert result.exit_code == 2
    (line,) = [x for x in result.output.splitlines() if x.startswith("parity:")]
    assert complaint in line


def test_a_file_of_weights_goes_to_the_port_and_back_bit_for_bit(tmp_path):
    source, there, back = (tmp_path / f"{name}.safetensors" for name in ("a", "b", "c"))
    with pair_module("mlp") as module:
        leaves = torch_leaves(module.torch_net())
    save_file(leaves, source)
    assert run("convert", source, there, "--to", "flax", *OWN).exit_code == 0
    assert np.array_equal(load_file(there)["mix.kernel"], leaves["3.weight"].T)
    assert run("convert", there, back, "--to", "torch", *OWN).exit_code == 0
    assert source.read_bytes() == back.read_bytes()


@pytest.mark.parametrize("change, complaint", [
    (lambda leaves: leaves.pop("0.bias"), "0.bias is missing"),
    (lambda leaves: leaves.update(extra=np.ones(1)), "extra is unknown"),
    (lambda leaves: leaves.update({"0.bias": np.ones(3)}), r"0.bias is [3], the module's is [7]"),
])  # fmt: skip
def test_a_file_of_other_weights_is_refused_and_nothing_is_written(change, complaint, tmp_path):
    source, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    with pair_module("mlp") as module:
        leaves = torch_leaves(module.torch_net())
    change(leaves)
    save_file(leaves, source)
    result = run("convert", source, out, "--to", "flax", *OWN)
    assert result.exit_code == 2 and complaint in result.output and not out.exists()
    source.write_bytes(b"no weights")
    assert run("convert", source, out, "--to", "flax", *OWN).exit_code == 2


def test_self_test_says_what_it_found(tmp_path):
    table = tmp_path / "table.md"
    result = run("self-test", "--only", "epsilon left at", "--seeds", "0", "--markdown", table)
    assert result.exit_code == 0, result.output
    assert "1 of 1 detected, 1 of 1 located, 1 of 1 explained" in result.output
    assert "eps=1e-06" in table.read_text()
    assert run("self-test", "--only", "no such fault", "--seeds", "0").exit_code == 2


USER = """
import numpy as np, torch
from flax import nnx

class Scaled(nnx.Linear):
    def __call__(self, x):
        return 1.01 * super().__call__(x)

FORWARD = dict(levels=["weights", "logits"], dtypes=("float64",))

def test_same(parity):
    port = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    assert parity.assert_same(torch.nn.Linear(3, 2), port, np.ones((4, 3)), **FORWARD).ok

def test_different(parity):
    port = Scaled(3, 2, rngs=nnx.Rngs(0))
    parity.assert_same(torch.nn.Linear(3, 2), port, np.ones((4, 3)), **FORWARD)
"""


def test_the_fixture_is_there_in_a_project_without_configuration(tmp_path):
    (tmp_path / "test_port.py").write_text(USER)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 1 and "1 failed, 1 passed" in ran.stdout, ran.stdout + ran.stderr
    assert "ParityError: FAIL: first differs at Linear (forward)" in ran.stdout
