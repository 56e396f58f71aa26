"""The harness's first client: flax_gpt and torch_gpt as a pair."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

import flax_gpt
import torch_gpt
from parity.corpus import Corpus
from parity.leaves import Leaves, flax_leaves, to_numpy, torch_leaves
from parity.pair import Batch, Pair, Side
from parity.rules import TWINS

Calls = list[tuple[np.ndarray, np.ndarray]]

_PROBE_SIZE = 1 << 26  # logits of one probe at most, half a gigabyte in float64
_PROMPT_LENGTH = 64


def twins(corpus: Corpus, preset: str = "tiny", seed: int = 0, max_new_tokens: int = 256) -> Pair:
    """The two GPTs at a preset's size, with probes cut from a text.

    Args:
        corpus: the text; `tiny` takes its vocabulary size from it.
        preset: one of `flax_gpt.PRESETS`.
        seed: of the passages.
        max_new_tokens: tokens to generate behind each prompt; the prompts leave room for them.

    Raises:
        ValueError: for an unknown preset, a vocabulary it cannot hold, or too many new tokens.
    """
    changes = {"vocab_size": len(corpus.vocabulary)} if preset == "tiny" else {}
    config = flax_gpt.GPTConfig.preset(preset, **changes)
    train_config = flax_gpt.TrainConfig()
    if len(corpus.vocabulary) > config.vocab_size:
        raise ValueError(
            f"check: {len(corpus.vocabulary)} different characters in {corpus.source} > vocabulary "
            f"{config.vocab_size} of {preset}. Each needs an id. Give another text or preset."
        )
    context = config.context_length
    prompt_length = min(_PROMPT_LENGTH, context - max_new_tokens)
    if not 4 <= prompt_length:
        raise ValueError(
            f"check: {max_new_tokens} new tokens leave {context - max_new_tokens} of context "
            f"{context} for the prompts, which need 4. Ask for at most {context - 4}."
        )
    counts = np.array([prompt_length, prompt_length * 3 // 4, prompt_length // 2, 1], np.int32)
    sequence_counts = np.array([96, 95, 33, 1], np.int32)
    return Pair(
        flax=Side(
            name="flax_gpt",
            build=lambda dtype: flax_gpt.GPT(dataclasses.replace(config, dtype=dtype)),
            forward=_flax_forward,
            loss=_flax_loss,
            trainer=lambda model: FlaxTrainer(model, train_config),
            decoder=FlaxDecoder,
        ),
        torch=Side(
            name="torch_gpt",
            build=lambda dtype: torch_gpt.GPT(_torch_config(config, dtype)),
            forward=_torch_forward,
            loss=_torch_loss,
            trainer=lambda model: TorchTrainer(model, train_config),
            decoder=TorchDecoder,
        ),
        rules=TWINS,
        probes=_probes(corpus, config, seed),
        training_batch=lambda step: Batch((corpus.windows(8, 64, seed, 1, step),)),
        learning_rate=train_config.learning_rate,
        prompts=(corpus.windows(4, prompt_length, seed, 2), counts),
        sequences=(corpus.windows(4, 96, seed, 3), sequence_counts),
        config=dataclasses.asdict(config) | {"preset": preset, "data": corpus.source},
    )


def _probes(corpus: Corpus, config: flax_gpt.GPTConfig, seed: int) -> dict[str, Batch]:
    """Inputs that reach bugs: the ends of the context, one token, padding, repetition."""
    context = config.context_length
    rows = int(np.clip(_PROBE_SIZE // (context * config.vocab_size), 1, 4))
    tokens = corpus.windows(rows, context, seed, 0)
    tokens[-1, :] = tokens[-1, 0] if rows > 1 else tokens[-1]
    counts = np.array([context, context * 2 // 3, 17, context], np.int32)[:rows]
    real = np.arange(context) < counts[:, None]
    return {
        "full context, ragged": Batch((tokens, counts), real),
        "context - 1": Batch((corpus.windows(1, context - 1, seed, 4),)),
        "one token": Batch((corpus.windows(4, 1, seed, 5),)),
    }


def _flax_forward(
    model: flax_gpt.GPT, tokens: jax.Array, counts: jax.Array | None = None
) -> jax.Array:
    return model(tokens, counts_B=counts)[0]


def _torch_forward(
    model: torch_gpt.GPT, tokens: torch.Tensor, counts: torch.Tensor | None = None
) -> torch.Tensor:
    return model(tokens, counts_B=counts)[0]


def _flax_loss(
    model: flax_gpt.GPT, tokens: jax.Array, counts: jax.Array | None = None
) -> jax.Array:
    return flax_gpt.next_token_loss(_flax_forward(model, tokens, counts), tokens, counts).mean


def _torch_loss(
    model: torch_gpt.GPT, tokens: torch.Tensor, counts: torch.Tensor | None = None
) -> torch.Tensor:
    return torch_gpt.next_token_loss(_torch_forward(model, tokens, counts), tokens, counts).mean


def _torch_config(config: flax_gpt.GPTConfig, dtype: str) -> torch_gpt.GPTConfig:
    return torch_gpt.GPTConfig(**dataclasses.asdict(config) | {"dtype": dtype})


class FlaxTrainer:
    """Training by flax_gpt.train_step."""

    def __init__(self, model: flax_gpt.GPT, config: flax_gpt.TrainConfig):
        self._state = flax_gpt.TrainState.create(model, config)

    def step(self, tokens: np.ndarray) -> float:
        """One step; the loss before it."""
        loss, self._state = flax_gpt.train_step(jnp.asarray(tokens), self._state)
        return float(loss.mean)

    def parameters(self) -> Leaves:
        """The present weights."""
        return flax_leaves(self._state.model)

    def moments(self) -> tuple[Leaves, Leaves, int]:
        """First and second moments by leaf, and the number of steps."""
        adam = self._state.optimizer[0]
        return _by_path(adam.mu), _by_path(adam.nu), int(adam.count)


class TorchTrainer:
    """Training by torch_gpt.train_step."""

    def __init__(self, model: torch_gpt.GPT, config: flax_gpt.TrainConfig):
        config = torch_gpt.TrainConfig(**dataclasses.asdict(config))
        self._state = torch_gpt.TrainState.create(model, config)

    def step(self, tokens: np.ndarray) -> float:
        """One step; the loss before it."""
        device = self._state.model.token_embedding.weight.device
        tokens = torch.from_numpy(tokens).long().to(device)
        loss, self._state = torch_gpt.train_step(tokens, self._state)
        return float(loss.mean)

    def parameters(self) -> Leaves:
        """The present weights."""
        return torch_leaves(self._state.model)

    def moments(self) -> tuple[Leaves, Leaves, int]:
        """First and second moments by leaf, and the number of steps."""
        states = {
            name: self._state.optimizer.state[parameter]
            for name, parameter in self._state.model.named_parameters()
        }
        first = {name: to_numpy(state["exp_avg"]) for name, state in states.items()}
        second = {name: to_numpy(state["exp_avg_sq"]) for name, state in states.items()}
        (count,) = {int(state["step"]) for state in states.values()}
        return first, second, count


class FlaxDecoder:
    """Decoding by flax_gpt's cache."""

    def __init__(self, model: flax_gpt.GPT):
        self._model = model
        graphdef, self._parameters = nnx.split(model)
        self._call = jax.jit(lambda parameters, *args: nnx.merge(graphdef, parameters)(*args))

    def chunks(self, calls: Calls, capacity: int) -> list[np.ndarray]:
        """Logits of each call (tokens (B, T), counts (B,)), one cache through all of them."""
        cache = flax_gpt.KVCache.empty(self._model.config, len(calls[0][0]), capacity)
        logits = []
        for tokens, counts in calls:
            cache.check_room(tokens.shape[1], jnp.asarray(counts))
            out, cache = self._call(self._parameters, jnp.asarray(tokens), cache, counts)
            logits.append(np.asarray(out))
        return logits

    def generate(
        self, tokens: np.ndarray, counts: np.ndarray, max_new_tokens: int, use_cache: bool
    ) -> np.ndarray:
        """Greedy tokens (B, G)."""
        generation = flax_gpt.generate(
            self._model, tokens, max_new_tokens, counts, use_cache=use_cache
        )
        return np.asarray(generation.tokens_BG)


