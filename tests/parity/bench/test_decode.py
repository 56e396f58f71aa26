"""The bench of decoding: what it compares before it times, what it counts, what it says."""

import dataclasses
import functools
import importlib.util
import json
import math
import re
import statistics
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import flax_gpt
import parity.bench.decode
import parity.bench.entry
import parity.bench.machine
import torch_gpt
from parity import cli
from parity.bench.agreement import LOGITS, Reference
from parity.bench.decode import DecodeOptions, bench_decode
from parity.bench.decoders.protocol import TimedTokens
from parity.bench.decoders.twins import Uncached
from parity.bench.machine import Bandwidth, Compilations, MemoryGrowth
from parity.bench.names import DECODERS, DTYPES
from parity.bench.pairs import StepPairs, pair_steps
from parity.bench.plots import draw
from parity.bench.ratios import HANDLE, ratios
from parity.bench.result import Agreement, DecodeBench, DecodeCell, Decoding, to_json
from parity.bench.roofline import BytesMoved
from parity.bench.scaling import fit_exponent
from parity.bench.table import markdown, tables, terminal
from parity.frameworks.flax.leaves import flax_leaves
from parity.system.devices import choose_devices

SMALL = dict(vocab_size=61, embed_dim=12, num_layers=1, num_heads=3, mlp_dim=20)
TWINS = "flax step", "torch step"
# The project's targets for gpt2 on two CPU cores: the least and the most, in which cells, and at
# which contexts (None for all).
TARGETS = {
    "flax over transformers": (1.9, math.inf, "float32, batch 1", None),
    "torch over transformers": (1.9, math.inf, "float32, batch 1", None),
    "torch step over flax step": (0.0, 1.15, "float32", None),
    "flax share of bandwidth": (0.65, math.inf, "float32, batch 1", {512, 2048}),
    "torch share of bandwidth": (0.65, math.inf, "float32, batch 1", {512, 2048}),
    "flax over naive": (4.0, math.inf, "float32, batch 1", {2048}),
    HANDLE: (0.0, 1.05, "float32, batch 1", None),
    "flax over ctranslate2": (1.2, math.inf, "float32, batch 1", None),
    "cache-shaped copies": (0, 0, "", None),
    "programs after warm-up": (0, 0, "", None),
    "flax step compile s": (0.0, 5.0, "float32", None),
    "batch 8 over batch 1": (3.5, math.inf, "float32", None),
    "batch 16 over batch 1": (4.5, math.inf, "float32", None),
    "8192 slots over 256, flax": (0.0, 1.1, "", None),
    "8192 slots over 256, torch": (0.0, 1.1, "", None),
}
CONTEXTS = 13, 16, 20  # whose prompts have one program
INSTALLED = {
    name: importlib.util.find_spec(name.split()[0]) is not None
    for name in ("transformers", "transformers static", "ctranslate2")
}


