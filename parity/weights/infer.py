"""rules="auto": the weight map of two modules from types, shapes, names, and experiment.

Modules that own leaves are sorted into classes of one kind and one set of shapes. Inside a class
names decide, and the numbers in them. Where names leave a choice, every choice is tried: only the
right one makes both models give the same output in float64. What is still open is an error that
lists the candidates.
"""

import dataclasses
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from flax import nnx
from scipy.optimize import linear_sum_assignment

from parity.frameworks.flax.leaves import flax_leaves
from parity.frameworks.leaves import Leaves
from parity.frameworks.torch.leaves import torch_leaves
from parity.weights.known_layers import Leaf, flax_leaf, flax_owner, torch_leaf, torch_owner
from parity.weights.layouts import Layout, Link, Shape
from parity.weights.rules import Rule, Rules
from parity.weights.weight_map import TransplantError, resolve

# Of the largest output; with the wrong map outputs differ by their own size.
_SAME_OUTPUT = 1e-9
# Choices that are tried at most, a forward pass of both models each.
_MOST_TRIALS = 120
# By how much two pairs must be likelier than the same traded: a word in two.
_CLEAR = 0.3

# Usual forms of words in names; the empty one says nothing.
_SYNONYMS = {
    "query": "q wq", "key": "k wk", "value": "v wv", "out": "o wo output",
    "norm": "ln layernorm bn batchnorm rmsnorm", "attention": "attn",
    "embedding": "emb embed embeddings", "token": "tok wte", "position": "pos positional wpe",
    "block": "h layer layers blocks", "encoder": "enc", "decoder": "dec", "input": "ih",
    "hidden": "hh", "": "self proj linear fc dense l lm conv",
}  # fmt: skip
_USUAL = {word: usual for usual, words in _SYNONYMS.items() for word in words.split()}
_FUSED = "query", "key", "value"


@dataclasses.dataclass(frozen=True, order=True)
class _Part:
    """A leaf, or those of several siblings that the other side fuses.

    Attributes:
        names: of the leaves.
        layout: see `parity.native.Leaf`.
        shape: of the joined form.
    """

    names: tuple[str, ...]
    layout: Layout
    shape: Shape


@dataclasses.dataclass(frozen=True)
class _Owner:
    """A module that owns leaves, or several siblings whose leaves the other side fuses.

    Attributes:
        path: of the module, or of the parent of the siblings; of the leaf itself if it is loose.
        kind: see `parity.native.Leaf`.
        leaves: by role.
    """

    path: str
    kind: str
    leaves: tuple[tuple[str, _Part], ...]


@dataclasses.dataclass(frozen=True)
class _Choice:
    """What names leave open.

    Attributes:
        question: in words.
        kind: alike in all layers, which are tried alike.
        answers: the links of each possibility.
    """

    question: str
    kind: str
    answers: tuple[tuple[Link, ...], ...]


