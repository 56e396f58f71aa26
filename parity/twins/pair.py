"""flax_gpt and torch_gpt as a pair, with probes cut from a text."""

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

import jax
import numpy as np
import torch

import flax_gpt
import torch_gpt
from parity.frameworks.batch import Batch
from parity.frameworks.leaves import Leaves
from parity.frameworks.plan import rows_of_pass
from parity.frameworks.spec import ModelSpec
from parity.pair.pair import Pair
from parity.pair.text import Corpus
from parity.twins.companions import COMPANIONS
from parity.twins.flax import FlaxTwin
from parity.twins.names import TASKS
from parity.twins.torch import TorchTwin
from parity.twins.twin import Constants, task_of
from parity.weights.tables import CLASSIFIERS, TWINS

CLASSES = 4

ArrayT = TypeVar("ArrayT", jax.Array, torch.Tensor)

_PROBE_SIZE = 1 << 26  # logits of one probe at most, half a gigabyte in float64
_PROMPT_LENGTH = 64
_SEQUENCE_LENGTH = 96
_TRAINING_BATCH = 8, 64
_LEARNING_RATE = 1e-3
_SAMPLING = dict(temperature=0.8, top_k=40, top_p=0.95, min_p=0.02)
_UNSCORED = 0.1  # share of labels that are not scored
_CHARACTER_KINDS = str.isalpha, str.isdigit, str.isspace  # and any other


def preset_config(corpus: Corpus, preset: str, **changes: Any) -> flax_gpt.GPTConfig:
    """Return the sizes of a preset; `tiny` takes its vocabulary size from the text.

    Args:
        corpus: the text.
        preset: name of the preset.
        changes: fields of GPTConfig that differ from it.

    Raises:
        ValueError: for an unknown preset, or a text with more characters than it has ids.
    """
    if preset == "tiny":
        changes = {"vocab_size": len(corpus.vocabulary)} | changes
    config = flax_gpt.GPTConfig.preset(preset, **changes)
    check_vocabulary(corpus, config)
    return config


def check_vocabulary(corpus: Corpus, config: flax_gpt.GPTConfig) -> None:
    """Refuse a text with more different characters than a model has ids.

    Raises:
        ValueError: with both numbers.
    """
    if len(corpus.vocabulary) > config.vocab_size:
        raise ValueError(
            f"data file {corpus.source}: {len(corpus.vocabulary)} different characters > "
            f"vocabulary size {config.vocab_size}. Each needs an id. Give another text or a larger "
            "model."
        )


