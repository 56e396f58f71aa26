"""How fast the twins are, side by side in one run, held against what the machine can do."""

from parity.bench.agreement import LOGITS, Reference
from parity.bench.complexity import Exponent, Law, Traffic, fit_exponent
from parity.bench.decode import CONTENDERS, bench_decode, decode_phases
from parity.bench.decode_outcome import DecodeBench
from parity.bench.decode_plots import draw
from parity.bench.decode_times import DecodeCell, Decoding
from parity.bench.machine import Bandwidth, Matmul, best_matmul
from parity.bench.ratios import Ratio
from parity.bench.times import Contest, Timing, TrainingBench
from parity.bench.training import DTYPES, bench_training, flop_per_step, phases

__all__ = [
    "CONTENDERS",
    "DTYPES",
    "LOGITS",
    "Bandwidth",
    "Contest",
    "DecodeBench",
    "DecodeCell",
    "Decoding",
    "Exponent",
    "Law",
    "Matmul",
    "Ratio",
    "Reference",
    "Timing",
    "Traffic",
    "TrainingBench",
    "bench_decode",
    "bench_training",
    "best_matmul",
    "decode_phases",
    "draw",
    "fit_exponent",
    "flop_per_step",
    "phases",
]
