"""A twin with a bug beside a healthy one: what they learn, what they write, where the cache drifts.

Dimension key: B batch, T tokens, V vocab.
"""

import dataclasses
import time
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

import flax_gpt
from parity.doctor import LanguageModel, examine, twin_model
from parity.doctor.detectors.forward import cross_entropies
from parity.doctor.model import CanDecode, CanGenerate
from parity.faults.edit import mutated, twin
from parity.faults.gallery import Bug
from parity.frameworks.flax.scope import Scoped, jax_scope
from parity.pair.text import Corpus, decode, encode
from parity.report.figures import plain, save
from parity.twins.flax import FlaxTrainer
from parity.twins.torch import TorchTrainer

_WIDTH, _ROWS, _PROMPT = 64, 16, "The "
_FLOOR = 1e-8  # below this a float32 cache is exact
_COLOURS = "#222222", "#d1495b", "#1b6ca8", "#edae49", "#66a182", "#8d6a9f", "#b0662a", "#5c6b73"


@dataclasses.dataclass(frozen=True)
class Exhibit:
    """What one model did.

    Attributes:
        name: of the bug; "healthy" for none.
        losses: of every training step, as its own loss tells.
        held_out: (step, loss) on text that it was not trained on, by a loss that is not its own.
        drift: by position, how far cached logits are from those without a cache, in standard
            deviations.
        text: what it wrote after the training.
        fired: detectors that saw something wrong.
        error: how the training ended, if not by its last step.
    """

    name: str
    losses: tuple[float, ...]
    held_out: tuple[tuple[int, float], ...]
    drift: tuple[float, ...]
    text: str
    fired: tuple[str, ...]
    error: str = ""


@dataclasses.dataclass(frozen=True)
class Exhibition:
    """A healthy model and those with bugs, of one framework."""

    framework: str
    exhibits: tuple[Exhibit, ...]

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = []
        for shown in self.exhibits:
            first, last = (f"{x:.3f}" for x in (shown.losses[0], np.mean(shown.losses[-10:])))
            held = f"{shown.held_out[-1][1]:.3f}" if shown.held_out else "none"
            worst = max(shown.drift, default=float("nan"))
            lines = [
                f"training loss {first} to {last}, held out {held}, cache off by {worst:.1e}"
                + (f"; {shown.error}" if shown.error else ""),
                f"writes: {_visible(shown.text)}",
                f"detectors: {', '.join(shown.fired) or 'none fires'}",
            ]
            style = "bold green" if shown.name == "healthy" else "bold red"
            parts += [Text(f"{shown.name} ({self.framework})", style=style)]
            parts += [Padding(Text(line), (0, 0, 0, 2)) for line in lines]
        return Group(*parts)


def exhibit(
    corpus: Corpus,
    bugs: Sequence[Bug],
    framework: str,
    *,
    steps: int = 300,
    seed: int = 0,
    progress: Callable[[str, float], None] = lambda name, fraction: None,
) -> Exhibition:
    """Trains a healthy twin and each broken one on the same batches.

    Args:
        corpus: the text; its end is held out.
        bugs: to show; those that the framework cannot have are left out.
        framework: flax or torch.
        steps: of training, 16 passages of 64 characters each.
        seed: of weights, batches and text.
        progress: told the name of the model and the fraction done.
    """
    shown = [_show(corpus, "healthy", framework, twin(framework), steps, seed, progress)]
    for bug in bugs:
        if bug.edits(framework):
            with mutated(f"{framework}_gpt", bug.edits(framework)) as package:
                shown.append(_show(corpus, bug.id, framework, package, steps, seed, progress))
    return Exhibition(framework, tuple(shown))


