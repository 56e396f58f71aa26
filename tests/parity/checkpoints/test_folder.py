"""Checkpoint folders: what transformers writes both twins read, and what we write it reads."""

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import flax_gpt
import torch_gpt
from parity import cli
from parity.check.check import check
from parity.checkpoints import (
    Checkpoint,
    Tokens,
    flax_model,
    open_checkpoint,
    pair_of,
    save,
    torch_model,
)
from parity.checkpoints import folder_of as folder_of_name
from parity.checkpoints.write import new_folder
from parity.frameworks.flax.leaves import flax_leaves
from parity.frameworks.torch.leaves import torch_leaves
from parity.report.record import Verdict
from tests.parity.checkpoints.library import LLAMA, Wide, both, prompts, theirs

BOUND = 1e-12


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory) -> Callable[[str], Path]:
    """Where a family's model is saved, by transformers itself."""

    @functools.cache
    def made(family: str) -> Path:
        path = tmp_path_factory.mktemp(family) / "checkpoint"
        theirs(family).save_pretrained(path)
        return path

    return made


def test_a_sharded_folder_in_half_precision_without_a_prefix_is_read(folder_of, tmp_path):
    """As hubs have GPT-2: shards, bfloat16, no `transformer.`, mask buffers, no head."""
    tensors = load_file(folder_of("gpt2") / "model.safetensors")
    tensors = {name.removeprefix("transformer."): x for name, x in tensors.items()}
    half = {name: x.astype(ml_dtypes.bfloat16) for name, x in tensors.items()}
    half["h.0.attn.bias"] = np.ones((1, 1, 40, 40), np.uint8)
    names = sorted(half)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, inside in shards.items():
        save_file({name: half[name] for name in inside}, tmp_path / file)
    index = {name: file for file, inside in shards.items() for name in inside}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    document = json.loads((folder_of("gpt2") / "config.json").read_text())
    document = {name: x for name, x in document.items() if name != "dtype"}
    document["torch_dtype"] = "bfloat16"
    document["n_ctx"] = document.pop("n_positions")
    (tmp_path / "config.json").write_text(json.dumps(document))
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.config.dtype == "bfloat16" and checkpoint.config.context_length == 40
    assert (
        dataclasses.replace(checkpoint.config, dtype="float64")
        == Checkpoint.open(folder_of("gpt2")).config
    )
    loaded = flax_leaves(flax_model(checkpoint)), torch_leaves(torch_model(checkpoint))
    name = "blocks.1.mlp.up.kernel"
    expected = half["h.1.mlp.c_fc.weight"]
    np.testing.assert_array_equal(loaded[0][name], expected)
    np.testing.assert_array_equal(loaded[1]["blocks.1.mlp.up.weight"], expected.T)


def test_the_old_spelling_of_rotary_positions_means_the_same(folder_of, tmp_path):
    for name in ("llama", "mistral"):
        document = json.loads((folder_of(name) / "config.json").read_text())
        new = document.pop("rope_parameters")
        document["rope_theta"] = new.pop("rope_theta")
        document["rope_scaling"] = {
            ("type" if name == "mistral" else "rope_type"): new.pop("rope_type")
        }
        document["rope_scaling"] |= new
        folder = tmp_path / name
        shutil.copytree(folder_of(name), folder)
        (folder / "config.json").write_text(json.dumps(document))
        assert Checkpoint.open(folder).config == Checkpoint.open(folder_of(name)).config


