"""How alike the paths of two modules are: by their numbers and by the words that they share."""

import re
from collections.abc import Sequence

# Usual forms of words in names; the empty form says nothing.
_SYNONYMS = {
    "query": "q wq",
    "key": "k wk",
    "value": "v wv",
    "out": "o wo output",
    "norm": "ln layernorm bn batchnorm rmsnorm",
    "attention": "attn",
    "embedding": "emb embed embeddings",
    "token": "tok wte",
    "position": "pos positional wpe",
    "block": "h layer layers blocks",
    "encoder": "enc",
    "decoder": "dec",
    "input": "ih",
    "hidden": "hh",
    "": "self proj linear fc dense l lm conv",
}
_USUAL = {word: usual for usual, words in _SYNONYMS.items() for word in words.split()}


def likeness(torch: str, flax: str, torch_paths: Sequence[str], flax_paths: Sequence[str]) -> float:
    """Return how well two paths go together, each among all that it competes with, from 0 to 3.

    It is 2 for equal ranks of their numbers, plus the share of words that they have in common.
    """
    mine, other = words(torch), words(flax)
    shared = len(mine & other) / max(len(mine | other), 1)
    return 2.0 * (_rank(torch, torch_paths) == _rank(flax, flax_paths)) + shared


def words(path: str) -> frozenset[str]:
    """Return the words of a path, without numbers, each in its usual form."""
    found = re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])([A-Z])", r"_\1", path).lower())
    return frozenset(_USUAL.get(word, word) for word in found) - {""}


def _rank(path: str, paths: Sequence[str]) -> tuple[int, ...]:
    """Return each number of a path as its place among the numbers that others have there."""
    numbers = _numbers(path)
    alike = [found for x in paths if len(found := _numbers(x)) == len(numbers)]
    return tuple(
        sorted({found[place] for found in alike}).index(number)
        for place, number in enumerate(numbers)
    )


def _numbers(path: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", path))
