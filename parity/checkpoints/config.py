"""config.json in both directions; all problems are in one message."""

import dataclasses

from flax_gpt import Experts, GPTConfig, Layer
from parity.checkpoints import rotary
from parity.checkpoints.families import ACTIVATIONS, FAMILIES, REQUIRED, ExpertEntries, Family
from parity.checkpoints.files import Json, JsonMapping

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
    "attention_softmax_in_fp32 skip_bias_add skip_bias_add_qkv classifier_dropout "
    "residual_dropout embedding_dropout cache_implementation".split()
)


def read_config(document: JsonMapping, where: str) -> tuple[Family, Json, list[str], list[str]]:
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


def write_config(family: Family, config: GPTConfig, dtype: str) -> Json:
    """Return the config.json of a model.

    Raises:
        ValueError: when the family has no such models, all reasons in one message.
    """
    theirs = {activation: name for name, activation in reversed(ACTIVATIONS.items())}
    document: Json = {
        "architectures": [family.architecture],
        "model_type": family.name,
        "dtype": dtype,
    }
    settled = dict(family.fixed) | {name: x(vars(config)) for name, x in family.derived.items()}
    problems = [
        f"{name} is {getattr(config, name)!r} and not {value!r}"
        for name, value in settled.items()
        if getattr(config, name) != value
    ]
    # As numbers: where an entry is missing, the library has one of its own.
    numbers = vars(config) | {"num_kv_heads": config.kv_heads, "head_dim": config.head_width}
    own_scale = config.head_width**-0.5
    numbers["attention_scale"] = config.attention_scale or own_scale
    written = set(settled) | {"dtype", "dropout", "t5_buckets", "t5_max_distance"}
    written |= {"rotary", "window", "num_full_layers", "layers"}
    for entry in family.entries:
        value = entry.write(numbers[entry.field])
        written.add(entry.field)
        if entry.default is None and (value is None or getattr(config, entry.field) is None):
            continue  # which means the same
        if document.setdefault(entry.names[0], value) != value:
            problems.append(f"{entry.field} is {value!r}, unlike others that go with it")
    if family.activation is not None:
        written.add("activation")
        if config.activation in theirs:
            document[family.activation[0]] = theirs[config.activation]
        else:
            problems.append(f"activation is {config.activation!r}")
    for switch in family.switched:
        written.add(switch.field)
        document[switch.name] = numbers[switch.field] == switch.on
        if numbers[switch.field] not in (switch.on, switch.off):
            problems.append(f"{switch.field} is {numbers[switch.field]!r}")
    if family.one_kv_head is not None:
        single, counted = family.one_kv_head
        document[single] = config.kv_heads == 1 and not document[counted]
        if not document[counted] and config.kv_heads not in (1, config.num_heads):
            problems.append(f"num_kv_heads is {config.kv_heads}")
    problems += rotary.write(family, config, document)
    if family.experts is not None:
        written.add("experts")
        problems += _write_experts(family.experts, config, document)
    same = {"num_kv_heads": config.num_heads, "mlp_dim": 4 * config.embed_dim}
    same |= {"head_dim": config.embed_dim // config.num_heads, "attention_scale": own_scale}
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
    family: Family, document: JsonMapping, where: str
) -> tuple[Family, Json, list[str], list[str]]:
    problems: list[str] = []
    notes: list[str] = []
    fields: Json = dict(family.fixed)
    for entry in family.entries:
        given = [document[name] for name in entry.names if name in document]
        value = next((x for x in given if x is not None), None)
        if not given and entry.default is REQUIRED:
            problems.append(f"{entry.names[0]} is missing")
            continue
        if value is None and not given:
            value = entry.default
        fields[entry.field] = entry.read(value)
    # Four widths, where there is no entry for it or none was given.
    if fields.get("mlp_dim") is None and "embed_dim" in fields:
        fields["mlp_dim"] = 4 * fields["embed_dim"]
    if family.activation is not None:
        key, default = family.activation
        activation = document.get(key) or default
        names = ACTIVATIONS | dict(family.activations)
        if activation not in names:
            problems.append(f"{key} is {activation!r}, there are {', '.join(names)}")
        fields["activation"] = names.get(activation, "gelu_tanh")
    for switch in family.switched:
        fields[switch.field] = (
            switch.on if document.get(switch.name, switch.default) else switch.off
        )
    if family.one_kv_head is not None:
        single, counted = family.one_kv_head
        if not document.get(counted, False):
            fields["num_kv_heads"] = 1 if document.get(single, True) else fields["num_heads"]
    for name, derive in family.derived.items():
        if not problems:
            fields[name] = derive(fields)
    for key, values in family.accepted.items():
        if document.get(key, values[0]) not in values:
            problems.append(f"{key} is {document[key]!r}, only {values[0]!r} is supported")
    known = _INERT | set(family.accepted) | {x for e in family.entries for x in e.names}
    known |= {family.activation[0]} if family.activation else set()
    known |= {switch.name for switch in family.switched} | set(family.one_kv_head or ())
    known |= rotary.entries(family)
    found, more = rotary.read(family, document, fields, where)
    problems += found
    notes += more
    if family.experts is not None:
        known |= _expert_entries(family.experts)
        if not problems:
            _read_experts(family.experts, document, fields)
    left = sorted(set(document) - known)
    notes += [f"{where}: {', '.join(left)}: not understood and left aside"] if left else []
    return family, fields, problems, notes


