"""The two twins under examination, and copies of them with a bug in."""

import dataclasses
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

import flax_gpt
from parity.doctor.flax import FlaxModel
from parity.doctor.model import AdamW, LanguageModel, Score, Trainer
from parity.doctor.torch import TorchModel
from parity.frameworks.flax.scope import jax_scope
from parity.frameworks.leaves import cast
from parity.twins.flax import FlaxTwin as FlaxHandle
from parity.twins.torch import TorchTwin as TorchHandle

# Sizes that all differ, and dropout that only a call with a key may switch on.
CONFIG = flax_gpt.GPTConfig(
    vocab_size=29,
    context_length=24,
    embed_dim=48,
    num_layers=2,
    num_heads=4,
    mlp_dim=72,
    dropout=0.1,
    dtype="float64",
)

# Two ragged parts, a rate that moves, and a norm that is clipped: what one step can get wrong.
_SCHEDULE = dict(learning_rate=1e-2, warmup_steps=2, total_steps=8)
_TRAINING = dict(_SCHEDULE, schedule="cosine", clip_norm=0.5, accumulation_steps=2)


def twin_model(
    framework: str,
    package: ModuleType,
    config: Any = CONFIG,
    seed: int = 0,
    healthy: ModuleType | None = None,
) -> LanguageModel:
    """Build a twin, or a changed copy of it, with initial weights from a seed.

    Args:
        framework: flax or torch.
        package: flax_gpt or torch_gpt, or a changed copy of it.
        config: sizes, a GPTConfig of any copy.
        seed: of the weights and of the probes.
        healthy: the package that it should do the same as.
    """
    kind = {"flax": FlaxTwin, "torch": TorchTwin}[framework]
    with jax_scope(config.dtype, jax.devices()[0]):
        sizes = package.GPTConfig(**dataclasses.asdict(config))
        model = kind(package, package.GPT(sizes, package.random.key(seed)), seed)
    if healthy is not None:
        model.reference = twin_model(framework, healthy, config, seed)
    return model


class _Twin:
    """What both twins offer, under the names that their packages share."""

    takes_counts = True
    ragged = bounded = True

    def __init__(self, package: ModuleType, module: Any, seed: int):
        self.package = package
        super().__init__(module, ignore_index=package.IGNORE_INDEX, seed=seed)

    def forward(self, module: Any, tokens_BT: Any, counts_B: Any) -> Any:
        """Return logits (B, T, V)."""
        return module(tokens_BT, counts_B=counts_B)[0]

    def loss(self, logits_BTV: Any, labels_BT: Any, counts_B: Any) -> tuple[Any, Any]:
        """Return the total over the scored tokens, and their number."""
        found = self.package.next_token_loss(logits_BTV, labels_BT, counts_B)
        return found.total, found.num_tokens

    def cast(self, dtype: str) -> Self:
        """Return the same model in another type."""
        with jax_scope(dtype, jax.devices()[0]):
            sizes = dataclasses.asdict(self.module.config) | {"dtype": dtype}
            blank = self.with_module(self.package.GPT(self.package.GPTConfig(**sizes)))
            return blank.with_weights(cast(self.weights(), dtype))

    def evaluate(self, batches: list[tuple[np.ndarray, np.ndarray | None]]) -> Score:
        """Return the loss over all (tokens, counts)."""
        with self.op_by_op():
            given = [self.package.Batch(*map(self.ids, arrays)) for arrays in batches]
            found = self.package.evaluate(self.module, given).loss
            return Score(float(found.mean), int(found.num_tokens))

    def trainer(self, rate: float) -> Trainer:
        """Start a training by its own step, with little that slows it down."""
        return self._trainer(dict(learning_rate=rate, beta2=0.99, weight_decay=0.0))

    def reference_trainer(self) -> tuple[Trainer, AdamW]:
        """Start its training with every option switched on; return the constants too."""
        constants = self.package.TrainConfig(**_TRAINING)
        return self._trainer(_TRAINING), AdamW(
            rates=tuple(cosine_rates(**_SCHEDULE)),
            beta1=constants.beta1,
            beta2=constants.beta2,
            epsilon=constants.epsilon,
            weight_decay=constants.weight_decay,
            clip_norm=constants.clip_norm,
            decays=lambda name: (
                (".attention." in name or ".mlp." in name) and name.endswith((".weight", ".kernel"))
            ),
        )

    def dropout_losses(self, tokens_BT: np.ndarray) -> tuple[float, float] | None:
        """Return the losses of two training steps that change no weight; None without dropout."""
        if not self.module.config.dropout:
            return None
        frozen = self._trainer(dict(learning_rate=1e-300, weight_decay=0.0), seed=0)
        return frozen.step(tokens_BT), frozen.step(tokens_BT)

    def empty_cache(self, rows: int, capacity: int) -> Any:
        """Return a cache that holds nothing."""
        with self.scope():
            return self.package.KVCache.empty(self.module.config, rows, capacity)

    def read(
        self, tokens_BT: np.ndarray, cache: Any, counts_B: np.ndarray | None = None
    ) -> tuple[np.ndarray, Any]:
        """Return logits (B, T, V) and the longer cache."""
        with self.scope():
            logits_BTV, cache = self.module(self.ids(tokens_BT), cache, self.ids(counts_B))
            return np.asarray(logits_BTV), cache

    def select(self, cache: Any, rows: np.ndarray) -> Any:
        """Return the cache of these rows, in this order."""
        with self.scope():
            return cache.select(self.ids(rows))

    def truncate(self, cache: Any, lengths: np.ndarray) -> Any:
        """Return the cache cut back to one length per row."""
        with self.scope():
            return cache.truncate(self.ids(lengths))

    def generate(
        self,
        tokens_BT: np.ndarray,
        num_tokens: int,
        *,
        counts_B: np.ndarray | None = None,
        temperature: float = 0.0,
        seed: int = 0,
        stop_ids: tuple[int, ...] = (),
    ) -> np.ndarray:
        """Return new tokens (B, G) after each prompt, -1 after a row's stop."""
        with self.op_by_op():
            written = self.package.generate(
                self.module,
                self.ids(tokens_BT),
                num_tokens,
                counts_B=self.ids(counts_B),
                stop_ids=stop_ids,
                sampling=self.package.Sampling(temperature=temperature),
                key=self.package.random.key(seed) if temperature else None,
            )
            return np.asarray(written.tokens_BG)

    def attention(
        self, tokens_BT: np.ndarray, counts_B: np.ndarray | None = None
    ) -> list[np.ndarray]:
        """Return weights (B, N, T, S) per layer, captured where values are weighted by them."""
        mix, captured = self.package.model.mix, []

        def capture(weights_BKQTS: Any, parts: Any) -> Any:
            captured.append(weights_BKQTS)
            return mix(weights_BKQTS, parts)

        self.package.model.mix = capture
        try:
            with self.scope():
                self.module(self.ids(tokens_BT), counts_B=self.ids(counts_B))
                layers = [np.asarray(weights_BKQTS) for weights_BKQTS in captured]
        finally:
            self.package.model.mix = mix
        return [x.reshape(x.shape[0], -1, *x.shape[3:]) for x in layers]


