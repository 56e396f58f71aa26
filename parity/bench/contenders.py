"""What is timed, behind two methods, and what all of them are given.

`prefill` reads the prompt and waits. `turn` first puts everything back to the state behind the
prompt, which no clock sees, and then writes. Its tokens begin with the one that the prompt itself
has chosen; each step appends a token to every row and chooses the next.
"""

import dataclasses
from typing import Protocol

import numpy as np

import flax_gpt
from parity.system.devices import Devices


@dataclasses.dataclass(frozen=True)
class Cell:
    """One prompt to go on from.

    Attributes:
        config: of the model.
        prompt_BT: token ids.
        num_steps: steps of a full turn.
        devices: where each framework runs.
    """

    config: flax_gpt.GPTConfig
    prompt_BT: np.ndarray
    num_steps: int
    devices: Devices

    @property
    def batch_size(self) -> int:
        """Rows."""
        return self.prompt_BT.shape[0]

    @property
    def prompt_length(self) -> int:
        """Tokens of a row before the first turn."""
        return self.prompt_BT.shape[1]

    @property
    def context(self) -> int:
        """Tokens of a row when a full turn ends."""
        return self.prompt_length + self.num_steps

    @property
    def words(self) -> str:
        """Which it is, for messages."""
        return f"{self.config.dtype}, batch {self.batch_size}, context {self.context}"


@dataclasses.dataclass(frozen=True)
class Turn:
    """Tokens (B, 1 + steps), the first of which is the prompt's, and the seconds of all steps."""

    tokens_BG: np.ndarray
    seconds: float


class Contender(Protocol):
    """What the bench needs of whoever decodes.

    Attributes:
        name: in tables.
        framework: whose it is.
        form: cached, uncached, or loop for all steps in one call.
        ran: what exactly is timed, in words.
        reads: whether `prefill` reads the prompt; the others leave that to another contender.
        extra_bytes: of weights that it holds beside the twin's own; None where unknown.
    """

    name: str
    framework: str
    form: str
    ran: str
    reads: bool
    extra_bytes: int | None

    def prefill(self) -> None:
        """Reads the prompt and waits."""
        ...

    def turn(self, num_steps: int) -> Turn:
        """Writes behind the prompt."""
        ...


def garbage_like(shape: tuple[int, ...]) -> np.ndarray:
    """Numbers as large as keys and values are, in float32."""
    return np.resize(_GARBAGE, shape)


_GARBAGE = np.random.default_rng(0).standard_normal(10_007).astype(np.float32)
