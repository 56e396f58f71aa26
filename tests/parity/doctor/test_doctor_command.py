"""The command as a user meets it: what it says, and its exit codes."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from parity.cli import app
from parity.doctor import DETECTORS

ROOT = Path(__file__).parents[3]
NAMES = [detector.name for detector in DETECTORS]

NET = """
import torch
from torch import nn
from parity.doctor import TorchModel

V, CONTEXT, D = 31, 19, 16


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.positions = nn.Embedding(V, D), nn.Embedding(CONTEXT, D)
        self.query, self.key, self.value = (nn.Linear(D, D) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, V)

    def mask(self, scores):
        return scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        scores = self.query(x) @ self.key(x).transpose(-1, -2) / D**0.5
        return self.head(self.norm(x + self.mask(scores).softmax(-1) @ self.value(x)))


class NoMask(Net):
    def mask(self, scores):
        return scores


class Classifier(Net):
    def forward(self, tokens):
        return super().forward(tokens)[:, 0]


def build():
    print("building")
    return Net()


def raising():
    raise RuntimeError("no such checkpoint\\nlook elsewhere")


def ending():
    raise SystemExit(0)


def number():
    return 7


def with_arguments(config):
    return Net()


def wrapped():
    return TorchModel(Net(), name="<b>mine</b>")


def loss(logits, labels, counts):
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def no_shift(logits, labels, counts):
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


