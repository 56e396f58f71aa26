"""The two twins as patients, and copies of them with a bug in."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import flax_gpt
from parity.doctor.flax_patient import flax_patient
from parity.doctor.patient import AdamW, Decoder, Patient, Score
from parity.doctor.torch_patient import torch_patient
from parity.frameworks.flax.leaves import flax_leaves, load_flax
from parity.frameworks.flax.scope import jax_scope
from parity.frameworks.leaves import cast as cast_leaves
from parity.frameworks.torch.leaves import load_torch, torch_leaves
from parity.twins.flax import FlaxTrainer, FlaxTwin
from parity.twins.torch import TorchTrainer, TorchTwin

# Sizes that all differ, and dropout that only a call with a key may switch on.
CONFIG = flax_gpt.GPTConfig(
    vocab_size=29, context_length=24, embed_dim=48, num_layers=2, num_heads=4, mlp_dim=72,
    dropout=0.1, dtype="float64",
)  # fmt: skip

# Two ragged parts, a rate that moves, and a norm that is clipped: what one step can get wrong.
_TRAINING = dict(
    learning_rate=1e-2, schedule="cosine", warmup_steps=2, total_steps=8, clip_norm=0.5,
    accumulation_steps=2,
)  # fmt: skip


def twin_patient(
    framework: str,
    package: ModuleType,
    config: Any = CONFIG,
    seed: int = 0,
    healthy: ModuleType | None = None,
) -> Patient:
    """A twin, or a changed copy of it, with initial weights from a seed.

    Args:
        framework: flax or torch.
        package: flax_gpt or torch_gpt, or a changed copy of it.
        config: sizes, a GPTConfig of any copy.
        seed: of the weights and of the probes.
        healthy: the package that it should do the same as.
    """
    sizes = dataclasses.asdict(config)
    make = {"flax": _flax_twin, "torch": _torch_twin}[framework]
    with jax_scope(config.dtype, jax.devices()[0]):
        model = package.GPT(package.GPTConfig(**sizes), package.random.key(seed))
        patient = make(package, model, seed)
    if healthy is None:
        return patient
    reference = twin_patient(framework, healthy, config, seed)
    return dataclasses.replace(patient, reference=reference)


def _torch_twin(package: ModuleType, model: Any, seed: int) -> Patient:
    def trainer(module: Any, constants: dict[str, Any], **more: Any) -> TorchTrainer:
        return TorchTwin(module, package).copy().trainer(constants, **more)

    def cast(module: Any, dtype: str) -> Patient:
        config = package.GPTConfig(**dataclasses.asdict(module.config) | {"dtype": dtype})
        changed = package.GPT(config)
        load_torch(changed, cast_leaves(torch_leaves(module), dtype))
        return _torch_twin(package, changed, seed)

    def keeps_graph(module: Any, tokens_BT: np.ndarray) -> bool:
        tokens = torch.from_numpy(tokens_BT).long()
        cache = package.KVCache.empty(module.config, len(tokens), tokens.shape[1] + 2)
        _, cache = package.prefill(module, tokens, cache)
        for _ in range(2):
            _, cache = package.decode_step(module, tokens[:, 0], cache)
        return cache.layers[0].keys_BKSH.requires_grad

    return torch_patient(
        model,
        seed=seed,
        **_shared(package, _torch_numbers, trainer),
        cast=lambda module: functools.partial(cast, module),
        decoder=lambda module: _decoder(package, module, _torch_numbers, torch.no_grad),
        generate=lambda module: functools.partial(
            _generate, package, module, _torch_numbers, contextlib.nullcontext
        ),
        keeps_graph=lambda module: functools.partial(keeps_graph, module),
        attention=lambda module: functools.partial(
            _attention, package, module, _torch_numbers, torch.no_grad
        ),
    )


def _flax_twin(package: ModuleType, model: Any, seed: int) -> Patient:
    scope = functools.partial(jax_scope, model.config.dtype, jax.devices()[0])

    @contextlib.contextmanager
    def eager() -> Iterator[None]:
        # Operation by operation: what was compiled for one copy serves all the others.
        with scope(), jax.disable_jit():
            yield

    def trainer(module: Any, constants: dict[str, Any], **more: Any) -> FlaxTrainer:
        return FlaxTwin(module, package).trainer(constants, **more)

    def cast(module: Any, dtype: str) -> Patient:
        with jax_scope(dtype, jax.devices()[0]):
            config = package.GPTConfig(**dataclasses.asdict(module.config) | {"dtype": dtype})
            changed = package.GPT(config)
            load_flax(changed, cast_leaves(flax_leaves(module), dtype))
            return _flax_twin(package, changed, seed)

    def num_programs(module: Any, lengths: tuple[int, ...]) -> int:
        counts = []
        with scope():
            for length in lengths:
                package.generate(module, jnp.zeros((1, length), jnp.int32), 2)
                counts.append(package.decoding.decoder._program()._cache_size())
        # What the first length needs, a program that reads and one that goes on, counts as one.
        return 1 + counts[-1] - counts[0]

    return flax_patient(
        model,
        seed=seed,
        compiled=False,
        **_shared(package, _flax_numbers, trainer, eager),
        cast=lambda module: functools.partial(cast, module),
        decoder=lambda module: _decoder(package, module, _flax_numbers, scope),
        generate=lambda module: functools.partial(_generate, package, module, _flax_numbers, eager),
        num_programs=lambda module: functools.partial(num_programs, module),
        attention=lambda module: functools.partial(
            _attention, package, module, _flax_numbers, scope
        ),
    )


def _torch_numbers(x: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(x)).long()


def _flax_numbers(x: Any) -> jax.Array:
    return jnp.asarray(x, jnp.int32)


def _shared(
    package: ModuleType,
    numbers: Callable[[Any], Any],
    trainer: Callable[..., Any],
    scope: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> dict[str, Any]:
    """What both twins offer beyond logits, in their own words, which are the same ones."""

    def loss(logits: Any, labels: Any, counts: Any) -> tuple[Any, Any]:
        found = package.next_token_loss(logits, labels, counts)
        return found.total, found.num_tokens

    def evaluate(module: Any, batches: list[tuple[np.ndarray, ...]]) -> Score:
        with scope():
            parts = [
                package.Batch(*(x if x is None else numbers(x) for x in arrays))
                for arrays in batches
            ]
            found = package.evaluate(module, parts).loss
            return Score(float(found.mean), int(found.num_tokens))

    def reference(module: Any) -> tuple[Any, AdamW]:
        constants = package.TrainConfig(**_TRAINING)
        return trainer(module, _TRAINING), AdamW(
            rates=tuple(cosine_rates(**_TRAINING)),
            beta1=constants.beta1,
            beta2=constants.beta2,
            epsilon=constants.epsilon,
            weight_decay=constants.weight_decay,
            clip_norm=constants.clip_norm,
            decays=lambda name: (
                (".attention." in name or ".mlp." in name) and name.endswith((".weight", ".kernel"))
            ),
        )

    def dropout_losses(module: Any, tokens_BT: np.ndarray) -> tuple[float, float]:
        frozen = trainer(module, dict(learning_rate=1e-300, weight_decay=0.0), seed=0)
        return frozen.step(tokens_BT), frozen.step(tokens_BT)

    def plain(module: Any, rate: float) -> Any:
        return trainer(module, dict(learning_rate=rate, beta2=0.99, weight_decay=0.0))

    return dict(
        forward=lambda model, tokens, counts: model(tokens, counts_B=counts)[0],
        takes_counts=True,
        loss=loss,
        ignore_index=package.IGNORE_INDEX,
        evaluate=lambda module: functools.partial(evaluate, module),
        trainer=lambda module: functools.partial(plain, module),
        reference_trainer=lambda module: functools.partial(reference, module),
        dropout_losses=lambda module: (
            functools.partial(dropout_losses, module) if module.config.dropout else None
        ),
    )


def cosine_rates(
    learning_rate: float, warmup_steps: int, total_steps: int, final_fraction: float = 0.1, **_: Any
) -> Iterator[float]:
    """The rate of every update of a warm-up and a cosine, as `TrainConfig` describes them."""
    for count in range(total_steps):
        if count < warmup_steps:
            yield learning_rate * (count + 1) / warmup_steps
        else:
            progress = (count - warmup_steps) / (total_steps - warmup_steps)
            cosine = 0.5 + 0.5 * math.cos(math.pi * progress)
            yield learning_rate * (final_fraction + (1.0 - final_fraction) * cosine)


def _decoder(package: ModuleType, module: Any, numbers: Callable, scope: Callable) -> Decoder:
    def empty(rows: int, capacity: int) -> Any:
        with scope():
            return package.KVCache.empty(module.config, rows, capacity)

    def read(state: Any, tokens_BT: np.ndarray, counts_B: np.ndarray | None = None):
        counts = None if counts_B is None else numbers(counts_B)
        with scope():
            logits, state = module(numbers(tokens_BT), state, counts)
            return np.asarray(logits), state

    def select(state: Any, rows: np.ndarray) -> Any:
        with scope():
            return state.select(numbers(rows))

    def truncate(state: Any, lengths: np.ndarray) -> Any:
        with scope():
            return state.truncate(numbers(lengths))

    return Decoder(empty, read, select, truncate, ragged=True)


def _generate(
    package: ModuleType,
    module: Any,
    numbers: Callable,
    scope: Callable,
    tokens_BT: np.ndarray,
    num_tokens: int,
    *,
    counts_B: np.ndarray | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    stop_ids: tuple[int, ...] = (),
) -> np.ndarray:
    with scope():
        written = package.generate(
            module,
            numbers(tokens_BT),
            num_tokens,
            counts_B=None if counts_B is None else numbers(counts_B),
            stop_ids=stop_ids,
            sampling=package.Sampling(temperature=temperature),
            key=package.random.key(seed) if temperature else None,
        )
        return np.asarray(written.tokens_BG)


def _attention(
    package: ModuleType,
    module: Any,
    numbers: Callable,
    scope: Callable,
    tokens_BT: np.ndarray,
    counts_B: np.ndarray | None = None,
) -> list[np.ndarray]:
    """The weights that meet the values, overheard where the model mixes values by them."""
    mix, heard = package.model.mix, []

    def overheard(weights_BKQTS: Any, parts: Any) -> Any:
        heard.append(weights_BKQTS)
        return mix(weights_BKQTS, parts)

    package.model.mix = overheard
    try:
        with scope():
            module(numbers(tokens_BT), counts_B=None if counts_B is None else numbers(counts_B))
            heads = [np.asarray(weights_BKQTS) for weights_BKQTS in heard]
            return [x.reshape(x.shape[0], -1, *x.shape[3:]) for x in heads]
    finally:
        package.model.mix = mix