def infer_rules(
    torch_module: torch.nn.Module,
    flax_module: nnx.Module,
    output_gap: Callable[[Rules], float] | None = None,
) -> Rules:
    """The weight map of two modules.

    Args:
        torch_module: the PyTorch module.
        flax_module: the Flax NNX module.
        output_gap: how far the outputs are apart, of the largest, when weights move by given rules;
            None where there is nothing to run them on, so that names must do.

    Raises:
        ValueError: for leaves without a counterpart, or with several that nothing tells apart.
    """
    torch_spec, flax_spec = torch_leaves(torch_module), flax_leaves(flax_module)
    ties = _ties(torch_module)
    found = {
        name: torch_leaf(*torch_owner(torch_module, name))
        for name in torch_spec
        if name not in dict(ties)
    }
    ignored = [name for name, leaf in found.items() if leaf is None]
    ours = _owners({name: leaf for name, leaf in found.items() if leaf})
    theirs = _owners({name: flax_leaf(*flax_owner(flax_module, name)) for name in flax_spec})
    ours, theirs = _with_siblings(ours, theirs)
    links: list[Link] = []
    choices: list[_Choice] = []
    problems = []
    for signature in dict.fromkeys(map(_signature, (*ours, *theirs))):
        mine = [owner for owner in ours if _signature(owner) == signature]
        other = [owner for owner in theirs if _signature(owner) == signature]
        if signature[0] == "buffer" and not other:  # a table that flax computes, or a mask
            ignored += [name for owner in mine for _, leaf in owner.leaves for name in leaf.names]
        elif len(mine) != len(other):
            problems.append(_unequal(mine, other))
        else:
            for group in _assigned(mine, other):
                if math.factorial(len(group)) > _MOST_TRIALS:
                    problems.append(f"names do not tell apart {_question(group)}")
                    continue
                answers = tuple(_answers(group))
                if len(answers) == 1:
                    links += answers[0]
                else:
                    choices.append(_Choice(_question(group), _kind(group), answers))
    if problems:
        raise ValueError(
            f"rules auto: {'; '.join(problems)}. Every leaf needs one counterpart of its shape. "
            "Mend a model or write a rules file."
        )

    def rules_of(links: Sequence[Link]) -> Rules:
        return _compressed(links, ties, tuple(ignored), torch_spec, flax_spec)

    return _decided(rules_of, links, choices, output_gap)


def _decided(
    rules_of: Callable[[Sequence[Link]], Rules],
    links: Sequence[Link],
    choices: Sequence[_Choice],
    output_gap: Callable[[Rules], float] | None,
) -> Rules:
    """The rules under which the outputs agree, among all that names leave open."""
    if not choices:
        return rules_of(links)
    words = "; ".join(choice.question for choice in choices)
    kinds = list(dict.fromkeys(choice.kind for choice in choices))
    sizes = {choice.kind: len(choice.answers) for choice in choices}
    trials = math.prod(sizes.values())
    if output_gap is None or trials > _MOST_TRIALS:
        reason = "no inputs to try them on" if output_gap is None else f"{trials} ways to try"
        raise ValueError(
            f"rules auto: names do not tell apart {words}, and there are {reason}. Write a rules "
            "file for these."
        )
    right = []
    for answer in itertools.product(*(range(sizes[kind]) for kind in kinds)):
        chosen = dict(zip(kinds, answer, strict=True))
        tried = [link for choice in choices for link in choice.answers[chosen[choice.kind]]]
        rules = rules_of([*links, *tried])
        if output_gap(rules) <= _SAME_OUTPUT:
            right.append(rules)
    if len(right) != 1:
        raise ValueError(
            f"rules auto: names do not tell apart {words}; of {trials} ways to pair them "
            f"{len(right) or 'none'} made the outputs equal. Write a rules file for these."
        )
    return right[0]


def _ties(module: torch.nn.Module) -> tuple[tuple[str, str], ...]:
    """Torch leaves that are one tensor under a second name."""
    first: dict[tuple[int, torch.Size], str] = {}
    ties = []
    for name, tensor in module.state_dict().items():
        key = tensor.data_ptr(), tensor.shape
        if tensor.numel() and key in first:
            ties.append((name, first[key]))
        first.setdefault(key, name)
    return tuple(ties)


def _owners(leaves: dict[str, Leaf]) -> list[_Owner]:
    """Modules with their leaves; a leaf of no known layer stands alone."""
    groups: dict[tuple[str, str], list[tuple[str, _Part]]] = {}
    for name, leaf in leaves.items():
        alone = leaf.kind in ("parameter", "buffer")
        path = name if alone else ".".join(filter(None, (name.rpartition(".")[0], leaf.part)))
        part = leaf.role, _Part((name,), leaf.layout, leaf.shape)
        groups.setdefault((path, leaf.kind), []).append(part)
    return [_Owner(path, kind, tuple(sorted(x))) for (path, kind), x in groups.items()]


def _signature(owner: _Owner) -> tuple:
    """What two owners must have in common; a loose parameter may lie the other way round."""
    shapes = tuple((role, part.shape) for role, part in owner.leaves)
    if owner.kind in ("parameter", "buffer"):
        return owner.kind, tuple(sorted(shapes[0][1]))
    return owner.kind, shapes