def training(num_steps: int) -> Constants:
    """Return fields of TrainConfig that switch on everything that can differ."""
    warmup = max(2, num_steps // 10)
    return dict(
        learning_rate=_LEARNING_RATE,
        schedule="cosine",
        warmup_steps=warmup,
        total_steps=max(num_steps, warmup + 1),
        clip_norm=0.5,
        label_smoothing=0.1,
        accumulation_steps=2,
    )


def twins(
    corpus: Corpus,
    config: flax_gpt.GPTConfig | None = None,
    *,
    task: str = "next-token",
    seed: int = 0,
    max_new_tokens: int = 256,
    leaves: Leaves | None = None,
    flax_package: ModuleType = flax_gpt,
    torch_package: ModuleType = torch_gpt,
) -> Pair:
    """Return the two GPTs as a pair, with probes cut from a text, and companions.

    Args:
        corpus: the text.
        config: of both; the `tiny` preset when None. Its dropout is active in training.
        task: one of `TASKS`. The two with classes put a classifier's head on the GPT: the kind of
            the character before each token, and how many of a passage's characters are letters.
        seed: of the passages and of dropout.
        max_new_tokens: tokens to generate after each prompt; the prompts leave room for them.
        leaves: weights of the Flax twin to test; None for random ones.
        flax_package: the Flax twin, or a changed copy of it.
        torch_package: the PyTorch twin, or a changed copy of it.

    Raises:
        ValueError: for an unknown task, a vocabulary that the model cannot hold, or too many new
            tokens.
    """
    if task not in TASKS:
        raise ValueError(f"task {task!r}: there are {', '.join(TASKS)}. Choose one of them.")
    config = config or preset_config(corpus, "tiny")
    check_vocabulary(corpus, config)
    context = config.context_length
    room = context - max_new_tokens
    if room < 4:
        raise ValueError(
            f"check: {max_new_tokens} new tokens leave {room} of context {context} for prompts. "
            f"They need 4. Ask for at most {context - 4}."
        )
    decodes = task == "next-token"
    dropout_seed = seed if config.dropout else None
    rows, width = _TRAINING_BATCH
    width = min(width, context)
    prompts = sequences = None
    if decodes:
        prompt, length = min(_PROMPT_LENGTH, room), min(_SEQUENCE_LENGTH, context)
        counts = [prompt, prompt * 3 // 4, prompt // 2, 1]
        prompts = corpus.windows(4, prompt, seed, 2), np.array(counts, np.int32)
        counts = [length, length - 1, length // 3, 1]
        sequences = corpus.windows(4, length, seed, 3), np.array(counts, np.int32)
    return Pair(
        flax=spec(FlaxTwin, config, task, dropout_seed, package=flax_package),
        torch=spec(TorchTwin, config, task, dropout_seed, package=torch_package),
        rules=TWINS if decodes else CLASSIFIERS,
        probes=_probes(corpus, config, task, seed),
        training_batch=lambda step: training_batch(corpus, rows, width, task, seed, step),
        learning_rate=_LEARNING_RATE,
        prompts=prompts,
        new_tokens=max_new_tokens,
        sampling=_SAMPLING if decodes else None,
        sequences=sequences,
        config=dataclasses.asdict(config) | {"data": corpus.source, "task": task},
        leaves=leaves,
        companions=companions(flax_package, torch_package, seed) if decodes else {},
    )


def companions(
    flax_package: ModuleType = flax_gpt, torch_package: ModuleType = torch_gpt, seed: int = 0
) -> dict[str, Pair]:
    """Return the tiny pairs that are checked beside any other, by name.

    Args:
        flax_package: the Flax twin, or a changed copy of it.
        torch_package: the PyTorch twin, or a changed copy of it.
        seed: of the tokens of their probes.
    """
    found = {}
    for number, (name, companion) in enumerate(COMPANIONS.items()):
        config, rng = companion.config, np.random.default_rng((seed, 7, number))
        # As many rows as a pass without a cache has, so that both are one program.
        rows, width = rows_of_pass(config.context_length), config.context_length
        tokens = rng.integers(0, config.vocab_size, (rows, width), np.int32)
        counts = rng.integers(1, width + 1, rows).astype(np.int32)
        counts[0] = width
        found[name] = Pair(
            flax=spec(FlaxTwin, config, package=flax_package),
            torch=spec(TorchTwin, config, package=torch_package),
            rules=TWINS,
            probes={"ragged": Batch((tokens, counts), np.arange(width) < counts[:, None])},
            training_batch=lambda step: Batch(()),
            config=dataclasses.asdict(config),
            plans={FlaxTwin.name: companion.flax, TorchTwin.name: companion.torch},
        )
    return found


def spec(
    twin: type[FlaxTwin] | type[TorchTwin],
    config: flax_gpt.GPTConfig,
    task: str = "next-token",
    dropout_seed: int | None = None,
    constants: Callable[[int], Constants] = training,
    package: ModuleType | None = None,
) -> ModelSpec:
    """Return how the harness builds, calls and trains a twin.

    Args:
        twin: the class of its handle.
        config: its sizes.
        task: one of `TASKS`.
        dropout_seed: None for no dropout.
        constants: a number of steps to fields of TrainConfig.
        package: a changed copy of the twin; the twin itself when None.
    """
    package = package or twin.original
    score, smoothing = task_of(package, task), constants(1)["label_smoothing"]

    def build(dtype: str) -> flax_gpt.GPT | torch_gpt.GPT:
        sizes = package.GPTConfig(**dataclasses.asdict(config) | {"dtype": dtype})
        if task == "next-token":
            return package.GPT(sizes)
        head = package.TokenClassifier if task == "token-class" else package.SequenceClassifier
        return head(sizes, CLASSES)

    def forward(
        model: Callable, tokens: ArrayT, counts: ArrayT | None = None, labels: ArrayT | None = None
    ) -> ArrayT:
        output = model(tokens, counts_B=counts)
        return output[0] if task == "next-token" else output

    def loss(model: Callable[..., ArrayT], *inputs: ArrayT) -> ArrayT:
        batch = package.Batch(*inputs)
        scores, targets = score.logits(model, batch, None), score.targets(batch)
        return package.cross_entropy(scores, targets, smoothing).mean

    return ModelSpec(
        name=twin.name,
        build=build,
        forward=forward,
        loss=loss,
        trainer=lambda model, num_steps: twin(model, package).trainer(
            constants(num_steps), task, dropout_seed
        ),
        decoder=(lambda model: twin(model, package)) if task == "next-token" else None,
    )


def training_batch(corpus: Corpus, rows: int, width: int, task: str, seed: int, step: int) -> Batch:
    """Return new ragged rows for every step; some of their labels are not scored."""
    tokens = corpus.windows(rows, width, seed, 1, step)
    rng = np.random.default_rng((seed, 4, step))
    counts = rng.integers(max(width // 4, 2), width + 1, rows).astype(np.int32)
    return Batch((tokens, counts, labels(corpus, tokens, counts, task, rng)))


def labels(
    corpus: Corpus, tokens: np.ndarray, counts: np.ndarray, task: str, rng: np.random.Generator
) -> np.ndarray:
    """Return the classes that a task asks for, some of them not to be scored.

    Of a token: itself, or the kind (letter, digit, space, other) of the character before it. Of a
    passage: in which fourth of 0 to 1 its share of letters lies.
    """
    if task == "next-token":
        return _some_unscored(tokens, rng)
    kinds = np.array([_kind(character) for character in corpus.vocabulary])[tokens]
    if task == "token-class":
        return _some_unscored(np.roll(kinds, 1, axis=1), rng)
    real = np.arange(tokens.shape[1]) < counts[:, None]
    share = np.sum(real & (kinds == 0), axis=1) / np.maximum(counts, 1)
    return np.minimum(share * CLASSES, CLASSES - 1).astype(np.int32)


def _some_unscored(classes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    unscored = rng.random(classes.shape) < _UNSCORED
    return np.where(unscored, flax_gpt.IGNORE_INDEX, classes).astype(np.int32)


def _kind(character: str) -> int:
    """Return the number of the first kind that a character is of."""
    kinds = (number for number, test in enumerate(_CHARACTER_KINDS) if test(character))
    return next(kinds, len(_CHARACTER_KINDS))


def _probes(corpus: Corpus, config: flax_gpt.GPTConfig, task: str, seed: int) -> dict[str, Batch]:
    """Return inputs that reach bugs: the ends of the context, one token, padding, repetition."""
    context = config.context_length
    rows = int(np.clip(_PROBE_SIZE // (context * config.vocab_size), 1, 4))
    probes = {
        "full context, ragged": _ragged(corpus, rows, context, task, seed),
        "context - 1": Batch((corpus.windows(1, context - 1, seed, 4),)),
        "one token": Batch((corpus.windows(4, 1, seed, 5),)),
    }
    if rows < 4:
        # A large model's full context has no room for rows that pad and repeat. The short one comes
        # first, which is where gradients are taken, for they keep what every layer has computed.
        probes = {"short, ragged": _ragged(corpus, 4, min(64, context), task, seed)} | probes
    return probes


def _ragged(corpus: Corpus, rows: int, width: int, task: str, seed: int) -> Batch:
    """Return the first of a full row, two with padding, and one that repeats a token."""
    tokens = corpus.windows(rows, width, seed, 0)
    if rows == 4:
        tokens[3] = tokens[3, 0]
    counts = np.array([width, width * 2 // 3, min(17, width), width], np.int32)[:rows]
    classes = labels(corpus, tokens, counts, task, np.random.default_rng((seed, 6)))
    real = np.arange(width) < counts[:, None]
    return Batch((tokens, counts, classes), None if task == "sequence-class" else real)