@pytest.mark.parametrize("theta", [None, 5000.0])
def test_of_two_spellings_of_rotary_positions_the_library_s_counts_and_is_named(
    folder_of, tmp_path, theta
):
    folder = tmp_path / "llama"
    shutil.copytree(folder_of("llama"), folder)
    document = json.loads((folder / "config.json").read_text())
    document["rope_scaling"] = {"rope_type": "linear", "factor": 3.0}
    document |= {} if theta is None else {"rope_theta": theta}
    (folder / "config.json").write_text(json.dumps(document))
    checkpoint = Checkpoint.open(folder)
    assert [x for x in checkpoint.notes if "rope_scaling counts" in x]
    library = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = np.arange(12)[None] % checkpoint.config.vocab_size
    with torch.no_grad():
        expected = library(torch.tensor(ids)).logits.numpy()
        found = torch_model(checkpoint)(torch.tensor(ids))[0].numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    document["rope_scaling"] = document["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(document))
    assert not Checkpoint.open(folder).notes


def test_dynamic_scaling_is_that_of_transformers_token_by_token(tmp_path):
    """Behind the original length each token turns as if the text ended with it."""
    config = transformers.LlamaConfig(**LLAMA | dict(
        max_position_embeddings=8,
        rope_parameters=dict(rope_type="dynamic", rope_theta=300.0, factor=4.0),
        attn_implementation="eager",
    ))  # fmt: skip
    with Wide():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).double().eval()
        model.save_pretrained(tmp_path / "dynamic")
        tokens = torch.from_numpy(np.random.default_rng(1).integers(0, 97, (1, 20)))
        with torch.no_grad():
            out = model(tokens[:, :6], use_cache=True)
            expected, cache = [out.logits[:, -1]], out.past_key_values
            for place in range(6, 20):
                out = model(tokens[:, place : place + 1], past_key_values=cache, use_cache=True)
                expected.append(out.logits[:, -1])
    expected = torch.stack(expected, dim=1).numpy()
    checkpoint = Checkpoint.open(tmp_path / "dynamic")
    assert checkpoint.config.context_length == 32
    with both(checkpoint) as twins:
        for _, gpt, array, numpy in twins:
            found = numpy(gpt(array(tokens.numpy()))[0])[:, 5:]
            np.testing.assert_allclose(found, expected, rtol=0, atol=BOUND)
    save(tmp_path / "out", "llama", checkpoint.config, dict(checkpoint.leaves()))
    assert Checkpoint.open(tmp_path / "out").config == checkpoint.config


class Exploding:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


