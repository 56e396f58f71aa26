"""`parity generate` with beams or guesses: both twins search, and what they find is compared."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import typer
from rich.console import Console

from parity.check import bounds
from parity.check.metrics import max_abs
from parity.check.ties import verdict_of_flip
from parity.checkpoints import Tokens, folder_of, open_checkpoint
from parity.cli.generate_options import GenerateOptions, is_checkpoint
from parity.pair.text import decode, encode
from parity.report.record import Verdict
from parity.system.devices import Devices, choose_devices, pinned_precision
from parity.training import Run, Writer
from parity.twins.both import build_twins

if TYPE_CHECKING:
    from parity.twins.twin import Twin

_GUESSES = 5


@dataclasses.dataclass(frozen=True)
class Source:
    """Twins of one model, and how its texts are read and written.

    Attributes:
        twins: by framework, with the same weights.
        encode: text to ids.
        decode: ids to text.
        stop_ids: ids that end a text.
    """

    twins: "dict[str, Twin]"
    encode: Callable[[str], Sequence[int]]
    decode: Callable[[Sequence[int]], str]
    stop_ids: Sequence[int]

    @classmethod
    def open(cls, name: str, devices: Devices, frameworks: Sequence[str]) -> "Source":
        """Return a run or a checkpoint, with the twins that write."""
        if is_checkpoint(name):
            weights = open_checkpoint(folder_of(name))
            text = Tokens(weights.path, weights.config.vocab_size)
            twins = build_twins(weights.config, devices, weights.leaves, frameworks)
            return cls(dict(twins), text.encode, text.decode, sorted(text.stop_ids))
        writer = Writer(Run.open(Path(name)), devices, frameworks)
        vocabulary = writer.vocabulary
        return cls(
            dict(writer.twins),
            lambda text: encode(vocabulary, text).tolist(),
            lambda ids: decode(vocabulary, np.asarray(ids)),
            (),
        )


@dataclasses.dataclass(frozen=True)
class Found:
    """What a twin wrote.

    Attributes:
        texts: ids, the best first.
        notes: what is said about them.
        margins: of the beams their scores; of guesses by how much each token was chosen.
    """

    texts: list[list[int]]
    notes: list[str]
    margins: list[float]


def write(errors: Console, options: GenerateOptions) -> tuple[bool, str, str]:
    """Write the text; return whether the twins differ, the last line and its style."""
    with errors.status("loading jax and torch"):
        devices = choose_devices(options.device)
        source = Source.open(options.source, devices, options.frameworks)
        ids = list(source.encode(options.prompt))
        drafts: dict[str, Twin] = {}
        if options.draft not in (None, "lookup"):
            drafts = Source.open(options.draft, devices, options.frameworks).twins
    found = {}
    with errors.status("writing"), pinned_precision():
        for name, twin in source.twins.items():
            with twin.package_scope():
                search = _beams if options.beams is not None else _guesses
                found[name] = search(twin, ids, options, source, drafts.get(name))
    best, *others = found.values()
    written = [token for token in best.texts[0] if token not in source.stop_ids]
    typer.echo(source.decode([*ids, *written]))
    for note in best.notes:
        errors.print(note, highlight=False, soft_wrap=True)
    names = " and ".join(f"{name}_gpt" for name in found)
    num = len(best.texts[0])
    if all(x.texts == best.texts for x in others):
        return False, f"{num} tokens, {'the same from ' if others else ''}{names}", "dim"
    verdict, line = _difference(ids, source, best, others[0], options)
    failed = verdict is Verdict.FAIL
    return failed, f"{verdict.name}: {line}", "bold red" if failed else "yellow"


def _difference(
    ids: list[int], source: Source, one: Found, two: Found, options: GenerateOptions
) -> tuple[Verdict, str]:
    """Return whether rounding explains two different texts, and the line that says so."""
    number, a, b = next(
        (number, a, b)
        for number, (a, b) in enumerate(zip(one.texts, two.texts, strict=False))
        if a != b
    )
    pairs = zip(a, b, strict=False)
    place = next((n for n, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))
    with pinned_precision():
        sequence = np.array([[*ids, *a[:place]]])
        gap = max_abs(*(twin.logits(sequence)[0, -1] for twin in source.twins.values()))
    dtype = next(iter(source.twins.values())).config.dtype
    # A score of beams is a mean of log-probabilities, which are off by two logits at most.
    margin = abs(one.margins[number] - two.margins[number])
    if options.beams is None:
        margin = one.margins[place]
    temperature = 0.0 if options.beams else options.temperature
    bound = bounds.LOGITS.get(dtype, bounds.OUTPUT_FLOAT32)
    verdict = verdict_of_flip(margin, gap, bound, temperature)
    line = f"the texts diverge at token {place + 1}, margin {margin:.1e}, logits {gap:.1e} apart"
    return verdict, line


def _beams(
    twin: "Twin", ids: list[int], options: GenerateOptions, source: Source, draft: "Twin | None"
) -> Found:
    """Search, and list the beams with their scores."""
    assert options.beams is not None
    tokens = twin.ints([ids])
    stops = source.stop_ids
    found = twin.package.beam_search(twin.model, tokens, options.beams, options.tokens, None, stops)
    rows, counts = twin.numpy(found.tokens_BRG)[0], twin.numpy(found.counts_BR)[0]
    texts = [row[:count].tolist() for row, count in zip(rows, counts, strict=True) if count]
    scores = twin.numpy(found.scores_BR)[0]
    notes = [
        f"beam {number}, {len(text)} tokens, log-probability {score:.4f} a token: "
        f"{source.decode(text)!r}"
        for number, (text, score) in enumerate(zip(texts, scores, strict=False), 1)
    ]
    return Found(texts, notes, scores.tolist())


def _guesses(
    twin: "Twin", ids: list[int], options: GenerateOptions, source: Source, draft: "Twin | None"
) -> Found:
    """Write by guesses, and say how many were right."""
    package: ModuleType = twin.package
    num = options.speculate or _GUESSES
    guesser = package.PromptLookup(num) if draft is None else package.DraftModel(draft.model, num)
    sampling = package.Sampling(**dataclasses.asdict(options.sampling()))
    key = package.random.key(options.seed) if options.temperature > 0.0 else None
    tokens = twin.ints([ids])
    found = package.speculate(
        twin.model, tokens, options.tokens, guesser, None, source.stop_ids, sampling, key
    )
    shares = [
        f"{kept}/{guessed}" for kept, guessed in zip(found.accepted_P, found.guessed_P, strict=True)
    ]
    note = (
        f"{found.tokens_per_call:.2f} tokens a call, {found.calls} calls; guesses that were right, "
        f"by place: {', '.join(shares)}"
    )
    if options.temperature == 0.0:
        note += f"; smallest margin {np.nanmin(found.margins_BG):.1e}"
    return Found(
        [found.tokens_BG[0, : found.counts_B[0]].tolist()], [note], found.margins_BG[0].tolist()
    )