made = Net()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a user keeps a model, with the command running in it."""
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "broken.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "ends.py").write_text("raise SystemExit(0)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]
    importlib.invalidate_caches()


def doctor(*arguments):
    """The command inside this process."""
    return CliRunner().invoke(app, ["doctor", *arguments], env={"COLUMNS": "100"})


def test_a_healthy_model_ends_with_0(folder):
    done = doctor("net.py:build")
    assert done.exit_code == 0, done.output
    assert "Nothing wrong in" in done.stdout and "Net, torch, 2,175 weights" in done.stdout
    assert all(name in done.stdout for name in NAMES)
    assert f"({len(NAMES)} of {len(NAMES)})" in done.stderr


def test_a_broken_one_ends_with_1_and_advice(folder):
    done = doctor("net.py:NoMask", "--only", "causality", "--only", "determinism")
    assert done.exit_code == 1, done.output
    assert "1 of 2 answers are wrong. Begin with causality." in done.stdout
    assert "try next: Look at the mask" in done.stdout and "sampling" not in done.stdout


def test_what_a_failure_makes_meaningless_is_left_out_unless_all_is_asked(folder):
    asked = "--only", "causality", "--only", "boundary-lengths"
    left_out = "not asked: boundary-lengths. Means nothing while causality fails."
    assert left_out in doctor("net.py:NoMask", *asked).stdout
    assert left_out not in doctor("net.py:NoMask", *asked, "--all").stdout


@pytest.mark.parametrize("target", ["net:build", "net.py:Net", "net.py:made", "net.py:wrapped"])
def test_a_target_is_a_module_or_file_and_a_function_class_or_model_in_it(target, folder):
    assert doctor(target, "--only", "causality").exit_code == 0


def test_what_lies_beside_a_file_can_be_imported_when_the_model_is_built(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "parts_of_it.py").write_text(NET)
    (folder / "sub" / "json.py").write_text(
        "def build():\n    from parts_of_it import Net\n    return Net()\n"
    )
    assert doctor("sub/json.py:build", "--only", "causality").exit_code == 0
    assert sys.modules["json"] is json  # a file of that name has not taken its place


def test_a_model_that_knows_something_is_not_asked_for_a_fresh_loss(folder):
    done = doctor("net.py:build", "--only", "initial-loss", "--trained")
    assert done.exit_code == 2 and "not asked: initial-loss" in done.stdout


def test_a_loss_can_be_given(folder):
    asked = "--only", "token-accounting"
    assert doctor("net.py:build", *asked).exit_code == 2
    assert doctor("net.py:build", *asked, "--loss", "net.py:loss").exit_code == 0
    assert doctor("net.py:build", *asked, "--loss", "net.py:no_shift").exit_code == 1


def test_sizes_can_be_given(folder):
    done = doctor("net.py:build", "--only", "boundary-lengths", "--context-length", "15")
    assert "Lengths 1, 14 and 15 work." in " ".join(done.stdout.split())
    done = doctor("net.py:build", "--only", "initial-loss", "--vocab-size", "29")
    assert "ln 29" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "doctor: no model. A model is what a function gives. Name one"),
        (["net.py"], "net.py: no function. A target is a module and a name in it. Write"),
        (["net.py:"], "net.py:: no function."),
        (["away.py:build"], "away.py:build: no file away.py."),
        (["away:build"], "importing away raised ModuleNotFoundError: No module named 'away'"),
        (["net.py:builds"], "net.py:builds: net.py has no builds, but there is build."),
        (["broken.py:build"], "importing broken.py raised ModuleNotFoundError: No module named"),
        (["ends.py:build"], "ends.py:build: importing ends.py raised SystemExit: 0"),
        (
            ["net.py:raising"],
            "net.py:raising: raised RuntimeError at net.py:42: no such checkpoint",
        ),
        (["net.py:ending"], "net.py:ending: raised SystemExit at net.py:46: 0"),
        (["net.py:with_arguments"], "missing 1 required positional argument: 'config'"),
        (["net.py:number"], "net.py:number: gave an object of type int. The doctor examines"),
        (["net.py:Classifier"], "doctor: tokens of shape (2, 16) gave Tensor[2, 31]. A language"),
        (
            ["net.py:build", "--vocab-size", "40"],
            "net.py:build: called with tokens, Net raised Ind",
        ),
        (["net.py:build", "--vocab-size", "3"], "doctor: vocabulary 3, context 19. The questions"),
        (["net.py:build", "--only", "mood"], "--only mood: no such question. Choose initial-loss"),
        (
            ["net.py:build", "--loss", "net.py:V"],
            "net.py:V: an object of type int. A loss is a function",
        ),
        (["net.py:build", "--loss", "net.py:lost"], "net.py:lost: net.py has no lost"),
        (
            ["net.py:wrapped", "--vocab-size", "29"],
            "gave a LanguageModel, which has a loss and sizes",
        ),
        (["net.py:build", "--json", "no/out.json"], "--json no/out.json: no folder no"),
        (["net.py:build", "--html", "."], "--html .: that is a folder. Name a file in it"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_input_ends_with_2_and_one_line(arguments, message, folder):
    before = sorted(folder.rglob("*"))
    done = doctor(*arguments)
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("parity: ") and message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout.strip() in ("", "building")
    assert [x for x in sorted(folder.rglob("*")) if "__pycache__" not in str(x)] == before


def test_a_file_that_cannot_be_written_after_all_ends_with_2(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("parity.cli.options.write_file", full)
    done = doctor("net.py:NoMask", "--only", "causality", "--html", "net.html")
    assert done.exit_code == 2 and "No space left on device" in done.stderr
    assert "Begin with causality" in done.stdout  # what was found is not lost


def test_the_questions_can_be_read_without_a_model():
    done = doctor("--questions")
    assert done.exit_code == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[::2]] == NAMES
    assert len(doctor("--questions", "--only", "parity").stdout.splitlines()) == 2


def test_json_on_standard_output_is_nothing_but_json(folder):
    done = doctor("net.py:build", "--only", "causality", "--json", "-")
    document = json.loads(done.stdout)
    assert document["name"] == "Net" and document["fired"] == []
    assert [x["detector"] for x in document["answers"]] == ["causality"]
    assert "building" in done.stderr and "Nothing wrong" in done.stderr


def test_a_document_and_a_page_are_written(folder):
    done = doctor("net.py:wrapped", "--only", "causality", "--json", "a.json", "--html", "a.html")
    assert done.exit_code == 0, done.output
    assert json.loads((folder / "a.json").read_text())["name"] == "<b>mine</b>"
    page = (folder / "a.html").read_text()
    assert "&lt;b&gt;mine&lt;/b&gt;" in page and "<b>" not in page


def test_the_command_is_a_process_that_ends_with_its_code(folder):
    done = subprocess.run(
        [sys.executable, "-m", "parity", "doctor", "net.py:NoMask", "--only", "causality"],
        cwd=folder, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert re.search(r"causality\s+FAIL", done.stdout)
    assert "Traceback" not in done.stderr
