"""Training both twins side by side: runs that can be stopped, resumed, drawn and written from."""

from parity.training.curves import draw_precision, draw_training
from parity.training.loop import NonFinite, Trainers, evaluate, parted, train
from parity.training.precision import precision_report
from parity.training.run import Run, RunConfig, as_line
from parity.training.writer import Writer

__all__ = [
    "NonFinite",
    "Run",
    "RunConfig",
    "Trainers",
    "Writer",
    "as_line",
    "draw_precision",
    "draw_training",
    "evaluate",
    "parted",
    "precision_report",
    "train",
]
