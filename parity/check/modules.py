"""Check your own two modules: a PyTorch module, a Flax NNX module and what to call both with."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TypedDict, Unpack

import torch
from flax import nnx

from parity.check.check import check
from parity.check.experiment import PairExperiment
from parity.check.levels.names import DTYPES, LEVELS
from parity.check.pair_session import PairSession
from parity.check.trial import Side, called, with_other_size
from parity.frameworks.flax.leaves import flax_leaves
from parity.frameworks.flax.module import FlaxUse
from parity.frameworks.handle import handle
from parity.frameworks.spec import BY_DEFAULT
from parity.frameworks.torch.leaves import torch_leaves
from parity.frameworks.torch.module import TorchUse, learning_rate
from parity.pair.pair import Pair
from parity.report import Report
from parity.system.devices import choose_devices
from parity.system.random_state import kept_random_state
from parity.weights.infer import infer_rules
from parity.weights.rules import Rules
from parity.weights.weight_map import TransplantError, resolve


class PairOptions(TypedDict, total=False):
    """The options of `pair_of`, which documents them."""

    rules: Rules | Path | str
    torch: TorchUse
    flax: FlaxUse
    weights: str
    seed: int


def check_pair(
    torch_module: torch.nn.Module,
    flax_module: nnx.Module,
    inputs: object,
    *,
    levels: Iterable[str] = LEVELS,
    dtypes: tuple[str, ...] = DTYPES,
    device: str = "cpu",
    steps: int = 20,
    **options: Unpack[PairOptions],
) -> Report:
    """Compare two modules level by level: weights, outputs, gradients, updates, losses.

        report = check_pair(net, port, np.ones((2, 3, 8), np.float32))
        print(report)
        report.raise_if_diverged()

    Neither module is changed: copies are made in float64, which decides, and in float32. Both get
    the same random weights, because initial ones hide forgotten biases and norms.

    Args:
        torch_module: the PyTorch module.
        flax_module: the Flax NNX module.
        inputs: what to call both with: an array, a tuple of arguments, a dict of them by the names
            of parameters, a tuple that ends with such a dict, several such calls by name, or a
            function of a NumPy random generator that returns one of these, called for every batch.
            Arguments are arrays, of either framework too, None, numbers, texts, and lists and dicts
            of these. Parameters such as `train`, `deterministic` and `rngs` are filled in.
        levels: names of levels; all by default.
        dtypes: float64, or float64 and float32.
        device: auto, cpu or cuda.
        steps: of the trajectory.
        options: rules, torch, flax, weights and seed, as of `pair_of`. The seed is also that of
            the random weights.

    Returns:
        A report: prints as a table, has `.ok`, `.to_json()` and `.raise_if_diverged()`.

    Raises:
        ValueError: for modules, inputs or rules that cannot be used.
    """
    pair = pair_of(torch_module, flax_module, inputs, **options)
    devices, seed = choose_devices(device), options.get("seed", 0)
    return check(pair, levels=levels, dtypes=dtypes, devices=devices, seed=seed, steps=steps)


@kept_random_state()
def pair_of(
    torch_module: torch.nn.Module,
    flax_module: nnx.Module,
    inputs: object,
    *,
    rules: Rules | Path | str = "auto",
    torch: TorchUse = BY_DEFAULT,
    flax: FlaxUse = BY_DEFAULT,
    weights: str = "random",
    seed: int = 0,
) -> Pair:
    """Make a pair of two modules.

        pair_of(net, port, x, torch=ModuleUse(loss=net_loss), flax=ModuleUse(loss=port_loss))

    Args:
        torch_module: the PyTorch module.
        flax_module: the Flax NNX module.
        inputs: see `check_pair`.
        rules: the weight map, a rules file, or "auto" to infer it.
        torch: how the PyTorch module is called, scored and trained.
        flax: the same of the Flax module; its call may bring axes into torch's order. A loss or an
            optimizer is given for both modules or for neither.
        weights: "random", or "torch" for those that the PyTorch module has.
        seed: of the inputs' generator.

    Returns:
        The pair, for `parity.check.check.check`.

    Raises:
        ValueError: for modules, inputs or rules that cannot be used.
    """
    _require_modules(torch_module, flax_module)
    for name in ("loss", "optimizer"):
        if (getattr(torch, name) is None) != (getattr(flax, name) is None):
            raise ValueError(
                f"check_pair: {name} of one side alone. Two are compared. Give one in `torch` and "
                "one in `flax`, or neither."
            )
    if weights not in ("random", "torch"):
        raise ValueError(f"check_pair: weights {weights!r}: there are random and torch.")
    sides = (
        Side(handle("flax"), flax_module, flax),
        Side(handle("torch"), torch_module, torch),
    )
    calls, sides, scored = called(sides, inputs, seed)
    calls = with_other_size(sides, calls)
    flax_module, torch_module = sides[0].module, sides[1].module
    port, original = (x.handle.spec(x.module, x.use, y) for x, y in zip(sides, scored, strict=True))

    half = _half_precision(torch_module, flax_module)

    def made(rules: Rules) -> Pair:
        batches = calls.probes, calls.training_batch
        return Pair(port, original, rules, *batches, pure=False, half=half)

    is_file = rules != "auto" and not isinstance(rules, Rules)
    if rules == "auto":
        rules = Rules((), rest="auto")
    elif not isinstance(rules, Rules):
        rules = Rules.load(Path(rules))
    if rules.is_open:
        experiment = PairExperiment(made(Rules(())))
        rules = infer_rules(torch_module, flax_module, experiment, rules)
    rate = learning_rate(torch_module, torch.optimizer)
    pair = _without_frozen(
        dataclasses.replace(made(rules), learning_rate=rate), sides, scored, is_file
    )
    if weights == "torch":
        ours = torch_leaves(original.build("float32"))
        theirs = flax_leaves(PairSession(pair).build_flax())
        found = resolve(rules, ours, theirs)
        kept = {name: theirs[name] for name in found.flax_ignored}
        pair = dataclasses.replace(pair, leaves=found.to_flax(ours) | kept)
    return pair


def _half_precision(torch_module: torch.nn.Module, flax_module: nnx.Module) -> str | None:
    """Return the type of 16 bits that all float weights of one of the modules have, if one does."""
    ours = {str(x.dtype).removeprefix("torch.") for x in torch_module.parameters()}
    theirs = {str(x.dtype) for x in flax_leaves(flax_module).values() if x.dtype.kind not in "iub"}
    found = (min(x) for x in (ours, theirs) if x and x <= {"bfloat16", "float16"})
    return next(found, None)


def _without_frozen(
    pair: Pair,
    sides: tuple[Side[nnx.Module], Side[torch.nn.Module]],
    scored: list[list[str]],
    is_file: bool,
) -> Pair:
    """Return the pair with what one side does not train frozen on the other too."""
    flax, torch = (side.handle.trained(side.module) for side in sides)
    frozen: list[tuple[str, ...]] = [(), ()]
    try:
        leaves = torch_leaves(sides[1].module), flax_leaves(sides[0].module)
        links = resolve(pair.rules, *leaves).links
    except TransplantError:
        if is_file:
            raise
        return pair  # the level of the weights reports it
    for link in links:
        moves = bool(flax & {*link.flax}), bool(torch & {*link.torch})
        if moves[0] != moves[1]:
            frozen = [frozen[0] + link.flax, frozen[1] + link.torch]
    if not frozen[1]:
        return pair
    flax_spec, torch_spec = (
        side.handle.spec(side.module, side.use, leaves, names)
        for side, leaves, names in zip(sides, scored, frozen, strict=True)
    )
    return dataclasses.replace(pair, flax=flax_spec, torch=torch_spec, frozen=frozen[1])


def _require_modules(torch_module: object, flax_module: object) -> None:
    if not isinstance(torch_module, torch.nn.Module) or not isinstance(flax_module, nnx.Module):
        kinds = " and ".join(type(module).__name__ for module in (torch_module, flax_module))
        raise ValueError(
            f"check_pair: {kinds}. A pair is a torch.nn.Module and a flax.nnx.Module, in this "
            "order. Give these."
        )