class TorchTwin(_Twin, TorchModel):
    """The PyTorch twin, with weights."""

    def op_by_op(self) -> AbstractContextManager:
        """Return the context of its calls: torch knows no other way."""
        return self.scope()

    def keeps_graph(self, tokens_BT: np.ndarray) -> bool:
        """Whether the cache after a few decoded tokens keeps an autograd graph alive."""
        tokens, package = self.ids(tokens_BT), self.package
        cache = package.KVCache.empty(self.module.config, len(tokens), tokens.shape[1] + 2)
        _, cache = package.prefill(self.module, tokens, cache)
        for _ in range(2):
            _, cache = package.decode_step(self.module, tokens[:, 0], cache)
        return cache.layers[0].keys_BKSH.requires_grad

    def _trainer(self, constants: dict[str, Any], seed: int | None = None) -> Trainer:
        return TorchHandle(self.module, self.package).copy().trainer(constants, seed=seed)


class FlaxTwin(_Twin, FlaxModel):
    """The Flax twin, with weights."""

    compiled = False  # what is compiled for one operation serves all changed copies

    def num_programs(self, lengths: tuple[int, ...]) -> int:
        """Return the number of programs compiled to continue prompts of these lengths."""
        counts = []
        with self.scope():
            for length in lengths:
                self.package.generate(self.module, jnp.zeros((1, length), jnp.int32), 2)
                counts.append(self.package.decoding.decoder._program()._cache_size())
        # What the first length needs, a program that reads and one that continues, counts as one.
        return 1 + counts[-1] - counts[0]

    def _trainer(self, constants: dict[str, Any], seed: int | None = None) -> Trainer:
        return FlaxHandle(self.module, self.package).trainer(constants, seed=seed)


def cosine_rates(
    learning_rate: float, warmup_steps: int, total_steps: int, final_fraction: float = 0.1
) -> Iterator[float]:
    """Yield the rate of every update of a warm-up and a cosine, as `TrainConfig` describes them."""
    for count in range(total_steps):
        if count < warmup_steps:
            yield learning_rate * (count + 1) / warmup_steps
        else:
            progress = (count - warmup_steps) / (total_steps - warmup_steps)
            cosine = 0.5 + 0.5 * math.cos(math.pi * progress)
            yield learning_rate * (final_fraction + (1.0 - final_fraction) * cosine)
