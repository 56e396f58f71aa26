"""The options of `parity generate`, and what kind of folder its source is."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from parity.cli.options import frameworks

if TYPE_CHECKING:
    from flax_gpt import Sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """The options of `parity generate`, by the names of its parameters."""

    source: str
    prompt: str
    tokens: int
    temperature: float
    top_k: int | None
    top_p: float
    min_p: float
    seed: int
    only: str | None
    cache: bool
    device: str
    beams: int | None
    draft: str | None
    speculate: int | None

    @property
    def searches(self) -> bool:
        """Whether the text is searched for or guessed, and not written token by token.

        Raises:
            ValueError: for options that exclude each other.
        """
        guesses = self.draft is not None or self.speculate is not None
        if self.beams is not None and guesses:
            raise ValueError("generate: --beams and --speculate. Each goes alone. Drop one.")
        if (self.beams is not None or guesses) and not self.cache:
            raise ValueError("generate: --no-cache. Beams and guesses are rows of a cache.")
        return self.beams is not None or guesses

    @property
    def frameworks(self) -> tuple[str, ...]:
        """The twins that write."""
        return frameworks(self.only)

    def sampling(self) -> "Sampling":
        """Return how each token is chosen.

        Raises:
            ValueError: for numbers outside their range.
        """
        from flax_gpt import Sampling

        return Sampling(
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p
        )


def is_checkpoint(source: str) -> bool:
    """Whether it is not a run: a folder of transformers or of `parity convert`, or a hub's name."""
    path = Path(source)
    if not path.is_dir():
        return "/" in source
    try:
        document = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return not (path / "config.json").exists() and any(path.glob("*.safetensors"))
    return isinstance(document, dict) and bool({"model_type", "format"} & set(document))
