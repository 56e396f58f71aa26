"""Two modules, what to call them with and a weight map: a pair, and its check."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import optax
import torch
from flax import nnx

from parity.check.check import LEVELS, Progress, check
from parity.check.metrics import max_abs
from parity.check.pair_session import PairSession
from parity.frameworks.flax.leaves import flax_leaves
from parity.frameworks.flax.module import flax_spec
from parity.frameworks.torch.leaves import torch_leaves
from parity.frameworks.torch.module import largest_learning_rate, torch_spec
from parity.pair.inputs import as_inputs
from parity.pair.pair import Pair
from parity.report import Report
from parity.system.devices import choose_devices
from parity.system.import_target import in_a_line
from parity.weights.infer import infer_rules
from parity.weights.rules import Rules
from parity.weights.weight_map import resolve

Call = Callable[..., Any]


def check_pair(
    torch_module: torch.nn.Module,
    flax_module: nnx.Module,
    inputs: Any,
    *,
    levels: Iterable[str] = tuple(LEVELS),
    dtypes: tuple[str, ...] = ("float64", "float32"),
    device: str = "cpu",
    seed: int = 0,
    steps: int = 20,
    progress: Progress = lambda level, fraction: None,
    **options: Any,
) -> Report:
    """Compares two modules level by level: weights, outputs, gradients, updates, losses.

        report = check_pair(net, port, np.ones((2, 3, 8), np.float32))
        print(report)
        report.raise_if_diverged()

    Neither module is changed: copies are made in float64, which decides, and in float32. Both get
    the same random weights, for initial ones hide forgotten biases and norms.

    Args:
        torch_module: the PyTorch module.
        flax_module: the Flax NNX module.
        inputs: what to call both with: an array, a tuple of arrays, several such by name, or a
            function of a NumPy random generator that gives one of these, called for every batch.
        levels: names of levels; all by default.
        dtypes: float64, or float64 and float32.
        device: auto, cpu or cuda.
        seed: of the weights and of the inputs' generator.
        steps: of the trajectory.
        progress: called with a level's name and how far it is, from 0 to 1.
        options: of `pair_of`.

    Returns:
        A report: prints as a table, has `.ok`, `.to_json()` and `.raise_if_diverged()`.

    Raises:
        ValueError: for modules, inputs or rules that cannot be used.
    """
    pair = pair_of(torch_module, flax_module, inputs, seed=seed, **options)
    return check(
        pair,
        levels=levels,
        dtypes=dtypes,
        devices=choose_devices(device),
        seed=seed,
        steps=steps,
        progress=progress,
    )


def pair_of(
    torch_module: torch.nn.Module,
    flax_module: nnx.Module,
    inputs: Any,
    *,
    rules: Rules | Path | str = "auto",
    torch_call: Call | None = None,
    flax_call: Call | None = None,
    torch_loss: Call | None = None,
    flax_loss: Call | None = None,
    torch_optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
    flax_optimizer: optax.GradientTransformation | None = None,
    weights: str = "random",
    seed: int = 0,
) -> Pair:
    """Two modules as a pair.

    Args:
        torch_module: the PyTorch module.
        flax_module: the Flax NNX module.
        inputs: see `check_pair`.
        rules: the weight map, a rules file, or "auto" to infer it.
        torch_call: (module, *inputs) to outputs; `module(*inputs)` when None.
        flax_call: the same of the other module; here axes are brought into its order.
        torch_loss: (module, *inputs) to a scalar; a fixed random projection of the outputs when
            None. Both losses are given or neither.
        flax_loss: the same of the other module.
        torch_optimizer: parameters to an optimizer; AdamW when None. Both or neither.
        flax_optimizer: an optax transformation.
        weights: random, or torch for those that the PyTorch module has.
        seed: of the inputs' generator.

    Raises:
        ValueError: for modules, inputs or rules that cannot be used.
    """
    if not isinstance(torch_module, torch.nn.Module) or not isinstance(flax_module, nnx.Module):
        kinds = " and ".join(type(module).__name__ for module in (torch_module, flax_module))
        raise ValueError(
            f"check_pair: {kinds}. A pair is a torch.nn.Module and a flax.nnx.Module, in this "
            "order. Give these."
        )
    for name, both in (
        ("loss", (torch_loss, flax_loss)),
        ("optimizer", (torch_optimizer, flax_optimizer)),
    ):
        if (both[0] is None) != (both[1] is None):
            raise ValueError(
                f"check_pair: {name} of one side alone. Two are compared. Give "
                f"torch_{name} and flax_{name}, or neither."
            )
    if weights not in ("random", "torch"):
        raise ValueError(f"check_pair: weights {weights!r}: there are random and torch.")
    calls = as_inputs(inputs, seed)
    flax = flax_spec(flax_module, flax_call, flax_loss, flax_optimizer)
    port = torch_spec(torch_module, torch_call, torch_loss, torch_optimizer)

    def made(rules: Rules) -> Pair:
        return Pair(flax, port, rules, calls.probes, calls.training_batch, pure=False)

    if rules == "auto":
        rules = infer_rules(torch_module, flax_module, lambda found: _output_gap(made(found)))
    elif not isinstance(rules, Rules):
        rules = Rules.load(Path(rules))
    pair = dataclasses.replace(
        made(rules), learning_rate=largest_learning_rate(torch_module, torch_optimizer)
    )
    if weights == "torch":
        ours = torch_leaves(port.build("float32"))
        theirs = PairSession(pair, choose_devices("cpu")).build_flax()
        pair = dataclasses.replace(
            pair, leaves=resolve(rules, ours, flax_leaves(theirs)).to_flax(ours)
        )
    return pair


def _output_gap(pair: Pair) -> float:
    """How far the outputs are apart in float64 with these rules, of the largest."""
    session = PairSession(pair, choose_devices("cpu"), dtypes=("float64",))
    try:
        flax, torch = (run.outputs(session.gradient_probe) for run in session.runs("float64"))
    except Exception as error:
        raise ValueError(
            f"rules auto: a model raised {type(error).__name__}: {in_a_line(error)}. Names leave a "
            "choice that only running the models can make. Mend the inputs or write a rules file."
        ) from error
    return max_abs(flax, torch) / max(float(np.max(np.abs(torch), initial=0.0)), 1e-300)
