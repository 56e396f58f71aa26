"""Pictures of trainings: the losses, and how far they are apart."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from parity.check.bounds import LOSS
from parity.report.figures import plain, save

# A gap of zero has no place on a log axis; it is drawn at the rounding of a loss near 1.
_FLOOR = 1e-17
_COLOURS = {"flax": "#1b6ca8", "torch": "#d1495b"}


def draw_training(path: Path, metrics: Sequence[Mapping[str, Any]], title: str) -> None:
    """Both loss curves, and below them their gap between the bounds of float64 and float32.

    Args:
        path: of the PNG.
        metrics: a row per step: step, losses by framework.
        title: over the picture.
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
        gap = np.abs(curves["flax"] - curves["torch"])
        axes[1].plot(steps, np.maximum(gap, _FLOOR), ".", color="#444444", markersize=3)
        for name, bound in reversed(LOSS.items()):
            axes[1].axhline(bound, color="#888888", linewidth=0.9, linestyle=":")
            axes[1].annotate(
                f"bound in {name}", (1.0, bound), xycoords=("axes fraction", "data"), ha="right",
                va="bottom", fontsize=8, color="#555555",
            )  # fmt: skip
        if np.any(gap == 0.0):
            axes[1].annotate(
                "equal to the last bit", (1.0, _FLOOR), xycoords=("axes fraction", "data"),
                ha="right", va="bottom", fontsize=8, color="#555555",
            )  # fmt: skip
        axes[1].set_yscale("log")
        axes[1].set_ylim(
            _FLOOR / 3, max(1e-3, 10 * np.max(gap, initial=0.0, where=np.isfinite(gap)))
        )
        axes[1].set_ylabel("gap between the losses")
    axes[-1].set_xlabel("step")
    plain(axes)
    save(figure, path)


def draw_precision(path: Path, report: Mapping[str, Any]) -> None:
    """Loss curves in every type, their distance from float64, and the ratio of the two twins'.

    Args:
        path: of the PNG.
        report: what `precision_report` returned.
    """
    figure = Figure(figsize=(8, 9), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True)
    steps = 1 + np.arange(report["steps"])
    colours = dict(
        zip(report["curves"], ("#222222", "#1b6ca8", "#d1495b", "#edae49"), strict=False)
    )
    for dtype, curves in report["curves"].items():
        for name, style in (("flax", "-"), ("torch", "--")):
            loss = np.array(curves[name], float)
            axes[0].plot(steps, loss, style, color=colours[dtype], linewidth=1.2,
                         label=f"{dtype}, {name}_gpt")  # fmt: skip
            if dtype != "float64":
                error = np.abs(loss - np.array(report["curves"]["float64"][name], float))
                axes[1].plot(steps, np.maximum(error, _FLOOR), style, color=colours[dtype],
                             linewidth=0.9, label=f"{dtype}, {name}_gpt")  # fmt: skip
        if dtype != "float64":
            ratio = np.array(report["ratios"][dtype], float)
            axes[2].plot(steps, ratio, color=colours[dtype], linewidth=1.2, label=dtype)
    axes[0].set_ylabel("loss, nats per token")
    axes[0].set_title("The same weights and batches in every type", fontsize=10)
    axes[1].set_yscale("log")
    axes[1].set_ylabel("distance from float64")
    axes[2].set_yscale("log", base=2)
    for bound in (report["bound"], 1 / report["bound"]):
        axes[2].axhline(bound, color="#888888", linewidth=0.9, linestyle=":")
    axes[2].axhline(1.0, color="#bbbbbb", linewidth=0.9)
    axes[2].set_ylabel("error of flax / error of torch")
    axes[2].set_xlabel("step")
    axes[0].legend(frameon=False, fontsize=8, ncol=2)
    plain(axes)
    save(figure, path)
