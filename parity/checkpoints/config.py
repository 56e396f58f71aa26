"""config.json in both directions; all problems are in one message."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax_gpt import GPTConfig, Rotary
from parity.checkpoints.families import ACTIVATIONS, FAMILIES, REQUIRED, Family

# Entries that do not change what a model computes: names, ids, dropout in training, how the library
# itself runs, and what old versions wrote beside an entry that counts.
_INERT = frozenset(
    "_name_or_path architectures model_type transformers_version auto_map torch_dtype dtype "
    "bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id use_cache return_dict "
    "problem_type output_hidden_states output_attentions id2label label2id "
    "chunk_size_feed_forward is_encoder_decoder is_decoder attention_dropout hidden_dropout "
    "attn_pdrop embd_pdrop resid_pdrop pretraining_tp slow_but_exact task_specific_params "
    "reorder_and_upcast_attn summary_activation summary_first_dropout summary_proj_to_labels "
    "summary_type summary_use_proj gradient_checkpointing attn_implementation "
    "_attn_implementation masked_softmax_fusion bias_dropout_fusion offset_alibi n_ctx "
    "attention_softmax_in_fp32 skip_bias_add skip_bias_add_qkv".split()
)
_ROTARY = "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"
_ROPE_TYPES = {"default": "none", "linear": "linear", "dynamic": "dynamic", "llama3": "llama3"}


def read_config(
    document: Mapping[str, Any], where: str
) -> tuple[Family, dict[str, Any], list[str], list[str]]:
    """Read a config.json as fields of GPTConfig.

    Args:
        document: the parsed file.
        where: its name, for the message.

    Returns:
        The family, the fields, all problems, and notes on what was ignored.

    Raises:
        ValueError: for an unknown family, or entries of the wrong type.
    """
    name = document.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(
            f"{where}: model_type {name!r} is not among {', '.join(FAMILIES)}. Only these are "
            "understood. Choose another checkpoint."
        )
    try:
        return _read(FAMILIES[name], document, where)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{where}: an entry is not what it should be ({reason}). A number is a number and an "
            "object an object. Get the file again."
        ) from error


def write_config(family: Family, config: GPTConfig, dtype: str) -> dict[str, Any]:
    """Return the config.json of a model.

    Raises:
        ValueError: when the family has no such models, all reasons in one message.
    """
    theirs = {activation: name for name, activation in reversed(ACTIVATIONS.items())}
    document: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.name,
        "dtype": dtype,
    }
    problems = [
        f"{name} is {getattr(config, name)!r} and not {value!r}"
        for name, value in family.fixed.items()
        if getattr(config, name) != value
    ]
    # As numbers: where an entry is missing, the library has one of its own.
    numbers = vars(config) | {"num_kv_heads": config.kv_heads, "head_dim": config.head_width}
    written = set(family.fixed) | {"dtype", "dropout", "rotary", "t5_buckets", "t5_max_distance"}
    for entry in family.entries:
        value = numbers[entry.field]
        written.add(entry.field)
        if document.setdefault(entry.names[0], value) != value:
            problems.append(f"{entry.field} is {value!r}, unlike others that go with it")
    if family.activation is not None:
        written.add("activation")
        if config.activation in theirs:
            document[family.activation[0]] = theirs[config.activation]
        else:
            problems.append(f"activation is {config.activation!r}")
    if family.rotary:
        document["rope_parameters"] = _rope_parameters(config.rotary)
        if config.rotary.fraction != 1.0:
            problems.append(f"rotary.fraction is {config.rotary.fraction}")
        if config.rotary.scaling == "dynamic":
            trained = config.rotary.original_length or config.context_length
            document["max_position_embeddings"] = trained
            if int(trained * config.rotary.factor) != config.context_length:
                problems.append(
                    f"context_length is {config.context_length} and not {trained} times the factor "
                    f"{config.rotary.factor} of its dynamic rotation"
                )
    if family.window is not None:
        switch, size, full = family.window
        document[size] = config.window
        written.add("window")
        if switch:
            document[switch] = config.window is not None
            document[full] = config.num_full_layers if config.window else config.num_layers
            written.add("num_full_layers")
    same = {"num_kv_heads": config.num_heads, "mlp_dim": 4 * config.embed_dim}
    same["head_dim"] = config.embed_dim // config.num_heads
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    problems += [
        f"{name} is {value!r}"
        for name, value in numbers.items()
        if name not in written and value != same.get(name, defaults[name])
    ]
    if problems:
        raise ValueError(
            f"convert to {family.name}: {'; '.join(problems)}. Models of this family are not so. "
            "Choose another one."
        )
    return document


def _read(
    family: Family, document: Mapping[str, Any], where: str
) -> tuple[Family, dict[str, Any], list[str], list[str]]:
    problems: list[str] = []
    notes: list[str] = []
    fields: dict[str, Any] = dict(family.fixed)
    for entry in family.entries:
        given = [document[name] for name in entry.names if name in document]
        value = next((x for x in given if x is not None), None)
        if not given and entry.default is REQUIRED:
            problems.append(f"{entry.names[0]} is missing")
            continue
        if value is None and not given:
            value = entry.default
        fields[entry.field] = value
    # Four widths, where there is no entry for it or none was given.
    if fields.get("mlp_dim") is None and "embed_dim" in fields:
        fields["mlp_dim"] = 4 * fields["embed_dim"]
    if family.activation is not None:
        key, default = family.activation
        activation = document.get(key) or default
        if activation not in ACTIVATIONS:
            problems.append(f"{key} is {activation!r}, there are {', '.join(ACTIVATIONS)}")
        fields["activation"] = ACTIVATIONS.get(activation, "gelu_tanh")
    for key, values in family.accepted.items():
        if document.get(key, values[0]) not in values:
            problems.append(f"{key} is {document[key]!r}, only {values[0]!r} is supported")
    known = _INERT | set(family.accepted) | {x for e in family.entries for x in e.names}
    known |= {family.activation[0]} if family.activation else set()
    if family.rotary:
        known |= set(_ROTARY)
        rotary, found = _rotary(document)
        problems += found
        notes += _two_spellings(document, where)
        if not found:
            fields["rotary"] = rotary
            if rotary["scaling"] == "dynamic":
                # There, the length is what was trained; it reads more by growing the base.
                rotary["original_length"] = fields["context_length"]
                fields["context_length"] = int(fields["context_length"] * rotary["factor"])
    if family.window is not None:
        known |= {*family.window, "layer_types"}
        if "num_layers" in fields:
            fields |= _window(family.window, document, fields["num_layers"], problems)
    left = sorted(set(document) - known)
    notes += [f"{where}: {', '.join(left)}: not understood and left aside"] if left else []
    return family, fields, problems, notes


def _rotary(document: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return rotary positions of the old spelling (rope_theta, rope_scaling) or the new one.

    Where both are given, the old one counts alone, as in `convert_rope_params_to_dict` of
    transformers: model cards have people add it to a file that already holds the new one.
    """
    given = dict(document.get("rope_scaling") or document.get("rope_parameters") or {})
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in _ROPE_TYPES:
        return {}, [f"rope type is {kind!r}, there are {', '.join(_ROPE_TYPES)}"]
    rotary: dict[str, Any] = {
        "base": float(given.get("rope_theta") or document.get("rope_theta") or 10_000.0),
        "scaling": _ROPE_TYPES[kind],
    }
    part = given.get("partial_rotary_factor") or document.get("partial_rotary_factor") or 1.0
    if part != 1.0:
        return rotary, [f"partial_rotary_factor is {part}, these families turn whole heads"]
    if kind == "default":
        return rotary, []
    if given.get("factor") is None:
        return rotary, [f"rope type {kind} has no factor"]
    rotary["factor"] = float(given["factor"])
    # Dynamic scaling goes by max_position_embeddings alone.
    if kind != "dynamic" and given.get("original_max_position_embeddings") is not None:
        rotary["original_length"] = int(given["original_max_position_embeddings"])
    if kind == "llama3":
        missing = [x for x in ("low_freq_factor", "high_freq_factor") if x not in given]
        missing += [] if "original_length" in rotary else ["original_max_position_embeddings"]
        if missing:
            return rotary, [f"rope type llama3 has no {', '.join(missing)}"]
        rotary["low_frequency"] = float(given["low_freq_factor"])
        rotary["high_frequency"] = float(given["high_freq_factor"])
    return rotary, []


