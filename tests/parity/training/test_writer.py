"""Text from a run: the same from either twin, for every way of choosing."""

import numpy as np
import pytest

import flax_gpt
from flax_gpt import GREEDY, Sampling
from parity.pair.text import Corpus, decode
from parity.report.record import Verdict
from parity.system.devices import choose_devices
from parity.training import Run, RunConfig, Trainers, Writer, train
from parity.twins.pair import preset_config

CPU = choose_devices("cpu")
SETTINGS = {
    "greedy": GREEDY,
    "0.8": Sampling(temperature=0.8),
    "top-k": Sampling(temperature=0.8, top_k=20),
    "top-p": Sampling(temperature=0.8, top_p=0.9),
    "min-p": Sampling(temperature=0.8, min_p=0.05),
}


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory) -> Run:
    """A short training of the tiny preset, on both twins."""
    from flax_gpt import TrainConfig

    config = RunConfig.of(
        corpus,
        model=preset_config(corpus, "tiny"),
        training=TrainConfig(learning_rate=3e-3),
        rows=8,
        width=64,
        seed=0,
    )
    run = Run.start(tmp_path_factory.mktemp("runs") / "run", config)
    train(run, corpus, Trainers(config, CPU), 40)
    return run


@pytest.fixture(scope="module")
def writer(run) -> Writer:
    return Writer(run, CPU)


@pytest.mark.parametrize("name", SETTINGS)
def test_both_twins_write_the_same_text_for_20_seeds(name, writer):
    texts = set()
    for seed in range(20):
        written = writer.write("The ", 24, SETTINGS[name], seed)
        assert written.verdict is Verdict.PASS, written.note
        assert len(set(written.texts.values())) == 1
        texts |= set(written.texts.values())
    assert len(texts) == (1 if name == "greedy" else 20)


def test_the_cache_does_not_change_the_text(writer):
    cached, uncached = (
        writer.write("def ", 16, SETTINGS["top-p"], 5, use_cache=x) for x in (True, False)
    )
    assert cached.texts == uncached.texts


def test_it_writes_with_the_weights_that_were_trained(run, writer, corpus):
    trainers = Trainers(run.config, CPU)
    trainers.restore(run.load()[1])
    prompt = corpus.windows(1, 6, 9)
    expected = flax_gpt.generate(trainers.by_framework["flax"].model, prompt, 12)
    written = writer.write(decode(corpus.vocabulary, prompt[0]), 12)
    assert written.texts["flax"] == decode(corpus.vocabulary, np.asarray(expected.tokens_BG)[0])
    margins = np.asarray(expected.margins_BG)[0]
    assert written.smallest_at == int(np.argmin(margins)) + 1
    assert written.smallest_margin == float(margins.min())


def test_one_twin_can_write_alone(run):
    alone = Writer(run, CPU, ("torch",)).write("The ", 8)
    both = Writer(run, CPU).write("The ", 8)
    assert alone.texts["torch"] == both.texts["flax"] and set(alone.texts) == {"torch"}


def test_texts_that_diverge_are_a_failure_unless_rounding_explains_it(writer):
    rows = {"flax": np.array([1, 2, 3], np.int32), "torch": np.array([1, 5, 6], np.int32)}
    wide = {name: np.array([1.0, 0.5, 1.0]) for name in rows}
    thin = {name: np.array([1.0, 0.0, 1.0]) for name in rows}
    prompt = np.array([7, 8], np.int32)
    verdict, note = writer._compare(prompt, rows, wide, 0.0)
    assert verdict is Verdict.FAIL and note.startswith(
        "the texts diverge at token 2, margin 5.0e-01"
    )
    assert writer._compare(prompt, rows, thin, 0.0)[0] is Verdict.TIE
    # The noise of a draw errs by more than the logits of equal weights.
    noisy = {name: np.array([1.0, 5e-6, 1.0]) for name in rows}
    assert writer._compare(prompt, rows, noisy, 0.8)[0] is Verdict.TIE


def test_a_prompt_of_unknown_characters_is_refused_with_those_that_are_known(writer):
    with pytest.raises(ValueError, match=r"prompt: '☃' unknown\. A prompt is characters of"):
        writer.write("snow ☃", 8)
    with pytest.raises(ValueError, match="prompt: an empty prompt"):
        writer.write("", 8)


def test_more_tokens_than_the_context_holds_are_refused(writer):
    with pytest.raises(ValueError, match="ask for at most 380"):
        writer.write("The ", 381)


def test_a_run_without_a_checkpoint_has_nothing_to_write_with(run, tmp_path):
    empty = Run.start(tmp_path / "empty", run.config)
    with pytest.raises(ValueError, match="no checkpoint in it"):
        Writer(empty, CPU)


def test_a_run_of_one_twin_can_be_written_from_by_the_other(corpus, tmp_path):
    small = Corpus.from_text("the quick brown fox jumps over the lazy dog\n" * 30, "a fox")
    from flax_gpt import GPTConfig, TrainConfig

    model = GPTConfig(
        vocab_size=len(small.vocabulary), context_length=32, embed_dim=20, num_layers=1,
        num_heads=4, mlp_dim=28,
    )  # fmt: skip
    for name in ("flax", "torch"):
        config = RunConfig.of(
            small,
            model=model,
            training=TrainConfig(),
            rows=2,
            width=8,
            seed=0,
            frameworks=(name,),
        )
        run = Run.start(tmp_path / name, config)
        train(run, small, Trainers(config, CPU), 2)
        written = Writer(run, CPU).write("the ", 6)
        assert written.verdict is Verdict.PASS and set(written.texts) == {"flax", "torch"}
