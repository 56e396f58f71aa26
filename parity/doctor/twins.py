"""The two twins under examination, and copies of them with a bug in."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, Self

import numpy as np

import flax_gpt
from parity.doctor.flax import FlaxModel
from parity.doctor.model import AdamW, Array, Counts, Loss, Score
from parity.doctor.torch import TorchModel
from parity.frameworks.protocols import Trainer
from parity.twins.flax import FlaxTwin
from parity.twins.torch import TorchTwin
from parity.twins.twin import Constants

GPT = Tensor = Any  # of either framework

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
    config: flax_gpt.GPTConfig = CONFIG,
    seed: int = 0,
    healthy: ModuleType | None = None,
) -> "FlaxTwinModel | TorchTwinModel":
    """Return a twin, or a changed copy of it, with initial weights from a seed.

    Args:
        framework: flax or torch.
        package: flax_gpt or torch_gpt, or a changed copy of it.
        config: sizes, a GPTConfig of any copy.
        seed: of the weights and of the probes.
        healthy: the package that it should do the same as.
    """
    kinds = {"flax": (FlaxTwinModel, FlaxTwin), "torch": (TorchTwinModel, TorchTwin)}
    kind, handle = kinds[framework]
    module: GPT = handle.build(config, seed=seed, package=package).model
    model = kind(module, seed=seed)
    model.package, model.ignore_index = package, package.IGNORE_INDEX
    if healthy is not None:
        model.reference = twin_model(framework, healthy, config, seed)
    return model


class _Handled:
    """What a twin offers through its handle, which is the same for both.

    Attributes:
        package: flax_gpt or torch_gpt, or a changed copy of it.
        module: a GPT of it.
        handle: makes a handle of the module and the package.
    """

    takes_counts = ragged = bounded = True
    package: ModuleType
    module: GPT
    handle: Callable[..., FlaxTwin | TorchTwin]
    with_module: Callable[..., Self]

    @property
    def decoder(self) -> FlaxTwin | TorchTwin:
        """The handle of the module."""
        return self.handle(self.module, self.package)

    def forward(self, module: GPT, tokens_BT: Tensor, counts_B: Tensor) -> Tensor:
        """Return logits (B, T, V)."""
        return module(tokens_BT, counts_B=counts_B)[0]

    def loss(self, logits_BTV: Tensor, labels_BT: Tensor, counts_B: Tensor) -> Loss:
        """Return the total over the scored tokens, and their number."""
        found = self.package.next_token_loss(logits_BTV, labels_BT, counts_B)
        return found.total, found.num_tokens

    def cast(self, dtype: str) -> Self:
        """Return the same model in another type."""
        return self.with_module(self.decoder.cast(dtype).model)

    def evaluate(self, batches: Sequence[tuple[Array, Counts]]) -> Score:
        """Return the loss over all (tokens, counts)."""
        found = self.decoder.evaluate(batches)
        return Score(found["loss"], int(found["tokens"]))

    def trainer(self, rate: float) -> Trainer:
        """Start a training by its own step, with little that slows it down."""
        constants: Constants = dict(learning_rate=rate, beta2=0.99, weight_decay=0.0)
        return self.decoder.copy().trainer(constants)

    def reference_trainer(self) -> tuple[Trainer, AdamW]:
        """Start its training with every option switched on; return the constants too."""
        constants = self.package.TrainConfig(**_TRAINING)
        return self.decoder.copy().trainer(_TRAINING), AdamW(
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

    def dropout_losses(self, tokens_BT: Array) -> tuple[float, float] | None:
        """Return the losses of two training steps that change no weight; None without dropout."""
        if not self.module.config.dropout:
            return None
        constants: Constants = dict(learning_rate=1e-300, weight_decay=0.0)
        frozen = self.decoder.copy().trainer(constants, seed=0)
        return frozen.step(tokens_BT), frozen.step(tokens_BT)

    def generate(
        self,
        tokens_BT: Array,
        num_tokens: int,
        *,
        counts_B: Counts = None,
        temperature: float = 0.0,
        seed: int = 0,
        stop_ids: tuple[int, ...] = (),
    ) -> Array:
        """Return new tokens (B, G) after each prompt, -1 after a row's stop."""
        sampling = {"temperature": temperature}
        written = self.decoder.write(
            tokens_BT, num_tokens, counts_B, sampling=sampling, seed=seed, stop_ids=stop_ids
        )
        return written.tokens_BG

    def attention(self, tokens_BT: Array, counts_B: Counts = None) -> list[Array]:
        """Return weights (B, N, T, S) per layer."""
        return self.decoder.attention_weights(tokens_BT, counts_B)


class TorchTwinModel(_Handled, TorchModel):
    """The PyTorch twin under examination."""

    handle = TorchTwin

    def keeps_graph(self, tokens_BT: Array) -> bool:
        """Whether the cache after a few decoded tokens keeps an autograd graph alive."""
        tokens, package = self.ids(tokens_BT), self.package
        cache = package.KVCache.empty(self.module.config, len(tokens), tokens.shape[1] + 2)
        _, cache = package.prefill(self.module, tokens, cache)
        for _ in range(2):
            _, cache = package.decode_step(self.module, tokens[:, 0], cache)
        return cache.layers[0].keys_BKSH.requires_grad


class FlaxTwinModel(_Handled, FlaxModel):
    """The Flax twin under examination."""

    compiled = False  # what is compiled for one operation serves all changed copies
    handle = functools.partial(FlaxTwin, compiled=False)

    def num_programs(self, lengths: tuple[int, ...]) -> int:
        """Return the number of programs compiled to continue prompts of these lengths."""
        twin, counts = FlaxTwin(self.module, self.package), []
        for length in lengths:
            twin.write(np.zeros((1, length), np.int32), 2)
            counts.append(twin.num_compilations())
        # What the first length needs, a program that reads and one that continues, counts as one.
        return 1 + counts[-1] - counts[0]


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
