"""Train a healthy twin and broken ones on the same batches, and compare what each has learned.

Dimension key: B batch, T tokens, V vocab.
"""

import dataclasses
import itertools
import time
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

import flax_gpt
from parity.doctor import LanguageModel, examine, twin_model
from parity.doctor.detectors.forward import cross_entropies
from parity.doctor.offers import CanDecode, CanGenerate
from parity.faults.bug import Bug
from parity.faults.edit import mutated, twin
from parity.pair.text import Corpus, decode, encode
from parity.report.figures import plain, save
from parity.twins.flax import FlaxTwin
from parity.twins.torch import TorchTwin
from parity.twins.twin import TwinTrainer

_WIDTH, _ROWS, _PROMPT = 64, 16, "The "
_FLOOR = 1e-8  # where the plot of the drift begins
_COLOURS = "#222222", "#d1495b", "#1b6ca8", "#edae49", "#66a182", "#8d6a9f", "#b0662a", "#5c6b73"


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """The training of one model and what it does afterwards.

    Attributes:
        name: of the bug; "healthy" for none.
        losses: of every training step, by its own loss.
        held_out: (step, loss) on text that it was not trained on, by a loss that no bug is in.
        drift: by position, the largest difference between cached and uncached logits, in standard
            deviations of the logits.
        text: that it writes after the training.
        fired: detectors that found a fault.
        error: how the training ended, if not with its last step.
    """

    name: str
    losses: tuple[float, ...]
    held_out: tuple[tuple[int, float], ...]
    drift: tuple[float, ...]
    text: str
    fired: tuple[str, ...]
    error: str = ""


@dataclasses.dataclass(frozen=True)
class TrainingComparison:
    """A healthy model and models with bugs, of one framework."""

    framework: str
    models: tuple[TrainedModel, ...]

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = []
        for model in self.models:
            first, last = (f"{x:.3f}" for x in (model.losses[0], np.mean(model.losses[-10:])))
            held = f"{model.held_out[-1][1]:.3f}" if model.held_out else "none"
            worst = max(model.drift, default=float("nan"))
            lines = [
                f"training loss {first} to {last}, held out {held}, cache off by {worst:.1e}"
                + (f"; {model.error}" if model.error else ""),
                f"writes: {_visible(model.text)}",
                f"detectors: {', '.join(model.fired) or 'none fires'}",
            ]
            style = "bold green" if model.name == "healthy" else "bold red"
            parts += [Text(f"{model.name} ({self.framework})", style=style)]
            parts += [Padding(Text(line), (0, 0, 0, 2)) for line in lines]
        return Group(*parts)


def compare_training(
    corpus: Corpus,
    bugs: Sequence[Bug],
    framework: str,
    *,
    steps: int = 300,
    seed: int = 0,
    progress: Callable[[str, float], None] = lambda name, fraction: None,
) -> TrainingComparison:
    """Train a healthy twin and one with each bug on the same batches.

    Args:
        corpus: the text; its end is held out.
        bugs: to plant; those that the framework cannot have are left out.
        framework: flax or torch.
        steps: of training, 16 passages of 64 characters each.
        seed: of weights, batches and text.
        progress: called with the name of the model and the fraction done.

    Returns:
        The healthy model and the broken ones.
    """
    models = [_trained(corpus, "healthy", framework, twin(framework), steps, seed, progress)]
    for bug in bugs:
        if edits := bug.edits(framework):
            with mutated(f"{framework}_gpt", edits) as package:
                models.append(_trained(corpus, bug.id, framework, package, steps, seed, progress))
    return TrainingComparison(framework, tuple(models))