def _with_siblings(ours: list[_Owner], theirs: list[_Owner]) -> tuple[list[_Owner], list[_Owner]]:
    """Puts query, key and value together wherever the other side has them fused."""
    sides = [ours, theirs]
    for side, other in ((1, 0), (0, 1)):
        wanted = set(map(_signature, sides[other])) - set(map(_signature, sides[side]))
        for siblings, whole in list(_siblings(sides[side])):
            if _signature(whole) in wanted:
                sides[side] = [x for x in sides[side] if x not in siblings] + [whole]
    return sides[0], sides[1]


def _siblings(owners: list[_Owner]) -> Iterator[tuple[list[_Owner], _Owner]]:
    """Query, key and value of one parent, and the owner that they would be if they were fused."""
    parents: dict[str, dict[str, _Owner]] = {}
    for owner in owners:
        parent, _, name = owner.path.rpartition(".")
        for role in _words(name) & set(_FUSED):
            parents.setdefault(parent, {})[role] = owner
    for parent, parts in parents.items():
        group = [parts[role] for role in _FUSED if role in parts]
        roles = [[role for role, _ in part.leaves] for part in group]
        if len(group) < 3 or len({part.kind for part in group}) > 1 or roles[1:] != roles[:-1]:
            continue
        leaves = []
        for place, role in enumerate(roles[0]):
            parts = [part.leaves[place][1] for part in group]
            width = sum(part.shape[-1] for part in parts)
            names = tuple(name for part in parts for name in part.names)
            leaves.append((role, _Part(names, parts[0].layout, (*parts[0].shape[:-1], width))))
        yield group, _Owner(parent, group[0].kind, tuple(leaves))


def _assigned(ours: list[_Owner], theirs: list[_Owner]) -> Iterator[list[tuple[_Owner, _Owner]]]:
    """Pairs by name; those that could as well trade places come in one group."""
    scores = np.array([[_likeness(a, b, ours, theirs) for b in theirs] for a in ours])
    rows, columns = linear_sum_assignment(-scores)
    groups = [{place} for place in range(len(rows))]
    for i, j in itertools.combinations(range(len(rows)), 2):
        kept = scores[i, columns[i]] + scores[j, columns[j]]
        traded = scores[i, columns[j]] + scores[j, columns[i]]
        if kept - traded < _CLEAR:
            joined = next(g for g in groups if i in g) | next(g for g in groups if j in g)
            groups = [g for g in groups if not g & joined] + [joined]
    for group in groups:
        yield [(ours[rows[place]], theirs[columns[place]]) for place in sorted(group)]


def _likeness(a: _Owner, b: _Owner, ours: list[_Owner], theirs: list[_Owner]) -> float:
    """How well two names go together: their numbers by rank, and the words that they share."""
    mine, other = _words(a.path), _words(b.path)
    shared = len(mine & other) / max(len(mine | other), 1)
    return 2.0 * (_rank(a, ours) == _rank(b, theirs)) + shared


def _words(path: str) -> frozenset[str]:
    """The words of a path, without numbers, each in its usual form."""
    found = re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])([A-Z])", r"_\1", path).lower())
    return frozenset(_USUAL.get(word, word) for word in found) - {""}


def _rank(owner: _Owner, owners: list[_Owner]) -> tuple[int, ...]:
    """The numbers of a name, each as its place among those that the class has there."""
    numbers = _numbers(owner.path)
    alike = [found for x in owners if len(found := _numbers(x.path)) == len(numbers)]
    return tuple(
        sorted({found[place] for found in alike}).index(number)
        for place, number in enumerate(numbers)
    )


