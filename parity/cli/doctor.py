"""`parity doctor`: what is wrong with a language model?"""

import contextlib
import sys
from typing import Annotated

import typer
from rich.console import Console

from parity.cli.options import AtLeastTwoOrNone, check_outputs, in_one_line, write_output
from parity.system.progress import interruptible, shown


def doctor(
    target: Annotated[str, typer.Argument()] = "",
    vocab_size: AtLeastTwoOrNone = None,
    context_length: AtLeastTwoOrNone = None,
    loss: str | None = None,
    ignore_index: int | None = None,
    trained: bool = False,
    only: list[str] | None = None,
    all_questions: Annotated[bool, typer.Option("--all")] = False,
    questions: bool = False,
    json: str | None = None,
    html: str | None = None,
) -> None:
    """Examine a language model: what is wrong with it, why that matters, what to try next.

    The function gives a torch.nn.Module or a flax.nnx.Module that maps tokens (B, T) to logits (B,
    T, V), alone, first in a tuple, or as `.logits`. Models of transformers bring their loss, cache
    and generation with them; for others, return a subclass of
    parity.doctor.TorchModel or FlaxModel that says how to reach yours, and more can be asked.

    About twenty questions are put in the order of a disciplined debugging session: the loss of
    fresh weights, causality, positions, batches, padding, the loss and its shift, the gradient, one
    batch learned by heart, the cache, generated tokens. What an earlier failure makes meaningless
    is left out. The model itself is not changed.

    Options:
        target: A function that builds the model: my_pkg.net:build or net.py:build.
        vocab_size: Token ids; found in the model where it says so.
        context_length: Longest sequence; found in the model likewise.
        loss: The model's own loss as a target: a function of logits, labels (the tokens
            themselves) and counts of real tokens or None.
        ignore_index: A label that this loss does not score, such as -100.
        trained: The weights are trained, so they know something.
        only: Put only this question; repeat for more.
        all_questions: Also put questions that a failure made meaningless.
        questions: Print what is asked, and why, and end.
        json: Write the answers to this file; - for standard output.
        html: Write a page to this file.

    Exit codes: 0 nothing wrong was seen, 1 something was, 2 bad input.

    Examples:
        parity doctor my_pkg.net:build
        parity doctor net.py:build --vocab-size 128 --context-length 64 --html net.html
        parity doctor net.py:build --only causality --only best-lag
    """
    # A target such as net.py:key: is no emoji.
    with in_one_line(Console(stderr=True, emoji=False)) as errors:
        check_outputs({"--json": json, "--html": html})
        with errors.status("loading jax and torch"):
            from parity.doctor import DETECTORS, examine
            from parity.doctor.loading import load_model
            from parity.system.devices import pinned_precision

        names = [detector.name for detector in DETECTORS]
        if unknown := set(only or ()) - set(names):
            raise ValueError(f"--only {min(unknown)}: no such question. Choose {', '.join(names)}.")
        chosen = [x for x in DETECTORS if not only or x.name in only]
        if questions:
            for detector in chosen:
                typer.echo(f"{detector.name}: {detector.asks}\n    {detector.matters}")
            raise typer.Exit(0)
        if not target:
            raise ValueError(
                "doctor: no model. A model is what a function gives. Name one, as my_pkg.net:build "
                "or net.py:build."
            )
        asked = [detector.name for detector in chosen]
        with (
            # What a model prints is no part of a document.
            contextlib.redirect_stdout(sys.stderr if json == "-" else sys.stdout),
            shown(errors, asked) as show,
            interruptible(show) as progress,
            pinned_precision(),
        ):
            model = load_model(
                target,
                loss,
                trained=trained,
                vocab_size=vocab_size,
                context_length=context_length,
                ignore_index=ignore_index,
            )
            found = examine(
                model, detectors=chosen, stop_early=not all_questions, progress=progress
            )
        Console(stderr=json == "-").print(found)
        write_output(json, found.to_json)
        write_output(html, found.to_html)
    raise typer.Exit(found.exit_code)
