"""Runs: resumed bit for bit, killed without loss, judged by rounding, and written from."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import flax_gpt
from parity.pair.text import Corpus
from parity.system.devices import choose_devices
from parity.training import (
    NonFinite,
    Run,
    RunConfig,
    Trainers,
    as_line,
    draw_precision,
    draw_training,
    evaluate,
    judge_gap,
    precision_report,
    train,
)

ROOT = Path(__file__).parents[3]
MODEL = dict(
    vocab_size=0, context_length=32, embed_dim=20, num_layers=1, num_heads=4, mlp_dim=28,
    dropout=0.1, dtype="float32",
)  # fmt: skip
TRAINING = dict(
    learning_rate=3e-3, schedule="cosine", warmup_steps=2, total_steps=8, accumulation_steps=2
)
CPU = choose_devices("cpu")


@pytest.fixture(scope="module")
def text(corpus) -> Corpus:
    """The front of the text, which is enough to learn from."""
    return Corpus.from_text("".join(corpus.vocabulary[i] for i in corpus.ids[:20_000]), "a text")


def config_of(text: Corpus, **changes) -> RunConfig:
    """A small run with dropout, accumulation and a schedule; changes go where they belong."""
    sizes = MODEL | {"vocab_size": len(text.vocabulary)} | _of(changes, MODEL)
    fields = {field.name for field in dataclasses.fields(flax_gpt.TrainConfig)}
    model = flax_gpt.GPTConfig(**sizes)
    training = flax_gpt.TrainConfig(**TRAINING | _of(changes, fields))
    rest = {name: x for name, x in changes.items() if name not in MODEL and name not in fields}
    return RunConfig.of(
        text, model=model, training=training, **dict(rows=4, width=16, seed=3) | rest
    )


def _of(changes: dict, names) -> dict:
    return {name: x for name, x in changes.items() if name in names}


def started(path: Path, config: RunConfig) -> tuple[Run, Trainers]:
    """A run's folder and fresh trainers."""
    return Run.start(path, config), Trainers(config, CPU)


def different_bits_of(a: dict, b: dict) -> list[str]:
    """Names whose arrays are not the same to the last bit."""
    assert a.keys() == b.keys()
    return [name for name in a if (a[name].dtype, a[name].shape, a[name].tobytes())
            != (b[name].dtype, b[name].shape, b[name].tobytes())]  # fmt: skip


def losses(run: Run) -> list[dict]:
    return [row["losses"] for row in run.metrics()]


@pytest.mark.parametrize("changes", [{}, {"compute_dtype": "float16"}], ids=["float32", "float16"])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(changes, tmp_path, text):
    config = config_of(text, **changes)
    run, trainers = started(tmp_path / "whole", config)
    train(run, text, trainers, 6)
    whole = trainers.save()
    run, trainers = started(tmp_path / "parts", config)
    train(run, text, trainers, 3, save_every=2)
    run, trainers = started(tmp_path / "parts", config)
    assert train(run, text, trainers, 6) == 6
    assert losses(run) == losses(Run.open(tmp_path / "whole"))
    for name, state in trainers.save().items():
        assert different_bits_of(state, whole[name]) == []
    assert int(whole["flax"]["step"]) == int(whole["torch"]["step"]) == 6


def test_a_checkpoint_holds_all_that_the_next_step_depends_on(tmp_path, text):
    run, trainers = started(tmp_path / "run", config_of(text, compute_dtype="float16"))
    train(run, text, trainers, 2)
    found = load_file(run.checkpoints()[-1][1])
    for side in ("flax", "torch"):
        kinds = {name.split("/")[1].split(".")[0] for name in found if name.startswith(side)}
        assert kinds == {"parameters", "first", "second", "updates", "step", "key", "scale",
                         "streak"}  # fmt: skip
    assert found["flax/key"].tolist() == found["torch/key"].tolist() == [0, 3]


def test_the_twins_stay_together_and_are_judged_alike(tmp_path, text):
    run, trainers = started(tmp_path / "run", config_of(text, dtype="float64"))
    learn, held_out = text.split()
    train(run, learn, trainers, 5)
    is_bug, gap = judge_gap(run, learn, trainers)
    assert not is_bug and gap.endswith("bound 1e-12")
    flax, torch = evaluate(run.config, held_out, trainers).values()
    assert flax["tokens"] == torch["tokens"] == 2000 // 16 * 15
    for name in ("loss", "perplexity", "accuracy"):
        assert flax[name] == pytest.approx(torch[name], rel=1e-12)
    assert flax["perplexity"] == pytest.approx(np.exp(flax["loss"]), rel=1e-12)