def _two_spellings(document: Mapping[str, Any], where: str) -> list[str]:
    """Return a note when rotary positions are given twice and differ."""
    new, old = document.get("rope_parameters"), document.get("rope_scaling")
    if not new or not old or new == old:
        return []
    return [
        f"{where}: rope_scaling and rope_parameters differ; rope_scaling counts, as in the library"
    ]


def _rope_parameters(rotary: Rotary) -> dict[str, Any]:
    """Return rotary positions in the new spelling."""
    kind = next(name for name, scaling in _ROPE_TYPES.items() if scaling == rotary.scaling)
    found: dict[str, Any] = {"rope_theta": rotary.base, "rope_type": kind}
    if kind != "default":
        found["factor"] = rotary.factor
    if kind == "llama3":
        found["original_max_position_embeddings"] = rotary.original_length
        found["low_freq_factor"] = rotary.low_frequency
        found["high_freq_factor"] = rotary.high_frequency
    return found


def _window(
    entries: tuple[str, str, str],
    document: Mapping[str, Any],
    num_layers: int,
    problems: list[str],
) -> dict[str, Any]:
    """Read the window, and how many first layers have none."""
    switch, size, full = entries
    if switch and not document.get(switch, False):
        return {"window": None}
    window = document.get(size, 4096)
    if window is None:
        return {"window": None}
    first = int(document[full] if document.get(full) is not None else 28) if full else 0
    kinds = document.get("layer_types")
    if kinds is not None:
        first = sum(kind == "full_attention" for kind in kinds)
        if list(kinds) != ["full_attention"] * first + ["sliding_attention"] * (num_layers - first):
            problems.append("layer_types has layers without a window after others with one")
    first = min(first, num_layers)
    # A window that no layer has is none.
    return {"window": None} if first == num_layers else {"window": window, "num_full_layers": first}
