"""`parity train` and `generate` as a user meets them: outcomes, interrupts, kills, bad input."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from parity.cli import app
from parity.training import Run

ROOT = Path(__file__).parents[3]

# --- the commands, in this process ---

TINY = "--batch-size", "2", "--width", "8", "--save-every", "1000"


def invoke(*arguments: str):
    """A command's result, its two streams apart."""
    return CliRunner().invoke(app, [str(x) for x in arguments], catch_exceptions=False)


def test_both_twins_train_and_write_by_command(tmp_path):
    run = tmp_path / "run"
    done = invoke("train", "--out", run, "--steps", "6", *TINY)
    assert done.exit_code == 0, done.output
    assert "bound 2e-05" in done.stdout and "held-out loss" in done.stdout
    assert (run / "curves.png").exists()
    again = invoke("train", "--out", run, "--steps", "6", *TINY)
    assert again.exit_code == 0 and again.stdout == done.stdout
    assert "goes on from step 6" in again.stderr
    written = invoke("generate", run, "The ", "--tokens", "8", "--seed", "1")
    assert written.exit_code == 0 and "the same from flax_gpt and torch_gpt" in written.stderr
    assert written.stdout.startswith("The ") and len(written.stdout) == len("The ") + 8 + 1
    alone = invoke("generate", run, "The ", "--tokens", "8", "--seed", "1", "--only", "torch")
    assert alone.stdout == written.stdout


def test_twins_that_diverge_exit_1_with_what_rounding_would_have_done(tmp_path, plant, monkeypatch):
    broken = plant("torch_gpt", "training/optimizer.py", "config.beta2", "0.999")
    monkeypatch.setattr("parity.twins.torch.torch_gpt", broken)
    done = invoke("train", "--out", tmp_path / "run", "--steps", "6", *TINY)
    assert done.exit_code == 1, done.output
    assert "Looks like a bug" in done.stdout


def test_a_nan_in_one_twin_exits_1_because_they_differ(tmp_path, plant, monkeypatch):
    broken = plant(
        "torch_gpt", "training/loss.py", "torch.logsumexp(logits, dim=-1)",
        "torch.log(torch.sum(torch.exp(logits + 800.0), dim=-1))",
    )  # fmt: skip
    monkeypatch.setattr("parity.twins.torch.torch_gpt", broken)
    done = invoke("train", "--out", tmp_path / "run", "--steps", "2", *TINY)
    assert done.exit_code == 1, done.output
    assert "step 1: torch has a loss of inf" in done.stderr
    assert "flax is finite, so the twins differ" in done.stderr


def test_one_batch_that_is_not_learned_exits_1(tmp_path):
    options = "--overfit-one-batch", "--only", "torch", *TINY
    done = invoke("train", "--out", tmp_path / "short", "--steps", "3", *options)
    assert done.exit_code == 1 and "one batch not learned" in done.stdout
    done = invoke("train", "--out", tmp_path / "long", "--steps", "400", *options)
    assert done.exit_code == 0 and "one batch learned in" in done.stdout
    done = invoke("train", "--out", tmp_path / "x", "--dropout", "0.1", *options)
    assert done.exit_code == 2 and not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--out", "x", "--data", "missing.txt"], "data file missing.txt: no such file"),
        (["train", "--out", "x", "--only", "keras"], "--only keras: there are flax and torch"),
        (["train", "--out", "x", "--dtype", "int8"], "--dtype int8: there are float64, float32"),
        (["train", "--out", "x", "--width", "400"], "--width 400 > context length 384 of tiny"),
        (["train", "--out", "x", "--accumulate", "3"], "--batch-size 8 in 3 parts"),
        (["train", "--out", "x", "--clip", "-1"], "clip_norm is -1.0, it must be positive"),
        (["train", "--out", "x", "--preset", "huge"], "no preset 'huge'"),
        (["generate", ".", "x"], "run .: no config.json in it"),
        (["generate", ".", "x", "--top-p", "2"], "Sampling: top_p is 2.0, it must be in (0, 1]"),
        (["precision", "--out", "x", "--dtype", "float32"], "float64 is the truth"),
        (["precision", "--out", "x", "--dtype", "float64,int8"], "--dtype int8: there are"),
    ],
)  # fmt: skip
def test_bad_input_exits_2_with_one_line_and_leaves_nothing(
    arguments, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    done = invoke(*arguments)
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("parity: ") and message in done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stdout == ""
    assert list(tmp_path.iterdir()) == []


# --- the commands, in processes of their own ---


def command(*arguments: str, cwd: Path = ROOT) -> list[str]:
    return [sys.executable, "-m", "parity", *arguments]


SMALL = "--batch-size", "2", "--width", "8", "--only", "torch", "--save-every", "1000"


def test_an_interrupted_training_goes_on_from_where_it_was(tmp_path):
    options = "--steps", "60", *SMALL
    whole = subprocess.run(
        command("train", "--out", str(tmp_path / "whole"), *options),
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert whole.returncode == 0, whole.stderr
    arguments = command("train", "--out", str(tmp_path / "parts"), *options)
    process = subprocess.Popen(
        arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "parts" / "metrics.jsonl"
    for line in process.stderr:
        if line.startswith("step 1/"):
            break
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 130, rest
    assert "checkpoint written. The same command goes on from it." in rest
    stopped = Run.open(tmp_path / "parts").load()[0]
    assert 0 < stopped < 60
    again = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert again.stdout.replace("parts", "whole") == whole.stdout
    assert metrics.read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert (tmp_path / "parts" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_kill_9_at_any_time_loses_nothing_but_the_steps_since_the_checkpoint(tmp_path):
    run = tmp_path / "run"
    arguments = command(
        "train", "--out", str(run), "--steps", "400", "--batch-size", "2", "--width", "8",
        "--only", "torch", "--save-every", "1",
    )  # fmt: skip
    for turn in range(3):
        process = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 120
        before = Run.open(run).load()[0] if turn else 0
        while time.monotonic() < deadline:
            found = sorted(run.glob("step-*.safetensors")) if run.exists() else []
            if found and int(found[-1].stem.removeprefix("step-")) > before + 2:
                break
            time.sleep(0.01)
        time.sleep(0.013 * turn)
        process.kill()
        process.wait()
        process.stderr.close()
        step, states = Run.open(run).load()
        assert step > before and states.keys() == {"torch"}