@pytest.fixture(scope="module", autouse=True)
def small_caches() -> Iterator[None]:
    """A large cache that is small, prompts that are read once, and no search for garbage."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(parity.bench.decode, "CAPACITIES", (256, 512))
        monkeypatch.setattr(parity.bench.decode, "VALID", 9)
        monkeypatch.setattr(parity.bench.entry, "PREFILLS", 1)
        monkeypatch.setattr(parity.bench.machine, "BANDWIDTH_BYTES", 1 << 16)
        monkeypatch.setattr(parity.bench.machine, "hand_back_freed_memory", lambda: None)
        yield


def bench(progress=lambda phase, done: None, **options) -> DecodeBench:
    config = flax_gpt.GPTConfig.preset("tiny", **SMALL)
    given = dict(preset="tiny", config=config, contexts=CONTEXTS[:1], num_steps=4, rounds=1)
    return bench_decode(DecodeOptions(**(given | options)), choose_devices("cpu"), progress)


@pytest.fixture(scope="module")
def times() -> DecodeBench:
    """Every contender, one row, as many contexts as a fit needs."""
    return bench(contexts=CONTEXTS, rounds=2)


def printed(value) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(value)
    return capture.get()


def test_every_decoder_is_timed_in_every_cell_and_the_json_says_on_what(times):
    document = json.loads(to_json(times))
    assert (document["schema"], document["bench"], document["preset"]) == (1, "decode", "tiny")
    assert {"jax", "torch", "devices", "threads", "cores", "load_before", "load_after"} <= set(
        document["environment"]
    )
    assert [cell["context"] for cell in document["cells"]] == list(CONTEXTS)
    for cell in document["cells"]:
        assert (cell["dtype"], cell["batch_size"]) == ("float32", 1)
        assert cell["prompt_length"] == cell["context"] - 4
        assert cell["agreement"]["gap"] <= cell["agreement"]["bound"] == LOGITS["float32"]
        assert cell["agreement"]["count"] == 5 * 61
        assert cell["cache_copies"] == 0
        assert {len(rates) for rates in cell["rates"].values()} == {2}
        assert [timing["name"] for timing in cell["timings"]] == list(DECODERS)
        for timing in cell["timings"]:
            if not INSTALLED.get(timing["name"], True):
                assert "step_s" not in timing and "[bench]" in timing["unavailable"]
                continue
            assert timing["unavailable"] is None
            seconds, rounds = timing["step_s"], timing["rounds_s"]
            assert len(rounds) == 2 and seconds == statistics.median(rounds)
            assert math.isclose(timing["spread"] * seconds, max(rounds) - min(rounds))
            assert math.isclose(timing["tokens_per_s"], 1 / seconds)
            assert (timing["compile_s"] is None) == (timing["framework"] != "flax")
            assert timing["programs_compiled_after_warm_up"] == 0
            uncached = timing["form"] == "uncached"
            assert ("bytes_per_s" not in timing) == uncached
            assert ("share_of_bandwidth" not in timing) == uncached
            assert timing["tokens_compared"] == (2 if uncached else 5)
            reads = {*TWINS, *INSTALLED}
            assert (timing["prefill_s"] is not None) == (timing["name"] in reads)
            assert timing["memory_bytes"] is None or timing["memory_bytes"] >= 0
    if INSTALLED["transformers"]:
        names = [timing["name"] for timing in document["cells"][0]["timings"]]
        itself = document["cells"][0]["timings"][names.index("transformers")]
        assert itself["speed_over_transformers"] == 1.0


def test_the_cache_is_accounted_for_by_layer_and_by_the_formula(times):
    config = times.config
    for cell in times.cells:
        assert cell.bytes_moved.config.num_layers == config.num_layers
        assert list(cell.cache_layers) == ["flax", "torch"]
        for layer in cell.cache_layers.values():
            slot = 2 * 1 * config.num_heads * config.head_width * 4
            assert layer["allocated"] == layer["capacity"] * slot
            assert layer["valid"] == cell.prompt_length * slot
            assert layer["valid"] <= layer["read"] <= layer["allocated"]


def test_the_bytes_of_a_step_are_those_of_the_weights_that_it_reads():
    config = flax_gpt.GPTConfig.preset("tiny", **SMALL)
    model = flax_gpt.GPT(config)
    leaves = flax_leaves(model)
    table = leaves.pop("position_embedding.embedding")
    rows = 3 * 2 * config.embed_dim * table.itemsize  # looked up: a token and its position each
    moved = BytesMoved(config, 3, 4)
    assert moved.weights == sum(leaf.nbytes for leaf in leaves.values()) + rows
    for package in (flax_gpt, torch_gpt):
        cache = package.KVCache.empty(config, 3, 7)
        assert moved.cache(7) == cache.num_bytes.allocated
    assert moved.per_step(7) == moved.weights + moved.cache(7)


def test_a_table_per_cell_then_ratios_exponents_and_what_ran(times):
    table = printed(terminal(times))
    for context in CONTEXTS:
        assert f"float32, batch 1, context {context}" in table
    for name in DECODERS:
        assert f"\n {name} " in table
        if INSTALLED.get(name, True):
            assert f"\n{name}: " in table
    assert "flax cache: 1 x " in table and "num_bytes confirms" in table
    assert "512 slots over 256, flax" in table and "programs after warm-up" in table
    assert re.search(r"flax uncached +-?\d\.\d\d \(-?\d", table)
    assert "affine in the context" in table and "Student's t" in table and "cores, load" in table


def test_one_context_has_no_exponents_and_the_table_says_so():
    few = bench(names=TWINS)
    assert few.complexity and all(fit.exponent is None for fit in few.complexity)
    assert "no exponents are fitted: they need 3 contexts" in printed(terminal(few))
    assert json.loads(to_json(few))["complexity"][0]["exponent"] is None


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_a_power_law_is_found_and_noise_widens_its_interval(power):
    rng = np.random.default_rng(1)
    contexts = [128, 256, 512, 1024, 2048]
    exact = fit_exponent([(x, 3.0 * x**power) for x in contexts])
    assert exact.low <= exact.value <= exact.high
    assert math.isclose(exact.value, power, abs_tol=1e-9) and exact.high - exact.low < 1e-6
    assert math.isclose(exact.cost(512), 3.0 * 512**power)
    widths = []
    for noise in (0.01, 0.1):
        points = [
            (x, 3.0 * x**power * math.exp(noise * rng.standard_normal()))
            for x in contexts
            for _ in range(5)
        ]
        found = fit_exponent(points)
        assert found.low < power < found.high
        widths.append(found.high - found.low)
    assert widths[1] > 3 * widths[0]


def test_the_interval_holds_the_power_in_about_95_of_100_cases(rng):
    held = 0
    for _ in range(400):
        points = [(x, x * math.exp(0.2 * rng.standard_normal())) for x in (1, 2, 4, 8, 16)]
        found = fit_exponent(points)
        held += found.low <= 1.0 <= found.high
    assert 0.92 * 400 <= held <= 0.98 * 400


def test_what_is_affine_lies_between_two_powers_and_two_contexts_are_too_few():
    affine = fit_exponent([(x, 1000.0 + x) for x in (128, 512, 2048)])
    assert 0.0 < affine.value < 1.0 and affine.high - affine.low > 0.1
    assert fit_exponent([(128, 1.0), (512, 2.0), (512, 2.1)]) is None


def reference(noise: float = 0.1) -> Reference:
    """Two rows that write 1 2 0, of which the second token is a close call."""
    logits = [np.array([[0.0, 5.0, 1.0]] * 2), np.array([[0.0, 2.9, 3.0]] * 2)]
    logits.append(np.array([[9.0, 0.0, 1.0]] * 2))
    return Reference(np.array([[1, 2, 0], [1, 2, 0]]), logits, noise, "a cell")


def test_a_token_between_two_equal_logits_is_a_tie_and_ends_the_comparison_of_its_row():
    assert reference().compare("peer", np.array([[1, 2, 0], [1, 2, 0]])) == ()
    assert reference().compare("peer", np.array([[1], [1]])) == ()
    (tie,) = reference().compare("peer", np.array([[1, 2, 0], [1, 1, 2]]))
    assert (tie.row, tie.number) == (1, 1) and math.isclose(tie.gap, 0.1)


@pytest.mark.parametrize(
    ("tokens", "noise", "message"),
    [
        ([[1, 2, 0], [1, 1, 0]], 0.01, r"token 1 of row 1 in a cell: .* 2, peer 1, .* 1\.0e-01"),
        ([[1, 2, 0], [0, 2, 0]], 0.1, r"token 0 of row 1 in a cell: .* 1, peer 0, .* 5\.0e\+00"),
        ([[1, 1, 0], [1, 2, 1]], 0.1, r"token 2 of row 1 .* --without 'peer'"),
        ([[1, 1, 0], [1, 2, 0]], math.nan, r"token 1 of row 0"),
    ],
    ids=["no tie", "not the second choice", "behind a tie", "nan"],
)  # fmt: skip
def test_any_other_token_is_refused_with_who_and_where(tokens, noise, message):
    with pytest.raises(ValueError, match=f"^bench: {message}"):
        reference(noise).compare("peer", np.array(tokens))


class Slipping:
    """Writes the worst token once, from a round on."""

    def __init__(self, model, reader, rounds: int):
        self._decoder, self._reader, self._left = in_place(model, reader), reader, rounds

    def __getattr__(self, name):
        return getattr(self._decoder, name)

    def timed_steps(self, num_steps: int) -> TimedTokens:
        found = self._decoder.timed_steps(num_steps)
        self._left -= 1
        if self._left < 0:
            logits_V = next(self._reader.logits_along(found.tokens_BG))[0]
            found.tokens_BG[0, 0] = np.argmin(logits_V)
        return found


in_place = parity.bench.entry.torch_in_place


@pytest.mark.parametrize("rounds", [0, 2], ids=["before", "while timing"])
def test_a_decoder_that_writes_another_token_is_not_timed(monkeypatch, rounds):
    slipping = functools.partial(Slipping, rounds=rounds)
    monkeypatch.setattr(parity.bench.entry, "torch_in_place", slipping)
    message = r"bench: token 0 of row 0 in float32, batch 1, context 13: .* torch in place \d+, "
    with pytest.raises(ValueError, match=message):
        bench(names=(*TWINS, "torch in place"))


@pytest.mark.parametrize("error", [1e-3, math.nan])
def test_twins_that_diverge_while_they_write_are_not_timed(monkeypatch, error):
    step = torch_gpt.Decoder.advance

    def wrong(decoder, tokens_B, cache):
        logits_BV, cache = step(decoder, tokens_B, cache)
        return logits_BV + error * logits_BV.abs().max(), cache

    monkeypatch.setattr(torch_gpt.Decoder, "advance", wrong)
    monkeypatch.setattr(parity.bench.decode, "Bandwidth", lambda device: None)
    message = (
        r"bench: logits of flax and torch in float32, batch 1, context 13: (\d\.\de-0\d|nan) of "
        r"the largest apart > 1e-04\. Only twins .* `parity check`\."
    )
    with pytest.raises(ValueError, match=message):
        bench(names=("flax naive",))


def test_a_cache_that_counts_its_bytes_wrongly_is_not_timed(monkeypatch):
    wrong = property(lambda cache: torch_gpt.cache.CacheBytes(1, 1))
    monkeypatch.setattr(torch_gpt.KVCache, "num_bytes", wrong)
    with pytest.raises(ValueError, match=r"a cache of torch in .*: 1 bytes allocated and 1 valid"):
        bench(names=TWINS)


def test_what_lies_in_free_slots_is_garbage_when_the_clock_starts(monkeypatch):
    seen = []
    step = torch_gpt.Decoder.advance

    def watched(decoder, tokens_B, cache):
        length = int(cache.lengths_B.max())
        seen.extend(layer.keys_BKSH[:, :, length:].abs() for layer in cache.layers)
        return step(decoder, tokens_B, cache)

    monkeypatch.setattr(torch_gpt.Decoder, "advance", watched)
    bench(names=("torch step",))
    assert seen and all(float(slots.mean()) > 0.3 for slots in seen if slots.numel() > 100)
    assert any(slots.numel() > 100 for slots in seen)


def test_several_rows_in_bfloat16_are_compared_too_and_peers_say_what_they_cannot():
    wide = bench(batch_sizes=(2,), names=(*TWINS, "torch uncached", *INSTALLED), rounds=1)
    narrow = bench(
        batch_sizes=(2,), dtypes=("bfloat16",), names=(*TWINS, "transformers", "ctranslate2")
    )
    for times, dtype in ((wide, "float32"), (narrow, "bfloat16")):
        (cell,) = times.cells
        assert (cell.batch_size, cell.dtype) == (2, dtype)
        assert cell.bytes_moved.itemsize == (4 if dtype == "float32" else 2)
        for timing in cell.timings:
            ran = INSTALLED.get(timing.name, True)
            ran &= (timing.name, dtype) != ("ctranslate2", "bfloat16")
            assert bool(timing.rounds_s) == ran, timing
            if ran:
                assert timing.tokens_compared == (4 if timing.form == "uncached" else 10)
    if INSTALLED["ctranslate2"]:
        assert "ctranslate2: is measured in float32 on a CPU only" in printed(terminal(narrow))


def test_peers_that_are_not_installed_are_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = bench(names=(*TWINS, "transformers", "ctranslate2"))
    (cell,) = found.cells
    assert [x.name for x in cell.timings if x.rounds_s] == list(TWINS)
    assert cell.speed("flax step", "transformers") is None
    for name in ("transformers", "ctranslate2"):
        line = f"\n{name}: {name} is not installed; pip install 'parity-gpt[bench]'"
        assert line in printed(terminal(found))


def test_a_slow_decoder_sits_out_later_rounds_and_ratios_take_the_shared_ones(monkeypatch):
    monkeypatch.setattr(parity.bench.decode, "ALL_ROUNDS_S", 0.05)
    monkeypatch.setattr(parity.bench.decode, "MIN_ROUNDS", 1)
    timed_steps = Uncached.timed_steps

    def slow(decoder, num_steps: int) -> TimedTokens:
        time.sleep(0.06)
        return timed_steps(decoder, num_steps)

    monkeypatch.setattr(Uncached, "timed_steps", slow)
    (cell,) = bench(names=("torch step", "torch uncached"), rounds=3).cells
    assert [len(x.rounds_s) for x in cell.timings] == [3, 1]
    assert cell.speed("torch step", "torch uncached") > 0


def cell_of(rows: int = 1, context: int = 2048, **rounds_s: tuple[float, ...]) -> DecodeCell:
    """A cell with these times, on a machine that reads 1e9, 5e8 and 2.5e8 bytes per second."""
    config = flax_gpt.GPTConfig.preset("gpt2")
    return DecodeCell(
        dtype="float32",
        batch_size=rows,
        context=context,
        prompt_length=context - 1,
        bytes_moved=BytesMoved(config, rows, 4),
        agreement=Agreement(0.0, 1e-4, 0.0, 1, 1),
        cache_layers={},
        timings=tuple(
            Decoding(
                name=name.replace("_", " "),
                compile_s=1.5 if name == "flax_step" else None,
                steps_per_round=1,
                rounds_s=seconds,
            )
            for name, seconds in rounds_s.items()
        ),
        rates={"sum": (5e8, 5e8, 1e8), "matvec": (1e9, 2e8, 2.5e8)},
    )


def outcome(*cells: DecodeCell, pairs: tuple[StepPairs, ...] = ()) -> DecodeBench:
    environment = dict(load_before=0.1, load_after=0.2, devices="cpu", cores=2, threads=2)
    return DecodeBench(
        environment=environment, preset="gpt2", config=flax_gpt.GPTConfig.preset("gpt2"), seed=0,
        cells=cells, capacity=pairs, ratios=ratios(cells, pairs), complexity=(),
    )  # fmt: skip


def test_shares_and_speeds_are_taken_round_by_round():
    cell = cell_of(flax_step=(1.0, 2.0, 4.0), transformers=(2.0, 4.0, 8.0), flax_naive=(6.0, 12.0))
    assert cell.speed("flax step", "transformers") == 2.0
    assert cell.speed("flax step", "flax naive") == 6.0
    num_bytes = cell.bytes_moved.per_step(2047)
    share = cell.numbers(cell.get("flax step"))["share_of_bandwidth"]
    assert math.isclose(share, num_bytes / 1e9)


def test_ratios_sum_up_cells_batches_and_pairs_and_some_have_targets():
    cells = [
        cell_of(flax_step=(1.0,) * 3, torch_step=(1.2,) * 3, transformers=(2.0,) * 3,
                flax_naive=(5.0,) * 3, ctranslate2=(1.1,) * 3),
        cell_of(8, flax_step=(2.0,) * 3, torch_step=(3.2,) * 3),
        cell_of(context=128, flax_step=(1.0,) * 3, flax_naive=(2.0,) * 3),
    ]  # fmt: skip
    pairs = StepPairs("8192 slots over 256, torch", 128, {}, 1.05)
    cells[0] = dataclasses.replace(cells[0], handle=StepPairs(HANDLE, 2048, {}, 1.02))
    found = outcome(*cells, pairs=(pairs,))
    numbers = {(x.name, x.cell, x.context): round(x.found, 3) for x in found.ratios}
    one, eight = "float32, batch 1", "float32, batch 8"
    assert numbers["flax over transformers", one, 2048] == 2.0
    assert numbers["torch over transformers", one, 2048] == 1.667
    assert numbers["torch step over flax step", one, 2048] == 1.2
    assert numbers["torch step over flax step", eight, 2048] == 1.6
    assert numbers["flax over naive", one, 2048] == 5.0
    assert numbers["flax over naive", one, 128] == 2.0
    assert numbers[HANDLE, one, 2048] == 1.02
    assert numbers["flax over ctranslate2", one, 2048] == 1.1
    assert numbers["batch 8 over batch 1", "flax, float32", 2048] == 4.0
    assert numbers["batch 8 over batch 1", "torch, float32", 2048] == 3.0
    assert numbers["8192 slots over 256, torch", one, 128] == 1.05
    assert numbers["flax step compile s", one, 2048] == 1.5
    missed = {(name, cell) for name, cell, _ in targets_missed(json.loads(to_json(found)))}
    assert missed == {
        ("torch over transformers", one),
        ("torch step over flax step", one),
        ("torch step over flax step", eight),
        ("flax over ctranslate2", one),
        ("batch 8 over batch 1", "torch, float32"),
    }
    assert re.search(r"flax over naive +5 2 +2048 128 +float32, batch 1", printed(terminal(found)))
    assert "| flax over naive | 5 2 | 2048 128 | float32, batch 1 |" in markdown(found)


def targets_missed(document: dict) -> set[tuple[str, str, int]]:
    """Name, cell and context of the ratios of a bench that miss their targets."""
    missed = set()
    for ratio in document["ratios"]:
        name, cell, context = ratio["name"], ratio["cell"], ratio["context"]
        least, most, where, contexts = TARGETS.get(name, (-math.inf, math.inf, "", None))
        # The names of cells end with their batch or with the dtype.
        holds = cell.startswith(f"{where},") or cell.endswith(where)
        holds &= contexts is None or context in contexts
        if holds and not least <= ratio["found"] <= most:
            missed.add((name, cell, context))
    return missed


class Ticking:
    """Steps that take given times, on a clock that only they move."""

    def __init__(self, clock, seconds):
        self.clock, self.seconds, self.waited = clock, seconds, []

    def start(self):
        return 0

    def advance(self, state):
        self.clock.append(self.clock[-1] + self.seconds(state))
        return state + 1

    def wait(self, state):
        self.waited.append(state)


def test_two_step_in_turns_each_from_its_own_state_and_drift_cancels(monkeypatch):
    clock, drift = [0.0], lambda: 1.0 + clock[-1] / 50  # ever slower
    one, other = (Ticking(clock, lambda state, k=k: k * drift()) for k in (1.1, 1.0))
    both = {"a": one, "b": other}
    monkeypatch.setattr(time, "perf_counter", lambda: clock[-1])
    pairs = pair_steps("it", 7, both, rounds=2, num_steps=20)
    assert (pairs.name, pairs.context) == ("it", 7)
    assert [len(times) for times in pairs.seconds.values()] == [40, 40]
    assert one.waited == other.waited == 2 * [*range(1, 21)]
    assert pairs.seconds["a"][-1] > 2 * pairs.seconds["a"][0]
    assert abs(pairs.ratio - 1.1) < 0.005


def test_the_handle_is_paired_with_steps_in_place_where_both_are_timed(times):
    for cell in times.cells:
        assert list(cell.handle.seconds) == ["torch step", "torch in place"]
        for times_s in cell.handle.seconds.values():
            assert len(times_s) == 2 * cell.get("torch step").steps_per_round
            assert all(seconds > 0 for seconds in times_s)
    assert all(cell.handle is None for cell in bench(names=TWINS, contexts=CONTEXTS[:1]).cells)


def test_the_plots_are_drawn(times, tmp_path):
    paths = draw(times, tmp_path)
    assert [path.name for path in paths] == [
        "tokens_per_second.png", "cached_against_uncached.png",
    ]  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    single = dataclasses.replace(times, cells=times.cells[:1], complexity=())
    assert len(draw(single, tmp_path)) == 1


def test_growth_of_memory_is_seen_where_it_can_be():
    with MemoryGrowth(torch.device("cpu")) as memory:
        held = np.ones(1 << 22)
        time.sleep(0.02)
    assert memory.num_bytes is None or held.nbytes * 0.9 < memory.num_bytes < held.nbytes * 3
    unknown = MemoryGrowth(torch.device("cpu"))
    unknown._in_use = lambda: None
    with unknown:
        pass
    assert unknown.num_bytes is None


def test_programs_are_counted_when_they_are_compiled_and_not_when_they_run():
    double = jax.jit(lambda x: x * 2.0)
    x = jnp.ones(3)
    with Compilations() as first:
        double(x)
    with Compilations() as second:
        double(x)
    assert (first.count, second.count) == (1, 0)
    assert 0.0 < first.seconds < 10.0 and second.seconds == 0.0


def test_the_read_bandwidth_has_a_rate_for_every_program():
    rates = Bandwidth(torch.device("cpu")).rates()
    assert list(rates) == ["torch sum", "XLA sum", "XLA matvec"]
    assert all(1e6 < rate < 1e13 for rate in rates.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(names=("flax setp",)), r"there is no decoder 'flax setp'"),
        (dict(names=()), "nothing is left to time"),
        (dict(dtypes=("float16",)), "there is no dtype 'float16'"),
        (dict(contexts=(5, 30)), "context 5 with 4 tokens of a round: at least 2 must be left"),
        (dict(batch_sizes=(0,)), "rows, rounds and tokens of a round are at least 1"),
    ],
)
def test_what_cannot_be_decoded_is_refused_before_anything_is_built(options, message):
    with pytest.raises(ValueError, match=rf"^bench: {message}"):
        bench(**options)


def invoke(*arguments: str):
    return CliRunner().invoke(cli.app, ["bench", *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "float16"], "--dtype float16: there are float32, bfloat16"),
        (["--batch", "1,x"], "--batch 1,x: it takes whole numbers of at least 1"),
        (["--context", "0"], "--context 0: it takes whole numbers"),
        (["--only", "flax"], "--only flax: there are flax step, flax loop"),
        (["--without", "jax"], "--without jax: there are flax step"),
        (["--json", "no/folder/out.json"], "--json no/folder/out.json: no folder no/folder"),
        (["--preset", "huge"], "no preset 'huge'. Choose one of tiny, gpt2"),
        (["--context", "32"], "context 32 with 32 tokens of a round"),
        (["--device", "tpu"], "--device tpu: there are auto, cpu and cuda"),
    ],
)
def test_bad_input_exits_2_with_one_line(arguments, message):
    done = invoke(*arguments)
    assert done.exit_code == 2 and done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("parity: ")]
    assert len(lines) == 1 and message in lines[0]


def test_the_command_times_draws_and_writes_json_and_markdown(monkeypatch, times, tmp_path):
    asked = []

    def stand_in(options, devices, progress, on_cell):
        asked.append(options)
        for cell in times.cells:
            on_cell(cell)
        return times

    monkeypatch.setattr(parity.bench.decode, "bench_decode", stand_in)
    done = invoke(
        "--batch", "1,8,1", "--context", "128", "--tokens", "8", "--rounds", "2",
        "--without", "ctranslate2, flax loop", "--json", "-", "--png", str(tmp_path / "out"),
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["bench"] == "decode" and done.stdout.count("\n") == 1
    assert "torch in place" in done.stderr and len(list((tmp_path / "out").iterdir())) == 2
    (options,) = asked
    assert options.preset == "gpt2" and options.batch_sizes == (1, 8)
    assert options.contexts == (128,) and options.num_steps == 8 and options.rounds == 2
    assert set(DECODERS) - set(options.names) == {"ctranslate2", "flax loop"}
    files = tmp_path / "times.json", tmp_path / "times.md"
    done = invoke("--json", str(files[0]), "--markdown", str(files[1]))
    assert done.exit_code == 0 and "torch in place" in done.stdout
    assert json.loads(files[0].read_text())["schema"] == 1
    assert "| flax step |" in files[1].read_text()
    # Each cell once: as it is measured, and not with the rest again.
    assert done.stdout.count("bandwidth in GB/s") == len(times.cells)
    assert invoke("--quick").exit_code == 0
    quick = asked[-1]
    assert quick.contexts == (128,) and quick.rounds == 3 and not quick.large_cache
    assert {"flax step", "torch step", "transformers"} <= set(quick.names)
    assert not any("uncached" in name for name in quick.names)


def test_the_tables_fit_80_columns(times):
    console = Console(width=80)
    for table in tables(times):
        with console.capture() as capture:
            console.print(table)
        assert "…" not in capture.get()


def test_there_is_a_bound_on_the_logits_of_every_dtype():
    assert tuple(LOGITS) == DTYPES


def test_progress_is_called_with_the_phases_that_were_announced():
    calls = []
    bench(names=TWINS, contexts=(13,), progress=lambda phase, done: calls.append((phase, done)))
    config = flax_gpt.GPTConfig.preset("tiny")
    announced = DecodeOptions(preset="tiny", config=config, contexts=(13,), num_steps=4).phases()
    assert list(dict.fromkeys(phase for phase, _ in calls)) == list(announced)
    assert all(0.0 <= done <= 1.0 for _, done in calls)
