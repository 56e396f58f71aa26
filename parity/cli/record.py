"""`parity record`: keep what one framework computes in a file."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from parity.check.levels.names import OPTIMIZER_STEPS
from parity.cli.options import Natural, check_outputs, in_one_line
from parity.frameworks.handle import handle
from parity.frameworks.spec import ModuleUse
from parity.system.import_target import built, load_attribute


def record(
    out: Path,
    inputs: Annotated[str, typer.Option()],
    torch: str | None = None,
    flax: str | None = None,
    call: str | None = None,
    steps: Annotated[int, typer.Option(min=OPTIMIZER_STEPS)] = OPTIMIZER_STEPS,
    weights: str = "random",
    seed: Natural = 0,
) -> None:
    """Record what one model computes, to check the other where the first framework is not there.

    The file is a golden: weights, inputs, outputs, gradients and the first steps of training, all
    in float64. Whoever ports the model gets it instead of an environment with two frameworks in
    it; and a later version of the model itself is checked against it in the same way.

    Recording twice gives the same bytes.

    Options:
        out: The file to write, of safetensors.
        inputs: What to call the module with: inputs.py:make, arrays or a function of a NumPy
            random generator that gives them.
        torch: The PyTorch module: net.py:build or my_pkg.net:build.
        flax: The Flax NNX module: port.py:build or my_pkg.port:build.
        call: How the module is called, where a plain call does not fit: calls.py:f, a function of
            the module and its inputs.
        steps: Steps of AdamW to record.
        weights: random, which hides nothing, or own for those that the module is built with.
        seed: Seed of the weights and of the inputs.

    Examples:
        parity record net.safetensors --torch net.py:build --inputs inputs.py:make
        parity check --golden net.safetensors --flax port.py:build --rules rules.toml
        parity check --golden net.safetensors --torch net.py:build
    """
    with in_one_line(Console(stderr=True)) as errors:
        if str(out) == "-":
            raise ValueError("record -: a golden is binary. Name a file.")
        check_outputs({"record": str(out)})
        name, target = only_one("record", torch, flax)
        given = load_attribute(inputs)
        with errors.status(f"recording {target}"):
            from parity.golden import record as run

            module = build_module(name, target, seed)
            use = called_by("--call", call)
            golden = run(module, given, use=use, weights=weights, seed=seed, steps=steps)
            golden.write(out)
        size = out.stat().st_size / 1e6
        done = f"{len(golden.weights)} leaves, {len(golden.probes)} probes, {steps} steps"
        line = f"{out}: {golden.model}, {done}, {size:.1f} MB"
        errors.print(line, highlight=False, soft_wrap=True)


def only_one(command: str, torch: str | None, flax: str | None) -> tuple[str, str]:
    """Return the framework that one of two options names, and the target in it."""
    if torch is not None and flax is None:
        return "torch", torch
    if flax is not None and torch is None:
        return "flax", flax
    given = "neither --torch nor --flax" if torch is None else "both --torch and --flax"
    raise ValueError(
        f"{command}: {given}. A golden has one side, and one side is run. Give one of them."
    )


def called_by(option: str, target: str | None) -> ModuleUse:
    """Return the use of a module that a function calls: (module, *inputs, **keywords)."""
    call = None if target is None else load_attribute(target)
    if call is not None and not callable(call):
        raise ValueError(
            f"{option} {target}: {type(call).__name__}. It is a function that calls a module: def "
            "f(module, x): return module(x). Name one."
        )
    return ModuleUse(call=call)


def build_module(framework: str, target: str, seed: int) -> object:
    """Return the module that a target stands for, built with torch's own generator at a seed."""
    here = handle(framework)
    found = here.seeded(seed, lambda: built(target, load_attribute(target), (here.MODULE,)))
    if not isinstance(found, here.MODULE):
        raise ValueError(
            f"{target}: {type(found).__name__}. --{framework} wants a {framework} module or a "
            "function that builds one. Name one."
        )
    return found
