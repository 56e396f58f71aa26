"""Names of tensors as tools leave them: wrappers, empty shards, other heads, fused maps."""

import dataclasses
import re
from collections.abc import Collection, Mapping

from parity.checkpoints.files import Header
from parity.weights.layouts import Layout
from parity.weights.rules import Rule, Rules

# Modules that wrap another one, and add their name to all inside them.
_WRAPPERS = "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"
_OUTER = "base_model.model.", "module.", "policy.", "pretrained_model."
# Heads that read the same body and are no part of a language model.
_HEADS = "v_head.", "value_head.", "score.", "classifier.", "reward_head."
_FUSED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}


def plain_names(
    tensors: Mapping[str, Header], prefix: str, head: str
) -> tuple[dict[str, Header], list[str], list[str]]:
    """Return tensors by the names that a family gives them.

    Args:
        tensors: by the names in the files.
        prefix: of all tensors of the family but the head's; a base model is saved without it.
        head: the head's.

    Returns:
        Tensors by name, problems, and notes on what was done.
    """
    found: dict[str, Header] = {}
    problems, notes = [], []
    outer = _outer(tensors, prefix)
    removed = {outer} - {""}
    empty, heads = [], []
    for name, x in tensors.items():
        parts = [part for part in name.split(".") if part not in _WRAPPERS]
        removed |= set(name.split(".")) & set(_WRAPPERS)
        plain = ".".join(parts).removeprefix(outer)
        if plain.startswith(prefix * 2):  # a base model that was saved with the prefix, once more
            removed.add(prefix)
            plain = plain.removeprefix(prefix)
        if 0 in x.shape:
            empty.append(name)
            continue
        if plain.startswith(_HEADS):
            heads.append(name)
            continue
        whole = plain if plain.startswith(prefix) or plain == head else prefix + plain
        if whole in found:
            problems.append(f"{name} and {found[whole].name} are one tensor")
        found[whole] = x
    if removed:
        wrappers = ", ".join(sorted(x.rstrip(".") for x in removed))
        notes.append(f"{wrappers}: names that a wrapper adds, taken off")
    if empty:
        notes.append(f"{_listed(empty)}: empty, left aside")
    if heads:
        notes.append(f"{_listed(heads)}: a head beside the language model's, left aside")
    return found, problems, notes


def with_fused(rules: Rules, names: Collection[str]) -> tuple[Rules, list[str]]:
    """Return rules in which maps are fused as they are in a folder, and notes on these."""
    notes = []
    for fused, apart in _FUSED.items():
        pattern = re.compile(rf".*\.\d+\.{re.escape(fused)}\.(weight|bias)")
        if not any(pattern.fullmatch(name) for name in names):
            continue
        groups: dict[str, list[Rule]] = {}
        others = []
        for rule in rules.rules:
            module, _, kind = rule.torch.rpartition(".")
            if module.endswith(apart) and rule.layout in (Layout.TRANSPOSED, Layout.SAME):
                groups.setdefault(kind, []).append(rule)
            else:
                others.append(rule)
        if any(len(group) != len(apart) for group in groups.values()) or not groups:
            continue
        for kind, group in groups.items():
            start = group[0].torch.removesuffix(f"{apart[0]}.{kind}")
            before, _, last = group[0].flax.rpartition(".")
            modules = ",".join(rule.flax.split(".")[-2] for rule in group)
            flax = f"{before.rpartition('.')[0]}.{{{modules}}}.{last}"
            joined = f"{start}{fused}.{kind}"
            others.append(Rule(joined, flax, group[0].layout, optional=group[0].optional))
        rules = dataclasses.replace(rules, rules=tuple(others))
        notes.append(f"{fused}: {', '.join(apart)}, one after the other")
    return rules, notes


def _outer(tensors: Collection[str], prefix: str) -> str:
    """Return what stands before every name that could be of the family."""
    plain = [
        ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        for name in tensors
        if not name.startswith(_HEADS)
    ]
    found = ""
    while True:
        new = next(
            (x for x in _OUTER if plain and all(name.startswith(found + x) for name in plain)), ""
        )
        if not new or (found + new).startswith(prefix):
            return found
        found += new


def _listed(names: Collection[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(list(names)[:3]) + more