class TorchDecoder:
    """Decoding by torch_gpt's cache."""

    def __init__(self, model: torch_gpt.GPT):
        self._model = model
        self._device = model.token_embedding.weight.device

    def chunks(self, calls: Calls, capacity: int) -> list[np.ndarray]:
        """Logits of each call (tokens (B, T), counts (B,)), one cache through all of them."""
        batch_size = len(calls[0][0])
        cache = torch_gpt.KVCache.empty(
            self._model.config, batch_size, capacity, device=self._device
        )
        logits = []
        with torch.no_grad():
            for tokens, counts in calls:
                tokens, counts = (
                    torch.from_numpy(x).long().to(self._device) for x in (tokens, counts)
                )
                out, cache = self._model(tokens, cache, counts)
                logits.append(to_numpy(out))
        return logits

    def generate(
        self, tokens: np.ndarray, counts: np.ndarray, max_new_tokens: int, use_cache: bool
    ) -> np.ndarray:
        """Greedy tokens (B, G)."""
        generation = torch_gpt.generate(
            self._model, tokens, max_new_tokens, counts, use_cache=use_cache
        )
        return to_numpy(generation.tokens_BG).astype(np.int32)


def _by_path(state: Any) -> Leaves:
    return {".".join(map(str, p)): np.asarray(v[...]) for p, v in nnx.to_flat_state(state)}
