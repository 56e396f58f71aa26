"""Compare the twins' logits and all decoders' tokens before anything is timed."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from parity.bench.decoders.flax import FlaxStep
from parity.bench.decoders.torch import TorchStep
from parity.bench.result import Agreement, Tie
from parity.check import bounds
from parity.check.ties import verdict_of_flip
from parity.report.record import Verdict

# Largest difference between the twins' logits, over the largest logit.
LOGITS = {"float32": bounds.OUTPUT_FLOAT32, "bfloat16": bounds.OUTPUT_FLOAT16}


@dataclasses.dataclass(frozen=True)
class Reference:
    """The tokens that every decoder must write.

    Attributes:
        tokens_BG: of the flax step.
        logits: (B, V) for each of them, from which it was chosen.
        noise: largest difference between the twins' logits.
        task: its description, for messages.
    """

    tokens_BG: np.ndarray
    logits: Sequence[np.ndarray]
    noise: float
    task: str

    def compare(self, name: str, tokens_BG: np.ndarray) -> tuple[Tie, ...]:
        """Compare a decoder's tokens, possibly fewer, each row up to its first difference.

        Returns:
            Where rows differ between two practically equal logits.

        Raises:
            ValueError: for a row that differs anywhere else.
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
                    f"bench: token {number} of row {row} in {self.task}: flax step "
                    f"{ours[number]}, {name} {theirs[number]}, whose logit is {gap:.1e} lower, "
                    f"where the twins' logits differ by {self.noise:.1e}. Only decoders that "
                    f"write the same are worth timing. Find out why, or leave it out by "
                    f"--without '{name}'."
                )
            ties.append(Tie(row, number, gap))
        return tuple(ties)


def agree(
    flax_step: FlaxStep, torch_step: TorchStep, tokens_BG: np.ndarray
) -> tuple[Reference, Agreement]:
    """Feed both twins the tokens of the flax step, each through its own cache.

    Returns:
        What every decoder must write, and how far the twins are apart.

    Raises:
        ValueError: if their logits differ; NaN differs from everything.
    """
    task, logits = flax_step.task, []
    noise = largest = 0.0
    pairs = zip(flax_step.logits_along(tokens_BG), torch_step.logits_along(tokens_BG), strict=True)
    for ours_BV, theirs_BV in pairs:
        noise = float(np.maximum(noise, np.max(np.abs(ours_BV - theirs_BV))))  # NaN stays
        largest = max(largest, float(np.max(np.abs(ours_BV))))
        logits.append(ours_BV)
    gap, bound = noise / largest, LOGITS[task.config.dtype]
    if not gap <= bound:
        raise ValueError(
            f"bench: logits of flax and torch in {task}: {gap:.1e} of the largest apart > "
            f"{bound:.0e}. Only twins that compute the same are worth timing. Find out where they "
            "diverge by `parity check`."
        )
    reference = Reference(tokens_BG, logits, noise, str(task))
    count = sum(x.size for x in logits)
    return reference, Agreement(gap, bound, noise, count, len(np.unique(tokens_BG)))
