"""How fast the twins are, side by side in one run, held against what the machine can do."""

from parity.bench.machine import Matmul, best_matmul
from parity.bench.times import Contest, Timing, TrainingBench
from parity.bench.training import DTYPES, bench_training, flop_per_step, phases

__all__ = [
    "DTYPES",
    "Contest",
    "Matmul",
    "Timing",
    "TrainingBench",
    "bench_training",
    "best_matmul",
    "flop_per_step",
    "phases",
]