def corrupted(folder: Path, how: str) -> None:
    """Does something bad to a folder of a llama."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    document = json.loads(config.read_text())
    tensors = load_file(weights)
    key = "model.layers.1.self_attn.k_proj.weight"
    match how:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "garbage":
            weights.write_bytes(b"not safetensors at all")
        case "wrong shape":
            save_file(tensors | {key: tensors[key][:-1]}, weights)
        case "missing tensor":
            save_file({name: x for name, x in tensors.items() if name != key}, weights)
        case "unknown tensor":
            save_file(tensors | {"model.layers.0.adapter": np.ones(3)}, weights)
        case "two at once":
            kept = {name: x for name, x in tensors.items() if name != key}
            save_file(kept | {"model.layers.0.adapter": np.ones(3)}, weights)
        case "nan":
            tensors[key][0, 0] = np.nan
            save_file(tensors, weights)
        case "integers":
            save_file(tensors | {key: tensors[key].astype(np.int32)}, weights)
        case "missing shard" | "escaping shard" | "index disagrees":
            weights.rename(folder / "a.safetensors")
            index = dict.fromkeys(tensors, "a.safetensors")
            other = {"missing shard": "b.safetensors", "escaping shard": "../a.safetensors"}
            if how in other:
                index[key] = other[how]
            else:
                index["more"] = "a.safetensors"
            path = folder / "model.safetensors.index.json"
            path.write_text(json.dumps({"weight_map": index}))
        case "pickle":
            weights.unlink()
            torch.save({"x": Exploding()}, folder / "pytorch_model.bin")
        case "no weights":
            weights.unlink()
        case "no config":
            config.unlink()
        case "broken config":
            config.write_text("{")
        case "list config":
            config.write_text("[]")
        case "unknown architecture":
            config.write_text(json.dumps(document | {"model_type": "mamba"}))
        case "unknown activation":
            config.write_text(json.dumps(document | {"hidden_act": "xielu"}))
        case "unknown rope":
            document["rope_parameters"]["rope_type"] = "proportional"
            config.write_text(json.dumps(document))
        case "several problems":
            del document["hidden_size"]
            config.write_text(json.dumps(document | {"hidden_act": "xielu"}))
        case "sizes of strings":
            config.write_text(json.dumps(document | {"hidden_size": "42"}))
        case "part of a head":
            document["rope_parameters"]["partial_rotary_factor"] = 0.5
            config.write_text(json.dumps(document))
        case "no factor":
            document["rope_parameters"]["factor"] = None
            config.write_text(json.dumps(document))
        case "rope is a word":
            config.write_text(json.dumps(document | {"rope_parameters": "linear"}))
        case "activations":
            config.write_text(json.dumps(document | {"hidden_act": ["silu"]}))
        case "twice":
            save_file(tensors | {"norm.weight": tensors["model.norm.weight"]}, weights)
        case "heads":
            config.write_text(json.dumps(document | {"num_key_value_heads": 4}))


BAD = {
    "truncated": r"model\.safetensors: cannot be read \(.*\)\. The file is truncated",
    "garbage": r"model\.safetensors: cannot be read",
    "wrong shape": r"torch leaf model\.layers\.1\.self_attn\.k_proj\.weight is \[39, 42\]",
    "missing tensor": r"no torch leaf for flax leaf blocks\.1\.attention\.key\.kernel",
    "unknown tensor": r"no rule for torch leaf model\.layers\.0\.adapter",
    "two at once": r"adapter; .*blocks\.1\.attention\.key\.kernel",
    "nan": r"1 of 1680 numbers in model\.layers\.1\.self_attn\.k_proj\.weight are not finite",
    "integers": r"k_proj\.weight is stored as I32, there are F64",
    "missing shard": r"b\.safetensors is missing\. The index names them",
    "escaping shard": r"'\.\./a\.safetensors' is not in the folder",
    "index disagrees": r"more: the index and the shards do not agree",
    "pickle": r"only pytorch_model\.bin, a pickle, which can run any code",
    "no weights": r"no model\.safetensors and no",
    "no config": r"no config\.json",
    "broken config": r"config\.json: cannot be read",
    "list config": r"config\.json: a list, not an object",
    "unknown architecture": r"model_type 'mamba' is not among gpt2, llama",
    "unknown activation": r"hidden_act is 'xielu'",
    "unknown rope": r"rope type is 'proportional', there are default, linear, dynamic, llama3",
    "several problems": r"hidden_size is missing; hidden_act is 'xielu'",
    "sizes of strings": r"embed_dim is '42', it must be an integer",
    "part of a head": r"partial_rotary_factor is 0\.5, these families turn whole heads",
    "no factor": r"rope type llama3 has no factor",
    "rope is a word": r"config\.json: an entry is not what it should be",
    "activations": r"config\.json: an entry is not what it should be",
    "twice": r"(model\.)?norm\.weight and (model\.)?norm\.weight are one tensor",
    "heads": r"num_heads 6 does not divide into 4 kv heads",
}


@pytest.mark.parametrize("how", BAD)
def test_a_corrupt_folder_is_refused_in_one_line_and_nothing_runs(
    how, folder_of, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder_of("llama"), tmp_path / "bad")
    corrupted(tmp_path / "bad", how)
    with pytest.raises(ValueError, match=BAD[how]) as raised:
        torch_model(Checkpoint.open(tmp_path / "bad"))
    assert "\n" not in str(raised.value)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["bad"]  # nothing has exploded


def test_what_a_family_cannot_be_is_not_written(folder_of, tmp_path):
    checkpoint = Checkpoint.open(folder_of("qwen3"))
    leaves = dict(checkpoint.leaves())
    with pytest.raises(ValueError, match=r"convert to llama: .*qk_norm is 'head'"):
        save(tmp_path / "out", "llama", checkpoint.config, leaves)
    with pytest.raises(ValueError, match=r"convert to gpt2: .*positions is 'rotary'"):
        save(tmp_path / "out", "gpt2", checkpoint.config, leaves)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="there is something already"):
        save(tmp_path / "full", "qwen3", checkpoint.config, leaves)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["full"]


def test_entries_that_are_not_understood_are_named(folder_of, tmp_path):
    shutil.copytree(folder_of("qwen3"), tmp_path / "more")
    document = json.loads((tmp_path / "more" / "config.json").read_text())
    (tmp_path / "more" / "config.json").write_text(json.dumps(document | {"logit_softcap": 30}))
    (note,) = Checkpoint.open(tmp_path / "more").notes
    assert "logit_softcap: not understood and left aside" in note


LEVELS = "weights", "logits", "cache"  # the tests above have compared tokens


@pytest.fixture(scope="module")
def quiet_folder_of(tmp_path_factory) -> Callable[[str], Path]:
    """The same with weights that keep a signal's size, as those of a trained model do."""

    @functools.cache
    def made(family: str) -> Path:
        path = tmp_path_factory.mktemp(family) / "quiet"
        theirs(family, 1.0).save_pretrained(path)
        return path

    return made