def draw(exhibition: Exhibition, path: Path) -> None:
    """Loss curves above, and below them the drift of the cache along a text.

    Raises:
        OSError: when the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 7.5), layout="constrained")
    loss, drift = figure.subplots(2, 1, height_ratios=(3, 2))
    for shown, colour in zip(
        exhibition.exhibits, _COLOURS * len(exhibition.exhibits), strict=False
    ):
        width = 2.0 if shown.name == "healthy" else 1.2
        steps = np.arange(1, len(shown.losses) + 1)
        loss.plot(steps, shown.losses, color=colour, linewidth=width / 2, alpha=0.45)
        if shown.held_out:
            loss.plot(*zip(*shown.held_out, strict=True), color=colour, linewidth=width,
                      label=shown.name)  # fmt: skip
        drift.plot(np.maximum(shown.drift, _FLOOR), color=colour, linewidth=width,
                   label=shown.name)  # fmt: skip
    top = max(x for shown in exhibition.exhibits for x in shown.losses[:1])
    loss.set_ylim(0.0, 1.6 * top if np.isfinite(top) else None)
    loss.set_ylabel("nats per token: held out (thick), training (faint)")
    loss.set_xlabel("step")
    loss.legend(frameon=False, fontsize=8)
    loss.set_title(f"{exhibition.framework}: the same weights and batches", fontsize=10)
    drift.set_yscale("log")
    drift.set_ylim(_FLOOR / 2, 20.0)
    drift.set_ylabel("cached logits off by, std")
    drift.set_xlabel(f"position; a prompt of {len(_PROMPT)}, then one token at a time")
    plain((loss, drift))
    save(figure, path)


def _show(
    corpus: Corpus,
    name: str,
    framework: str,
    package: ModuleType,
    steps: int,
    seed: int,
    progress: Callable[[str, float], None],
) -> Exhibit:
    """Trains, writes and examines one model."""
    progress(name, 0.0)
    config = flax_gpt.GPTConfig(
        vocab_size=len(corpus.vocabulary), context_length=_WIDTH + 64, embed_dim=48, num_layers=2,
        num_heads=4, mlp_dim=192,
    )  # fmt: skip
    learned, held = corpus.split()
    model = twin_model(framework, package, config, seed=seed)
    trainer = _trainer(framework, package, config, steps, seed)
    probe = held.windows(32, _WIDTH, seed)
    losses: list[float] = []
    held_out: list[tuple[int, float]] = []
    error = ""
    last_told = time.monotonic()
    try:
        for step in range(steps):
            if step % max(steps // 20, 1) == 0:
                held_out.append((step, _held_out(model, trainer, probe)))
            losses.append(trainer.step(learned.windows(_ROWS, _WIDTH, seed, step)))
            if time.monotonic() - last_told > 0.2:
                last_told = time.monotonic()
                progress(name, 0.8 * step / steps)
        held_out.append((steps, _held_out(model, trainer, probe)))
    except Exception as raised:
        error = f"raised {type(raised).__name__} at step {len(losses) + 1}"
    progress(name, 0.8)
    trained = model.with_weights(trainer.parameters())
    found = examine(twin_model(framework, package, healthy=twin(framework)), stop_early=False)
    return Exhibit(
        name,
        tuple(losses or [float("nan")]),
        tuple(held_out),
        _drift(trained, probe[:1]),
        _text(trained, corpus, seed),
        found.fired,
        error,
    )


def _trainer(framework: str, package: ModuleType, config, steps: int, seed: int):
    """The twin's own training."""
    sizes = package.GPTConfig(**dataclasses.asdict(config))
    constants = dict(
        learning_rate=3e-3, schedule="cosine", warmup_steps=steps // 20, total_steps=steps + 1
    )
    if framework == "torch":
        return TorchTrainer(package, package.GPT(sizes, package.random.key(seed)), constants)

    def scope():
        return jax_scope("float32", jax.devices()[0])

    with scope():
        model = package.GPT(sizes, package.random.key(seed))
        return Scoped(FlaxTrainer(package, model, constants), scope)


def _held_out(model: LanguageModel, trainer, probe_BT: np.ndarray) -> float:
    """Cross entropy of the next token, by a loss that no bug is in."""
    logits_BTV = model.with_weights(trainer.parameters()).logits(probe_BT, None)
    return float(np.mean(cross_entropies(logits_BTV[:, :-1], probe_BT[:, 1:])))


def _drift(model: CanDecode, ids: np.ndarray) -> tuple[float, ...]:
    """How far each position's logits are from those without a cache, read one by one."""
    try:
        whole, cache = model.logits(ids), model.empty_cache(1, 2 * ids.shape[1])
        found, cache = model.read(ids[:, : len(_PROMPT)], cache)
        pieces = [found]
        for at in range(len(_PROMPT), ids.shape[1]):
            found, cache = model.read(ids[:, at : at + 1], cache)
            pieces.append(found)
        cached = np.concatenate(pieces, axis=1)
    except Exception:
        return (float("nan"),)
    scale = float(np.std(whole)) or 1.0
    return tuple(float(x) / scale for x in np.abs(cached - whole).max(axis=(0, 2)))


def _text(model: CanGenerate, corpus: Corpus, seed: int) -> str:
    """What the model writes, at a temperature that shows what it knows."""
    prompt = _PROMPT if set(_PROMPT) <= set(corpus.vocabulary) else corpus.vocabulary[-4:]
    ids = encode(corpus.vocabulary, prompt)[None]
    try:
        written = model.generate(ids, 90, temperature=0.7, seed=seed)[0]
    except Exception as raised:
        return f"({type(raised).__name__} while writing)"
    return prompt + decode(corpus.vocabulary, written[written >= 0])


def _visible(text: str) -> str:
    """One line: line breaks and control characters as spaces."""
    printable = "".join(" " if unicodedata.category(c).startswith("C") else c for c in text)
    return " ".join(printable.split())
