"""Nothing is timed before it writes the same: how the twins' logits and all tokens are compared."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from parity.bench.contenders import Cell
from parity.bench.decode_times import Agreement, Tie
from parity.check import bounds
from parity.check.ties import verdict_of_flip
from parity.report.record import Verdict

# Largest difference between the twins' logits, over the largest logit.
LOGITS = {"float32": bounds.OUTPUT_FLOAT32, "bfloat16": bounds.OUTPUT_FLOAT16}


class Stepper(Protocol):
    """A twin that can be led along given tokens."""

    def logits_along(self, tokens_BG: np.ndarray) -> Iterator[np.ndarray]:
        """Logits (B, V) behind the prompt, and behind each of these tokens but the last."""
        ...


@dataclasses.dataclass(frozen=True)
class Reference:
    """What every contender must write.

    Attributes:
        tokens_BG: of the flax step.
        logits: (B, V) for each of them, from which it was chosen.
        noise: largest difference between the twins' logits.
        words: the cell, for messages.
    """

    tokens_BG: np.ndarray
    logits: Sequence[np.ndarray]
    noise: float
    words: str

    def compare(self, name: str, tokens_BG: np.ndarray) -> tuple[Tie, ...]:
        """Compares a contender's tokens, perhaps fewer, each row up to its first difference.

        Returns:
            Where rows part between two logits that are as good as equal.

        Raises:
            ValueError: for a row that parts anywhere else.
        """
        ties = []
        pairs = zip(self.tokens_BG[:, : tokens_BG.shape[1]], tokens_BG, strict=True)
        for row, (ours, theirs) in enumerate(pairs):
            different = np.flatnonzero(ours != theirs)
            if not different.size:
                continue
            number = int(different[0])
            logits_V = self.logits[number][row]
            gap = float(logits_V[ours[number]] - logits_V[theirs[number]])
            if verdict_of_flip(gap, self.noise) is Verdict.FAIL:
                raise ValueError(
                    f"bench: token {number} of row {row} in {self.words}: flax step "
                    f"{ours[number]}, {name} {theirs[number]}, whose logit is {gap:.1e} lower, "
                    f"where the twins' logits differ by {self.noise:.1e}. Only contenders that "
                    f"write the same are worth timing. Find out why, or leave it out by "
                    f"--without '{name}'."
                )
            ties.append(Tie(row, number, gap))
        return tuple(ties)


def agree(
    cell: Cell, flax_steps: Stepper, torch_steps: Stepper, tokens_BG: np.ndarray
) -> tuple[Reference, Agreement]:
    """Leads both twins along the tokens of the flax step, each through its own cache.

    Raises:
        ValueError: when their logits differ; NaN differs from everything.
    """
    logits, noise, largest = [], 0.0, 0.0
    pairs = zip(
        flax_steps.logits_along(tokens_BG), torch_steps.logits_along(tokens_BG), strict=True
    )
    for ours_BV, theirs_BV in pairs:
        noise = float(np.maximum(noise, np.max(np.abs(ours_BV - theirs_BV))))  # NaN stays
        largest = max(largest, float(np.max(np.abs(ours_BV))))
        logits.append(ours_BV)
    gap, bound = noise / largest, LOGITS[cell.config.dtype]
    if not gap <= bound:
        raise ValueError(
            f"bench: logits of flax and torch in {cell.words}: {gap:.1e} of the largest apart > "
            f"{bound:.0e}. Only twins that compute the same are worth timing. Find out where they "
            "part by `parity check`."
        )
    reference = Reference(tokens_BG, logits, noise, cell.words)
    count = sum(x.size for x in logits)
    return reference, Agreement(gap, bound, noise, count, len(np.unique(tokens_BG)))
