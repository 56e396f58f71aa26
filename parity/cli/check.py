"""`parity check`: are two models the same function, the twins or two of your own?"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer
from rich.console import Console

from parity.check.levels.names import DTYPES, LEVELS
from parity.cli.options import (
    Data,
    Device,
    Natural,
    Positive,
    PositiveOrNone,
    check_data,
    check_outputs,
    in_one_line,
    write_output,
)
from parity.cli.record import build_module, called_by, only_one
from parity.system.memory import return_freed_memory_at_once
from parity.system.programs import keep_programs
from parity.system.progress import interruptible, shown
from parity.system.random_state import kept_random_state
from parity.twins.names import PRESETS

if TYPE_CHECKING:
    from parity.pair.pair import Pair
    from parity.report import Report

Kind = TypeVar("Kind")


def check(
    data: Data = None,
    preset: Annotated[
        str,
        typer.Option(
            help=f"Model size: {', '.join(PRESETS)}. Beyond tiny, a CPU takes hours unless --steps "
            "and --tokens are small."
        ),
    ] = "tiny",
    checkpoint: str | None = None,
    torch: str | None = None,
    flax: str | None = None,
    inputs: str | None = None,
    torch_call: str | None = None,
    flax_call: str | None = None,
    rules: str = "auto",
    save_rules: str | None = None,
    golden: Path | None = None,
    task: str = "next-token",
    level: Annotated[
        list[str] | None,
        typer.Option(help=f"Run only this level; repeat for more: {', '.join(LEVELS)}."),
    ] = None,
    dtype: str = "float64,float32",
    steps: Positive = 100,
    dropout: float = 0.0,
    tokens: PositiveOrNone = None,
    seed: Natural = 0,
    device: Device = "auto",
    no_cache: bool = False,
    json: str | None = None,
    markdown: str | None = None,
    html: str | None = None,
) -> None:
    """Prove that a Flax model and a PyTorch model are the same function: the twins, or yours.

    Both get the same random weights, or those of a checkpoint, and go through these levels; a
    failure blocks the rest, and is located and explained.

    [bold]weights[/]     each leaf used once, bit for bit, matrices right way round
    [bold]logits[/]      equal outputs: full context, padding, repetition, one token
    [bold]gradients[/]   equal gradients by leaf
    [bold]optimizer[/]   equal updates and moments over four AdamW steps
    [bold]trajectory[/]  equal losses over --steps training steps
    [bold]cache[/]       reading in ragged chunks equals reading at once
    [bold]tokens[/]      equal tokens: flax, torch, cached, uncached, greedy, sampled

    Training runs with warm-up, cosine, clipping, a decay mask, label smoothing, accumulation over
    ragged parts and labels that are not scored; --dropout adds dropout.

    Options:
        checkpoint: The weights and sizes of a folder of transformers (gpt2, llama, mistral, qwen2,
            qwen3, bloom), of one that `parity convert` made, or of a name of the hub.
        torch: Your PyTorch module, or what builds it: my_pkg.net:build or net.py:Net.
        flax: Your Flax NNX module, or a function that builds it.
        inputs: What to call both with: an array, a tuple of arguments, a dict of them by the names
            of parameters, several such calls in a dict by names of your own, or a function of a
            NumPy random generator that returns one of these. Parameters such as train,
            deterministic and rngs are filled in.
        torch_call: How your PyTorch module is called, where a plain call does not fit: calls.py:f,
            a function such as def f(module, tokens, mask): return module(input_ids=tokens,
            attention_mask=mask).logits. It gets the arguments of --inputs.
        flax_call: The same of your Flax module. It may bring axes into the other's order.
        rules: Which weight is which: a rules file, or auto to infer it.
        save_rules: Write the rules that were used to this file, to keep and edit.
        golden: A file of `parity record`: checks one module of yours against it, in float64 alone
            and without the other framework.
        task: next-token, or a classifier's head on the GPT: token-class (what kind of character
            came before), sequence-class (how many of a passage's characters are letters).
        dtype: float64 decides; float64,float32 also judges float32 by it.
        steps: Training steps of the trajectory.
        dropout: Dropout in training, with the same masks in both.
        tokens: Tokens to generate after each of four prompts. Default: 256, or half of a
            checkpoint's context where that is less.
        seed: Seed of the weights and of the text passages.
        json: Write the report to this file; - for standard output.
        markdown: Write the table to this file, for a README; - for standard output.
        no_cache: Compile everything anew. Else what jax compiles is kept in the user's cache
            folder, and a second run is faster.
        html: Write a page to this file, with plots of gaps, losses and margins.

    Examples:
        parity check
        parity check --data shakespeare.txt --html report.html --json report.json
        parity check --steps 1000 --dropout 0.1 --level trajectory
        parity check --level logits --level gradients --dtype float64
        parity check --checkpoint ./llama --steps 3
        parity check --torch my_pkg.net:build --flax my_port.net:build --inputs inputs.py:make
        parity check --torch net.py:Net --flax port.py:Port --inputs inputs.py:make \
            --flax-call inputs.py:call
        parity check --golden net.safetensors --flax my_port.net:build --rules rules.toml
    """
    files = {"--json": json, "--markdown": markdown, "--html": html, "--save-rules": save_rules}
    with in_one_line(Console(stderr=True)) as errors:
        check_outputs(files)
        dtypes = tuple(name.strip() for name in dtype.split(","))
        if dtypes not in (DTYPES[:1], DTYPES):
            raise ValueError(f"--dtype {dtype}: choose float64 or float64,float32.")
        if unknown := set(level or ()) - set(LEVELS):
            raise ValueError(f"--level {min(unknown)}: no such level. Choose {', '.join(LEVELS)}.")
        levels = [name for name in LEVELS if not level or name in level]
        own = {"--torch": torch, "--flax": flax, "--inputs": inputs}
        calls = {"torch": torch_call, "flax": flax_call}
        return_freed_memory_at_once()
        if not no_cache:
            keep_programs()
        if golden is not None:
            others = {"--data": data, "--checkpoint": checkpoint, "--inputs": inputs}
            others |= {"--save-rules": save_rules}
            report = _check_golden(errors, golden, own, calls, rules, levels, others)
        else:
            is_own = any((*own.values(), *calls.values()))
            of_twins = preset != "tiny" or task != "next-token"
            if is_own and (checkpoint is not None or data is not None or of_twins):
                raise ValueError(
                    "--torch and --flax with --checkpoint, --data, --preset or --task: those are "
                    "of the twins. Leave one or the other out."
                )
            if is_own:
                _refuse_part_of_pair(own, rules)
            elif rules != "auto" or save_rules is not None:
                raise ValueError(
                    "--rules: the twins have their own. Give --torch, --flax and --inputs."
                )
            elif checkpoint is not None and of_twins:
                raise ValueError(
                    f"--checkpoint {checkpoint} with --preset or --task: a checkpoint has sizes of "
                    "its own and predicts the next token. Leave the others out."
                )
            check_data(data)
            with errors.status("loading jax and torch"):
                from parity.check.check import check as run
                from parity.pair.text import Corpus
                from parity.system.devices import choose_devices

                devices = choose_devices(device)
                if is_own:
                    pair = _own_pair(own, calls, rules, seed)
                elif checkpoint is not None:
                    from parity.checkpoints import folder_of, open_checkpoint, pair_of

                    weights = open_checkpoint(folder_of(checkpoint))
                    for note in weights.notes:
                        errors.print(note, style="yellow", highlight=False, soft_wrap=True)
                    sizes = dict(dropout=dropout, seed=seed, max_new_tokens=tokens)
                    pair = pair_of(weights, Corpus.load(data), **sizes)
                else:
                    from parity.twins.pair import preset_config, twins

                    corpus = Corpus.load(data)
                    config = preset_config(corpus, preset, dropout=dropout)
                    pair = twins(corpus, config, task=task, seed=seed, max_new_tokens=tokens or 256)
            with shown(errors, levels) as show, interruptible(show) as progress:
                report = run(
                    pair,
                    levels=levels,
                    dtypes=dtypes,
                    devices=devices,
                    seed=seed,
                    steps=steps,
                    plot_data=html is not None,
                    progress=progress,
                )
            write_output(save_rules, pair.rules.to_toml)
        Console(stderr="-" in files.values()).print(report)
        write_output(json, report.to_json)
        write_output(markdown, report.to_markdown)
        if html is not None:
            from parity.report.page import page  # jinja2 waits until a page is wanted

            write_output(html, lambda: page(report))
    raise typer.Exit(report.exit_code)


def _refuse_part_of_pair(own: Mapping[str, str | None], rules: str) -> None:
    """Refuse targets, by option, of which one is missing, and a rules file that does not exist."""
    if missing := [option for option, target in own.items() if target is None]:
        raise ValueError(
            f"{' and '.join(missing)}: missing. A pair is two modules and what to call them with. "
            "Give --torch, --flax and --inputs."
        )
    if rules != "auto" and not Path(rules).is_file():
        raise ValueError(f"--rules {rules}: no such file. Give a rules file, or auto.")


@kept_random_state()
def _own_pair(
    own: Mapping[str, str | None], calls: Mapping[str, str | None], rules: str, seed: int
) -> "Pair":
    """Return the pair of a user's modules: targets by option, and of calls by framework."""
    from flax import nnx
    from torch import nn

    from parity.check.modules import pair_of
    from parity.system.import_target import built, load_attribute

    attributes = {}

    def module(option: str, kind: type[Kind]) -> Kind:
        target = str(own[option])
        attributes[option] = load_attribute(target)
        found = built(target, attributes[option], (kind,))
        if not isinstance(found, kind):
            raise ValueError(
                f"{option} {target}: gave an object of type {type(found).__name__}. It must be a "
                f"{kind.__module__.split('.')[0]} module or a function that builds one."
            )
        return found

    modules = module("--torch", nn.Module), module("--flax", nnx.Module)
    uses = {name: called_by(f"--{name}-call", target) for name, target in calls.items()}
    if not isinstance(attributes["--torch"], nn.Module):
        uses["torch"] = dataclasses.replace(uses["torch"], build=attributes["--torch"])
    inputs = load_attribute(str(own["--inputs"]))
    return pair_of(*modules, inputs, rules=rules, seed=seed, torch=uses["torch"], flax=uses["flax"])


def _check_golden(
    errors: Console,
    golden: Path,
    own: Mapping[str, str | None],
    calls: Mapping[str, str | None],
    rules: str,
    levels: Sequence[str],
    others: Mapping[str, object],
) -> "Report":
    """Check a module against a golden, beside which none of the `others` must be given."""
    if given := [option for option, value in others.items() if value is not None]:
        raise ValueError(
            f"--golden {golden} with {', '.join(given)}: a golden has inputs and weights of its "
            "own. Leave the others out."
        )
    name, target = only_one("check --golden", own["--torch"], own["--flax"])
    from parity.golden import check, read, weight_rules

    recorded = read(golden)
    found = weight_rules(None if rules == "auto" else Path(rules), recorded, name)
    module = build_module(name, target, recorded.seed)
    use = called_by(f"--{name}-call", calls[name])
    with shown(errors, levels) as show, interruptible(show) as progress:
        return check(recorded, module, rules=found, use=use, levels=levels, progress=progress)
