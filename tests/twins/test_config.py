"""One config text for both twins; sizes that cannot be built are refused, all problems at once."""

import dataclasses
import filecmp
import re

import pytest
import transformers

import flax_gpt.config
import torch_gpt.config

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
    (dict(dropout=float("nan")), "dropout is nan, it must be in [0, 1)"),
    (dict(norm_epsilon=0.0), "norm_epsilon is 0.0, it must be positive"),
    (dict(norm_epsilon=float("nan")), "norm_epsilon is nan, it must be positive"),
    (dict(init_std=-0.02), "init_std is -0.02, it must be positive"),
    (dict(dtype="float16"), "dtype is 'float16', it must be one of float32, float64"),
]

TRAIN_PROBLEMS = [
    (dict(beta1=1.0), "beta1 is 1.0, it must be in (0, 1)"),
    (dict(beta2=0.0), "beta2 is 0.0, it must be in (0, 1)"),
    (dict(beta2=float("nan")), "beta2 is nan, it must be in (0, 1)"),
    (dict(learning_rate=0.0), "learning_rate is 0.0, it must be positive"),
    (dict(epsilon=-1e-8), "epsilon is -1e-08, it must be positive"),
    (dict(weight_decay=-0.1), "weight_decay is -0.1, it must not be negative"),
]


def exactly(message: str) -> str:
    """A pattern for the whole of a message."""
    return f"^{re.escape(message)}$"


def test_the_config_file_is_the_same_bytes_in_both_packages():
    assert filecmp.cmp(flax_gpt.config.__file__, torch_gpt.config.__file__, shallow=False)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_published_sizes(gpt, name):
    config = gpt.package.GPTConfig.preset(name)
    assert (config.num_layers, config.embed_dim) == PUBLISHED[name]
    assert config.head_dim == 64
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
        "dtype is 'half', it must be one of float32, float64."
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
        "learning_rate is -1.0, it must be positive; "
        "weight_decay is -2.0, it must not be negative."
    )
    with pytest.raises(ValueError, match=exactly(message)):
        gpt.package.TrainConfig(beta1=0.0, learning_rate=-1.0, weight_decay=-2.0)


def test_configs_cannot_be_changed(gpt):
    for config in (gpt.config(), gpt.package.TrainConfig()):
        field = dataclasses.fields(config)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field, 3)


def test_the_heads_share_the_width_evenly(gpt):
    config = gpt.config(embed_dim=35, num_heads=5)
    assert config.head_dim * config.num_heads == config.embed_dim
