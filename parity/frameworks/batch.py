"""The inputs of one call."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Batch:
    """Inputs of one call.

    Attributes:
        inputs: arrays, in the order of the arguments.
        real: True where an element of the output counts, over the leading axes; None for all.
    """

    inputs: tuple[np.ndarray, ...]
    real: np.ndarray | None = None

    def select(self, outputs: np.ndarray) -> np.ndarray:
        """Return what counts of an output; all of it if it lacks the axes of `real`."""
        if self.real is None or outputs.shape[: self.real.ndim] != self.real.shape:
            return outputs
        return outputs[self.real]
