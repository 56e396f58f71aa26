"""Runs one module and keeps what it computed."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from parity.check.levels.names import HORIZON, OPTIMIZER_STEPS
from parity.frameworks.leaves import Leaves, copied
from parity.frameworks.spec import ModelSpec
from parity.golden.file import Golden, State
from parity.golden.frameworks import framework, framework_of
from parity.pair.inputs import as_inputs
from parity.weights.randomize import randomized

Call = Callable[..., Any]


def record(
    module: Any,
    inputs: Any,
    *,
    call: Call | None = None,
    loss: Call | None = None,
    optimizer: Any = None,
    learning_rate: float | None = None,
    weights: str = "random",
    seed: int = 0,
    steps: int = OPTIMIZER_STEPS,
) -> Golden:
    """What a module computes in float64: outputs, gradients and a few steps of its optimizer.

        record(net, np.ones((2, 3, 8))).write(Path("net.safetensors"))

    The module is not changed.

    Args:
        module: a torch.nn.Module or a flax.nnx.Module.
        inputs: what to call it with: an array, a tuple of arrays, several such by name, or a
            function of a NumPy random generator that gives one of these, called for every batch.
        call: (module, *inputs) to outputs; `module(*inputs)` when None.
        loss: (module, *inputs) to a scalar; a fixed random projection of the outputs when None.
        optimizer: of the module's framework, as `check_pair` takes it; AdamW when None.
        learning_rate: the largest of an optimizer of optax, which does not tell it; the unit in
            which single updates are judged.
        weights: random, as in a check, for initial ones hide forgotten biases and norms; or own
            for those that the module has.
        seed: of the weights and of the inputs' generator.
        steps: of training.

    Raises:
        ValueError: for a module, inputs or numbers that cannot be used.
    """
    if weights not in ("random", "own"):
        raise ValueError(f"record: weights {weights!r}: there are random and own.")
    if steps < OPTIMIZER_STEPS:
        raise ValueError(
            f"record: {steps} steps < {OPTIMIZER_STEPS}. Fewer cannot see every fault of an optimizer. Ask "
            f"for {OPTIMIZER_STEPS} or more."
        )
    calls = as_inputs(inputs, seed)
    name = framework_of(module)
    here = framework(name)
    side = here.side_of(module, call, loss, optimizer)
    run = here.run_of(side, _weights(here, module, side, weights, seed))
    under_test = here.leaves_of_run(run)
    first = next(iter(calls.probes.values()))
    value, gradients = run.gradients(first)
    batches = tuple(calls.training_batch(step) for step in range(steps))
    purity = {"forward": run.forward_purity(first), "gradient": run.gradient_purity(first)}
    if narrow := purity["forward"].impure or purity["gradient"].impure:
        words = ", ".join(f"{name} ({n}x)" for name, n in narrow.items())
        raise ValueError(
            f"record: {side.name} is not float64 throughout: {words}. A golden is judged in "
            "float64 alone. Mend the model or check both as they run, where float32 decides."
        )
    # Two trainers, as in the levels: the schedule may span another number of steps.
    trainer, states = run.trainer(HORIZON), []
    for batch in batches[:OPTIMIZER_STEPS]:
        trainer.step(*batch.inputs)
        first, second, count = trainer.moments()
        states.append(State(trainer.parameters(), copied(first), copied(second), count))
    trainer = run.trainer(steps)
    losses = np.array([trainer.step(*batch.inputs) for batch in batches])
    return Golden(
        framework=name,
        model=side.name,
        versions={"numpy": np.__version__} | here.versions(),
        seed=seed,
        learning_rate=learning_rate or here.learning_rate(trainer, optimizer),
        weights=under_test,
        probes=calls.probes,
        outputs={name: run.outputs(batch) for name, batch in calls.probes.items()},
        loss=value,
        gradients=gradients,
        batches=batches,
        losses=losses,
        states=tuple(states),
        final=trainer.parameters(),
        purity=purity,
    )


def _weights(here: ModuleType, module: Any, side: ModelSpec, weights: str, seed: int) -> Leaves:
    """What is to be loaded: random numbers in all that training moves, or the module's own."""
    if weights == "own":
        return here.leaves_of_side(side, "float64")
    leaves, kept = here.leaves_of_side(side, "float32"), here.fixed(module)
    drawn = randomized({name: x for name, x in leaves.items() if name not in kept}, seed)
    return leaves | drawn
