"""Run one module and keep what it computes."""

from collections.abc import Mapping

import numpy as np

from parity.check.levels.names import HORIZON, OPTIMIZER_STEPS
from parity.frameworks.batch import Batch
from parity.frameworks.default_call import Signature
from parity.frameworks.handle import handle_of
from parity.frameworks.leaves import copied
from parity.frameworks.protocols import Runner
from parity.frameworks.purity import Purity
from parity.frameworks.spec import BY_DEFAULT, ModuleUse
from parity.golden.file import Golden, State
from parity.pair.inputs import as_inputs
from parity.system.devices import versions
from parity.weights.randomize import randomized


def record(
    module: object,
    inputs: object,
    *,
    use: ModuleUse = BY_DEFAULT,
    learning_rate: float | None = None,
    weights: str = "random",
    seed: int = 0,
    steps: int = OPTIMIZER_STEPS,
) -> Golden:
    """Return what a module computes in float64: outputs, gradients, some steps of its optimizer.

        record(net, np.ones((2, 3, 8))).write(Path("net.safetensors"))

    The module is not changed.

    Args:
        module: a torch.nn.Module or a flax.nnx.Module.
        inputs: what to call it with: an array, a tuple of arrays, several such by name, or a
            function of a NumPy random generator that gives one of these, called for every batch.
        use: how it is called, scored and trained.
        learning_rate: the largest of the optimizer, in units of which single updates are judged;
            needed for an optimizer of optax, which does not reveal it.
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
            f"record: {steps} steps < {OPTIMIZER_STEPS}. Fewer cannot see every fault of an "
            f"optimizer. Ask for {OPTIMIZER_STEPS} or more."
        )
    here = handle_of(module)
    calls = as_inputs(inputs, seed, [Signature.of(module, use.call)])
    spec = here.spec(module, use)
    leaves = here.initial_leaves(spec, "float64" if weights == "own" else "float32")
    if weights == "random":  # in all that training moves
        kept = here.code_leaves(module)
        leaves |= randomized({name: x for name, x in leaves.items() if name not in kept}, seed)
    runner = here.runner(spec, leaves)
    under_test, probe = runner.leaves(), next(iter(calls.probes.values()))
    loss, gradients = runner.gradients(probe)
    batches = tuple(calls.training_batch(step) for step in range(steps))
    purity = _required_purity(runner, probe)
    # A trainer of its own, as in the levels: its schedule may span another number of steps.
    trainer, states = runner.trainer(HORIZON), []
    for batch in batches[:OPTIMIZER_STEPS]:
        trainer.step(*batch.inputs, **batch.keywords)
        first, second, count = trainer.moments()
        states.append(State(trainer.parameters(), copied(first), copied(second), count))
    trainer = runner.trainer(steps)
    losses = np.array([trainer.step(*batch.inputs, **batch.keywords) for batch in batches])
    return Golden(
        framework=here.NAME,
        model=spec.name,
        versions=versions(here.NAME),
        seed=seed,
        learning_rate=learning_rate or here.learning_rate(module, use.optimizer),
        weights=under_test,
        probes=calls.probes,
        outputs={
            name: {path: x for path, x in runner.outputs(batch).items() if x.dtype.kind != "U"}
            for name, batch in calls.probes.items()
        },
        loss=loss,
        gradients=gradients,
        batches=batches,
        losses=losses,
        states=tuple(states),
        final=trainer.parameters(),
        purity=purity,
    )


def _required_purity(runner: Runner, probe: Batch) -> Mapping[str, Purity]:
    """Return the purity of the forward and of the backward pass, which must stay in float64."""
    purity = {"forward": runner.forward_purity(probe), "gradient": runner.gradient_purity(probe)}
    if narrow := purity["forward"].impure or purity["gradient"].impure:
        listed = ", ".join(f"{name} ({n}x)" for name, n in narrow.items())
        raise ValueError(
            f"record: {runner.name} is not float64 throughout: {listed}. A golden is judged in "
            "float64 alone. Mend the model or check both as they run, where float32 decides."
        )
    return purity
