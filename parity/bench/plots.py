"""Plots of the decode bench: speed and growth against the context."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from parity.bench.result import DecodeBench, DecodeCell
from parity.bench.scaling import Exponent, ScalingFit
from parity.report.figures import plain, save

# One colour per system, one line style per form of it.
_STYLES = {
    "flax step": ("tab:blue", "-", "o"),
    "flax loop": ("tab:blue", "--", "s"),
    "flax naive": ("tab:cyan", ":", "v"),
    "torch step": ("tab:orange", "-", "o"),
    "torch in place": ("tab:orange", "--", "s"),
    "transformers": ("tab:green", "-", "D"),
    "transformers static": ("tab:green", ":", "v"),
    "ctranslate2": ("tab:purple", "-", "^"),
}

_BARS = {"capsize": 2, "elinewidth": 0.8}


def draw(bench: DecodeBench, folder: Path) -> tuple[Path, ...]:
    """Write the plots that the outcome has numbers for.

    Returns:
        Their files.

    Raises:
        OSError: if one cannot be written.
    """
    groups: dict[tuple[str, int], list[DecodeCell]] = {}
    for cell in bench.cells:
        groups.setdefault((cell.dtype, cell.batch_size), []).append(cell)
    panels = [sorted(cells, key=lambda cell: cell.context) for cells in groups.values()]
    figures = {"tokens_per_second.png": _speed(bench, panels)}
    fits = [(x, x.exponent) for x in bench.complexity]
    fitted = [(fit, exponent) for fit, exponent in fits if exponent is not None]
    if fitted:
        figures["cached_against_uncached.png"] = _growth(bench, fitted)
    for name, figure in figures.items():
        save(figure, folder / name)
    return tuple(folder / name for name in figures)


def _speed(bench: DecodeBench, panels: Sequence[Sequence[DecodeCell]]) -> Figure:
    """Plot tokens per second against the context, a panel per dtype and batch size."""
    figure, axes = _panels(len(panels))
    for axis, cells in zip(axes, panels, strict=True):
        for name, (colour, line, marker) in _STYLES.items():
            timings = [(cell, cell.get(name)) for cell in cells]
            points = [(cell.context, cell.batch_size, x.rounds_s) for cell, x in timings if x]
            if not points:
                continue
            contexts = [context for context, _, _ in points]
            rates = [[rows / x for x in seconds] for _, rows, seconds in points]
            style = {"color": colour, "linestyle": line, "marker": marker, "markersize": 5}
            axis.errorbar(contexts, *_middles(rates), **style, **_BARS, label=name)
        _contexts(axis, [cell.context for cell in cells])
        axis.set_ylim(bottom=0)
        axis.set_ylabel("tokens per second, all rows")
        axis.set_title(f"{cells[0].dtype}, batch {cells[0].batch_size}", fontsize=10)
    _legend(figure, axes)
    figure.suptitle(f"{bench.preset}: writing, median and range of the rounds", fontsize=11)
    return figure


def _growth(bench: DecodeBench, fits: Sequence[tuple[ScalingFit, Exponent]]) -> Figure:
    """Plot milliseconds per token of both forms in both twins, with the fitted powers."""
    figure, (axis,) = _panels(1)
    for fit, exponent in fits:
        colour, cached = _STYLES[f"{fit.name.split()[0]} step"][0], fit.form == "cached"
        style = {"color": colour, "marker": "o" if cached else "s"}
        style["markerfacecolor"] = colour if cached else "white"
        contexts = sorted({context for context, _ in fit.points})
        times = [[1e3 * s for context, s in fit.points if context == x] for x in contexts]
        axis.errorbar(contexts, *_middles(times), **style, **_BARS, linestyle="none")
        line = {"linestyle": "-" if cached else "--", "linewidth": 1.2, "markevery": []}
        line["label"] = (
            f"{fit.name.split()[0]} {fit.form}\npower {exponent.value:.2f}, 95 %: "
            f"{exponent.low:.2f} to {exponent.high:.2f}"
        )
        axis.plot(contexts, [1e3 * exponent.cost(x) for x in contexts], **style, **line)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
    axis.yaxis.set_minor_locator(NullLocator())
    _contexts(axis, sorted({cell.context for cell in bench.cells}))
    axis.set_xlabel("tokens that a row holds")
    axis.set_ylabel("ms per token")
    _legend(figure, [axis])
    cell = bench.cells[0]
    figure.suptitle(
        f"{bench.preset}, {cell.dtype}, batch {cell.batch_size}: a token with and without cache",
        fontsize=11,
    )
    return figure


def _middles(values: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the median of each group, and the distances to its lowest and highest number."""
    middles = np.array([np.median(group) for group in values])
    lowest, highest = (np.array([end(group) for group in values]) for end in (min, max))
    return middles, np.stack([middles - lowest, highest - middles])


def _panels(number: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.6 * number + 2.4, 4.2), layout="constrained")
    axes = list(figure.subplots(1, number, squeeze=False)[0])
    plain(axes)
    return figure, axes


def _contexts(axis: Axes, contexts: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xlabel("context, tokens")


def _legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """Write every name once, beside the panels and not over them."""
    found = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    figure.legend(
        found.values(), found.keys(), loc="outside right center", frameon=False, fontsize=9
    )
