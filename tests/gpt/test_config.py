"""One config text for both twins; sizes that cannot be built are refused, all problems at once."""

import dataclasses
import filecmp
import re

import pytest
import transformers

import flax_gpt.config
import flax_gpt.training.config
import torch_gpt.config
import torch_gpt.training.config

NAN, INF = float("nan"), float("inf")

# Layers and widths of "Language models are unsupervised multitask learners", 2019, table 2.
PUBLISHED = {
    "gpt2": (12, 768),
    "gpt2-medium": (24, 1024),
    "gpt2-large": (36, 1280),
    "gpt2-xl": (48, 1600),
}

PROBLEMS = [
    (dict(vocab_size=0), "vocab_size is 0, it must be an integer of at least 1"),
    (dict(context_length=-3), "context_length is -3, it must be an integer of at least 1"),
    (dict(embed_dim=1.5), "embed_dim is 1.5, it must be an integer of at least 1"),
    (dict(num_layers="2"), "num_layers is '2', it must be an integer of at least 1"),
    (dict(num_heads=None), "num_heads is None, it must be an integer of at least 1"),
    (dict(mlp_dim=0), "mlp_dim is 0, it must be an integer of at least 1"),
    (dict(embed_dim=15, num_heads=7), "embed_dim 15 does not divide into 7 heads"),
    (dict(dropout=1.0), "dropout is 1.0, it must be in [0, 1)"),
    (dict(dropout=-0.1), "dropout is -0.1, it must be in [0, 1)"),
    (dict(dropout=NAN), "dropout is nan, it must be in [0, 1)"),
    (dict(norm_epsilon=0.0), "norm_epsilon is 0.0, it must be positive"),
    (dict(norm_epsilon=NAN), "norm_epsilon is nan, it must be positive"),
    (dict(init_std=-0.02), "init_std is -0.02, it must be positive"),
    (
        dict(dtype="float8"),
        "dtype is 'float8', it must be one of float64, float32, bfloat16, float16",
    ),
]

TRAIN_PROBLEMS = [
    (dict(beta1=1.0), "beta1 is 1.0, it must be in (0, 1)"),
    (dict(beta2=0.0), "beta2 is 0.0, it must be in (0, 1)"),
    (dict(beta2=NAN), "beta2 is nan, it must be in (0, 1)"),
    (dict(learning_rate=0.0), "learning_rate is 0.0, it must be positive and finite"),
    (dict(learning_rate=INF), "learning_rate is inf, it must be positive and finite"),
    (dict(learning_rate=NAN), "learning_rate is nan, it must be positive and finite"),
    (dict(epsilon=-1e-8), "epsilon is -1e-08, it must be positive and finite"),
    (dict(epsilon=INF), "epsilon is inf, it must be positive and finite"),
    (dict(schedule="step"), "schedule is 'step', it must be one of constant, linear, cosine"),
    (dict(schedule="linear"), "schedule linear has no total_steps, it must have an end"),
    (dict(schedule="cosine"), "schedule cosine has no total_steps, it must have an end"),
    (dict(warmup_steps=-1), "warmup_steps is -1, it must not be negative"),
    (dict(total_steps=0), "total_steps is 0, it must be more than the 0 of the warm-up"),
    (
        dict(schedule="cosine", warmup_steps=7, total_steps=7),
        "total_steps is 7, it must be more than the 7 of the warm-up",
    ),
    (dict(final_fraction=-0.1), "final_fraction is -0.1, it must be in [0, 1]"),
    (dict(final_fraction=1.5), "final_fraction is 1.5, it must be in [0, 1]"),
    (dict(final_fraction=NAN), "final_fraction is nan, it must be in [0, 1]"),
    (dict(weight_decay=-0.1), "weight_decay is -0.1, it must not be negative"),
    (dict(weight_decay=NAN), "weight_decay is nan, it must not be negative"),
    (dict(clip_norm=0.0), "clip_norm is 0.0, it must be positive or None"),
    (dict(clip_norm=NAN), "clip_norm is nan, it must be positive or None"),
    (dict(label_smoothing=1.0), "label_smoothing is 1.0, it must be in [0, 1)"),
    (dict(label_smoothing=-0.1), "label_smoothing is -0.1, it must be in [0, 1)"),
    (
        dict(accumulation_steps=0),
        "accumulation_steps is 0, it must be an integer of at least 1",
    ),
    (
        dict(accumulation_steps=2.0),
        "accumulation_steps is 2.0, it must be an integer of at least 1",
    ),
    (
        dict(compute_dtype="float32"),
        "compute_dtype is 'float32', it must be bfloat16, float16 or None",
    ),
]

