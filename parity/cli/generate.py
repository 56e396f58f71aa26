"""`parity generate`: text from a run or a checkpoint, the same from either twin."""

import itertools
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from parity.cli.generate_options import GenerateOptions, is_checkpoint
from parity.cli.options import Device, Only, in_one_line


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
        float,
        typer.Option(help="0 takes the most likely token; 1 draws by probability."),
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
    beams: Annotated[
        int | None, typer.Option(min=1, help="Search with a beam of this width; nothing is drawn.")
    ] = None,
    draft: Annotated[
        str | None,
        typer.Option(
            help="Where guesses come from: lookup (the text itself, default) or another model."
        ),
    ] = None,
    speculate: Annotated[
        int | None, typer.Option(min=1, help="Tokens to guess and check in one call; 5 by --draft.")
    ] = None,
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

    parity generate ./llama "Once upon a time" --beams 4

    parity generate ./llama "Once upon a time" --draft ./llama-small --speculate 5
    """
    options = GenerateOptions(**locals())
    errors = Console(stderr=True)
    with in_one_line(errors, interrupted="the text ends here"):
        _ = options.frameworks  # refused before anything heavy is loaded
        write = _from_checkpoint if is_checkpoint(source) else _from_run
        if options.searches:
            from parity.cli.search import write
        failed, line, style = write(errors, options)
        errors.print(line, style=style, highlight=False, soft_wrap=True)
    raise typer.Exit(1 if failed else 0)


def _from_run(errors: Console, options: GenerateOptions) -> tuple[bool, str, str]:
    """Write the text of a run; return whether the twins differ, the last line and its style."""
    with errors.status("loading jax and torch"):
        from parity.report.record import Verdict
        from parity.system.devices import choose_devices
        from parity.training import Run, Writer

        sampling, devices = options.sampling(), choose_devices(options.device)
        writer = Writer(Run.open(Path(options.source)), devices, options.frameworks)
    with errors.status("writing"):
        found = writer.write(options.prompt, options.tokens, sampling, options.seed, options.cache)
    text, *others = dict.fromkeys(found.texts.values())
    typer.echo(options.prompt + text)
    if not others:
        return False, *_same(options, options.tokens, found.smallest_margin, found.smallest_at)
    failed = found.verdict is Verdict.FAIL
    note = f"FAIL: {found.note}" if failed else f"TIE: {found.note}, which rounding explains"
    note += f"\ntorch_gpt wrote: {options.prompt}{others[0]}"
    return failed, escape(note), "bold red" if failed else "yellow"


def _from_checkpoint(errors: Console, options: GenerateOptions) -> tuple[bool, str, str]:
    """Write the text of a checkpoint token by token; return the same as `_from_run`."""
    with errors.status("loading jax and torch"):
        from parity.checkpoints import Tokens, Writing, folder_of, open_checkpoint, stream
        from parity.report.record import Verdict
        from parity.system.devices import choose_devices

        devices = choose_devices(options.device)
        writing = Writing(
            options.tokens, options.sampling(), options.seed, options.frameworks, options.cache
        )
        weights = open_checkpoint(folder_of(options.source))
        text = Tokens(weights.path, weights.config.vocab_size)
        ids = text.encode(options.prompt)
        choices = stream(weights, ids, writing, devices)
        first = next(choices)
    for note in weights.notes:
        errors.print(note, style="yellow", highlight=False, soft_wrap=True)
    typer.echo(options.prompt, nl=False)
    now = shown = text.decode(ids)
    written, flips, smallest = [], [], (float("inf"), 0)
    for number, choice in enumerate(itertools.chain([first], choices), 1):
        smallest = min(smallest, (choice.margin, number))
        if choice.others is not None:
            flips.append((number, choice))
        if choice.token in text.stop_ids:
            break
        written.append(choice.token)
        now = text.decode([*ids, *written])
        if now.startswith(shown):
            typer.echo(now[len(shown) :], nl=False)
            shown = now
    if not now.startswith(shown):  # later tokens have changed the text of earlier ones
        typer.echo(f"\n{now}", nl=False)
    typer.echo()
    if not flips:
        return False, *_same(options, len(written), *smallest)
    wrong = [flip for flip in flips if flip[1].verdict is Verdict.FAIL]
    number, choice = (wrong or flips)[0]
    line = (
        f"{'FAIL' if wrong else 'TIE'}: token {number} is {choice.token} by flax_gpt and "
        f"{choice.others} by torch_gpt, margin {choice.margin:.1e}, scores {choice.gap:.1e} "
        "apart" + ("" if wrong else ", which rounding explains")
    )
    return bool(wrong), line, "bold red" if wrong else "yellow"


def _same(options: GenerateOptions, num_tokens: int, margin: float, place: int) -> tuple[str, str]:
    """Return the last line of a text that all twins wrote, and its style."""
    names = " and ".join(f"{name}_gpt" for name in options.frameworks)
    same = "the same from " if len(options.frameworks) > 1 else ""
    return (
        f"{num_tokens} tokens, {same}{names}, smallest margin {margin:.1e} at token {place}",
        "dim",
    )
