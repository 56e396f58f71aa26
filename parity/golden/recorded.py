"""A recorded model, which answers the levels from a golden."""

from parity.frameworks.batch import Argument, Batch, Outputs
from parity.frameworks.leaves import Leaves
from parity.frameworks.protocols import Moments
from parity.frameworks.purity import Purity
from parity.golden.file import Golden


class RecordedRunner:
    """A `Runner` that knows the answers to what was asked when the golden was recorded."""

    def __init__(self, golden: Golden):
        self.name = name_of(golden)
        self._golden = golden

    def release(self) -> None:
        """Nothing to release."""

    def moved(self) -> "RecordedRunner":
        """Return itself, for a recording is what it is."""
        return self

    def outputs(self, batch: Batch) -> Outputs:
        """Return the output for one of the golden's own probes."""
        found = (name for name, probe in self._golden.probes.items() if probe is batch)
        return self._golden.outputs[next(found)]

    def gradients(self, batch: Batch) -> tuple[float, Leaves]:
        """Return the loss on the first probe and its gradient by leaf."""
        return self._golden.loss, self._golden.gradients

    def forward_purity(self, batch: Batch) -> Purity:
        """Return the recorded purity of the forward pass."""
        return self._golden.purity["forward"]

    def gradient_purity(self, batch: Batch) -> Purity:
        """Return the recorded purity of the forward and backward pass."""
        return self._golden.purity["gradient"]

    def trainer(self, num_steps: int) -> "RecordedTrainer":
        """Return the recorded training from its beginning."""
        return RecordedTrainer(self._golden)


class RecordedTrainer:
    """A recorded training: every loss, and the states after the first few steps and the last."""

    def __init__(self, golden: Golden):
        self._golden, self._steps = golden, 0

    def step(self, *inputs: Argument, **keywords: Argument) -> float:
        """Move one step on and return the loss before it."""
        self._steps += 1
        return float(self._golden.losses[self._steps - 1])

    def parameters(self) -> Leaves:
        """Return the weights at this step."""
        golden, steps = self._golden, self._steps
        if steps == 0:
            return golden.weights
        return golden.states[steps - 1].after if steps <= len(golden.states) else golden.final

    def moments(self) -> Moments:
        """Return the moments at this step."""
        state = self._golden.states[self._steps - 1]
        return state.first, state.second, state.count


def name_of(golden: Golden) -> str:
    """Return the name of the recorded model in a report."""
    return f"{golden.model.removesuffix(')')}, golden)"
