"""Rotary positions, windows and kinds of blocks in a config.json, in both directions."""

import math

from flax_gpt import GPTConfig, Layer, Rotary
from parity.checkpoints.families import Family, Kinds
from parity.checkpoints.files import Json, JsonMapping

_TYPES = {
    "default": "none",
    "linear": "linear",
    "dynamic": "dynamic",
    "llama3": "llama3",
    "yarn": "yarn",
    "longrope": "longrope",
}
_ENTRIES = frozenset(("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"))
_OTHERS = frozenset(("original_max_position_embeddings", "rotary_emb_base", "rotary_pct"))
_FULL, _NARROW = "full_attention", "sliding_attention"


def entries(family: Family) -> frozenset[str]:
    """Return the entries of config.json that are read here."""
    found = _ENTRIES | _OTHERS if family.rotary else frozenset()
    if family.kinds is not None:
        kinds = family.kinds
        found |= {kinds.size, kinds.switch, kinds.number, "layer_types", *kinds.others} - {""}
    return found


def read(
    family: Family, document: JsonMapping, fields: Json, where: str
) -> tuple[list[str], list[str]]:
    """Add rotary positions and kinds of blocks to fields of GPTConfig.

    Args:
        family: whose entries count.
        document: the parsed config.json.
        fields: what has been read; changed.
        where: the file's name, for notes.

    Returns:
        All problems, and notes on what was ignored.
    """
    problems: list[str] = []
    notes: list[str] = []
    local: Json | None = None
    if family.rotary:
        given = _by_kind(family, document) if family.local_base else {_FULL: _given(document)}
        notes += _two_spellings(document, where)
        fields["rotary"], found = _rotary(family, document, given[_FULL])
        problems += found
        if fields["rotary"].get("scaling") == "dynamic" and not found:
            # There, the length is what was trained; it reads more by growing the base.
            fields["rotary"]["original_length"] = fields["context_length"]
            factor = fields["rotary"]["factor"]
            fields["context_length"] = int(fields["context_length"] * factor)
        if _NARROW in given:
            local, found = _rotary(family, document, given[_NARROW])
            problems += found
    if family.kinds is not None and "num_layers" in fields and not problems:
        _read_kinds(family.kinds, document, fields, local, problems)
    return problems, notes


def write(family: Family, config: GPTConfig, document: Json) -> list[str]:
    """Add rotary positions and kinds of blocks to a config.json.

    Returns:
        What this family has no entries for.
    """
    problems = []
    blocks, kinds = config.blocks, family.kinds
    sizes = {block.window for block in blocks if block.window is not None}
    local = [block.rotary for block in blocks if block.window is not None]
    if family.rotary:
        full = [block.rotary for block in blocks if block.window is None] or [config.rotary]
        turned = {block.rotary for block in blocks if block.positions == "rotary"}
        if family.local_base:
            document["rope_parameters"] = {
                _FULL: _parameters(full[0], config),
                _NARROW: _parameters((local or full)[0], config),
            }
            if len(set(full)) > 1 or len(set(local)) > 1:
                problems.append("layers of one kind turn by several bases")
        else:
            rotary = turned.pop() if len(turned) == 1 else config.rotary
            document["rope_parameters"] = _parameters(rotary, config)
            if turned:
                problems.append("layers turn by several bases")
        if config.rotary.fraction != 1.0 and family.fraction is None:
            problems.append(f"rotary.fraction is {config.rotary.fraction}")
        if config.rotary.scaling == "dynamic":
            trained = config.rotary.original_length or config.context_length
            document["max_position_embeddings"] = trained
            if int(trained * config.rotary.factor) != config.context_length:
                problems.append(
                    f"context_length is {config.context_length} and not {trained} times the factor "
                    f"{config.rotary.factor} of its dynamic rotation"
                )
        if family.outer_length:
            length = config.rotary.original_length or config.context_length
            document["original_max_position_embeddings"] = length
    narrow = [block.window is not None for block in blocks]
    turning = [block.positions != "none" for block in blocks]
    if kinds is None:
        if sizes:
            problems.append(f"window is {sorted(sizes)}")
        if len(set(turning)) > 1:
            problems.append("some layers have no positions")
        return problems
    if len(sizes) > 1:
        problems.append(f"windows are {sorted(sizes)}")
    document[kinds.size] = min(sizes, default=None)
    if kinds.switch:
        document[kinds.switch] = bool(sizes)
    if kinds.rest == "first":
        if kinds.number:
            document[kinds.number] = narrow.index(True) if sizes else config.num_layers
        elif not all(narrow) and any(narrow):
            problems.append("some layers have no window")
        if sorted(narrow) != narrow:
            problems.append("layers without a window after others with one")
    else:
        document["layer_types"] = [_NARROW if x else _FULL for x in narrow]
    if kinds.unturned == "listed":
        document["no_rope_layers"] = [int(x) for x in turning]
    elif turning != (narrow if kinds.unturned == "full" and sizes else [True] * len(blocks)):
        problems.append("layers without positions are others")
    return problems


