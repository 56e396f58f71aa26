"""`parity generate`: text from a run, the same from either twin."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from parity.cli.options import Device, Only, frameworks, in_one_line


def generate(
    run: Annotated[Path, typer.Argument(help="Folder that `parity train --out` made.")],
    prompt: Annotated[str, typer.Argument(help="What to continue.")],
    tokens: Annotated[int, typer.Option(min=1, help="Characters to write.")] = 200,
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

    Those are flax's where flax was trained, else torch's. The text goes to standard output; what
    was compared, and the other text where there is one, goes to the error stream.

    Exit codes: 0 the same text (or a near-tie, with its margin), 1 different texts, 2 bad input.

    Examples:

    parity generate runs/a "To be" --tokens 200 --temperature 0.8 --seed 1

    parity generate runs/a "The " --temperature 0 --only torch
    """
    errors = Console(stderr=True)
    with in_one_line(errors):
        twins = frameworks(only)
        with errors.status("loading jax and torch"):
            from flax_gpt import Sampling
            from parity.compare import Verdict
            from parity.environment import choose_devices
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
