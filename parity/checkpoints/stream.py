"""Both twins of a checkpoint write in lockstep, token by token, each through its own cache."""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from flax_gpt import Sampling
from parity.check import bounds
from parity.check.ties import verdict_of_flip
from parity.checkpoints.weights import Weights
from parity.report.record import Verdict
from parity.system.devices import Devices, pinned_precision
from parity.twins.both import build_twins
from parity.twins.names import FRAMEWORKS


@dataclasses.dataclass(frozen=True)
class Writing:
    """How a text is continued.

    Attributes:
        num_tokens: to write.
        sampling: how each token is chosen.
        seed: of the draws, with the same noise in both twins.
        frameworks: the twins that write.
        use_cache: False reads the whole text again for every token.
    """

    num_tokens: int
    sampling: Sampling
    seed: int = 0
    frameworks: Sequence[str] = FRAMEWORKS
    use_cache: bool = True


@dataclasses.dataclass(frozen=True)
class Choice:
    """One token.

    Attributes:
        token: the id chosen by the first twin that writes, with which both go on.
        margin: by how much its score beat the second best.
        others: the id chosen by the other twin; None where it agrees or does not write.
        gap: largest difference between the twins' logits; None for one twin.
        verdict: PASS where they agree, TIE where the margin is within what the gap explains.
    """

    token: int
    margin: float
    others: int | None = None
    gap: float | None = None
    verdict: Verdict = Verdict.PASS


def stream(
    weights: Weights, ids: Sequence[int], writing: Writing, devices: Devices
) -> Iterator[Choice]:
    """Continue ids, and yield each token as it is chosen.

    Args:
        weights: of a checkpoint.
        ids: the prompt.
        writing: how it is continued.
        devices: where the twins run.

    Yields:
        A choice for each token.

    Raises:
        ValueError: when the prompt and the new tokens do not fit into the context.
    """
    config, num_tokens = weights.config, writing.num_tokens
    total = len(ids) + num_tokens
    if total > config.context_length:
        raise ValueError(
            f"generate: {len(ids)} prompt tokens + {num_tokens} new tokens = {total} > "
            f"context_length {config.context_length}. Ask for at most "
            f"{max(config.context_length - len(ids), 0)}."
        )
    sampling = dataclasses.asdict(writing.sampling)
    with pinned_precision():
        streams = [
            twin.stream(ids, sampling, writing.seed, writing.use_cache)
            for twin in build_twins(config, devices, weights.leaves, writing.frameworks).values()
        ]
        for step in range(num_tokens):
            logits = [x.logits_V for x in streams]
            if not all(np.all(np.isfinite(x)) for x in logits):
                raise ValueError(
                    f"generate: logits of token {step + 1} are not finite in {config.dtype}. "
                    "Nothing can be chosen from them. Convert the checkpoint to a wider type."
                )
            scores = [x.scores_V for x in streams]
            choice = _choose(scores, logits, config.dtype, writing.sampling.temperature)
            yield choice
            if step + 1 < num_tokens:
                for x in streams:
                    x.append(choice.token)


def _choose(
    scores: list[np.ndarray], logits: list[np.ndarray], dtype: str, temperature: float
) -> Choice:
    """Return the first twin's token; where the other's differs, whether rounding explains it."""
    tokens = [int(np.argmax(x)) for x in scores]
    margins = [_margin(x) for x in scores]
    if len(scores) == 1:
        return Choice(tokens[0], margins[0])
    gap = float(np.max(np.abs(logits[0] - logits[1])))
    if tokens[0] == tokens[1]:
        return Choice(tokens[0], margins[0], None, gap)
    bound = bounds.LOGITS.get(dtype, bounds.OUTPUT_FLOAT16 * float(np.max(np.abs(logits[0]))))
    verdict = verdict_of_flip(max(margins), gap, bound, temperature)
    return Choice(tokens[0], margins[0], tokens[1], gap, verdict)


def _margin(scores_V: np.ndarray) -> float:
    best, second = np.sort(scores_V)[-1:-3:-1] if scores_V.size > 1 else (scores_V[0], -np.inf)
    return float(best - second)
