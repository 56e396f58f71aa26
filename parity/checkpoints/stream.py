"""Both twins of a checkpoint write in step, a token at a time, each through its own cache."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import torch

import flax_gpt
import torch_gpt
from flax_gpt import Sampling
from parity.check import bounds
from parity.check.ties import verdict_of_flip
from parity.checkpoints.folder import Weights
from parity.frameworks.flax.scope import jax_scope
from parity.frameworks.torch.leaves import to_numpy
from parity.report.record import Verdict
from parity.system.devices import Devices, pinned_precision


@dataclasses.dataclass(frozen=True)
class Choice:
    """One token.

    Attributes:
        token: its id, by flax where it writes, which both go on from.
        margin: by how much its score beat the second best.
        others: what the other twin chose; None where it agrees or does not write.
        gap: largest difference between the twins' logits; None for one twin.
        verdict: PASS where they agree, TIE where the margin is within what the gap explains.
    """

    token: int
    margin: float
    others: int | None = None
    gap: float | None = None
    verdict: Verdict = Verdict.PASS


def stream(
    weights: Weights,
    ids: Sequence[int],
    num_tokens: int,
    sampling: Sampling,
    seed: int,
    devices: Devices,
    frameworks: Sequence[str] = ("flax", "torch"),
    use_cache: bool = True,
) -> Iterator[Choice]:
    """Continues ids.

    Args:
        weights: of a checkpoint.
        ids: the prompt.
        num_tokens: to write.
        sampling: how tokens are chosen.
        seed: of the draws, the same noise in both twins.
        devices: where they run.
        frameworks: who writes.
        use_cache: without it every token reads everything again.

    Raises:
        ValueError: when the prompt and the new tokens do not fit into the context.
    """
    config = weights.config
    total = len(ids) + num_tokens
    if total > config.context_length:
        raise ValueError(
            f"generate: {len(ids)} prompt tokens + {num_tokens} new tokens = {total} > "
            f"context_length {config.context_length}. Ask for at most "
            f"{max(config.context_length - len(ids), 0)}."
        )
    kinds = {"flax": _Flax, "torch": _Torch}
    with pinned_precision():
        writers = [kinds[name](weights, devices, sampling, seed) for name in frameworks]
        logits = [writer.read(ids, use_cache) for writer in writers]
        for step in range(num_tokens):
            pairs = list(zip(writers, logits, strict=True))
            scores = [writer.scores(logits_1V, step) for writer, logits_1V in pairs]
            plain = [writer.numbers(logits_1V) for writer, logits_1V in pairs]
            if not all(np.all(np.isfinite(x)) for x in plain):
                raise ValueError(
                    f"generate: logits of token {step + 1} are not finite in {config.dtype}. "
                    "Nothing can be chosen from them. Convert the checkpoint to a wider type."
                )
            choice = _choose(scores, plain, config.dtype, sampling.temperature)
            yield choice
            if step + 1 < num_tokens:
                logits = [writer.extend(choice.token) for writer in writers]


def _choose(
    scores: list[np.ndarray], logits: list[np.ndarray], dtype: str, temperature: float
) -> Choice:
    """The first twin's token; where the other has another one, whether rounding explains it."""
    tokens = [int(np.argmax(x)) for x in scores]
    margins = [_margin(x) for x in scores]
    if len(scores) == 1:
        return Choice(tokens[0], margins[0])
    gap = float(np.max(np.abs(logits[0] - logits[1])))
    if tokens[0] == tokens[1]:
        return Choice(tokens[0], margins[0], None, gap)
    bound = bounds.LOGITS.get(dtype, bounds.FLOAT16 * float(np.max(np.abs(logits[0]))))
    verdict = verdict_of_flip(max(margins), gap, bound, temperature)
    return Choice(tokens[0], margins[0], tokens[1], gap, verdict)


def _margin(scores_V: np.ndarray) -> float:
    best, second = np.sort(scores_V)[-1:-3:-1] if scores_V.size > 1 else (scores_V[0], -np.inf)
    return float(best - second)


class _Flax:
    def __init__(self, weights: Weights, devices: Devices, sampling: Sampling, seed: int):
        self._scope = lambda: jax_scope(weights.config.dtype, devices.flax)
        with self._scope():
            self._decoder = flax_gpt.Decoder(weights.flax(devices.flax), 1)
            self._key = flax_gpt.random.key(seed)
        self._sampling, self._cache = sampling, None

    def read(self, ids: Sequence[int], use_cache: bool) -> jax.Array:
        self._ids, self._use_cache = list(ids), use_cache
        with self._scope():
            logits_1V, self._cache = self._decoder.prefill(np.asarray([self._ids], np.int32))
        return logits_1V

    def extend(self, token: int) -> jax.Array:
        if not self._use_cache:
            return self.read([*self._ids, token], False)
        with self._scope():
            tokens_1 = jnp.asarray([token], jnp.int32)
            logits_1V, self._cache = self._decoder.advance(tokens_1, self._cache)
        return logits_1V

    def scores(self, logits_1V: jax.Array, step: int) -> np.ndarray:
        with self._scope():
            scores_1V = logits_1V.astype(jnp.promote_types(logits_1V.dtype, jnp.float32))
            if self._sampling.temperature > 0.0:
                left_1V = flax_gpt.filter_logits(logits_1V, self._sampling)
                key = flax_gpt.random.fold_in(self._key, step)
                scores_1V = flax_gpt.random.perturb(key, left_1V)
            return self.numbers(scores_1V)

    def numbers(self, scores_1V: jax.Array) -> np.ndarray:
        return np.asarray(scores_1V)[0].astype(np.float64)


class _Torch:
    def __init__(self, weights: Weights, devices: Devices, sampling: Sampling, seed: int):
        self._decoder = torch_gpt.Decoder(weights.torch(devices.torch).eval(), 1)
        self._key = torch_gpt.random.key(seed)
        self._device = devices.torch
        self._sampling = torch_gpt.Sampling(**dataclasses.asdict(sampling))

    @torch.no_grad()
    def read(self, ids: Sequence[int], use_cache: bool) -> torch.Tensor:
        self._ids, self._use_cache = list(ids), use_cache
        logits_1V, self._cache = self._decoder.prefill(torch.tensor([self._ids]))
        return logits_1V

    @torch.no_grad()
    def extend(self, token: int) -> torch.Tensor:
        if not self._use_cache:
            return self.read([*self._ids, token], False)
        tokens_1 = torch.tensor([token], device=self._device)
        logits_1V, self._cache = self._decoder.advance(tokens_1, self._cache)
        return logits_1V

    @torch.no_grad()
    def scores(self, logits_1V: torch.Tensor, step: int) -> np.ndarray:
        scores_1V = logits_1V.to(torch.promote_types(logits_1V.dtype, torch.float32))
        if self._sampling.temperature > 0.0:
            left_1V = torch_gpt.filter_logits(logits_1V, self._sampling)
            key = torch_gpt.random.fold_in(self._key, step)
            scores_1V = torch_gpt.random.perturb(key, left_1V)
        return self.numbers(scores_1V)

    def numbers(self, scores_1V: torch.Tensor) -> np.ndarray:
        return to_numpy(scores_1V)[0].astype(np.float64)
