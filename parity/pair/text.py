"""Text in, token batches out: one id per character."""

import dataclasses
from pathlib import Path

import numpy as np


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A text as token ids.

    Attributes:
        source: where the text came from.
        vocabulary: the characters, sorted; an id is an index into them.
        ids: the text, int32.
    """

    source: str
    vocabulary: str
    ids: np.ndarray

    @classmethod
    def load(cls, path: Path | None = None) -> "Corpus":
        """Return the text of a UTF-8 file, or the language reference that every CPython has."""
        if path is None:
            from pydoc_data.topics import topics

            return cls.from_text("\n".join(topics[name] for name in sorted(topics)), "pydoc_data")
        try:
            return cls.from_text(path.read_text(encoding="utf-8"), str(path))
        except OSError as error:
            reason = error.strerror or error
            raise ValueError(f"data file {path}: {reason}. Give a UTF-8 text file.") from error
        except UnicodeDecodeError as error:
            raise ValueError(
                f"data file {path}: byte {error.start} is not UTF-8. Give a UTF-8 text file."
            ) from error

    @classmethod
    def from_text(cls, text: str, source: str) -> "Corpus":
        """Return a text of 1,000 characters or more, which are numbered in sorted order."""
        vocabulary = "".join(sorted(set(text)))
        if len(text) < 1000 or len(vocabulary) < 2:
            raise ValueError(
                f"data file {source}: {len(text)} characters, {len(vocabulary)} different ones. A "
                "check needs 1,000 and 2. Give a longer text."
            )
        number = {character: index for index, character in enumerate(vocabulary)}
        return cls(source, vocabulary, np.array([number[c] for c in text], np.int32))

    @classmethod
    def from_ids(cls, ids: np.ndarray, source: str) -> "Corpus":
        """Return a corpus of given ids, whose characters are unknown."""
        return cls(source, "", np.asarray(ids, np.int32))

    def split(self, held_out: float = 0.1) -> tuple["Corpus", "Corpus"]:
        """Return the beginning of the text, to train on, and its end, to evaluate on."""
        cut = int(len(self.ids) * (1.0 - held_out))
        front, end = (dataclasses.replace(self, ids=x) for x in (self.ids[:cut], self.ids[cut:]))
        return front, end

    def pieces(self, length: int, most: int) -> np.ndarray:
        """Return at most `most` adjacent passages (N, length), evenly spread.

        A text shorter than one passage gives one that wraps around its end.
        """
        num = max(len(self.ids) // length, 1)
        kept = np.unique(np.linspace(0, num - 1, min(num, most)).astype(int))
        return self.ids[(kept[:, None] * length + np.arange(length)) % len(self.ids)]

    def windows(self, num: int, length: int, *seed: int) -> np.ndarray:
        """Return passages (num, length) from random places, the same ones for the same seed.

        A text shorter than a passage wraps around its end.
        """
        starts = np.random.default_rng(seed).integers(0, len(self.ids), num)
        return self.ids[(starts[:, None] + np.arange(length)) % len(self.ids)]


def encode(vocabulary: str, text: str) -> np.ndarray:
    """Return the ids of a text, int32; it must not be empty."""
    unknown = sorted(set(text) - set(vocabulary))
    if unknown or not text:
        found = "an empty prompt" if not text else f"{', '.join(map(repr, unknown[:5]))} unknown"
        raise ValueError(
            f"prompt: {found}. A prompt is characters of the text that was trained on, one at "
            f"least. There are {len(vocabulary)}: {''.join(c for c in vocabulary if c > ' ')}"
        )
    return np.array([vocabulary.index(character) for character in text], np.int32)


def decode(vocabulary: str, ids: np.ndarray) -> str:
    """Return the text of ids."""
    return "".join(vocabulary[index] for index in ids)
