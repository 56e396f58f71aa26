"""Infer the rules of two modules from types, shapes, names and experiment.

Modules that own leaves are sorted into classes of one kind and one set of shapes. Inside a class
names decide, and the numbers in them. Where names leave a choice, every choice is tried: only the
right one makes the outputs equal in float64. What is still open is an error that lists the
candidates.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from flax import nnx
from scipy.optimize import linear_sum_assignment

from parity.frameworks.flax.leaves import flax_leaves
from parity.frameworks.torch.leaves import torch_leaves
from parity.weights.compress import compress
from parity.weights.known_layers import Leaf, flax_leaf, flax_owner, torch_leaf, torch_owner
from parity.weights.layouts import Layout, Link, Shape
from parity.weights.names import likeness, words
from parity.weights.rules import Rules

# Relative to the largest output; with the wrong map outputs differ by their own size.
_SAME_OUTPUT = 1e-9
# Most choices to try, with a forward pass of both models each.
_MOST_TRIALS = 120
# Least difference in likeness between two pairs and the same two exchanged: a word in two.
_CLEAR = 0.3

_FUSED = "query", "key", "value"


@dataclasses.dataclass(frozen=True, order=True)
class _Part:
    """A leaf, or those of several siblings that the other model fuses; see `Leaf`."""

    names: tuple[str, ...]
    layout: Layout
    shape: Shape


@dataclasses.dataclass(frozen=True)
class _Owner:
    """A module that owns leaves, or several siblings whose leaves the other model fuses."""

    path: str  # of the module, or the parent of the siblings; of the leaf itself if it is loose
    kind: str  # see `Leaf`
    leaves: tuple[tuple[str, _Part], ...]  # by role

    @property
    def is_loose(self) -> bool:
        """Whether it is a leaf of no known layer."""
        return self.kind in ("parameter", "buffer")

    @property
    def signature(self) -> tuple[str, tuple[object, ...]]:
        """What two owners must have in common; a loose parameter may be transposed."""
        if self.is_loose:
            return self.kind, tuple(sorted(self.leaves[0][1].shape))
        return self.kind, tuple((role, part.shape) for role, part in self.leaves)


# A torch owner and the Flax owner of the same weights.
_Match = tuple[_Owner, _Owner]


@dataclasses.dataclass(frozen=True)
class _Choice:
    """What names leave open, and the links of each possible answer."""

    question: str
    answers: tuple[tuple[Link, ...], ...]

    @property
    def kind(self) -> str:
        """The question without the numbers of layers, which all get the same answer."""
        return re.sub(r"\d+", "*", self.question)


def infer_rules(
    torch_module: torch.nn.Module,
    flax_module: nnx.Module,
    output_gap: Callable[[Rules], float] | None = None,
) -> Rules:
    """Infer the weight map of two modules.

    Args:
        torch_module: the PyTorch module.
        flax_module: the Flax NNX module.
        output_gap: the difference of the outputs, relative to the largest, when weights move by
            given rules; None where there is nothing to run the models on.

    Returns:
        Rules that map every leaf.

    Raises:
        ValueError: for leaves without a counterpart, or with several that nothing tells apart.
    """
    torch_names, flax_names = torch_leaves(torch_module), flax_leaves(flax_module)
    ties = _ties(torch_module)
    found = {
        name: torch_leaf(*torch_owner(torch_module, name))
        for name in torch_names
        if name not in dict(ties)
    }
    ignored = [name for name, leaf in found.items() if leaf is None]
    ours = _owners({name: leaf for name, leaf in found.items() if leaf})
    theirs = _owners({name: flax_leaf(*flax_owner(flax_module, name)) for name in flax_names})
    ours, theirs = _with_siblings(ours, theirs)
    links: list[Link] = []
    choices: list[_Choice] = []
    problems = []
    for signature in dict.fromkeys(owner.signature for owner in (*ours, *theirs)):
        mine = [owner for owner in ours if owner.signature == signature]
        other = [owner for owner in theirs if owner.signature == signature]
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
                    choices.append(_Choice(_question(group), answers))
    if problems:
        raise ValueError(
            f"rules auto: {'; '.join(problems)}. Every leaf needs one counterpart of its shape. "
            "Mend a model or write a rules file."
        )

    def rules_of(links: Sequence[Link]) -> Rules:
        return compress(links, ties, tuple(ignored), torch_names, flax_names)

    return _decided(rules_of, links, choices, output_gap)


def _decided(
    rules_of: Callable[[Sequence[Link]], Rules],
    links: Sequence[Link],
    choices: Sequence[_Choice],
    output_gap: Callable[[Rules], float] | None,
) -> Rules:
    """Return the rules that make the outputs equal, among all that names leave open."""
    if not choices:
        return rules_of(links)
    questions = "; ".join(choice.question for choice in choices)
    sizes = {choice.kind: len(choice.answers) for choice in choices}
    trials = math.prod(sizes.values())
    if output_gap is None or trials > _MOST_TRIALS:
        reason = "no inputs to try them on" if output_gap is None else f"{trials} ways to try"
        raise ValueError(
            f"rules auto: names do not tell apart {questions}, and there are {reason}. Write a "
            "rules file for these."
        )
    right = []
    for numbers in itertools.product(*map(range, sizes.values())):
        answer = dict(zip(sizes, numbers, strict=True))
        tried = [link for choice in choices for link in choice.answers[answer[choice.kind]]]
        rules = rules_of([*links, *tried])
        if output_gap(rules) <= _SAME_OUTPUT:
            right.append(rules)
    if len(right) != 1:
        raise ValueError(
            f"rules auto: names do not tell apart {questions}; of {trials} ways to pair them "
            f"{len(right) or 'none'} made the outputs equal. Write a rules file for these."
        )
    return right[0]


def _ties(module: torch.nn.Module) -> tuple[tuple[str, str], ...]:
    """Return (alias, original) for torch leaves that are one tensor under a second name."""
    first: dict[tuple[int, torch.Size], str] = {}
    ties = []
    for name, tensor in module.state_dict().items():
        key = tensor.data_ptr(), tensor.shape
        if tensor.numel() and key in first:
            ties.append((name, first[key]))
        first.setdefault(key, name)
    return tuple(ties)


def _owners(leaves: dict[str, Leaf]) -> list[_Owner]:
    """Group leaves by module; a leaf of no known layer stands alone."""
    groups: dict[tuple[str, str], list[tuple[str, _Part]]] = {}
    for name, leaf in leaves.items():
        is_loose = leaf.kind in ("parameter", "buffer")
        path = name if is_loose else ".".join(filter(None, (name.rpartition(".")[0], leaf.part)))
        part = leaf.role, _Part((name,), leaf.layout, leaf.shape)
        groups.setdefault((path, leaf.kind), []).append(part)
    return [_Owner(path, kind, tuple(sorted(x))) for (path, kind), x in groups.items()]


def _with_siblings(ours: list[_Owner], theirs: list[_Owner]) -> tuple[list[_Owner], list[_Owner]]:
    """Fuse query, key and value wherever the other model has them fused."""
    models = [ours, theirs]
    for apart, fused in ((1, 0), (0, 1)):
        wanted = {x.signature for x in models[fused]} - {x.signature for x in models[apart]}
        for siblings, whole in list(_siblings(models[apart])):
            if whole.signature in wanted:
                models[apart] = [x for x in models[apart] if x not in siblings] + [whole]
    return models[0], models[1]


def _siblings(owners: list[_Owner]) -> Iterator[tuple[list[_Owner], _Owner]]:
    """Yield query, key and value of each parent, and the owner that they would be if fused."""
    parents: dict[str, dict[str, _Owner]] = {}
    for owner in owners:
        parent, _, name = owner.path.rpartition(".")
        for role in words(name) & set(_FUSED):
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


def _assigned(ours: list[_Owner], theirs: list[_Owner]) -> Iterator[list[_Match]]:
    """Match owners by name; those that could as well be exchanged come in one group."""
    paths = [x.path for x in ours], [x.path for x in theirs]
    scores = np.array([[likeness(a, b, *paths) for b in paths[1]] for a in paths[0]])
    rows, columns = linear_sum_assignment(-scores)
    groups = [{place} for place in range(len(rows))]
    for i, j in itertools.combinations(range(len(rows)), 2):
        kept = scores[i, columns[i]] + scores[j, columns[j]]
        exchanged = scores[i, columns[j]] + scores[j, columns[i]]
        if kept - exchanged < _CLEAR:
            joined = next(g for g in groups if i in g) | next(g for g in groups if j in g)
            groups = [g for g in groups if not g & joined] + [joined]
    for group in groups:
        yield [(ours[rows[place]], theirs[columns[place]]) for place in sorted(group)]


def _answers(group: list[_Match]) -> Iterator[tuple[Link, ...]]:
    """Yield the links of every way to match a group, and to transpose what is square and loose."""
    ours, theirs = zip(*group, strict=True)
    shapes = [owner.leaves[0][1].shape for owner in ours if owner.kind == "parameter"]
    has_squares = any(len(shape) == 2 and shape[0] == shape[1] for shape in shapes)
    for order in itertools.permutations(theirs):
        for transpose in (False, True) if has_squares else (False,):
            pairs = zip(ours, order, strict=True)
            yield tuple(link for pair in pairs for link in _links(*pair, transpose))


def _links(ours: _Owner, theirs: _Owner, transpose: bool) -> Iterator[Link]:
    for (_, mine), (_, other) in zip(ours.leaves, theirs.leaves, strict=True):
        layout = mine.layout if other.layout is Layout.SAME else other.layout
        if ours.is_loose and (transpose or mine.shape != other.shape):
            layout = Layout.TRANSPOSED
        yield Link(mine.names, other.names, layout)


def _question(group: list[_Match]) -> str:
    ours, theirs = zip(*group, strict=True)
    if len(group) == 1:
        return f"the two ways round of torch {ours[0].path} in flax {theirs[0].path}"
    torch_paths, flax_paths = (", ".join(x.path or "the model" for x in y) for y in (ours, theirs))
    return f"torch {torch_paths} against flax {flax_paths}"


def _unequal(ours: list[_Owner], theirs: list[_Owner]) -> str:
    """Describe a class of which the two models have different numbers."""
    owner, counts = (ours or theirs)[0], []
    shapes = ", ".join(f"{role} {list(part.shape)}" for role, part in owner.leaves)
    for framework, owners in (("torch", ours), ("flax", theirs)):
        names = ", ".join(owner.path or "the model" for owner in owners[:4])
        more = f" and {len(owners) - 4} more" if len(owners) > 4 else ""
        counts.append(f"{framework} has {len(owners)}" + (f" ({names}{more})" if names else ""))
    return f"of {owner.kind} with {shapes} {' and '.join(counts)}"
