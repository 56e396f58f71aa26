"""The bench of the training steps: what it times, what it refuses, what it says."""

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest
import torch
from jax.extend.core import jaxprs_in_params
from rich.console import Console
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import flax_gpt
import parity.bench.machine
import parity.bench.train
import torch_gpt
from parity import cli
from parity.bench.machine import Matmul, best_matmul
from parity.bench.names import DTYPES
from parity.bench.result import Timing, TrainBench, TrainingResult, to_json
from parity.bench.roofline import flop_per_step
from parity.bench.table import terminal
from parity.bench.train import LOSSES, TrainOptions, bench_train
from parity.system.devices import choose_devices

NAMES = ["flax jit", "flax donated", "torch eager", "torch compiled"]
SMALL = dict(context_length=16, embed_dim=12, num_layers=1, num_heads=3, mlp_dim=20)


@pytest.fixture(scope="module", autouse=True)
def short_rounds() -> Iterator[None]:
    """Rounds and products that take no time."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(parity.bench.machine, "SIZES", (64, 128))
        monkeypatch.setattr(parity.bench.train, "ROUND_S", 0.02)
        yield


def bench(corpus, rounds: int = 1, dtype: str = "float32") -> TrainBench:
    config = flax_gpt.GPTConfig.preset("tiny", vocab_size=len(corpus.vocabulary), **SMALL)
    options = TrainOptions("tiny", config, batch_size=2, width=12, rounds=rounds)
    return bench_train(corpus, [options], dtype, choose_devices("cpu"), lambda phase, done: None)


@pytest.fixture(scope="module")
def times(corpus) -> TrainBench:
    """Three rounds of a small model; torch.compile traces, and then runs the graph as it is."""
    compile_module = nn.Module.compile
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(
            nn.Module,
            "compile",
            lambda module, **options: compile_module(module, backend="aot_eager", **options),
        )
        return bench(corpus, rounds=3)


def printed(value) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(value)
    return capture.get()


def test_every_step_is_timed_and_the_json_says_on_what(times):
    document = json.loads(to_json(times))
    assert (document["schema"], document["bench"], document["dtype"]) == (1, "training", "float32")
    assert {"jax", "torch", "devices", "threads", "cores", "load_before", "load_after"} <= set(
        document["environment"]
    )
    (preset,) = document["presets"]
    assert (preset["preset"], preset["batch_size"], preset["width"]) == ("tiny", 2, 12)
    assert preset["config"]["embed_dim"] == 12 and document["training"]["clip_norm"] == 1.0
    losses = preset["losses"].values()
    assert all(max(x) - min(x) <= preset["bound"] == 2e-5 for x in zip(*losses, strict=True))
    assert [timing["name"] for timing in preset["timings"]] == NAMES
    for timing in preset["timings"]:
        assert timing["unavailable"] is None and timing["ran"].startswith("train_step")
        rounds, seconds = timing["rounds_s"], timing["step_s"]
        assert len(rounds) == 3 and seconds == statistics.median(rounds)
        assert math.isclose(timing["spread"] * seconds, max(rounds) - min(rounds))
        assert math.isclose(timing["tokens_per_s"], 24 / seconds)
        assert math.isclose(timing["flop_per_s"], preset["flop_per_step"] / seconds)
        assert 0 < timing["share_of_fastest_matmul"] <= timing["share_of_own_matmul"] < 1
        assert timing["steps_per_round"] >= 1
        assert (timing["compile_s"] is None) == (timing["name"] == "torch eager")
        assert (timing["memory_bytes"] is None) == (timing["framework"] == "torch")
    assert preset["timings"][2]["speed_over_torch_eager"] == 1.0
    assert set(preset["matmul_sizes"]) == set(preset["rates"]) == {"flax", "torch"}
    assert all(len(rates) == 3 for rates in preset["rates"].values())


def test_the_table_has_a_row_for_every_step_and_says_what_ran(times):
    table = printed(terminal(times))
    for name in NAMES:
        assert f"\n {name} " in table and f"\n{name}: train_step" in table
    assert "1.00x" in table and "cores, load" in table


def test_shares_and_speeds_are_taken_round_by_round():
    def timing(name: str, *rounds_s: float) -> Timing:
        return Timing(name=name, steps_per_round=1, rounds_s=rounds_s)

    result = TrainingResult(
        preset="tiny",
        config=flax_gpt.GPTConfig.preset("tiny"),
        batch_size=1,
        width=2,
        flop_per_step=100,
        losses={"flax jit": [1.0], "torch eager": [1.0]},
        bound=2e-5,
        # The machine is half as fast in the second round and a quarter as fast in the third.
        timings=(
            timing("flax jit", 1.0, 2.0, 4.0),
            timing("torch eager", 2.0, 4.0, 8.0),
        ),
        matmul_sizes={"flax": 512, "torch": 512},
        rates={"flax": [200.0, 100.0, 50.0], "torch": [400.0, 200.0, 100.0]},
    )
    numbers = result.numbers(result.timings[0])
    assert numbers["speed_over_torch_eager"] == 2.0
    assert numbers["share_of_own_matmul"] == 0.5 and numbers["share_of_fastest_matmul"] == 0.25


def differently(right=torch_gpt.train_step, **changes):
    """The training step with other constants."""

    def wrong(batch, state):
        config = dataclasses.replace(state.config, **changes)
        result, after = right(batch, dataclasses.replace(state, config=config))
        return result, dataclasses.replace(after, config=state.config)

    return wrong


def without_a_loss(batch, state, right=torch_gpt.train_step):
    result, state = right(batch, state)
    loss = torch_gpt.TokenLoss(result.loss.total * math.nan, result.loss.num_tokens)
    return dataclasses.replace(result, loss=loss), state


@pytest.mark.parametrize(
    ("step", "number"),
    [
        (differently(label_smoothing=0.1), 1),
        (differently(learning_rate=1.1e-3), 2),
        (without_a_loss, 1),
    ],
    ids=["loss", "rate", "nan"],
)
def test_steps_that_do_not_compute_the_same_are_not_timed(corpus, monkeypatch, step, number):
    monkeypatch.setattr(torch_gpt, "train_step", step)
    monkeypatch.setattr(Matmul, "rate", None)  # measured before and in every round
    message = (
        rf"bench: loss of step {number} on tiny: flax jit [\d.]+, flax donated [\d.]+, torch eager "
        r"[\d.na]+, \S+ apart > 2e-05 in float32\. Only steps .* timing\. Find out .* `parity check"
    )
    with pytest.raises(ValueError, match=message):
        bench(corpus)


def test_without_a_compiler_the_rest_is_timed_and_the_reason_given(
    corpus, monkeypatch, tmp_path, capfd
):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (str(tmp_path / "no-compiler"),))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    times = bench(corpus, dtype="bfloat16")
    (result,) = times.presets
    assert [x.name for x in result.timings if x.unavailable is None] == NAMES[:3]
    assert "No working C++ compiler found" in result.timings[3].unavailable
    document = json.loads(to_json(times))
    (preset,) = document["presets"]
    assert document["training"]["compute_dtype"] == "bfloat16"
    assert preset["config"]["dtype"] == "float32" and preset["bound"] == 2e-2
    assert "step_s" not in preset["timings"][3]
    assert "torch compiled: InvalidCxxCompiler" in printed(terminal(times))
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


CONFIG = flax_gpt.GPTConfig(
    vocab_size=11, context_length=8, embed_dim=6, num_layers=2, num_heads=3, mlp_dim=10
)
ROWS, WIDTH = 4, 5


def test_the_flop_of_a_step_are_those_counted_by_hand():
    tokens = 4 * 5
    projections = 4 * (tokens * 6 * 6)
    mlp = tokens * 6 * 10 + tokens * 10 * 6
    scores_and_mixing = 2 * (4 * 3 * 5 * 5 * 2)  # rows, heads, queries, keys, head dim
    head = tokens * 6 * 11
    forward = 2 * (2 * (projections + mlp + scores_and_mixing) + head)
    assert flop_per_step(CONFIG, ROWS, WIDTH) == 3 * forward == 85_680


def test_the_flop_of_a_step_are_those_of_the_products_that_jax_traces():
    def products(jaxpr) -> int:
        total = 0
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                left = equation.invars[0].aval.shape
                depth = math.prod(left[axis] for axis in contracted)
                total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
            total += sum(map(products, jaxprs_in_params(equation.params)))
        return total

    model = flax_gpt.GPT(CONFIG, flax_gpt.random.key(0))
    state = flax_gpt.TrainState.create(model, flax_gpt.TrainConfig())
    batch = flax_gpt.Batch(jnp.zeros((ROWS, WIDTH), jnp.int32))
    traced = jax.make_jaxpr(flax_gpt.train_step)(batch, state)
    assert products(traced.jaxpr) == flop_per_step(CONFIG, ROWS, WIDTH)


def test_the_flop_of_a_step_are_those_of_the_products_that_torch_runs():
    model = torch_gpt.GPT(torch_gpt.GPTConfig(**dataclasses.asdict(CONFIG)))
    state = torch_gpt.TrainState.create(model, torch_gpt.TrainConfig())
    with FlopCounterMode(display=False) as counted:
        torch_gpt.train_step(torch_gpt.Batch(torch.zeros((ROWS, WIDTH), dtype=torch.long)), state)
    assert counted.get_total_flops() == flop_per_step(CONFIG, ROWS, WIDTH)


@pytest.mark.parametrize("framework", ["flax", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_roofline_is_the_fastest_of_the_sizes(monkeypatch, framework, dtype):
    monkeypatch.setattr(parity.bench.machine, "SIZES", (8, 64))
    found = best_matmul(framework, dtype, torch.device("cpu"))
    assert found.size == 64 and found.rate() > 0


def test_a_rate_counts_every_product():
    slow = Matmul(100, 3, lambda times: time.sleep(0.01 * times))
    assert 1e8 < slow.rate() <= 2 * 100**3 / 0.01


def invoke(*arguments: str):
    return CliRunner().invoke(cli.app, ["bench", "training", *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "float16"], "--dtype float16: there are float32, bfloat16"),
        (["--json", "no/folder/out.json"], "--json no/folder/out.json: no folder no/folder"),
        (["--preset", "huge"], "no preset 'huge'. Choose one of tiny, gpt2"),
        (["--width", "385"], "bench: 385 tokens in a row, context length 384 of tiny"),
        (["--device", "tpu"], "--device tpu: there are auto, cpu and cuda"),
    ],
)
def test_bad_input_exits_2_with_one_line(arguments, message):
    done = invoke(*arguments)
    assert done.exit_code == 2 and done.stdout == ""
    assert done.stderr.startswith("parity: ") and message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_json_on_standard_output_is_nothing_but_json(monkeypatch, times):
    asked = []

    def stand_in(corpus, options, dtype, devices, progress):
        asked.extend(options)
        return times

    monkeypatch.setattr(parity.bench.train, "bench_train", stand_in)
    done = invoke("--preset", "tiny", "--preset", "tiny", "--rounds", "3", "--json", "-")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["presets"][0]["preset"] == "tiny"
    assert "torch compiled" in done.stderr
    (options,) = asked
    assert (options.preset, options.batch_size, options.width, options.rounds) == ("tiny", 8, 64, 3)


def test_json_in_a_file_leaves_the_table_on_standard_output(monkeypatch, times, tmp_path):
    monkeypatch.setattr(parity.bench.train, "bench_train", lambda *_: times)
    done = invoke("--json", str(tmp_path / "times.json"))
    assert done.exit_code == 0 and "torch compiled" in done.stdout
    assert json.loads((tmp_path / "times.json").read_text())["schema"] == 1


def test_there_is_a_bound_on_the_losses_of_every_dtype():
    assert tuple(LOSSES) == DTYPES