def _read_kinds(
    kinds: Kinds,
    document: JsonMapping,
    fields: Json,
    local: Json | None,
    problems: list[str],
) -> None:
    """Read which blocks have a window and which turn."""
    num_layers = fields["num_layers"]
    window = document.get(kinds.size, kinds.default)
    if kinds.switch and not document.get(kinds.switch, False):
        window = None
    types = document.get("layer_types")
    if types is not None and (
        len(types) != num_layers or not set(types) <= {_FULL, _NARROW} or isinstance(types, str)
    ):
        problems.append(f"layer_types is {types}, there are {_FULL} and {_NARROW}, one per layer")
        return
    turning = [True] * num_layers
    if kinds.unturned == "listed":
        every = document.get("no_rope_layer_interval", 4)
        listed = document.get("no_rope_layers")
        turning = [(i + 1) % every != 0 for i in range(num_layers)] if listed is None else listed
        turning = [bool(x) for x in turning]
    if types is not None and kinds.rest == "first" and kinds.number and window is not None:
        # Kept for models whose first blocks have none.
        first = sum(kind == _FULL for kind in types)
        if list(types) != [_FULL] * first + [_NARROW] * (num_layers - first):
            problems.append("layer_types has layers without a window after others with one")
    if types is not None and (kinds.number or kinds.rest != "first"):
        narrow = [kind == _NARROW for kind in types]
    elif kinds.rest == "first":
        number = document.get(kinds.number)
        first = int(28 if number is None else number) if kinds.number else 0
        narrow = [i >= first for i in range(num_layers)]
    elif kinds.unturned == "listed":
        narrow = [not x for x in turning]
    else:
        every = document.get(kinds.number, kinds.every) if kinds.number else kinds.every
        narrow = [(i + 1) % every != 0 for i in range(num_layers)] if every else [True] * num_layers
    narrow = [x and window is not None for x in narrow]
    if kinds.unturned == "full" and window is not None:
        turning = narrow
    own = None if local is None or local == fields["rotary"] else Rotary(**local)
    layers = [
        Layer(
            window=window if small else None,
            positions=None if turns else "none",
            rotary=own if small else None,
        )
        for small, turns in zip(narrow, turning, strict=True)
    ]
    plain = all(x.positions is None and x.rotary is None for x in layers)
    if plain and narrow == sorted(narrow):  # a window from some block on
        fields |= {"window": window if any(narrow) else None}
        fields |= {"num_full_layers": narrow.index(True)} if any(narrow) else {}
    else:
        fields["layers"] = tuple(layers)


def _given(document: JsonMapping) -> Json:
    """Return rotary positions of the old spelling or the new one.

    Where both are given, the old one counts alone, as in `convert_rope_params_to_dict` of
    transformers: model cards have people add it to a file that already holds the new one.
    """
    return dict(document.get("rope_scaling") or document.get("rope_parameters") or {})


def _by_kind(family: Family, document: JsonMapping) -> dict[str, Json]:
    """Return rotary positions of blocks without a window and with one.

    The old spelling scales the first alone.
    """
    given = document.get("rope_parameters") or {}
    full = dict(given.get(_FULL) or {}) | dict(document.get("rope_scaling") or {})
    local = dict(given.get(_NARROW) or {})
    full.setdefault("rope_theta", document.get("rope_theta") or family.base)
    local.setdefault("rope_theta", document.get("rope_local_base_freq") or family.local_base)
    return {_FULL: full, _NARROW: local}


