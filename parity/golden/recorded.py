"""A recorded model: it answers the levels from a golden, as a runner does from a live model."""

import numpy as np

from parity.frameworks.leaves import Leaves
from parity.frameworks.purity import Purity
from parity.frameworks.spec import Batch
from parity.golden.file import Golden


class RecordedRunner:
    """What a golden has to say, to the questions that were asked when it was recorded."""

    def __init__(self, golden: Golden):
        self.name = name_of(golden)
        self._golden = golden

    def release(self) -> None:
        """It holds no more than what it says."""

    def outputs(self, batch: Batch) -> np.ndarray:
        """The output for one of the golden's own probes."""
        found = (name for name, probe in self._golden.probes.items() if probe is batch)
        return self._golden.outputs[next(found)]

    def gradients(self, batch: Batch) -> tuple[float, Leaves]:
        """The loss on the first probe, and its gradient by leaf."""
        return self._golden.loss, self._golden.gradients

    def forward_purity(self, batch: Batch) -> Purity:
        """What the forward pass was made of."""
        return self._golden.purity["forward"]

    def gradient_purity(self, batch: Batch) -> Purity:
        """What the forward and backward pass were made of."""
        return self._golden.purity["gradient"]

    def trainer(self, num_steps: int) -> "RecordedTrainer":
        """The recorded training from its beginning."""
        return RecordedTrainer(self._golden)


class RecordedTrainer:
    """A training that was recorded, step by step: states after the first few and the last."""

    def __init__(self, golden: Golden):
        self._golden, self._steps = golden, 0

    def step(self, *inputs: np.ndarray) -> float:
        """One step on; the loss before it."""
        self._steps += 1
        return float(self._golden.losses[self._steps - 1])

    def parameters(self) -> Leaves:
        """The weights at this step."""
        golden, steps = self._golden, self._steps
        if steps == 0:
            return golden.weights
        return golden.states[steps - 1].after if steps <= len(golden.states) else golden.final

    def moments(self) -> tuple[Leaves, Leaves, int]:
        """First and second moments at this step, and the optimizer's count."""
        state = self._golden.states[self._steps - 1]
        return state.first, state.second, state.count


def name_of(golden: Golden) -> str:
    """What the report calls the recorded side."""
    return f"{golden.model.removesuffix(')')}, golden)"
