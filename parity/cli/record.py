"""`parity record`: what one framework computes, in a file; and the check against such a file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from parity.check.levels.names import OPTIMIZER_STEPS
from parity.cli.options import check_outputs, in_one_line


def record(
    out: Annotated[Path, typer.Argument(help="The file to write, of safetensors.")],
    inputs: Annotated[
        str,
        typer.Option(
            help="What to call the module with: inputs.py:make, arrays or a function of a NumPy "
            "random generator that gives them."
        ),
    ],
    torch: Annotated[
        str | None, typer.Option(help="The PyTorch module: net.py:build or my_pkg.net:build.")
    ] = None,
    flax: Annotated[
        str | None, typer.Option(help="The Flax NNX module: port.py:build or my_pkg.port:build.")
    ] = None,
    steps: Annotated[
        int, typer.Option(min=OPTIMIZER_STEPS, help="Steps of AdamW to record.")
    ] = OPTIMIZER_STEPS,
    weights: Annotated[
        str,
        typer.Option(
            help="random, which hides nothing, or own for those that the module is built with."
        ),
    ] = "random",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the weights and of the inputs.")] = 0,
) -> None:
    """Record what one model computes, to check the other where the first framework is not there.

    The file is a golden: weights, inputs, outputs, gradients and the first steps of training, all
    in float64. Whoever ports the model gets it instead of an environment with two frameworks in
    it; and a later version of the model itself is checked against it in the same way.

    Recording twice gives the same bytes.

    Examples:

    parity record net.safetensors --torch net.py:build --inputs inputs.py:make

    parity check --golden net.safetensors --flax port.py:build --rules rules.toml

    parity check --golden net.safetensors --torch net.py:build
    """
    errors = Console(stderr=True)
    with in_one_line(errors):
        if str(out) == "-":
            raise ValueError("record -: a golden is binary. Name a file.")
        check_outputs({"record": str(out)})
        name, target = _only("record", torch, flax)
        from parity.system.import_target import load_attribute

        given = load_attribute(inputs)
        with errors.status(f"recording {target}"):
            module = _module(name, target, seed)
            from parity.golden import record as run

            golden = run(module, given, weights=weights, seed=seed, steps=steps)
            golden.write(out)
        size = out.stat().st_size / 1e6
        errors.print(
            f"{out}: {golden.model}, {len(golden.weights)} leaves, {len(golden.probes)} probes, "
            f"{steps} steps, {size:.1f} MB",
            highlight=False, soft_wrap=True,
        )  # fmt: skip


def check_golden(
    errors: Console,
    golden: Path,
    torch: str | None,
    flax: str | None,
    rules: str,
    levels: list[str],
    others: Mapping[str, Any],
) -> Any:
    """The report of a module against a golden, with a live progress line on the error stream.

    Args:
        errors: the error stream.
        golden: the file.
        torch: what stands for a PyTorch module.
        flax: what stands for a Flax module.
        rules: a rules file, or auto where none is given.
        levels: to climb.
        others: options that must not be given beside it.

    Raises:
        ValueError: for a golden, a module or rules that cannot be used.
    """
    from parity.golden import check, read, weight_rules
    from parity.system.progress import interruptible, shown

    if given := [option for option, value in others.items() if value is not None]:
        raise ValueError(
            f"--golden {golden} with {', '.join(given)}: a golden has inputs and weights of its "
            "own. Leave the others out."
        )
    name, target = _only("check --golden", torch, flax)
    recorded = read(golden)
    found = weight_rules(None if rules == "auto" else Path(rules), recorded, name)
    module = _module(name, target, recorded.seed)
    with shown(errors, levels) as show, interruptible(show) as progress:
        return check(recorded, module, rules=found, levels=levels, progress=progress)


def _only(who: str, torch: str | None, flax: str | None) -> tuple[str, str]:
    """The one framework that is named, and the target in it.

    Raises:
        ValueError: for both or neither.
    """
    if (torch is None) == (flax is None):
        given = "neither --torch nor --flax" if torch is None else "both --torch and --flax"
        raise ValueError(
            f"{who}: {given}. A golden has one side, and one side is run. Give one of them."
        )
    return ("torch", torch) if torch is not None else ("flax", flax)


def _module(name: str, target: str, seed: int) -> Any:
    """The module that a target builds.

    Raises:
        ValueError: when it builds none of that framework.
    """
    from parity.golden.frameworks import framework
    from parity.system.import_target import built, load_attribute

    here = framework(name)
    found = here.seeded(seed, lambda: built(target, load_attribute(target), (here.MODULE,)))
    if not isinstance(found, here.MODULE):
        raise ValueError(
            f"{target}: {type(found).__name__}. --{name} wants a {name} module or a function that "
            "builds one. Name one."
        )
    return found
