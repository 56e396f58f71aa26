"""Names and step counts that the levels and the command line share; imports no framework."""

from parity.report.record import DTYPES

__all__ = ["DTYPES", "HORIZON", "LEVELS", "OPTIMIZER_STEPS"]

# In the order in which they run.
LEVELS = "weights", "logits", "gradients", "optimizer", "trajectory", "cache", "tokens"
# Steps that the level `optimizer` compares, and the steps that its schedule spans: warm-up, the
# peak, and the beginning of the decay.
OPTIMIZER_STEPS, HORIZON = 4, 5
