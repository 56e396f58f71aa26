"""Goldens: what one framework wrote is checked by the other, which is all that can be imported."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from parity import golden
from parity.check.levels.names import LEVELS, OPTIMIZER_STEPS
from parity.frameworks.spec import ModuleUse
from parity.weights.layouts import Layout
from parity.weights.rules import Rule, Rules

ROOT = Path(__file__).parents[3]
PAIRS = "mlp", "convnet"
# One worker runs the processes once.

LAYERS = {
    "mlp": {"0": "up", "1": "norm", "3": "mix", "5": "down"},
    "convnet": {name: name for name in ("conv1", "norm1", "conv2", "norm2", "head")},
}

# Runs commands in one process, in which some packages are not there; gives codes and error lines.
RUNNER = """
import contextlib, io, json, sys
absent, commands = json.loads(sys.argv[1])
for name in absent:
    sys.modules[name] = None
from parity.cli import app
results = []
for arguments in commands:
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        try:
            app(arguments)
        except SystemExit as end:
            code = end.code
    results.append([code, out.getvalue(), errors.getvalue()])
print(json.dumps(results))
"""
ABSENT = {"torch": ["jax", "jaxlib", "flax", "optax", "flax_gpt"], "flax": ["torch", "torch_gpt"]}


def half(name: str, framework: str) -> str:
    """A pair's file without what needs the other framework."""
    others = {"torch": {"jax", "jnp", "flax", "nnx"}, "flax": {"torch"}}[framework]
    tree = ast.parse((ROOT / "parity" / "faults" / "selftest" / "pairs" / f"{name}.py").read_text())

    def words(statement: ast.stmt) -> set[str]:
        nodes = list(ast.walk(statement))
        found = {node.id for node in nodes if isinstance(node, ast.Name)}
        found |= {alias.name.partition(".")[0] for node in nodes if isinstance(node, ast.Import)
                  for alias in node.names}  # fmt: skip
        return found | {
            node.module.partition(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)
        }

    kept = [statement for statement in tree.body if not words(statement) & others]
    return ast.unparse(ast.Module(kept, []))


def rules(name: str) -> Rules:
    """The weight map of a pair."""
    found = []
    for ours, theirs in LAYERS[name].items():
        optional = ours == "conv2"
        if "norm" in theirs:
            found.append(Rule(f"{ours}.weight", f"{theirs}.scale"))
        else:
            layout = Layout.CONV if theirs.startswith("conv") else Layout.TRANSPOSED
            found.append(Rule(f"{ours}.weight", f"{theirs}.kernel", layout))
        found.append(Rule(f"{ours}.bias", f"{theirs}.bias", optional=optional))
    statistics = ("running_mean", "mean"), ("running_var", "var")
    if name == "convnet":
        found += [Rule(f"*.{ours}", f"*.{theirs}") for ours, theirs in statistics]
    return Rules(tuple(found), ignored=("*.num_batches_tracked",))


def run(framework: str, folder: Path, commands: list[list[str]]) -> list[list]:
    """Code, output and error lines of commands, where the other framework is not there."""
    request = json.dumps([ABSENT[framework], commands])
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUNNER, request],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def recorded(name: str, framework: str, out: str) -> list[str]:
    """The command that records one side of a pair."""
    file = f"{name}_{framework}.py"
    return [
        "record",
        out,
        f"--{framework}",
        f"{file}:{framework}_net",
        "--inputs",
        f"{file}:inputs",
    ]


