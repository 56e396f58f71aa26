"""Training both twins side by side: runs that can be stopped, resumed, drawn and written from."""

from parity.training.curves import draw_precision, draw_training
from parity.training.loop import NonFinite, Sides, train
from parity.training.precision import precision_report
from parity.training.run import Run, RunConfig
from parity.training.writer import Writer

__all__ = [
    "NonFinite",
    "Run",
    "RunConfig",
    "Sides",
    "Writer",
    "draw_precision",
    "draw_training",
    "precision_report",
    "train",
]