SIX = "gpt2", "llama", "mistral", "qwen2", "qwen3", "bloom"


@pytest.mark.parametrize("family", SIX)
def test_a_checkpoint_passes_the_check(family, quiet_folder_of, corpus):
    pair = pair_of(open_checkpoint(quiet_folder_of(family)), corpus, max_new_tokens=8)
    report = check(pair, levels=LEVELS, dtypes=("float64",))
    verdicts = [level.verdict for level in report.levels]
    assert set(verdicts) <= {Verdict.PASS, Verdict.TIE} and verdicts[1] is Verdict.PASS, report
    assert report.subject["config"]["family"] == family
    assert report.subject["config"]["data"] == "random ids"


def test_the_check_tests_the_weights_of_the_checkpoint(quiet_folder_of, corpus):
    path = quiet_folder_of("qwen3")
    pair = pair_of(open_checkpoint(path), corpus, max_new_tokens=8)
    name = "model.layers.2.self_attn.q_norm.weight"
    expected = load_file(path / "model.safetensors")[name].astype(np.float32)
    np.testing.assert_array_equal(pair.leaves["blocks.2.attention.query_norm.scale"], expected)


def test_a_long_context_is_checked_as_far_as_scores_fit_and_angles_stay(
    folder_of, tmp_path, corpus
):
    shutil.copytree(folder_of("qwen3"), tmp_path / "long")
    document = json.loads((tmp_path / "long" / "config.json").read_text())
    document["max_position_embeddings"] = 131_072
    document["rope_parameters"] = dict(rope_type="dynamic", rope_theta=1e4, factor=2.0)
    (tmp_path / "long" / "config.json").write_text(json.dumps(document))
    config = pair_of(open_checkpoint(tmp_path / "long"), corpus).config
    assert config["context_length"] == 1024
    assert config["rotary"]["original_length"] == 131_072


