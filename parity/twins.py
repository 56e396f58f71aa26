"""The harness's first client: flax_gpt and torch_gpt as a pair."""

import dataclasses
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

import flax_gpt
import torch_gpt
from parity.corpus import Corpus
from parity.leaves import Leaves, dotted, flax_leaves, to_numpy, torch_leaves
from parity.pair import Batch, Pair, Side
from parity.rules import TWINS

Calls = list[tuple[np.ndarray, np.ndarray]]

_PROBE_SIZE = 1 << 26  # logits of one probe at most, half a gigabyte in float64
_PROMPT_LENGTH = 64
_SEQUENCE_LENGTH = 96
_TRAINING_BATCH = 8, 64


def preset_config(corpus: Corpus, preset: str) -> flax_gpt.GPTConfig:
    """A preset's sizes; `tiny` takes its vocabulary size from the text.

    Raises:
        ValueError: for an unknown preset.
    """
    changes = {"vocab_size": len(corpus.vocabulary)} if preset == "tiny" else {}
    return flax_gpt.GPTConfig.preset(preset, **changes)


def twins(
    corpus: Corpus,
    config: flax_gpt.GPTConfig | None = None,
    *,
    seed: int = 0,
    max_new_tokens: int = 256,
    flax_package: ModuleType = flax_gpt,
    torch_package: ModuleType = torch_gpt,
) -> Pair:
    """The two GPTs as a pair, with probes cut from a text.

    Args:
        corpus: the text.
        config: their sizes; the `tiny` preset when None.
        seed: of the passages.
        max_new_tokens: tokens to generate behind each prompt; the prompts leave room for them.
        flax_package: the Flax twin, or a changed copy of it.
        torch_package: the PyTorch twin, or a changed copy of it.

    Raises:
        ValueError: for a vocabulary that the model cannot hold, or too many new tokens.
    """
    config = config or preset_config(corpus, "tiny")
    sizes, context = dataclasses.asdict(config), config.context_length
    training = dataclasses.asdict(flax_gpt.TrainConfig())
    if len(corpus.vocabulary) > config.vocab_size:
        raise ValueError(
            f"check: {len(corpus.vocabulary)} different characters in {corpus.source} > vocabulary "
            f"size {config.vocab_size}. Each needs an id. Give another text or a larger model."
        )
    room = context - max_new_tokens
    if room < 4:
        raise ValueError(
            f"check: {max_new_tokens} new tokens leave {room} of context {context} for prompts. "
            f"They need 4. Ask for at most {context - 4}."
        )

    flax_side = Side(
        name="flax_gpt",
        build=lambda dtype: flax_package.GPT(flax_package.GPTConfig(**sizes | {"dtype": dtype})),
        forward=_forward,
        loss=lambda *args: _loss(flax_package, *args),
        trainer=lambda model: FlaxTrainer(flax_package, model, training),
        decoder=lambda model: FlaxDecoder(flax_package, model),
    )
    torch_side = Side(
        name="torch_gpt",
        build=lambda dtype: torch_package.GPT(torch_package.GPTConfig(**sizes | {"dtype": dtype})),
        forward=_forward,
        loss=lambda *args: _loss(torch_package, *args),
        trainer=lambda model: TorchTrainer(torch_package, model, training),
        decoder=lambda model: TorchDecoder(torch_package, model),
    )
    rows, width = _TRAINING_BATCH
    width = min(width, context)
    prompt, length = min(_PROMPT_LENGTH, room), min(_SEQUENCE_LENGTH, context)
    return Pair(
        flax=flax_side,
        torch=torch_side,
        rules=TWINS,
        probes=_probes(corpus, config, seed),
        training_batch=lambda step: Batch((corpus.windows(rows, width, seed, 1, step),)),
        learning_rate=training["learning_rate"],
        prompts=(
            corpus.windows(4, prompt, seed, 2),
            np.array([prompt, prompt * 3 // 4, prompt // 2, 1], np.int32),
        ),
        new_tokens=max_new_tokens,
        sequences=(
            corpus.windows(4, length, seed, 3),
            np.array([length, length - 1, length // 3, 1], np.int32),
        ),
        config=sizes | {"data": corpus.source},
    )


def _probes(corpus: Corpus, config: flax_gpt.GPTConfig, seed: int) -> dict[str, Batch]:
    """Inputs that reach bugs: the ends of the context, one token, padding, repetition."""
    context = config.context_length
    rows = int(np.clip(_PROBE_SIZE // (context * config.vocab_size), 1, 4))
    probes = {
        "full context, ragged": _ragged(corpus, rows, context, seed),
        "context - 1": Batch((corpus.windows(1, context - 1, seed, 4),)),
        "one token": Batch((corpus.windows(4, 1, seed, 5),)),
    }
    if rows < 4:  # a large model's full context has no room for the rows that pad and repeat
        probes["short, ragged"] = _ragged(corpus, 4, min(64, context), seed)
    return probes


def _ragged(corpus: Corpus, rows: int, width: int, seed: int) -> Batch:
    """A full row, two with padding, and one that repeats a token; the first of these."""
    tokens = corpus.windows(rows, width, seed, 0)
    if rows == 4:
        tokens[3] = tokens[3, 0]
    counts = np.array([width, width * 2 // 3, min(17, width), width], np.int32)[:rows]
    return Batch((tokens, counts), np.arange(width) < counts[:, None])


def _forward(model: Any, tokens: Any, counts: Any = None) -> Any:
    """Logits of either twin."""
    return model(tokens, counts_B=counts)[0]


def _loss(package: ModuleType, model: Any, tokens: Any, counts: Any = None) -> Any:
    """Mean loss of either twin."""
    return package.next_token_loss(_forward(model, tokens, counts), tokens, counts).mean


class FlaxTrainer:
    """Training by flax_gpt.train_step."""

    def __init__(self, package: ModuleType, model: nnx.Module, constants: dict[str, float]):
        self._package = package
        self._state = package.TrainState.create(model, package.TrainConfig(**constants))

    def step(self, tokens: np.ndarray) -> float:
        """One step; the loss before it."""
        loss, self._state = self._package.train_step(jnp.asarray(tokens), self._state)
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

    def __init__(self, package: ModuleType, model: torch.nn.Module, constants: dict[str, float]):
        self._package = package
        self._state = package.TrainState.create(model, package.TrainConfig(**constants))

    def step(self, tokens: np.ndarray) -> float:
        """One step; the loss before it."""
        device = self._state.model.token_embedding.weight.device
        tokens = torch.from_numpy(tokens).long().to(device)
        loss, self._state = self._package.train_step(tokens, self._state)
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

    def __init__(self, package: ModuleType, model: nnx.Module):
        self._package, self._model = package, model
        graphdef, self._parameters = nnx.split(model)
        self._call = jax.jit(lambda parameters, *args: nnx.merge(graphdef, parameters)(*args))

    def chunks(self, calls: Calls, capacity: int) -> list[np.ndarray]:
        """Logits of each call (tokens (B, T), counts (B,)), one cache through all of them."""
        cache = self._package.KVCache.empty(self._model.config, len(calls[0][0]), capacity)
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
        generation = self._package.generate(
            self._model, tokens, max_new_tokens, counts, use_cache=use_cache
        )
        return np.asarray(generation.tokens_BG)


class TorchDecoder:
    """Decoding by torch_gpt's cache."""

    def __init__(self, package: ModuleType, model: torch.nn.Module):
        self._package, self._model = package, model
        self._device = model.token_embedding.weight.device

    def chunks(self, calls: Calls, capacity: int) -> list[np.ndarray]:
        """Logits of each call (tokens (B, T), counts (B,)), one cache through all of them."""
        batch_size = len(calls[0][0])
        cache = self._package.KVCache.empty(
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
        generation = self._package.generate(
            self._model, tokens, max_new_tokens, counts, use_cache=use_cache
        )
        return to_numpy(generation.tokens_BG).astype(np.int32)


def _by_path(state: Any) -> Leaves:
    return {dotted(p): np.asarray(v[...]) for p, v in nnx.to_flat_state(state)}