def test_a_chaotic_run_is_called_rounding_and_a_broken_twin_a_bug(
    tmp_path, text, plant, monkeypatch
):
    # A rate far too high amplifies rounding past any bound.
    wild = config_of(text, learning_rate=0.5, schedule="constant", dropout=0.0, clip_norm=None)
    run, trainers = started(tmp_path / "wild", wild)
    train(run, text, trainers, 40)
    is_bug, gap = judge_gap(run, text, trainers)
    assert "Looks like rounding" in gap and not is_bug
    broken = plant("torch_gpt", "training/optimizer.py", "config.beta2", "0.999")
    monkeypatch.setattr("parity.twins.torch.torch_gpt", broken)
    run, trainers = started(tmp_path / "broken", config_of(text))
    train(run, text, trainers, 6)
    is_bug, gap = judge_gap(run, text, trainers)
    assert is_bug and "past the bound 2e-05 from step 3. Looks like a bug" in gap


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from parity.training.run import Run
run = Run.open(Path(sys.argv[1]))
_, states = run.load()
real = getattr(os, sys.argv[2])
def kill(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)
setattr(os, sys.argv[2], kill)
run.save(7, states)
"""


@pytest.mark.parametrize("moment", ["fsync", "chmod", "replace"])
def test_kill_9_while_a_checkpoint_is_written_loses_nothing(moment, tmp_path, text):
    run, trainers = started(tmp_path / "run", config_of(text))
    train(run, text, trainers, 2)
    before = run.load()
    done = subprocess.run([sys.executable, "-c", KILLED, str(run.path), moment], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert list(run.path.glob(".step-*")), "it was killed while it wrote"
    step, states = run.load()
    assert step == before[0] == 2
    for name in states:
        assert different_bits_of(states[name], before[1][name]) == []
    again = Trainers(run.config, CPU)
    assert train(run, text, again, 3) == 3
    assert not list(run.path.glob(".step-*")), "what the dead process left is cleared away"


def test_a_disk_that_does_not_take_it_leaves_the_checkpoint_before(tmp_path, text, monkeypatch):
    run, trainers = started(tmp_path / "run", config_of(text))
    train(run, text, trainers, 1)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        run.save(2, trainers.save())
    monkeypatch.undo()
    assert run.load()[0] == 1 and not list(run.path.glob(".step-*"))


def broken_files(path: Path, text: Corpus) -> dict[str, Path]:
    """Checkpoints with one thing wrong each, each the newest of a run of its own."""
    run, trainers = started(path / "good", config_of(text))
    states, good = trainers.save(), path / "good" / "step-000001.safetensors"
    run.save(1, states)
    data, tensors = good.read_bytes(), load_file(good)
    about = {"format": "parity-checkpoint-1", "run": run.config.digest, "step": "1"}
    files = {}

    def place(name: str) -> Path:
        files[name] = path / name / "step-000001.safetensors"
        Run.start(path / name, run.config)
        return files[name]

    place("truncated").write_bytes(data[: len(data) // 2])
    place("empty").write_bytes(b"")
    place("text").write_bytes(b"this is not a checkpoint at all")
    save_file(tensors, place("foreign"))
    save_file(tensors, place("another"), metadata=about | {"run": "0"})
    bad = tensors["torch/parameters.norm.bias"].copy()
    bad[:2] = np.nan, np.inf
    save_file(tensors | {"torch/parameters.norm.bias": bad}, place("nan"), metadata=about)
    less = {name: x for name, x in tensors.items() if "norm.bias" not in name}
    save_file(less, place("missing"), metadata=about)
    return files


def test_a_checkpoint_that_cannot_be_resumed_is_refused_in_one_line(tmp_path, text):
    words = {
        "truncated": "The file is truncated or damaged. Delete it to go back to the one before.",
        "empty": "The file is truncated or damaged.",
        "text": "The file is truncated or damaged.",
        "foreign": "written by something else.",
        "another": "belongs to another run.",
        "nan": "2 of 20 numbers in torch/parameters.norm.bias are not finite.",
        "missing": "parameters.norm.bias is missing",
    }
    for name, path in broken_files(tmp_path, text).items():
        run, trainers = started(path.parent, config_of(text))
        before = sorted(x.name for x in path.parent.iterdir())
        with pytest.raises(ValueError) as caught:
            train(run, text, trainers, 2)
        assert words[name] in str(caught.value), name
        assert "\n" not in str(caught.value)
        after = sorted(x.name for x in path.parent.iterdir() if x.name != ".lock")
        assert after == before, "nothing was touched"


def test_numbers_that_are_not_finite_are_never_written(tmp_path, text):
    run, trainers = started(tmp_path / "run", config_of(text))
    states = trainers.save()
    states["torch"]["parameters.norm.bias"][0] = np.nan
    with pytest.raises(ValueError, match="1 of 20 numbers in torch/parameters"):
        run.save(5, states)
    assert run.load() is None


@pytest.mark.parametrize("framework", ["flax", "torch"])
def test_a_training_that_leaves_the_range_says_when_where_and_what_to_do(framework, tmp_path, text):
    config = config_of(text, learning_rate=1e20, warmup_steps=0, frameworks=(framework,))
    run, trainers = started(tmp_path / "run", config)
    with pytest.raises(NonFinite) as caught:
        train(run, text, trainers, 8)
    message = str(caught.value)
    assert message.startswith(f"step 2: {framework} has a loss of ")
    assert "First not finite: the output of blocks.0." in message
    assert message.endswith("Lower --learning-rate or --clip, or lengthen --warmup.")
    assert not caught.value.in_one_twin
    assert run.load()[0] == 0, "the run can go on from before it"


def test_a_folder_that_is_not_this_run_is_refused(tmp_path, text):
    config = config_of(text)
    Run.start(tmp_path / "run", config)
    assert Run.start(tmp_path / "run", config).config == config
    other = config_of(text, learning_rate=0.5, seed=4)
    with pytest.raises(ValueError, match=r"holds another run \(seed 3, not 4; learning_rate 0.003"):
        Run.start(tmp_path / "run", other)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="the folder is not empty and holds no run"):
        Run.start(tmp_path / "full", config)
    with pytest.raises(ValueError, match=r"that is a file\. A run is a folder"):
        Run.start(tmp_path / "full" / "letter.txt", config)
    with pytest.raises(ValueError, match=r"no config\.json in it"):
        Run.open(tmp_path / "full")
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        Run.open(tmp_path / "run")


def test_metrics_that_are_lost_are_told_and_nothing_is_forgotten(tmp_path, text):
    config = config_of(text, frameworks=("torch",))
    run, trainers = started(tmp_path / "run", config)
    train(run, text, trainers, 4)
    path = run.path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    for damaged in ("", "\n".join([lines[0], "garbage", *lines[2:]]), "5\n", '{"step": 1}\n'):
        path.write_text(damaged)
        with pytest.raises(
            ValueError, match=r"metrics\.jsonl has [01] of 4 steps that can be read"
        ):
            train(run, text, Trainers(config, CPU), 6)
        assert path.read_text() == damaged
    path.unlink()
    with pytest.raises(ValueError, match="has 0 of 4 steps"):
        train(run, text, Trainers(config, CPU), 6)


def test_two_processes_do_not_train_in_one_folder(tmp_path, text):
    config = config_of(text, frameworks=("torch",))
    run, trainers = started(tmp_path / "run", config)
    train(run, text, trainers, 1)
    with run.locked(), pytest.raises(ValueError, match="another process trains in it"):
        train(run, text, Trainers(config, CPU), 2)
    assert train(run, text, Trainers(config, CPU), 2) == 2


def test_what_a_killed_process_began_does_not_lock_the_folder_out(tmp_path, text):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.json.x1").write_text("{")
    run, trainers = started(tmp_path / "run", config_of(text, frameworks=("torch",)))
    (run.path / ".curves.png.x2").write_text("")
    train(run, text, trainers, 1)
    hidden = [path.name for path in run.path.iterdir() if path.name.startswith(".")]
    assert hidden == [".lock"]


def test_what_is_not_finite_is_null_in_the_metrics_and_no_pass(tmp_path, text):
    line = as_line({"step": 1, "losses": {"flax": float("nan"), "torch": 1.0}, "gap": float("nan")})
    assert json.loads(line)["losses"] == {"flax": None, "torch": 1.0}
    run = Run.start(tmp_path / "run", config_of(text))
    (run.path / "metrics.jsonl").write_text(line)
    (row,) = run.metrics(1)
    assert np.isnan(row["gap"]) and np.isnan(row["losses"]["flax"]) and row["losses"]["torch"] == 1
    draw_training(run.path / "curves.png", [row, row | {"step": 2}], "a step without a loss")


def test_only_the_newest_checkpoints_are_kept(tmp_path, text):
    run, trainers = started(tmp_path / "run", config_of(text, frameworks=("torch",)))
    train(run, text, trainers, 5, save_every=1)
    assert [step for step, _ in run.checkpoints()] == [4, 5]


def test_a_line_that_was_cut_off_is_measured_again(tmp_path, text):
    config = config_of(text, frameworks=("torch",))
    run, trainers = started(tmp_path / "run", config)
    train(run, text, trainers, 4)
    whole = losses(run)
    (run.path / "step-000004.safetensors").unlink()
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    assert train(run, text, Trainers(config, CPU), 4) == 4
    assert losses(run) == whole


def test_one_batch_is_learned_by_heart_and_the_training_stops(tmp_path, text):
    config = config_of(
        text, one_batch=True, dropout=0.0, schedule="constant", weight_decay=0.0,
        learning_rate=1e-2, frameworks=("flax",), rows=2, width=32,
    )  # fmt: skip
    run, trainers = started(tmp_path / "run", config)
    last = train(run, text, trainers, 500, target=0.01)
    assert last < 500 and losses(run)[-1]["flax"] < 0.01 <= losses(run)[-2]["flax"]
    assert run.load()[0] == last
    assert train(run, text, Trainers(config, CPU), 500, target=0.01) == last, "it was reached"


def test_pictures_are_drawn_for_one_twin_and_for_two(tmp_path, text):
    rows = [{"step": n, "losses": {"flax": 4.0 / n, "torch": 4.0 / n}} for n in range(1, 9)]
    draw_training(tmp_path / "two.png", rows, "two")
    alone = [row | {"losses": {"torch": row["losses"]["torch"]}} for row in rows]
    draw_training(tmp_path / "one.png", alone, "one")
    sizes = []
    for name in ("two", "one"):
        data = (tmp_path / f"{name}.png").read_bytes()
        assert data.startswith(b"\x89PNG")
        sizes.append(int.from_bytes(data[20:24], "big"))
    assert sizes[0] > 1.5 * sizes[1], "the gap has a panel of its own"
    assert len(list(tmp_path.iterdir())) == 2


def test_every_type_starts_from_the_same_weights_and_is_judged_by_float64(tmp_path, text):
    dtypes = "float64", "float32", "bfloat16"
    report = precision_report(config_of(text), text, CPU, 5, dtypes)
    assert report.verdict == "PASS" and set(report.ratios) == set(dtypes[1:])
    for name in ("flax", "torch"):
        start = {dtype: report.curves[dtype][name][0] for dtype in dtypes}
        for dtype, least, most in (("float32", 0.0, 1e-6), ("bfloat16", 1e-6, 1e-2)):
            gap = abs(start[dtype] - start["float64"])
            assert least <= gap <= most, (dtype, gap)
    draw_precision(tmp_path / "precision.png", report)
    assert (tmp_path / "precision.png").read_bytes().startswith(b"\x89PNG")


def test_a_twin_that_computes_in_a_narrower_type_fails_by_the_ratio(text, plant, monkeypatch):
    right = 'torch.einsum("BTD,VD->BTV", x_BTD, self.token_embedding.weight)'
    narrower = "torch.float32 if x_BTD.dtype == torch.float64 else torch.bfloat16"
    wrong = f"{right}.to({narrower}).to(x_BTD)"
    broken = plant("torch_gpt", "model.py", right, wrong)
    monkeypatch.setattr("parity.twins.torch.torch_gpt", broken)
    report = precision_report(config_of(text), text, CPU, 3, ("float64", "float32"))
    assert report.verdicts == {"float64": "FAIL", "float32": "FAIL"}
    document = json.loads(as_line(report.to_dict()))
    assert document["verdict"] == "FAIL" and document["ratios"]["float32"][-1] < 0.25
