"""Folders as people leave them are the same model, with a line that says what was done."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from parity.checkpoints import Checkpoint, open_checkpoint
from tests.parity.checkpoints.library import theirs

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama") / "checkpoint"
    theirs("llama").save_pretrained(path)
    return path


def changed(folder, tmp_path, change):
    """The folder with other tensors."""
    shutil.copytree(folder, tmp_path / "other")
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, tmp_path / "other/model.safetensors")
    return tmp_path / "other"


def fused(tensors):
    made = dict(tensors)
    for name, apart in FUSED.items():
        for first in [x for x in tensors if f".{apart[0]}." in x]:
            parts = [made.pop(first.replace(apart[0], x)) for x in apart]
            made[first.replace(apart[0], name)] = np.concatenate(parts)
    return made


LEFT = {
    "compiled": (
        lambda x: {f"_orig_mod.{name}": value for name, value in x.items()},
        "_orig_mod: names that a wrapper adds",
    ),
    "compiled inside": (
        lambda x: {name.replace("layers.", "layers._orig_mod."): y for name, y in x.items()},
        "_orig_mod: names that a wrapper adds",
    ),
    "in parallel, twice": (
        lambda x: {f"module.module.{name}": value for name, value in x.items()},
        "module.module: names that a wrapper adds",
    ),
    "peft": (
        lambda x: {f"base_model.model.{name}": value for name, value in x.items()},
        "base_model.model: names that a wrapper adds",
    ),
    "a doubled prefix": (
        lambda x: {name.replace("model.", "model.model.", 1): y for name, y in x.items()},
        "model: names that a wrapper adds",
    ),
    "empty leftovers": (
        lambda x: x | {"model.layers.0._flat_param": np.zeros((0,), np.float32)},
        "model.layers.0._flat_param: empty, left aside",
    ),
    "a value head": (
        lambda x: x | {"v_head.summary.weight": np.ones((1, 42))},
        "v_head.summary.weight: a head beside",
    ),
    "a head of classes": (
        lambda x: x | {"score.weight": np.ones((3, 42))},
        "score.weight: a head beside",
    ),
    "fused": (fused, "self_attn.qkv_proj: self_attn.q_proj, self_attn.k_proj, self_attn.v_proj"),
}


@pytest.mark.parametrize("how", LEFT)
def test_leftovers_are_read_and_named(folder, tmp_path, how):
    change, note = LEFT[how]
    expected = dict(Checkpoint.open(folder).leaves())
    checkpoint = Checkpoint.open(changed(folder, tmp_path, change))
    assert any(note in x for x in checkpoint.notes), checkpoint.notes
    found = dict(checkpoint.leaves())
    assert sorted(found) == sorted(expected)
    for name, leaf in expected.items():
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)


def test_two_tensors_that_become_one_are_refused(folder, tmp_path):
    name = "model.norm.weight"
    other = changed(folder, tmp_path, lambda x: x | {f"_orig_mod.{name}": x[name]})
    with pytest.raises(ValueError, match="are one tensor"):
        Checkpoint.open(other)


def adapter(path, rank=2, alpha=3, **entries):
    """A folder of peft for two matrices."""
    path.mkdir()
    rng, made = np.random.default_rng(0), {}
    for name, inputs, outputs in (
        ("layers.0.self_attn.q_proj", 42, 120),
        ("layers.2.mlp.down_proj", 34, 42),
    ):
        start = f"base_model.model.model.{name}"
        made[f"{start}.lora_A.weight"] = rng.normal(size=(rank, inputs))
        made[f"{start}.lora_B.weight"] = rng.normal(size=(outputs, rank))
    save_file(made, path / "adapter_model.safetensors")
    document = dict(peft_type="LORA", r=rank, lora_alpha=alpha, bias="none") | entries
    (path / "adapter_config.json").write_text(json.dumps(document))
    return made


@pytest.mark.parametrize("rslora, scale", [(False, 1.5), (True, 3 / 2**0.5)])
def test_an_adapter_is_added_on_request(folder, tmp_path, rslora, scale):
    factors = adapter(tmp_path / "lora", use_rslora=rslora)
    plain = dict(Checkpoint.open(folder).leaves())
    merged = open_checkpoint(folder, adapter=tmp_path / "lora")
    assert any("2 products of" in x for x in merged.notes)
    places = {
        "layers.0.self_attn.q_proj": "blocks.0.attention.query.kernel",
        "layers.2.mlp.down_proj": "blocks.2.mlp.down.kernel",
    }
    for name, leaf in merged.leaves():
        expected = plain[name]
        for theirs_, ours in places.items():
            if name == ours:
                start = f"base_model.model.model.{theirs_}"
                b, a = (factors[f"{start}.lora_{x}.weight"] for x in "BA")
                expected = expected + scale * (b @ a).T
        np.testing.assert_allclose(leaf, expected, rtol=0, atol=1e-12)


def test_an_adapter_that_cannot_be_merged_whole_is_refused(folder, tmp_path):
    adapter(tmp_path / "dora", use_dora=True)
    with pytest.raises(ValueError, match="use_dora is True"):
        Checkpoint.open(folder, adapter=tmp_path / "dora")
    made = adapter(tmp_path / "half")
    made.pop("base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight")
    save_file(made, tmp_path / "half/adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj has one factor"):
        Checkpoint.open(folder, adapter=tmp_path / "half")
    made = {x.replace("layers.2.", "layers.9."): y for x, y in adapter(tmp_path / "deep").items()}
    save_file(made, tmp_path / "deep/adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"layers.9.mlp.down_proj.weight is not among"):
        Checkpoint.open(folder, adapter=tmp_path / "deep")