def draw(comparison: TrainingComparison, path: Path) -> None:
    """Draw loss curves, and below them the drift of the cache along a text.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 7.5), layout="constrained")
    loss, drift = figure.subplots(2, 1, height_ratios=(3, 2))
    for model, colour in zip(comparison.models, itertools.cycle(_COLOURS), strict=False):
        width = 2.0 if model.name == "healthy" else 1.2
        style = dict(color=colour, linewidth=width, label=model.name)
        steps = np.arange(1, len(model.losses) + 1)
        loss.plot(steps, model.losses, color=colour, linewidth=width / 2, alpha=0.45)
        if model.held_out:
            loss.plot(*zip(*model.held_out, strict=True), **style)
        drift.plot(np.maximum(model.drift, _FLOOR), **style)
    top = max(x for model in comparison.models for x in model.losses[:1])
    loss.set_ylim(0.0, 1.6 * top if np.isfinite(top) else None)
    loss.set_ylabel("nats per token: held out (thick), training (faint)")
    loss.set_xlabel("step")
    loss.legend(frameon=False, fontsize=8)
    loss.set_title(f"{comparison.framework}: the same weights and batches", fontsize=10)
    drift.set_yscale("log")
    drift.set_ylim(_FLOOR / 2, 20.0)
    drift.set_ylabel("cached logits off by, std")
    drift.set_xlabel(f"position; a prompt of {len(_PROMPT)}, then one token at a time")
    plain((loss, drift))
    save(figure, path)


def _trained(
    corpus: Corpus,
    name: str,
    framework: str,
    package: ModuleType,
    steps: int,
    seed: int,
    progress: Callable[[str, float], None],
) -> TrainedModel:
    """Train one model, let it write and examine it."""
    progress(name, 0.0)
    config = flax_gpt.GPTConfig(
        vocab_size=len(corpus.vocabulary),
        context_length=_WIDTH + 64,
        embed_dim=48,
        num_layers=2,
        num_heads=4,
        mlp_dim=192,
    )
    learned, held = corpus.split()
    model = twin_model(framework, package, config, seed=seed)
    trainer = _trainer(framework, package, config, steps, seed)
    probe = held.windows(32, _WIDTH, seed)
    losses: list[float] = []
    held_out: list[tuple[int, float]] = []
    error = ""
    last_report = time.monotonic()
    try:
        for step in range(steps):
            if step % max(steps // 20, 1) == 0:
                held_out.append((step, _held_out(model, trainer, probe)))
            losses.append(trainer.step(learned.windows(_ROWS, _WIDTH, seed, step)))
            if time.monotonic() - last_report > 0.2:
                last_report = time.monotonic()
                progress(name, 0.8 * step / steps)
        held_out.append((steps, _held_out(model, trainer, probe)))
    except Exception as raised:
        error = f"raised {type(raised).__name__} at step {len(losses) + 1}"
    progress(name, 0.8)
    trained = model.with_weights(trainer.parameters())
    found = examine(twin_model(framework, package, healthy=twin(framework)), stop_early=False)
    return TrainedModel(
        name,
        tuple(losses or [float("nan")]),
        tuple(held_out),
        _drift(trained, probe[:1]),
        _text(trained, corpus, seed),
        found.fired,
        error,
    )


def _trainer(
    framework: str, package: ModuleType, config: flax_gpt.GPTConfig, steps: int, seed: int
) -> TwinTrainer:
    """Return the trainer of a twin, which uses its own training step."""
    constants = dict(
        learning_rate=3e-3, schedule="cosine", warmup_steps=steps // 20, total_steps=steps + 1
    )
    kind = {"flax": FlaxTwin, "torch": TorchTwin}[framework]
    return kind.build(config, seed=seed, package=package).trainer(constants)


def _held_out(model: LanguageModel, trainer: TwinTrainer, probe_BT: np.ndarray) -> float:
    """Return the cross entropy of the next token, by a loss that no bug is in."""
    logits_BTV = model.with_weights(trainer.parameters()).logits(probe_BT, None)
    return float(np.mean(cross_entropies(logits_BTV[:, :-1], probe_BT[:, 1:])))


def _drift(model: LanguageModel, ids: np.ndarray) -> tuple[float, ...]:
    """Return how far the logits of each position, decoded one by one, are from uncached ones."""
    try:
        assert isinstance(model, CanDecode)
        whole = model.logits(ids, None)
        decoder = model.decoder
        cache = decoder.empty(1, 2 * ids.shape[1])
        found, cache = decoder.read(cache, ids[:, : len(_PROMPT)])
        pieces = [found]
        for at in range(len(_PROMPT), ids.shape[1]):
            found, cache = decoder.read(cache, ids[:, at : at + 1])
            pieces.append(found)
        cached = np.concatenate(pieces, axis=1)
    except Exception:
        return (float("nan"),)
    scale = float(np.std(whole)) or 1.0
    return tuple(float(x) / scale for x in np.abs(cached - whole).max(axis=(0, 2)))


def _text(model: LanguageModel, corpus: Corpus, seed: int) -> str:
    """Return text by the model, at a temperature that shows what it has learned."""
    prompt = _PROMPT if set(_PROMPT) <= set(corpus.vocabulary) else corpus.vocabulary[-4:]
    ids = encode(corpus.vocabulary, prompt)[None]
    try:
        assert isinstance(model, CanGenerate)
        written = model.generate(ids, 90, temperature=0.7, seed=seed)[0]
    except Exception as raised:
        return f"({type(raised).__name__} while writing)"
    return prompt + decode(corpus.vocabulary, written[written >= 0])


def _visible(text: str) -> str:
    """Return text on one line, with spaces for line breaks and control characters."""
    printable = "".join(" " if unicodedata.category(c).startswith("C") else c for c in text)
    return " ".join(printable.split())
