"""How alike the paths of two leaves are: by the words in them, and by their numbers."""

import functools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

# Usual forms of words in names; the empty form says nothing.
_SYNONYMS = {
    "query": "q wq queries",
    "key": "k wk keys",
    "value": "v wv values",
    "out": "o wo output",
    "norm": "ln layernorm bn batchnorm rmsnorm groupnorm instancenorm",
    "attention": "attn att mha selfattention",
    "embedding": "emb embed embeddings embedder",
    "token": "tok wte word words tokens vocab",
    "position": "pos positional wpe positions",
    "block": "h layer layers blocks",
    "encoder": "enc",
    "decoder": "dec",
    "input": "ih inp",
    "hidden": "hh",
    "gain": "g gamma gains",
    "bias": "beta biases",
    "head": "classifier cls",
    "": "self proj projection linear fc dense l lm conv model module transformer weight w kernel "
    "scale embedding_table table parametrizations original param params c layer_instance",
}
_USUAL = {word: usual for usual, words in _SYNONYMS.items() for word in words.split()}
# What a word says that begins with another: "inter" and "intermediate".
_BEGINNING = 0.6


@functools.cache
def words(path: str) -> frozenset[str]:
    """Return the words of a path, without numbers, each in its usual form."""
    found = re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])([A-Z])", r"_\1", path).lower())
    return frozenset(_USUAL.get(word, word) for word in found) - {""}


def template(path: str) -> str:
    """Return a path with a star for every number."""
    return re.sub(r"\d+", "*", path)


@functools.cache
def numbers(path: str) -> tuple[int, ...]:
    """Return the numbers of a path."""
    return tuple(int(number) for number in re.findall(r"\d+", path))


def information(paths: Iterable[str]) -> dict[str, float]:
    """Return what each word tells of a path: much if few have it."""
    found = [words(path) for path in paths]
    counts = Counter(word for x in found for word in x)
    return {word: math.log(1 + len(found) / count) for word, count in counts.items()}


def likeness(
    ours: frozenset[str],
    theirs: frozenset[str],
    our_information: Mapping[str, float],
    their_information: Mapping[str, float],
) -> float:
    """Return the share of what two sets of words tell that they have in common, from 0 to 1."""
    total = sum(our_information[x] for x in ours) + sum(their_information[x] for x in theirs)
    if not total:
        return 0.0
    shared = 0.0
    left = set(theirs)
    for word in ours:
        if word in left:
            shared += our_information[word] + their_information[word]
            left.discard(word)
    for word in ours - theirs:
        other = next((x for x in sorted(left) if _begins(word, x)), None)
        if other is not None:
            shared += _BEGINNING * (our_information[word] + their_information[other])
            left.discard(other)
    return shared / total


def ranks(paths: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Return each number of a path as its place among those that its template has there."""
    groups: dict[str, list[str]] = {}
    for path in paths:
        groups.setdefault(template(path), []).append(path)
    found = {}
    for group in groups.values():
        columns = [sorted(set(column)) for column in zip(*map(numbers, group), strict=True)]
        for path in group:
            found[path] = tuple(
                column.index(x) for column, x in zip(columns, numbers(path), strict=True)
            )
    return found


def agreement(ours: tuple[int, ...], theirs: tuple[int, ...]) -> float:
    """Return how well the numbers of two paths go together, from 0 to 1."""
    if ours == theirs:
        return 1.0
    if len(ours) == len(theirs):
        return 0.5 * sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)
    # One has more levels than the other: these are often zero.
    longer, shorter = (ours, theirs) if len(ours) > len(theirs) else (theirs, ours)
    left = list(shorter)
    for number in longer:
        if left and number == left[0]:
            left.pop(0)
    return 0.75 if not left else 0.0


def _begins(word: str, other: str) -> bool:
    shorter, longer = sorted((word, other), key=len)
    return len(shorter) >= 3 and longer.startswith(shorter)
