"""Training both twins side by side: runs that can be stopped, resumed, drawn and written from.

run          the folder of a run: config, metrics, checkpoints
checkpoint   one checkpoint as a file
loop         train, evaluate, and judge the gap between the losses
diagnose     the first tensor of a step that is not finite
writer       text from a run
precision    the same training in several dtypes
curves       figures of both
watch        a live line on a terminal
"""

from parity.training.curves import draw_precision, draw_training
from parity.training.loop import NonFinite, Trainers, evaluate, judge_gap, train
from parity.training.precision import PrecisionReport, precision_report
from parity.training.run import Run, RunConfig, as_line
from parity.training.writer import Writer

__all__ = [
    "NonFinite",
    "PrecisionReport",
    "Run",
    "RunConfig",
    "Trainers",
    "Writer",
    "as_line",
    "draw_precision",
    "draw_training",
    "evaluate",
    "judge_gap",
    "precision_report",
    "train",
]
