"""Plots of a check as SVG: gaps of the modules, losses, margins of tokens."""

import itertools
import math
from collections.abc import Sequence

from markupsafe import Markup

from parity.report.plot_data import Generation, LossCurves, ModuleGaps
from parity.report.svg import Panel, Scale, drawing, linear_scale, log_scale, tag
from parity.report.table import number

_CHARACTER = 6.2  # width of a letter, in units of a drawing


class Plot:
    """A drawing, and a sentence on what it shows, which is its description as well."""

    def __init__(
        self, title: str, words: str, size: tuple[int, int], *elements: str, css: str = ""
    ):
        self.words, self.drawing = words, drawing(title, words, size, *elements, css=css)


def modules(seen: ModuleGaps, divergent: str | None) -> Plot:
    """Draw the gap of every module in the order of execution, and mark the divergent one."""
    paths, gaps = zip(*seen.gaps, strict=True)
    x = Scale(-0.5, len(gaps) - 0.5, ())
    panel = Panel(x, log_scale([*gaps, seen.bound]), 62, 34, 786, 246)
    elements = [*_groups(panel, paths), panel.axes(y_name="largest difference")]
    elements.append(panel.rule(seen.bound, f"bound of the outputs, {number(seen.bound)}"))
    for place, (path, gap) in enumerate(seen.gaps):
        across, down = panel.at(place, gap)
        css = "dot" if gap <= seen.bound else "dot off"
        words = tag("title", f"{path}: {number(gap)}")
        elements.append(tag("circle", words, cx=across, cy=down, r=4, class_=css))
    if divergent is not None and divergent in paths:
        place = paths.index(divergent)
        across, down = panel.at(place, gaps[place])
        side = "end " if place > len(paths) / 2 else ""
        y = down - 15 if down > panel.top + 30 else down + 24
        elements.append(tag("circle", cx=across, cy=down, r=8, class_="ring"))
        elements.append(tag("text", divergent, x=across, y=y, class_=f"{side}named"))
    worst = largest(gaps)
    words = f"The largest is {number(worst)}, at {paths[gaps.index(worst)]}."
    words += f" First to diverge: {divergent}." if divergent in paths else ""
    return Plot("Gap of every module", words, (860, 320), *elements, css="full")


def _groups(panel: Panel, paths: Sequence[str]) -> list[Markup]:
    """Return a stripe for the modules of every second numbered block, and the blocks' names."""
    elements, start = [], 0
    unit, bottom = panel.width / len(paths), panel.top + panel.height
    free = panel.left  # where the next name may begin
    for number_of_block, (name, members) in enumerate(itertools.groupby(paths, _block)):
        count = len(list(members))
        left, width = panel.left + unit * start, unit * count
        if name and number_of_block % 2:
            box = {"x": left, "y": panel.top, "width": width, "height": panel.height}
            elements.append(tag("rect", **box, class_="stripe"))
        middle, half = left + width / 2, len(name) * _CHARACTER / 2
        if name and middle - half >= free:
            elements.append(tag("text", name, x=middle, y=bottom + 17, class_="middle tick"))
            free = middle + half + _CHARACTER
        start += count
    return elements


def _block(path: str) -> str:
    """Return a path up to its first number; "" without one."""
    names = path.split(".")
    numbered = [place for place, name in enumerate(names) if name.isdigit()]
    return ".".join(names[: numbered[0] + 1]) if numbered else ""


def losses(seen: LossCurves) -> Plot:
    """Draw both loss curves, and below them their gap."""
    steps = range(1, len(seen.flax) + 1)
    gaps = [abs(a - b) for a, b in zip(seen.flax, seen.torch, strict=True)]
    x = linear_scale([0, len(steps)])
    above = Panel(x, linear_scale([*seen.flax, *seen.torch]), 62, 34, 360, 146)
    below = Panel(x, log_scale([*gaps, seen.bound]), 62, 224, 360, 126)
    words = f"The largest gap is {number(largest(gaps))}, {number(seen.bound)} is allowed."
    return Plot(
        f"Losses in {seen.dtype}",
        words,
        (440, 390),
        above.axes(y_name="loss", x_ticks=False),
        above.line(steps, seen.flax, "flax"),
        above.line(steps, seen.torch, "torch"),
        below.axes(x_name="step", y_name="gap between the two"),
        below.rule(seen.bound, f"bound {number(seen.bound)}"),
        below.dots(steps, gaps, "dots"),
    )


def margins(seen: Generation) -> Plot:
    """Draw the margin of every token, the margins that rounding can overturn, and the flips."""
    rows = [(range(1, len(row) + 1), row) for row in seen.margins]
    every = [margin for row in seen.margins for margin in row]
    # One decade more holds the words below the lowest line.
    limits = [*seen.reach.values(), min(seen.reach.values()) / 10]
    x = linear_scale([0, max(len(row) for row in seen.margins)])
    panel = Panel(x, log_scale([*every, *limits]), 62, 34, 360, 286)
    elements = [panel.axes(x_name="token", y_name="margin, in logits")]
    for place, (dtype, reach) in enumerate(seen.reach.items()):
        words = f"{dtype} rounding reaches {number(reach)}"
        elements.append(panel.rule(reach, words, "limit", below=place == 0))
    elements += [panel.dots(*row, "dots light") for row in rows]
    for flip in seen.flips:
        across, down = panel.at(flip.index + 1, seen.margins[flip.row][flip.index])
        words = f"{flip.name}, {flip.dtype}: row {flip.row} flips at token {flip.index + 1}"
        elements.append(tag("circle", tag("title", words), cx=across, cy=down, r=7, class_="ring"))
    words = f"The smallest margin is {number(smallest(every))}."
    words += f" Rows that flipped in other runs: {len(seen.flips)}." if seen.flips else ""
    return Plot(f"Margins of {seen.kind} tokens", words, (440, 360), *elements)


def largest(values: Sequence[float]) -> float:
    """Return the largest value; NaN is larger than all."""
    return max(values, key=lambda value: math.inf if math.isnan(value) else value)


def smallest(values: Sequence[float]) -> float:
    """Return the smallest value; NaN is smaller than all."""
    return min(values, key=lambda value: -math.inf if math.isnan(value) else value)