def _numbers(path: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", path))


def _answers(group: list[tuple[_Owner, _Owner]]) -> Iterator[tuple[Link, ...]]:
    """The links of every way to pair a group, and to turn what is square and loose."""
    ours, theirs = zip(*group, strict=True)
    turned = any(
        owner.kind == "parameter" and len(shape := owner.leaves[0][1].shape) == 2
        and shape[0] == shape[1]
        for owner in ours
    )  # fmt: skip
    for order in itertools.permutations(theirs):
        for turn in (False, True) if turned else (False,):
            pairs = zip(ours, order, strict=True)
            yield tuple(link for pair in pairs for link in _links(*pair, turn))


def _links(ours: _Owner, theirs: _Owner, turn: bool) -> Iterator[Link]:
    for (_, mine), (_, other) in zip(ours.leaves, theirs.leaves, strict=True):
        layout = mine.layout if other.layout is Layout.SAME else other.layout
        if ours.kind in ("parameter", "buffer") and (turn or mine.shape != other.shape):
            layout = Layout.TRANSPOSED
        yield Link(mine.names, other.names, layout)


def _question(group: list[tuple[_Owner, _Owner]]) -> str:
    ours, theirs = zip(*group, strict=True)
    if len(group) == 1:
        return f"the two ways round of torch {ours[0].path} in flax {theirs[0].path}"
    torch_paths, flax_paths = (", ".join(x.path or "the model" for x in y) for y in (ours, theirs))
    return f"torch {torch_paths} against flax {flax_paths}"


def _kind(group: list[tuple[_Owner, _Owner]]) -> str:
    return re.sub(r"\d+", "*", _question(group))


def _unequal(ours: list[_Owner], theirs: list[_Owner]) -> str:
    """Two classes of other sizes, in words."""
    owner = (ours or theirs)[0]
    shapes = ", ".join(f"{role} {list(part.shape)}" for role, part in owner.leaves)
    counts = [
        f"{framework} has {len(owners)}" + (f" ({_some(owners)})" if owners else "")
        for framework, owners in (("torch", ours), ("flax", theirs))
    ]
    return f"of {owner.kind} with {shapes} {' and '.join(counts)}"


def _some(owners: list[_Owner]) -> str:
    names = [owner.path or "the model" for owner in owners]
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _compressed(
    links: Sequence[Link],
    ties: tuple[tuple[str, str], ...],
    ignored: tuple[str, ...],
    torch_spec: Leaves,
    flax_spec: Leaves,
) -> Rules:
    """Rules with stars for the numbers of layers, where these say the same as the links."""
    literal = [Rule(_braced(x.torch), _braced(x.flax), x.layout, x.heads) for x in links]
    starred = [_starred(rule) for rule in literal]
    uses = Counter(
        name for rule in dict.fromkeys(starred) for x in rule.links(torch_spec) for name in x.torch
    )
    # Layers of a Sequential differ in kind under one pattern: such keep their numbers.
    chosen = [
        star if all(uses[name] == 1 for name in link.torch) else rule
        for link, rule, star in zip(links, literal, starred, strict=True)
    ]
    rules = Rules(tuple(dict.fromkeys(chosen)), ties, tuple(dict.fromkeys(map(_star, ignored))))
    try:
        weight_map = resolve(rules, torch_spec, flax_spec)
    except TransplantError:
        return dataclasses.replace(rules, rules=tuple(literal), ignored=ignored)
    same = set(weight_map.links) == set(links)
    return rules if same else dataclasses.replace(rules, rules=tuple(literal), ignored=ignored)


def _starred(rule: Rule) -> Rule:
    """The rule for all layers, if both sides number them alike."""
    numbers = [re.findall(r"(?<![^.])\d+(?![^.])", side) for side in (rule.torch, rule.flax)]
    if numbers[0] != numbers[1]:
        return rule
    return dataclasses.replace(rule, torch=_star(rule.torch), flax=_star(rule.flax))


def _star(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _braced(names: tuple[str, ...]) -> str:
    """One pattern for fused leaves: what they have in common, and the rest in braces."""
    if len(names) == 1:
        return names[0]
    parts = [name.split(".") for name in names]
    return ".".join(
        step[0] if len(set(step)) == 1 else "{" + ",".join(step) + "}"
        for step in zip(*parts, strict=True)
    )