_DENSE = "decoder_sparse_step", "mlp_only_layers"


def _expert_entries(entries: ExpertEntries) -> set[str]:
    """Return the entries about experts."""
    named = {entries.num[0], entries.chosen[0], entries.width[0], "router_aux_loss_coef"}
    named |= {"num_local_experts"}
    return (named | {entries.renormalise, entries.shared, *_DENSE}) - {""}


def _read_experts(entries: ExpertEntries, document: JsonMapping, fields: Json) -> None:
    """Add experts to fields of GPTConfig."""
    constants: Json = dict(entries.fixed)
    if "num_local_experts" in document:  # the library's own name, under which it saves others
        document = {entries.num[0]: document["num_local_experts"]} | dict(document)
    for name, (entry, default) in (
        ("num_experts", entries.num), ("num_chosen", entries.chosen), ("width", entries.width),
    ):  # fmt: skip
        constants[name] = document.get(entry, default)
    if entries.renormalise:
        constants["renormalise"] = bool(document.get(entries.renormalise, False))
    if entries.shared:
        constants["shared_width"] = document.get(entries.shared, 5632)
    fields["experts"] = Experts(**constants)
    step, dense = document.get("decoder_sparse_step", 1), document.get("mlp_only_layers") or ()
    plain = [i in dense or (i + 1) % step != 0 for i in range(fields["num_layers"])]
    if entries.dense and any(plain):
        fields["layers"] = tuple(Layer(dense=x) for x in plain)


def _write_experts(entries: ExpertEntries, config: GPTConfig, document: Json) -> list[str]:
    """Add experts to a config.json, and return what it has no entries for."""
    experts = config.experts
    if experts is None:
        return ["it has no experts"]
    constants, problems = vars(experts), []
    named = dict(num_experts=entries.num, num_chosen=entries.chosen, width=entries.width)
    named |= dict(renormalise=(entries.renormalise, 0), shared_width=(entries.shared, 0))
    for field in dataclasses.fields(experts):
        value = constants[field.name]
        if (entry := named.get(field.name, ("", 0))[0]) != "":
            if document.setdefault(entry, value) != value and field.name == "width":
                document[entry] = value  # an MLP of all tokens has the same entry, and is none
        elif value != entries.fixed.get(field.name, field.default):
            problems.append(f"experts.{field.name} is {value!r}")
    plain = [i for i, block in enumerate(config.blocks) if block.experts is None]
    if entries.dense:
        document |= {"mlp_only_layers": plain, "decoder_sparse_step": 1}
    elif plain:
        problems.append("some layers have no experts")
    return problems