def checked(name: str, of: str, framework: str, file: str | None = None) -> list[str]:
    """The command that checks a side, of this framework, against the golden of that."""
    target = f"{file or f'{name}_{framework}'}.py:{framework}_net"
    arguments = ["check", "--golden", f"{name}_{of}.safetensors", f"--{framework}", target]
    arguments += ["--json", f"{name}_{of}_{framework}{file or ''}.json"]
    return arguments if of == framework else [*arguments, "--rules", f"{name}.toml"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Halves of the pairs, their rules, and ports with one fault each."""
    folder = tmp_path_factory.mktemp("golden")
    for name in PAIRS:
        (folder / f"{name}.toml").write_text(rules(name).to_toml())
        for framework in ABSENT:
            (folder / f"{name}_{framework}.py").write_text(half(name, framework))
    port = half("mlp", "flax")
    for fault, right, wrong in (
        ("epsilon", "epsilon=1e-05", "epsilon=1e-06"),
        ("wide", "nnx.Linear(7, 3", "nnx.Linear(7, 4"),
    ):
        assert right in port
        (folder / f"{fault}.py").write_text(port.replace(right, wrong))
    return folder


@pytest.fixture(scope="module")
def results(folder) -> dict[str, list]:
    """All commands by what they do, in three processes: torch's, flax's and torch's again."""
    plans = (
        ("torch", {
            **{f"record {x} torch": recorded(x, "torch", f"{x}_torch.safetensors") for x in PAIRS},
            "again": recorded("mlp", "torch", "again.safetensors"),
        }),
        ("flax", {
            **{f"record {x} flax": recorded(x, "flax", f"{x}_flax.safetensors") for x in PAIRS},
            **{f"check {x} torch flax": checked(x, "torch", "flax") for x in PAIRS},
            "epsilon": checked("mlp", "torch", "flax", "epsilon"),
            "wide": checked("mlp", "torch", "flax", "wide"),
            "later and wide": checked("mlp", "flax", "flax", "wide"),
        }),
        ("torch", {
            **{f"check {x} flax torch": checked(x, "flax", "torch") for x in PAIRS},
            **{f"check {x} torch torch": checked(x, "torch", "torch") for x in PAIRS},
            "absent": checked("mlp", "torch", "flax"),
        }),
    )  # fmt: skip
    return {
        name: result
        for framework, plan in plans
        for name, result in zip(
            plan, run(framework, folder, list(plan.values())), strict=True
        )
    }  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("way", ["torch flax", "flax torch", "torch torch"])
def test_a_side_passes_against_a_golden_without_the_other_framework(results, folder, name, way):
    recording = results[f"record {name} {way.split()[0]}"]
    assert recording[0] == 0, recording
    code, out, errors = results[f"check {name} {way}"]
    assert code == 0, out + errors
    document = json.loads((folder / f"{name}_{way.replace(' ', '_')}.json").read_text())
    levels = {level["name"]: level for level in document["levels"]}
    verdicts = [level["verdict"] for level in levels.values()]
    assert list(levels) == list(LEVELS) and verdicts == ["PASS"] * 5 + ["ABSTAIN"] * 2
    compared = [sum(record["count"] for record in levels[x]["records"]) for x in list(levels)[:5]]
    assert all(count > 60 for count in compared), compared
    assert document["schema"] == 1 and document["divergence"] is None
    assert document["subject"]["num_params"] > 100


def test_a_wrong_epsilon_is_caught_on_the_outputs(results, folder):
    code, out, _ = results["epsilon"]
    assert code == 1 and "FAIL: first differs at FlaxNet (flax) (forward)" in out
    document = json.loads((folder / "mlp_torch_flaxepsilon.json").read_text())
    assert [x["verdict"] for x in document["levels"]] == ["PASS", "FAIL"] + ["BLOCKED"] * 5
    assert 1e-6 < document["divergence"]["value"] < 1e-3


def test_a_port_of_other_shapes_is_named_by_leaf(results):
    code, out, _ = results["wide"]
    assert code == 1 and "torch leaf 5.bias is [3], flax down.bias makes [4]" in out
    code, _, errors = results["later and wide"]
    assert code == 2 and len(errors.splitlines()) == 1
    assert "down.kernel is float64[7, 4], not float64[7, 3]" in errors
    assert "The module is not the one that was recorded" in errors


def test_a_module_whose_framework_is_absent_is_refused_in_a_line(results):
    code, out, errors = results["absent"]
    assert code == 2 and out == "" and errors.startswith("parity: flax: ")
    assert len(errors.splitlines()) == 1 and "Install it." in errors


def test_recording_twice_gives_equal_bytes(results, folder):
    first, again = (folder / f"{name}.safetensors" for name in ("mlp_torch", "again"))
    assert first.read_bytes() == again.read_bytes()


class Net(torch.nn.Module):
    """Weights of two kinds, tied ones, and a mask that is none."""

    def __init__(self, factor: float = 1.0):
        super().__init__()
        self.factor = factor
        self.embedding = torch.nn.Embedding(5, 3)
        self.head = torch.nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = torch.nn.Parameter(torch.ones(3))
        self.register_buffer("mask", torch.tensor([1.0, factor, 1.0]))

    def forward(self, tokens):
        return self.head(torch.tanh(self.embedding(tokens) * self.mask) * self.scale)


TOKENS = np.array([[0, 3, 1], [4, 2, 2]])


@pytest.fixture(scope="module")
def net() -> golden.Golden:
    """Recorded in this process."""
    return golden.record(Net(), {"tokens": TOKENS, "less": TOKENS[:, :2]})


def test_what_is_read_is_what_was_written(net, tmp_path):
    path = tmp_path / "net.safetensors"
    net.write(path)
    with safe_open(path, framework="numpy") as file:
        dtypes = {name: str(file.get_tensor(name).dtype) for name in file.keys()}
    assert {x for name, x in dtypes.items() if "input" not in name and name != "counts"} == {
        "float64"
    }
    back = golden.read(path)
    assert (
        list(back.weights)
        == list(net.weights)
        == ["scale", "mask", "embedding.weight", "head.weight"]
    )
    np.testing.assert_array_equal(back.weights["head.weight"], back.weights["embedding.weight"])
    np.testing.assert_array_equal(back.states[2].second["scale"], net.states[2].second["scale"])
    np.testing.assert_array_equal(back.probes["less"].inputs[0], TOKENS[:, :2])
    assert (
        back.loss == net.loss and back.states[3].count == 4 and len(back.losses) == OPTIMIZER_STEPS
    )
    back.write(tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == path.read_bytes()


def test_the_code_s_own_tables_are_under_test_and_not_loaded(net):
    assert golden.check(net, Net()).verdict == "PASS"
    report = golden.check(net, Net(factor=1.001))
    assert report.exit_code == 1 and report.divergence.phase == "forward"


@pytest.mark.parametrize(
    "changes", [dict(lr=2e-3), dict(betas=(0.9, 0.99)), dict(weight_decay=0.0)]
)
def test_another_optimizer_is_caught_at_its_level(changes):
    def adamw(**changes):
        return lambda parameters: torch.optim.AdamW(parameters, **(dict(lr=1e-3) | changes))

    made = golden.record(Net(), TOKENS, use=ModuleUse(optimizer=adamw()))
    assert golden.check(made, Net(), use=ModuleUse(optimizer=adamw())).verdict == "PASS"
    report = golden.check(made, Net(), use=ModuleUse(optimizer=adamw(**changes)))
    failed = [x.name for x in report.levels if x.verdict == "FAIL"]
    assert failed == ["optimizer"] and report.divergence.where in made.weights


def test_a_rate_that_changes_behind_the_fourth_step_is_caught_on_the_trajectory():
    class Late(torch.optim.AdamW):
        taken = 0

        def step(self, *args):
            self.taken += 1
            self.param_groups[0]["lr"] = 1e-3 if self.taken < 5 else 2e-3
            return super().step(*args)

    made = golden.record(Net(), TOKENS, steps=6, use=ModuleUse(optimizer=torch.optim.AdamW))
    report = golden.check(made, Net(), use=ModuleUse(optimizer=Late))
    assert [x.name for x in report.levels if x.verdict == "FAIL"] == ["trajectory"]
    assert report.divergence.step == 6


def test_another_loss_is_caught_by_leaf(net):
    def half_detached(model, tokens):
        output = model(tokens)
        weights = torch.from_numpy(np.random.default_rng(0).normal(size=output.numel()))
        projected = torch.dot(output.flatten(), weights / np.sqrt(output.numel()))
        return projected + 0.1 * (model.scale - model.scale.detach()).sum()

    report = golden.check(net, Net(), use=ModuleUse(loss=half_detached))
    assert [x.name for x in report.levels if x.verdict == "FAIL"] == ["gradients"]
    assert report.divergence.where == "scale" and report.divergence.phase == "backward"


def test_what_leaves_float64_is_no_reference_and_is_not_judged(net):
    class Narrow(Net):
        def forward(self, tokens):
            output = super().forward(tokens).float()
            assert output.dtype == torch.float32  # so it cannot be run in float64
            return output.double()

    with pytest.raises(ValueError, match=r"not float64 throughout: .*float64 alone"):
        golden.record(Narrow(), TOKENS)
    report = golden.check(net, Narrow())
    assert report.exit_code == 2 and "not float64 throughout" in report.levels[1].records[0].note


def edited(path: Path, change) -> None:
    """Rewrites a golden with other tensors or metadata."""
    with safe_open(path, framework="numpy") as file:
        about = json.loads(file.metadata()["about"])
    tensors = load_file(path)
    change(tensors, about)
    save_file(tensors, path, {"about": json.dumps(about)})


DAMAGES = {
    "no such file": lambda path: path.unlink(),
    "cannot be read": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "cannot be read (": lambda path: path.write_bytes(b"PK\x03\x04" + b"x" * 100),
    "written by something else": lambda path: save_file({"x": np.zeros(2)}, path),
    "schema 1, and this program reads 2": lambda path: edited(
        path, lambda _, about: about.update(schema=1)
    ),
    "damaged metadata ('batches')": lambda path: edited(
        path, lambda _, about: about.pop("batches")
    ),
    "gradient/scale is missing": lambda path: edited(
        path, lambda tensors, _: tensors.pop("gradient/scale")
    ),
    "more is unknown": lambda path: edited(
        path, lambda tensors, _: tensors.update(more=np.zeros(1))
    ),
    "step/1/first/scale is [4], not [3]": lambda path: edited(
        path, lambda tensors, _: tensors.update({"step/1/first/scale": np.zeros(4)})
    ),
    "losses is [3], not [4]": lambda path: edited(
        path, lambda tensors, _: tensors.update(losses=tensors["losses"][1:])
    ),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_file_is_refused_in_a_line(net, tmp_path, message):
    path = tmp_path / "net.safetensors"
    net.write(path)
    DAMAGES[message](path)
    with pytest.raises(ValueError) as caught:
        golden.read(path)
    text = str(caught.value)
    assert text.startswith(f"golden {path}: ") and message in text and "\n" not in text


def test_rules_that_are_missing_or_not_wanted_are_errors(net):
    with pytest.raises(ValueError, match=r"two modules\. Give a rules file"):
        golden.weight_rules("auto", net, "flax")
    with pytest.raises(ValueError, match="golden of torch against a flax module: no rules"):
        golden.weight_rules(None, net, "flax")
    with pytest.raises(ValueError, match=r"rules given\. Its leaves are the golden's own"):
        golden.check(net, Net(), rules=Rules(()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(steps=3), "3 steps < 4. Fewer cannot see"),
        (dict(weights="mine"), "there are random and own"),
        (
            dict(use=ModuleUse(lambda model, x: model(x) / 0)),
            "probe/0/output not finite",
        ),
    ],
)
def test_what_cannot_be_recorded_is_refused_and_nothing_is_written(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        golden.record(Net(), TOKENS, **options).write(tmp_path / "net.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_own_weights_are_recorded_as_they_are():
    module = Net()
    made = golden.record(module, TOKENS, weights="own")
    own = module.embedding.weight.detach().numpy().astype(np.float64)
    np.testing.assert_array_equal(made.weights["embedding.weight"], own)
    assert golden.check(made, Net()).verdict == "PASS"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["record", "out.safetensors", "--inputs", "x.py:x"], "neither --torch nor --flax"),
        (["check", "--golden", "x", "--torch", "a:b", "--flax", "c:d"], "both --torch and --flax"),
        (["check", "--golden", "x", "--torch", "a:b", "--data", "c"], "--golden x with --data"),
        (["check", "--golden", "x", "--torch", "a:b"], "golden x: no such file"),
        (["record", ".", "--torch", "a:b", "--inputs", "x.py:x"], "that is a folder"),
    ],
)  # fmt: skip
def test_options_that_clash_end_in_a_line(arguments, message, tmp_path, monkeypatch, capsys):
    from parity.cli import app

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        app(arguments)
    errors = capsys.readouterr().err
    assert end.value.code == 2 and message in errors and len(errors.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


class Several(torch.nn.Module):
    """A leaf that is frozen, arguments by name, and an output of several kinds."""

    def __init__(self, scale: float = 1.0):
        super().__init__()
        self.a, self.b, self.scale = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2), scale
        self.a.requires_grad_(False)

    def forward(self, x, mask=None, mode="plain"):
        hidden = torch.tanh(self.a(x)) * (1 if mode == "plain" else 2)
        found = self.b(hidden if mask is None else hidden * mask[:, None])
        spectrum = torch.fft.fft(found) * self.scale
        return {"y": found, "more": (spectrum, found.argmax(-1)), "hidden": hidden}


class SeveralPort(nnx.Module):
    def __init__(self, scale: float = 1.0):
        rngs = nnx.Rngs(0)
        self.a, self.b = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)
        self.scale = scale

    def __call__(self, x, mask=None, mode="plain"):
        hidden = jnp.tanh(self.a(x)) * (1 if mode == "plain" else 2)
        found = self.b(hidden if mask is None else hidden * mask[:, None])
        return found, (jnp.fft.fft(found) * self.scale, found.argmax(-1)), hidden


def test_keywords_several_outputs_and_frozen_leaves_are_recorded(tmp_path):
    x = np.random.default_rng(0).normal(size=(5, 3))
    inputs = {"x": x, "mask": np.array([True, False, True, True, True]), "mode": "other"}
    path = tmp_path / "several.safetensors"
    golden.record(Several(), inputs).write(path)
    rules = Rules((Rule("*.weight", "*.kernel", Layout.TRANSPOSED), Rule("*.bias", "*.bias")))
    report = golden.check(path, SeveralPort(), rules=rules)
    assert report.verdict == "PASS", report
    names = {record.name for record in report.levels[1].records}
    assert {"inputs, output y", "inputs, output more.0", "inputs, output more.1"} <= names
    wrong = golden.check(path, SeveralPort(1.001), rules=rules)
    assert wrong.levels[1].unpassed[0].where == "more.0" and wrong.exit_code == 1