# The far end of every range, which is inside.
TRAININGS = [
    dict(warmup_steps=3),
    dict(total_steps=1),
    dict(schedule="linear", warmup_steps=3, total_steps=4, final_fraction=0.0),
    dict(schedule="cosine", total_steps=1, final_fraction=1.0),
    dict(weight_decay=0.0, clip_norm=None, label_smoothing=0.0, accumulation_steps=1),
    dict(clip_norm=INF, label_smoothing=0.99, accumulation_steps=7),
    dict(compute_dtype="bfloat16"),
    dict(compute_dtype="float16"),
]

SAMPLING_PROBLEMS = [
    (dict(temperature=-0.1), "temperature is -0.1, it must be finite and not negative"),
    (dict(temperature=INF), "temperature is inf, it must be finite and not negative"),
    (dict(temperature=NAN), "temperature is nan, it must be finite and not negative"),
    (dict(top_k=0), "top_k is 0, it must be an integer of at least 1 or None"),
    (dict(top_k=2.0), "top_k is 2.0, it must be an integer of at least 1 or None"),
    (dict(top_p=0.0), "top_p is 0.0, it must be in (0, 1]"),
    (dict(top_p=1.1), "top_p is 1.1, it must be in (0, 1]"),
    (dict(top_p=NAN), "top_p is nan, it must be in (0, 1]"),
    (dict(min_p=-0.1), "min_p is -0.1, it must be in [0, 1]"),
    (dict(min_p=1.1), "min_p is 1.1, it must be in [0, 1]"),
    (dict(min_p=NAN), "min_p is nan, it must be in [0, 1]"),
]


def exactly(message: str) -> str:
    """A pattern for the whole of a message."""
    return f"^{re.escape(message)}$"


def test_the_config_files_are_the_same_bytes_in_both_packages():
    assert filecmp.cmp(flax_gpt.config.__file__, torch_gpt.config.__file__, shallow=False)
    ours, theirs = flax_gpt.training.config, torch_gpt.training.config
    assert filecmp.cmp(ours.__file__, theirs.__file__, shallow=False)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_published_sizes(gpt, name):
    config = gpt.package.GPTConfig.preset(name)
    assert (config.num_layers, config.embed_dim) == PUBLISHED[name]
    assert config.head_width == 64
    assert config.mlp_dim == 4 * config.embed_dim


def test_the_smallest_preset_is_the_one_that_hugging_face_ships(gpt):
    ours, theirs = gpt.package.GPTConfig.preset("gpt2"), transformers.GPT2Config()
    assert ours.vocab_size == theirs.vocab_size
    assert ours.context_length == theirs.n_positions
    assert (ours.num_layers, ours.embed_dim) == (theirs.n_layer, theirs.n_embd)
    assert ours.num_heads == theirs.n_head
    assert ours.norm_epsilon == theirs.layer_norm_epsilon
    assert ours.init_std == theirs.initializer_range


def test_every_preset_can_be_built(gpt):
    assert set(PUBLISHED) < set(gpt.package.PRESETS)
    for name in gpt.package.PRESETS:
        assert gpt.package.GPTConfig.preset(name).context_length >= 1


def test_a_preset_takes_changes(gpt):
    plain = gpt.package.GPTConfig.preset("gpt2")
    changed = gpt.package.GPTConfig.preset("gpt2", num_layers=5, dropout=0.1)
    assert changed == dataclasses.replace(plain, num_layers=5, dropout=0.1)
    assert changed != plain


def test_an_unknown_preset_is_refused_with_the_known_ones(gpt):
    message = f"GPTConfig: no preset 'gpt3'. Choose one of {', '.join(gpt.package.PRESETS)}."
    with pytest.raises(ValueError, match=exactly(message)):
        gpt.package.GPTConfig.preset("gpt3")


