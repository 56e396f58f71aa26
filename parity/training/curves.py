"""Figures of trainings: the losses, and how far apart they are."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from parity.check import bounds
from parity.report.figures import plain, save
from parity.training.precision import PrecisionReport
from parity.training.run import Row

# A gap of zero has no place on a log axis; it is drawn at the rounding of a loss near 1.
_FLOOR = 1e-17
_COLOURS = {"flax": "#1b6ca8", "torch": "#d1495b"}
_DTYPE_COLOURS = "#222222", "#1b6ca8", "#d1495b", "#edae49"


def draw_training(path: Path, metrics: Sequence[Row], title: str) -> None:
    """Draw both loss curves, and below them their gap between the bounds of float64 and float32.

    Args:
        path: of the PNG.
        metrics: a row per step.
        title: of the figure.
    """
    steps = np.array([row["step"] for row in metrics])
    curves = {
        name: np.array([row["losses"][name] for row in metrics]) for name in metrics[0]["losses"]
    }
    rows = 2 if len(curves) > 1 else 1
    figure = Figure(figsize=(8, 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    for (name, curve), style in zip(curves.items(), ("-", "--"), strict=False):
        axes[0].plot(steps, curve, style, color=_COLOURS[name], label=f"{name}_gpt", linewidth=1.4)
    axes[0].set_ylabel("loss, nats per token")
    axes[0].set_title(title, fontsize=10)
    axes[0].legend(frameon=False)
    if rows == 2:
        _draw_gap(axes[1], steps, np.abs(curves["flax"] - curves["torch"]))
    axes[-1].set_xlabel("step")
    plain(axes)
    save(figure, path)


def draw_precision(path: Path, report: PrecisionReport) -> None:
    """Draw losses in every dtype, their distance from float64, and the ratio of the twins'.

    Args:
        path: of the PNG.
        report: of the trainings.
    """
    figure = Figure(figsize=(8, 9), layout="constrained")
    losses, errors, ratios = axes = figure.subplots(3, 1, sharex=True)
    truth = report.curves["float64"]
    steps = 1 + np.arange(len(truth["flax"]))
    for (dtype, curves), colour in zip(report.curves.items(), _DTYPE_COLOURS, strict=False):
        for name, style in (("flax", "-"), ("torch", "--")):
            line = dict(color=colour, label=f"{dtype}, {name}_gpt")
            losses.plot(steps, curves[name], style, linewidth=1.2, **line)
            if dtype != "float64":
                error = np.abs(np.array(curves[name]) - np.array(truth[name]))
                errors.plot(steps, np.maximum(error, _FLOOR), style, linewidth=0.9, **line)
    for (dtype, ratio), colour in zip(report.ratios.items(), _DTYPE_COLOURS[1:], strict=False):
        ratios.plot(steps, ratio, color=colour, linewidth=1.2, label=dtype)
    losses.set_ylabel("loss, nats per token")
    losses.set_title("The same weights and batches in every type", fontsize=10)
    losses.legend(frameon=False, fontsize=8, ncol=2)
    errors.set_yscale("log")
    errors.set_ylabel("distance from float64")
    ratios.set_yscale("log", base=2)
    for bound in (bounds.RATIO, 1 / bounds.RATIO):
        ratios.axhline(bound, color="#888888", linewidth=0.9, linestyle=":")
    ratios.axhline(1.0, color="#bbbbbb", linewidth=0.9)
    ratios.set_ylabel("error of flax / error of torch")
    ratios.set_xlabel("step")
    plain(axes)
    save(figure, path)


def _draw_gap(axis: Axes, steps: np.ndarray, gap: np.ndarray) -> None:
    """Draw the gap of two loss curves on a log axis, with its bounds."""
    axis.plot(steps, np.maximum(gap, _FLOOR), ".", color="#444444", markersize=3)
    for dtype, bound in bounds.LOSS.items():
        axis.axhline(bound, color="#888888", linewidth=0.9, linestyle=":")
        _note(axis, f"bound in {dtype}", bound)
    if np.any(gap == 0.0):
        _note(axis, "equal to the last bit", _FLOOR)
    axis.set_yscale("log")
    axis.set_ylim(_FLOOR / 3, max(1e-3, 10 * np.max(gap, initial=0.0, where=np.isfinite(gap))))
    axis.set_ylabel("gap between the losses")


def _note(axis: Axes, text: str, height: float) -> None:
    """Write a text above a height, at the right edge."""
    axis.annotate(
        text,
        (1.0, height),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
        fontsize=8,
        color="#555555",
    )
