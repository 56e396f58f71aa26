"""`parity generate`: text from a run or a checkpoint, the same from either twin."""

import itertools
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from parity.cli.options import Device, Only, frameworks, in_one_line


def generate(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder that `parity train --out` or `parity convert` made, one of "
            "transformers, or a name of the Hugging Face hub."
        ),
    ],
    prompt: Annotated[str, typer.Argument(help="What to continue.")],
    tokens: Annotated[
        int, typer.Option(min=1, help="Tokens to write; a run's are characters.")
    ] = 200,
    temperature: Annotated[
        float, typer.Option(help="0 takes the most likely token; 1 draws as the model says.")
    ] = 0.8,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Draw from the k most likely tokens.")
    ] = None,
    top_p: Annotated[
        float, typer.Option(help="Draw from the most likely tokens that add up to p.")
    ] = 1.0,
    min_p: Annotated[
        float, typer.Option(help="Draw from tokens at least p times as likely as the first.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws.")] = 0,
    only: Only = None,
    cache: Annotated[
        bool, typer.Option(help="Without the cache every token reads the whole text again.")
    ] = True,
    device: Device = "auto",
) -> None:
    """Continue a prompt with both twins, which must write the same text from the same weights.

    Of a run, these weights are flax's where flax was trained, else torch's. The text goes to
    standard output, of a checkpoint as it is written; what was compared, and the other text where
    there is one, goes to the error stream. A checkpoint without tokenizer.json takes and writes
    ids.

    Exit codes: 0 the same text (or a near-tie, with its margin), 1 different texts, 2 bad input.

    Examples:

    parity generate runs/a "To be" --tokens 200 --temperature 0.8 --seed 1

    parity generate runs/a "The " --temperature 0 --only torch

    parity generate ./llama "Once upon a time" --tokens 50
    """
    errors = Console(stderr=True)
    with in_one_line(errors, interrupted="the text ends here"):
        twins = frameworks(only)
        if _is_checkpoint(source):
            verdict = _stream(
                errors, source, prompt, tokens, temperature, top_k, top_p, min_p, seed, twins,
                cache, device,
            )  # fmt: skip
            raise typer.Exit(verdict)
        run = Path(source)
        with errors.status("loading jax and torch"):
            from flax_gpt import Sampling
            from parity.report.record import Verdict
            from parity.system.devices import choose_devices
            from parity.training import Run, Writer

            sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
            writer = Writer(Run.open(run), choose_devices(device), twins)
        with errors.status("writing"):
            written = writer.write(prompt, tokens, sampling, seed, cache)
        texts = list(dict.fromkeys(written.texts.values()))
        typer.echo(prompt + texts[0])
        names = " and ".join(f"{name}_gpt" for name in written.texts)
        margin = f"smallest margin {written.smallest_margin:.1e} at token {written.smallest_at}"
        if len(texts) == 1:
            same = "the same from " if len(written.texts) > 1 else ""
            line, style = f"{tokens} tokens, {same}{names}, {margin}", "dim"
        elif written.verdict is Verdict.TIE:
            line, style = f"TIE: {written.note}, which rounding explains", "yellow"
        else:
            line, style = f"FAIL: {written.note}", "bold red"
        errors.print(line, style=style, highlight=False, soft_wrap=True)
        for text in texts[1:]:
            errors.print(f"torch_gpt wrote: {prompt}{text}", markup=False, highlight=False)
    raise typer.Exit(1 if written.verdict is Verdict.FAIL else 0)


def _is_checkpoint(source: str) -> bool:
    """Whether it is not a run: a folder of transformers or of `parity convert`, or a hub's name."""
    path = Path(source)
    if not path.is_dir():
        return "/" in source
    try:
        document = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return not (path / "config.json").exists() and any(path.glob("*.safetensors"))
    return isinstance(document, dict) and bool({"model_type", "format"} & set(document))


def _stream(
    errors: Console, source, prompt, tokens, temperature, top_k, top_p, min_p, seed, twins, cache,
    device,
) -> int:  # fmt: skip
    """Writes as it goes; returns the exit code."""
    with errors.status("loading jax and torch"):
        from flax_gpt import Sampling
        from parity.checkpoints import Tokens, folder_of, open_checkpoint, stream
        from parity.report.record import Verdict
        from parity.system.devices import choose_devices

        devices = choose_devices(device)
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        weights = open_checkpoint(folder_of(source))
        text = Tokens(weights.path, weights.config.vocab_size)
        ids = text.encode(prompt)
        choices = stream(weights, ids, tokens, sampling, seed, devices, twins, cache)
        first = next(choices)
    for note in weights.notes:
        errors.print(note, style="yellow", highlight=False, soft_wrap=True)
    typer.echo(prompt, nl=False)
    now = shown = text.decode(ids)
    written, parted, smallest = [], [], (float("inf"), 0)
    for number, choice in enumerate(itertools.chain([first], choices), 1):
        smallest = min(smallest, (choice.margin, number))
        if choice.others is not None:
            parted.append((number, choice))
        if choice.token in text.stop_ids:
            break
        written.append(choice.token)
        now = text.decode([*ids, *written])
        if now.startswith(shown):
            typer.echo(now[len(shown) :], nl=False)
            shown = now
    if not now.startswith(shown):  # later tokens have changed what earlier ones are
        typer.echo(f"\n{now}", nl=False)
    typer.echo()
    names = " and ".join(f"{name}_gpt" for name in twins)
    same = "the same from " if len(twins) > 1 else ""
    margin = f"smallest margin {smallest[0]:.1e} at token {smallest[1]}"
    line, style = f"{len(written)} tokens, {same}{names}, {margin}", "dim"
    wrong = [pair for pair in parted if pair[1].verdict is Verdict.FAIL]
    if parted:
        number, choice = (wrong or parted)[0]
        line = (
            f"{'FAIL' if wrong else 'TIE'}: token {number} is {choice.token} by flax_gpt and "
            f"{choice.others} by torch_gpt, margin {choice.margin:.1e}, scores {choice.gap:.1e} "
            "apart" + ("" if wrong else ", which rounding explains")
        )
        style = "bold red" if wrong else "yellow"
    errors.print(line, style=style, highlight=False, soft_wrap=True)
    return 1 if wrong else 0
