"""Pictures of the decode bench: speed, growth and bandwidth against the context."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from parity.bench.complexity import Law
from parity.bench.decode_outcome import DecodeBench
from parity.bench.decode_times import DecodeCell
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
_COLOURS = {"flax": "tab:blue", "torch": "tab:orange"}
_TARGET = 65  # percent of the bandwidth, see AT_LEAST


def draw(bench: DecodeBench, folder: Path) -> tuple[Path, ...]:
    """Writes the pictures that the outcome has numbers for.

    Returns:
        Their files.

    Raises:
        OSError: when the folder or the disk does not take one.
    """
    groups: dict[tuple[str, int], list[DecodeCell]] = {}
    for cell in bench.cells:
        groups.setdefault((cell.dtype, cell.batch_size), []).append(cell)
    panels = [sorted(cells, key=lambda cell: cell.context) for cells in groups.values()]
    figures = {"tokens_per_second.png": _speed(bench, panels)}
    if any(law.quantity == "time" and law.exponent is not None for law in bench.laws):
        figures["cached_against_uncached.png"] = _growth(bench)
    figures["share_of_bandwidth.png"] = _share(bench, panels)
    for name, figure in figures.items():
        save(figure, folder / name)
    return tuple(folder / name for name in figures)


def _speed(bench: DecodeBench, panels: Sequence[Sequence[DecodeCell]]) -> Figure:
    """Tokens per second against the context, a panel per dtype and batch size."""
    figure, axes = _panels(len(panels))
    for axis, cells in zip(axes, panels, strict=True):
        for name, (colour, line, marker) in _STYLES.items():
            timings = [(cell, cell.get(name)) for cell in cells]
            points = [(cell.context, cell.batch_size, x.turns_s) for cell, x in timings if x]
            if not points:
                continue
            contexts = [context for context, _, _ in points]
            rates = [rows / np.sort(turns) for _, rows, turns in points]
            axis.errorbar(
                contexts, *_middles(rates), color=colour, linestyle=line,
                marker=marker, markersize=5, capsize=2, elinewidth=0.8, label=name,
            )  # fmt: skip
        _contexts(axis, [cell.context for cell in cells])
        axis.set_ylim(bottom=0)
        axis.set_ylabel("tokens per second, all rows")
        axis.set_title(f"{cells[0].dtype}, batch {cells[0].batch_size}", fontsize=10)
    _legend(figure, axes)
    figure.suptitle(f"{bench.preset}: writing, median and range of the rounds", fontsize=11)
    return figure


def _growth(bench: DecodeBench) -> Figure:
    """Milliseconds per token of both forms in both twins, with the fitted powers."""
    figure, (axis,) = _panels(1)
    laws = [law for law in bench.laws if law.quantity == "time" and law.exponent is not None]
    for law in laws:
        colour, cached = _COLOURS[law.framework], law.form == "cached"
        contexts = sorted({context for context, _ in law.points})
        times = [[1e3 * s for context, s in law.points if context == x] for x in contexts]
        points = dict(
            color=colour, marker="o" if cached else "s",
            markerfacecolor=colour if cached else "white",
        )  # fmt: skip
        axis.errorbar(
            contexts, *_middles(times), **points, linestyle="none", capsize=2, elinewidth=0.8
        )
        axis.plot(
            contexts, [1e3 * law.exponent.cost(x) for x in contexts], **points, markevery=[],
            linestyle="-" if cached else "--", linewidth=1.2, label=_words(law),
        )  # fmt: skip
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


def _words(law: Law) -> str:
    found = law.exponent
    return (
        f"{law.framework} {law.form}\npower {found.value:.2f}, 95 %: {found.low:.2f} to "
        f"{found.high:.2f}"
    )


def _share(bench: DecodeBench, panels: Sequence[Sequence[DecodeCell]]) -> Figure:
    """Share of the read bandwidth, a group of bars per context."""
    figure, axes = _panels(len(panels))
    for axis, cells in zip(axes, panels, strict=True):
        names = [name for name in _STYLES if any(cell.share(name) for cell in cells)]
        width = 0.84 / max(1, len(names))
        for index, name in enumerate(names):
            colour, line, _ = _STYLES[name]
            if line != "-":
                colour = tuple(0.5 + 0.5 * part for part in to_rgb(colour))
            shares = [100 * (cell.share(name) or 0.0) for cell in cells]
            places = np.arange(len(cells)) + (index - (len(names) - 1) / 2) * width
            axis.bar(
                places, shares, width * 0.92, label=name, color=colour,
                hatch=None if line != ":" else "///", edgecolor="white", linewidth=0.4,
            )  # fmt: skip
        axis.axhline(_TARGET, color="0.35", linewidth=0.9, linestyle=(0, (4, 3)))
        axis.text(
            1.0, _TARGET + 1, f"target {_TARGET} %", transform=axis.get_yaxis_transform(),
            ha="right", va="bottom", fontsize=8, color="0.35",
        )  # fmt: skip
        axis.set_axisbelow(True)
        axis.grid(visible=False, axis="x")
        axis.set_xticks(range(len(cells)), [f"{cell.context:,}" for cell in cells])
        axis.set_xlabel("context, tokens")
        axis.set_ylim(0, max(100, axis.get_ylim()[1]))
        axis.set_ylabel("share of the read bandwidth, %")
        axis.set_title(f"{cells[0].dtype}, batch {cells[0].batch_size}", fontsize=10)
    _legend(figure, axes)
    figure.suptitle(
        f"{bench.preset}: weights and valid cache, read once per step, over what the machine reads",
        fontsize=11,
    )
    return figure


def _middles(values: Sequence[Sequence[float]]) -> tuple[np.ndarray, np.ndarray]:
    """The median of each group, and how far its numbers reach below and above."""
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
    """Every name once, beside the panels and not over them."""
    found = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    figure.legend(
        found.values(), found.keys(), loc="outside right center", frameon=False, fontsize=9
    )
