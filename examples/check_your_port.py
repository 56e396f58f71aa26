"""Check a port of your own: it fails, the cause is named, and the mended port passes.

    python examples/check_your_port.py

Look at `where` and `cause` of the first check. The difference is about 1e-5, which most tests of a
port would let pass; in float64 it cannot hide.
"""

import numpy as np
import torch
from flax import nnx

from parity import check_pair


class Net(torch.nn.Module):
    """A residual layer in PyTorch."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = torch.nn.Linear(6, 6), torch.nn.LayerNorm(6)

    def forward(self, x):
        """Return normed x plus its transform."""
        return self.norm(x + torch.tanh(self.linear(x)))


class Port(nnx.Module):
    """The same in Flax, whose LayerNorm has another epsilon by default."""

    def __init__(self, **options):
        rngs = nnx.Rngs(0)
        self.linear, self.norm = nnx.Linear(6, 6, rngs=rngs), nnx.LayerNorm(6, rngs=rngs, **options)

    def __call__(self, x):
        """Return normed x plus its transform."""
        return self.norm(x + nnx.tanh(self.linear(x)))


def inputs(rng: np.random.Generator) -> np.ndarray:
    """Draw one batch; called again for every batch of the check."""
    return rng.normal(size=(4, 6))


report = check_pair(Net(), Port(), inputs)
print(f"{report.verdict} at {report.divergence.where}: {report.divergence.cause}")

report = check_pair(Net(), Port(epsilon=1e-5), inputs)
print(report)
report.raise_if_diverged()