def with_tokenizer(folder: Path) -> Path:
    """Adds a tokenizer of single characters."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    letters = [chr(code) for code in range(32, 127)] + ["<eos>", "<unk>"]
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    made = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    made.save(str(folder / "tokenizer.json"))
    return folder


def parity(*arguments: str):
    return CliRunner().invoke(cli.app, [str(x) for x in arguments])


def test_the_commands_convert_and_write_text(quiet_folder_of, tmp_path):
    source = with_tokenizer(Path(shutil.copytree(quiet_folder_of("llama"), tmp_path / "llama")))
    written = set()
    for kind, folder in (
        ("flax", source),
        ("torch", tmp_path / "flax"),
        ("hf", tmp_path / "torch"),
    ):
        done = parity("convert", folder, tmp_path / kind, "--to", kind)
        assert done.exit_code == 0, done.stderr
        for temperature, seed in (("0", "0"), ("0.9", "3")):
            done = parity(
                "generate", tmp_path / kind, "To be", "--tokens", "9", "--temperature", temperature,
                "--seed", seed,
            )  # fmt: skip
            assert done.exit_code == 0, done.stderr
            assert "9 tokens, the same from flax_gpt and torch_gpt" in done.stderr
            assert done.stdout.startswith("To be") and len(done.stdout) == len("To be") + 9 + 1
            written.add(done.stdout)
    assert len(written) == 2  # greedy and drawn, whatever the folder
    uncached = parity(
        "generate", source, "To be", "--tokens", "9", "--temperature", "0", "--no-cache", "--only",
        "torch",
    )  # fmt: skip
    assert uncached.stdout in written
    ours, again = (load_file(x / "model.safetensors") for x in (source, tmp_path / "hf"))
    assert all(np.array_equal(ours[name], again[name]) for name in ours) and set(ours) == set(again)


def test_the_commands_search_and_guess(quiet_folder_of, tmp_path):
    source = with_tokenizer(Path(shutil.copytree(quiet_folder_of("llama"), tmp_path / "llama")))
    asked = "generate", source, "abcab", "--tokens", "8", "--temperature", "0"
    plain = parity(*asked, "--only", "torch")
    for options in (("--speculate", "3"), ("--draft", source), ("--beams", "1")):
        found = parity(*asked, *options, "--only", "torch")
        assert (found.exit_code, found.stdout) == (0, plain.stdout), found.output
    assert "guesses that were right, by place" in parity(*asked, "--draft", "lookup").stderr
    both = parity(*asked, "--beams", "3")
    assert both.exit_code == 0 and "the same from flax_gpt and torch_gpt" in both.stderr
    assert both.stderr.count("beam ") == 3
    bad = parity(*asked, "--beams", "3", "--speculate", "2")
    assert bad.exit_code == 2 and "Each goes alone" in bad.stderr


@pytest.mark.parametrize("options", [("0",), ("0.8", "--top-k", "1")], ids=["greedy", "one left"])
def test_twins_that_diverge_while_they_write_exit_1(options, quiet_folder_of, monkeypatch):
    advance = torch_gpt.Decoder.advance

    def wrong(decoder, tokens_B, cache):
        logits_BV, cache = advance(decoder, tokens_B, cache)
        return -logits_BV, cache

    monkeypatch.setattr(torch_gpt.Decoder, "advance", wrong)
    done = parity(
        "generate", quiet_folder_of("qwen3"), "5 17", "--tokens", "3", "--temperature", *options
    )
    assert done.exit_code == 1 and "FAIL: token 2 is" in done.stderr


def test_the_command_checks_a_checkpoint(quiet_folder_of):
    done = parity(
        "check", "--checkpoint", quiet_folder_of("gpt2"), "--dtype", "float64", "--level", "logits",
        "--json", "-",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["verdict"] == "PASS" and document["subject"]["config"]["family"] == "gpt2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "--checkpoint", "nowhere"], "checkpoint nowhere: no such folder, and no name"),
        (["check", "--checkpoint", "x", "--preset", "gpt2"], "a checkpoint has sizes of its own"),
        (["convert", "nowhere", "out", "--to", "hf"], "checkpoint nowhere: no such folder"),
        (["convert", "FOLDER", "out", "--to", "onnx"], "--to onnx: there are flax, torch, hf"),
        (["convert", "FOLDER", "no/where", "--to", "hf"], "no folder no"),
        (["convert", "FOLDER", "out", "--to", "hf", "--dtype", "int8"], "--dtype int8: there are"),
        (["generate", "FOLDER", "hello"], "the checkpoint has no tokenizer.json"),
        (["generate", "FOLDER", "97"], "id 97, the model has 97"),
        (["generate", "FOLDER", "5", "--tokens", "99"], "> context_length 40. Ask for at most 39"),
    ],
)
def test_bad_input_ends_in_one_line_with_code_2(
    arguments, message, quiet_folder_of, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    folder = str(quiet_folder_of("gpt2"))
    done = parity(*(folder if x == "FOLDER" else x for x in arguments))
    lines = [line for line in done.stderr.splitlines() if line.startswith("parity: ")]
    assert done.exit_code == 2 and len(lines) == 1 and message in lines[0], done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_name_of_the_hub_is_downloaded_without_pickles(quiet_folder_of, tmp_path, monkeypatch):
    asked = {}

    def download(name, allow_patterns, ignore_patterns):
        asked.update(name=name, patterns=allow_patterns)
        return str(quiet_folder_of("gpt2"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert open_checkpoint(folder_of_name("some/gpt2")).family == "gpt2"
    assert asked["name"] == "some/gpt2" and not any("bin" in x for x in asked["patterns"])

    def offline(name, allow_patterns, ignore_patterns):
        raise ConnectionError("no route\nto anywhere")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ValueError, match=r"some/gpt2: .* the hub does not give it \(no route\)\."):
        folder_of_name("some/gpt2")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="checkpoint runs/b: no such folder, and no name"):
        folder_of_name("runs/b")


def changed(source: Path, target: Path, **entries) -> Path:
    """A copy of a folder whose config.json says something else."""
    shutil.copytree(source, target)
    document = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(document | entries))
    return target


def test_ids_that_end_a_text_go_along_and_end_it(quiet_folder_of, tmp_path):
    said = dict(bos_token_id=3, eos_token_id=[17, 5], pad_token_id=None)
    source = changed(quiet_folder_of("qwen3"), tmp_path / "source", **said)
    for kind, folder in (("torch", source), ("hf", tmp_path / "torch")):
        assert parity("convert", folder, tmp_path / kind, "--to", kind).exit_code == 0
        document = json.loads((tmp_path / kind / "config.json").read_text())
        assert {name: document[name] for name in said} == said
        assert Tokens(tmp_path / kind, 97).stop_ids == (17, 5)
    first = parity(
        "generate", source, "9", "--tokens", "4", "--temperature", "0", "--only", "torch"
    )
    second = int(first.stdout.split()[2])
    source = changed(quiet_folder_of("qwen3"), tmp_path / "ends", eos_token_id=second)
    done = parity("generate", source, "9", "--tokens", "4", "--temperature", "0")
    written = first.stdout.split()[: first.stdout.split().index(str(second))]
    assert done.stdout.split() == written and f"{len(written) - 1} tokens, the same" in done.stderr


def test_types_that_differ_go_into_the_widest_and_nothing_becomes_infinite(folder_of, tmp_path):
    folder = Path(shutil.copytree(folder_of("llama"), tmp_path / "mixed"))
    tensors = load_file(folder / "model.safetensors")
    half = {name: x.astype(ml_dtypes.bfloat16) for name, x in tensors.items()}
    half["model.norm.weight"] = np.full(42, 70_000.0, np.float32)
    save_file(half, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config.dtype == "float32"
    assert dict(checkpoint.leaves())["norm.scale"][0] == 70_000.0
    done = parity("convert", folder, tmp_path / "out", "--to", "hf", "--dtype", "float16")
    assert done.exit_code == 2 and "too large for float16" in done.stderr
    assert [x.name for x in tmp_path.iterdir()] == ["mixed"]


def test_one_file_of_weights_is_read_before_an_older_index(folder_of, tmp_path):
    folder = Path(shutil.copytree(folder_of("qwen3"), tmp_path / "both"))
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert open_checkpoint(folder).family == "qwen3"


def test_dynamic_scaling_goes_by_the_length_that_the_library_goes_by(folder_of, tmp_path):
    rope = dict(rope_type="dynamic", factor=4.0, original_max_position_embeddings=8)
    folder = changed(folder_of("qwen3"), tmp_path / "dynamic", rope_parameters=rope)
    config = open_checkpoint(folder).config
    assert (config.rotary.original_length, config.context_length) == (40, 160)
    leaves = dict(open_checkpoint(folder).leaves())
    longer = dataclasses.replace(config, context_length=200)
    with pytest.raises(ValueError, match=r"context_length is 200 and not 40 times the factor 4\.0"):
        save(tmp_path / "out", "qwen3", longer, leaves)


def test_a_model_of_our_own_is_the_same_to_the_library(tmp_path):
    """Where an entry is missing the library has a number of its own, so none is."""
    sizes = dict(vocab_size=97, context_length=40, embed_dim=15, num_layers=2, num_heads=6,
                 head_dim=4, mlp_dim=13, positions="rotary", norm="rms", gated=True,
                 activation="silu", tied_head=False, norm_epsilon=1e-6, mlp_bias=False)  # fmt: skip
    kinds = {
        "mistral": dict(qkv_bias=False, out_bias=False),
        "qwen3": dict(qk_norm="head", qkv_bias=False, out_bias=False),
    }
    for family, changes in kinds.items():
        config = flax_gpt.GPTConfig(**(sizes | changes))
        model = flax_gpt.GPT(config, flax_gpt.random.key(0))
        save(tmp_path / family, family, config, flax_leaves(model))
        again = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / family, attn_implementation="eager"
        )
        with torch.no_grad():
            expected = again(torch.from_numpy(prompts())).logits.numpy()
        found = np.asarray(model(jax.numpy.asarray(prompts()))[0])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "full", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left")]
)
def test_a_full_disk_is_one_line_with_the_folder_and_nothing_is_left(tmp_path, full):
    with pytest.raises(OSError, match=r"made: .*No space left.* Nothing was written"):
        with new_folder(tmp_path / "made") as folder:
            (folder / "config.json").write_text("{}")
            raise full
    assert not list(tmp_path.iterdir())
