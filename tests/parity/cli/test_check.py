"""The command as a user meets it: in a process of its own, with its exit codes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flax_gpt import PRESETS
from flax_gpt.config import DTYPES
from flax_gpt.training.config import SCHEDULES
from parity.check.levels.names import LEVELS
from parity.cli import train as parity_train
from parity.twins import names

ROOT = Path(__file__).parents[3]


def parity(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Runs the command; the folder it runs in comes first on the path."""
    return subprocess.run(
        [sys.executable, "-m", "parity", *arguments],
        cwd=cwd, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_a_small_check_passes_and_writes_the_schema_and_a_page(tmp_path):
    path, page = tmp_path / "out.json", tmp_path / "out.html"
    levels = "--level", "weights", "--level", "cache"
    done = parity("check", *levels, "--json", str(path), "--html", str(page))
    assert done.returncode == 0, done.stderr
    assert "PASS: the same function" in done.stdout
    document = json.loads(path.read_text())
    assert document["schema"] == 1 and document["verdict"] == "PASS"
    assert [level["name"] for level in document["levels"]] == ["weights", "cache"]
    assert {"python", "jax", "flax", "torch", "devices", "precision", "threads"} <= set(
        document["environment"]
    )
    assert document["subject"]["num_params"] > 100_000 and document["divergence"] is None
    assert document["evidence"] == {"modules": None, "losses": [], "generations": []}
    assert "PASS. The same function" in page.read_text()


def test_json_on_standard_output_is_nothing_but_json(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    done = parity("check", "--level", "weights", "--data", str(text), "--json", "-")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["subject"]["config"]["data"] == str(text)
    assert "PASS" in done.stderr


def test_a_broken_twin_exits_1_and_names_the_module(tmp_path):
    for package in ("flax_gpt", "torch_gpt", "parity"):
        shutil.copytree(ROOT / package, tmp_path / package)
    layers = tmp_path / "torch_gpt" / "layers.py"
    right, wrong = 'approximate="tanh"', 'approximate="none"'
    assert right in layers.read_text()
    layers.write_text(layers.read_text().replace(right, wrong))
    done = parity("check", "--dtype", "float64", "--json", "out.json", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "first differs at blocks.0.mlp (forward)" in done.stdout.replace("\n", " ")
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["verdict"] == "FAIL" and document["divergence"]["where"] == "blocks.0.mlp"
    verdicts = [level["verdict"] for level in document["levels"]]
    assert verdicts == ["PASS", "FAIL", "BLOCKED", "BLOCKED", "BLOCKED", "BLOCKED", "BLOCKED"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "missing.txt"], "data file missing.txt: no such file"),
        (["--json", "no/folder/out.json"], "--json no/folder/out.json: no folder no/folder"),
        (["--json", "."], "--json .: that is a folder. Name a file in it"),
        (["--html", "no/out.html"], "--html no/out.html: no folder no"),
        (["--html", "."], "--html .: that is a folder. Name a file in it"),
        (["--preset", "huge"], "no preset 'huge'. Choose one of tiny, gpt2"),
        (["--level", "logit"], "--level logit: no such level. Choose weights"),
        (["--dtype", "float16"], "--dtype float16: choose float64"),
        (["--device", "tpu"], "--device tpu: there are auto, cpu and cuda"),
        (["--tokens", "381"], "381 new tokens leave 3 of context 384"),
    ],
)
def test_bad_input_exits_2_with_one_line(arguments, message, tmp_path):
    done = parity("check", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("parity: ") and message in done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_option_exits_2_and_shows_the_way():
    done = parity("check", "--stepz", "3")
    assert done.returncode == 2 and "--steps" in done.stderr


def test_an_interrupt_exits_130_with_one_line_and_no_file(tmp_path):
    path = tmp_path / "out.json"
    process = subprocess.Popen(
        [sys.executable, "-m", "parity", "check", "--json", str(path)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    seen = process.stderr.readline()
    time.sleep(1.0)
    os.kill(process.pid, signal.SIGINT)
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 130, rest
    assert "weights" in seen and "interrupted, nothing was written" in rest
    assert not path.exists()


def test_help_is_instant_and_teaches():
    commands = {
        "check": "Run only this level",
        "train": "goes on from it, bit for bit",
        "generate": "the same text",
        "precision": "ratio of the two errors",
    }
    start = time.perf_counter()
    top = parity("--help").stdout
    shown = {name: " ".join(parity(name, "--help").stdout.split()) for name in commands}
    assert time.perf_counter() - start < 2.5 * (1 + len(commands))
    assert "Exit codes: 0 the same function, 1 they differ, 2 usage error" in top
    for name, words in commands.items():
        assert name in top and words in shown[name] and "Example" in shown[name], name
    for level in LEVELS:
        assert re.search(rf"{level}\s+\w+", shown["check"])


def test_the_command_names_what_exists():
    assert tuple(PRESETS) == names.PRESETS and DTYPES == names.DTYPES
    assert SCHEDULES == parity_train.SCHEDULES
