"""Text in and out of a checkpoint by its tokenizer.json; without one, a text is ids."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from parity.checkpoints.files import read_json

_CUT = "\N{REPLACEMENT CHARACTER}"  # what half a character decodes to


class Tokens:
    """Ids of a checkpoint as text, and back.

    Args:
        path: its folder.
        vocab_size: ids that the model has.

    Attributes:
        stop_ids: that end a text, by generation_config.json or config.json.

    Raises:
        ValueError: for a tokenizer.json that cannot be read; in one line.
    """

    def __init__(self, path: Path, vocab_size: int):
        self._vocab_size, self._tokenizer = vocab_size, None
        self.stop_ids = _stop_ids(path)
        file = path / "tokenizer.json"
        if file.is_file():
            import tokenizers

            try:
                self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
            except Exception as error:  # it has no class of its own for a bad file
                reason = str(error).partition("\n")[0]
                raise ValueError(f"{file}: cannot be read ({reason}). Get it again.") from error
            # A text is read whole, whatever the tokenizer was last used for.
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()

    @property
    def reads_text(self) -> bool:
        """Whether there is a tokenizer."""
        return self._tokenizer is not None

    def encode(self, text: str) -> list[int]:
        """Return the ids of a prompt.

        Raises:
            ValueError: for an empty prompt, or ids that the model does not have.
        """
        if self._tokenizer is not None:
            ids = self._tokenizer.encode(text).ids
        else:
            parts = text.split()
            if not all(part.isdecimal() for part in parts):
                raise ValueError(
                    f"prompt {text!r}: the checkpoint has no tokenizer.json. Without one a prompt "
                    "is ids with spaces between. Put a tokenizer.json into the folder, or give ids."
                )
            ids = [int(part) for part in parts]
        return self._known(ids, f"prompt {text!r}")

    def of_text(self, text: str, seed: int) -> np.ndarray:
        """Return the ids of a long text; without a tokenizer, random ids, one for each character.

        Raises:
            ValueError: for ids that the model does not have.
        """
        if self._tokenizer is None:
            rng = np.random.default_rng((seed, 6))
            return rng.integers(0, self._vocab_size, len(text), dtype=np.int32)
        return np.asarray(self._known(self._tokenizer.encode(text).ids, "the text"), np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without a character that is not whole yet."""
        if self._tokenizer is None:
            return "".join(f" {index}" for index in ids)
        return self._tokenizer.decode(list(ids), skip_special_tokens=False).rstrip(_CUT)

    def _known(self, ids: list[int], what: str) -> list[int]:
        if not ids or max(ids) >= self._vocab_size:
            found = f"id {max(ids)}" if ids else "no ids"
            raise ValueError(
                f"{what}: {found}, the model has {self._vocab_size}. A text is at least one id "
                "below that. Give another text, or the tokenizer of this checkpoint."
            )
        return ids


def _stop_ids(path: Path) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        file = path / name
        if not file.is_file():
            continue
        stop = read_json(file).get("eos_token_id")
        if stop is not None:
            return tuple(stop) if isinstance(stop, list) else (stop,)
    return ()