def _rotary(family: Family, document: JsonMapping, given: JsonMapping) -> tuple[Json, list[str]]:
    kind = given.get("rope_type", given.get("type", "default"))
    # Old names of longrope.
    kind = "longrope" if family.outer_length and kind in ("su", "yarn") else kind
    if kind not in _TYPES:
        return {}, [f"rope type is {kind!r}, there are {', '.join(_TYPES)}"]
    base = given.get("rope_theta") or document.get("rope_theta")
    rotary: Json = {
        "base": float(base or document.get("rotary_emb_base") or family.base),
        "scaling": _TYPES[kind],
    }
    part = given.get("partial_rotary_factor") or document.get("partial_rotary_factor")
    part = part or document.get("rotary_pct") or family.fraction or 1.0
    if part != 1.0:
        rotary["fraction"] = float(part)
    if part != 1.0 and family.fraction is None:
        return rotary, [f"partial_rotary_factor is {part}, these families turn whole heads"]
    if kind == "default":
        return rotary, []
    if given.get("factor") is None and kind != "longrope":
        return rotary, [f"rope type {kind} has no factor"]
    # Dynamic scaling goes by max_position_embeddings alone.
    trained = given.get("original_max_position_embeddings")
    if family.outer_length:
        trained = document.get("original_max_position_embeddings") or trained or 4096
    if kind != "dynamic" and trained is not None:
        rotary["original_length"] = int(trained)
    if given.get("factor") is not None:
        rotary["factor"] = float(given["factor"])
    if kind == "llama3":
        missing = [x for x in ("low_freq_factor", "high_freq_factor") if x not in given]
        missing += [] if "original_length" in rotary else ["original_max_position_embeddings"]
        if missing:
            return rotary, [f"rope type llama3 has no {', '.join(missing)}"]
        rotary["low_frequency"] = float(given["low_freq_factor"])
        rotary["high_frequency"] = float(given["high_freq_factor"])
    if kind == "yarn":
        rotary["low_frequency"] = float(given.get("beta_slow") or 1)
        rotary["high_frequency"] = float(given.get("beta_fast") or 32)
        # Where each kind of layers has its own, the library does not look for it.
        rotary["whole_pairs"] = bool(given.get("truncate", True)) or bool(family.local_base)
        rotary["attention_factor"] = _yarn_factor(given, rotary["factor"])
    if kind == "longrope":
        missing = [x for x in ("short_factor", "long_factor") if x not in given]
        if missing:
            return rotary, [f"rope type longrope has no {', '.join(missing)}"]
        rotary["short_factors"] = tuple(float(x) for x in given["short_factor"])
        rotary["long_factors"] = tuple(float(x) for x in given["long_factor"])
        trained = rotary.setdefault("original_length", int(document["max_position_embeddings"]))
        factor = given.get("factor") or document["max_position_embeddings"] / trained
        size = math.sqrt(1.0 + math.log(factor) / math.log(trained)) if factor > 1.0 else 1.0
        rotary["attention_factor"] = float(given.get("attention_factor") or size)
    return rotary, []


def _yarn_factor(given: JsonMapping, factor: float) -> float:
    """Return what yarn multiplies turned numbers by, so that scores keep their spread."""

    def size(share: float) -> float:
        return 0.1 * share * math.log(factor) + 1.0 if factor > 1.0 else 1.0

    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])
    if given.get("mscale") and given.get("mscale_all_dim"):
        return size(given["mscale"]) / size(given["mscale_all_dim"])
    return size(1.0)


def _two_spellings(document: JsonMapping, where: str) -> list[str]:
    """Return a note when rotary positions are given twice and differ."""
    new, old = document.get("rope_parameters"), document.get("rope_scaling")
    if not new or not old or new == old:
        return []
    return [
        f"{where}: rope_scaling and rope_parameters differ; rope_scaling counts, as in the library"
    ]


def _parameters(rotary: Rotary, config: GPTConfig) -> Json:
    """Return rotary positions in the new spelling."""
    kind = next(name for name, scaling in _TYPES.items() if scaling == rotary.scaling)
    found: Json = {"rope_theta": rotary.base, "rope_type": kind}
    if rotary.fraction != 1.0:
        found["partial_rotary_factor"] = rotary.fraction
    if kind in ("linear", "dynamic", "llama3", "yarn"):
        found["factor"] = rotary.factor
    if kind in ("llama3", "yarn", "longrope"):
        length = rotary.original_length or config.context_length
        found["original_max_position_embeddings"] = length
    if kind == "llama3":
        found["low_freq_factor"] = rotary.low_frequency
        found["high_freq_factor"] = rotary.high_frequency
    if kind == "yarn":
        found |= {"beta_slow": rotary.low_frequency, "beta_fast": rotary.high_frequency}
        found |= {"truncate": rotary.whole_pairs, "attention_factor": rotary.attention_factor}
    if kind == "longrope":
        found["short_factor"] = list(rotary.short_factors)
        found["long_factor"] = list(rotary.long_factors)
        found["attention_factor"] = rotary.attention_factor
        if rotary.factor != 1.0:
            found["factor"] = rotary.factor
    return found