@pytest.mark.parametrize("changes, message", PROBLEMS)
def test_a_model_that_cannot_be_built_is_refused(gpt, changes, message):
    with pytest.raises(ValueError, match=exactly(f"GPTConfig: {message}.")):
        gpt.config(**changes)


def test_all_problems_of_a_model_are_in_one_message(gpt):
    message = (
        "GPTConfig: vocab_size is 0, it must be an integer of at least 1; "
        "mlp_dim is -1, it must be an integer of at least 1; "
        "dropout is 2.0, it must be in [0, 1); "
        "dtype is 'half', it must be one of float64, float32, bfloat16, float16."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        gpt.config(vocab_size=0, mlp_dim=-1, dropout=2.0, dtype="half")


@pytest.mark.parametrize("changes, message", TRAIN_PROBLEMS)
def test_a_training_that_cannot_run_is_refused(gpt, changes, message):
    with pytest.raises(ValueError, match=exactly(f"TrainConfig: {message}.")):
        gpt.package.TrainConfig(**changes)


def test_all_problems_of_a_training_are_in_one_message(gpt):
    message = (
        "TrainConfig: beta1 is 0.0, it must be in (0, 1); "
        "learning_rate is -1.0, it must be positive and finite; "
        "schedule linear has no total_steps, it must have an end; "
        "warmup_steps is -3, it must not be negative; "
        "final_fraction is 2.0, it must be in [0, 1]; "
        "weight_decay is -2.0, it must not be negative; "
        "clip_norm is -1.0, it must be positive or None; "
        "label_smoothing is 2.0, it must be in [0, 1); "
        "accumulation_steps is None, it must be an integer of at least 1; "
        "compute_dtype is 'half', it must be bfloat16, float16 or None."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        gpt.package.TrainConfig(
            beta1=0.0, learning_rate=-1.0, schedule="linear", warmup_steps=-3, final_fraction=2.0,
            weight_decay=-2.0, clip_norm=-1.0, label_smoothing=2.0, accumulation_steps=None,
            compute_dtype="half",
        )  # fmt: skip


@pytest.mark.parametrize("changes", TRAININGS, ids=str)
def test_a_training_at_the_end_of_a_range_can_run(gpt, changes):
    assert gpt.package.TrainConfig(**changes) == gpt.package.TrainConfig(**changes)


@pytest.mark.parametrize("changes, message", SAMPLING_PROBLEMS)
def test_a_sampling_that_means_nothing_is_refused(gpt, changes, message):
    with pytest.raises(ValueError, match=exactly(f"Sampling: {message}.")):
        gpt.package.Sampling(**changes)


def test_all_problems_of_a_sampling_are_in_one_message(gpt):
    message = (
        "Sampling: temperature is -1.0, it must be finite and not negative; "
        "top_k is -3, it must be an integer of at least 1 or None; "
        "top_p is 2.0, it must be in (0, 1]; "
        "min_p is 2.0, it must be in [0, 1]."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        gpt.package.Sampling(temperature=-1.0, top_k=-3, top_p=2.0, min_p=2.0)


def test_a_sampling_keeps_all_tokens_unless_told_otherwise(gpt):
    plain = gpt.package.Sampling()
    assert plain == gpt.package.Sampling(temperature=1.0, top_k=None, top_p=1.0, min_p=0.0)
    assert gpt.package.Sampling(temperature=0.0, top_k=1, min_p=1.0).temperature == 0.0
    assert gpt.package.GREEDY == gpt.package.Sampling(temperature=0.0)
    # jax compiles once per sampling, so equal ones must look equal to it.
    assert hash(plain) == hash(gpt.package.Sampling()) != hash(gpt.package.GREEDY)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_a_dtype_by_name_is_one_of_the_config(gpt, dtype):
    assert gpt.config(dtype=dtype).dtype == dtype
    assert dtype in gpt.package.config.DTYPES and len(gpt.package.config.DTYPES) == 4


def test_configs_cannot_be_changed(gpt):
    for config in (gpt.config(), gpt.package.TrainConfig(), gpt.package.Sampling()):
        field = dataclasses.fields(config)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field, 3)


def test_the_heads_share_the_width_evenly(gpt):
    config = gpt.config(embed_dim=35, num_heads=5)
    assert config.head_width * config.num_heads == config.embed_dim
