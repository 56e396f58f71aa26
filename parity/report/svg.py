"""Plots as inline SVG: axes, lines and dots. Colours are CSS classes, so they follow the page.

NaN and infinity have no place on a linear axis; on a log axis they lie at the top, and zero at the
bottom.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

from markupsafe import Markup

_LARGEST = 1e300  # differences of larger numbers are infinite
_TICKS = 6


def tag(_name: str, *inside: str, **attributes: str | float) -> Markup:
    """Return an element; text and attributes are escaped, underscores in names become dashes."""
    pairs = ((key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items())
    words = (
        Markup(' {}="{}"').format(key, f"{value:.5g}" if isinstance(value, float) else value)
        for key, value in pairs
    )
    opening, content = Markup("").join(words), Markup("").join(inside)
    return Markup("<{0}{1}>{2}</{0}>").format(_name, opening, content)


@dataclasses.dataclass(frozen=True)
class Scale:
    """An axis."""

    low: float  # value, or its decade on a log axis, at the beginning
    high: float  # that at the end
    ticks: tuple[tuple[float, str], ...]  # places between low and high, each with a label
    log: bool = False  # whether places are decades

    def share(self, value: float) -> float:
        """Return the position of a value along the axis, from 0 to 1; NaN where it has none."""
        if self.log and not abs(value) < _LARGEST:
            place = self.high
        elif self.log:
            place = math.log10(abs(value)) if value else self.low
        else:
            place = value if abs(value) < _LARGEST else math.nan
        return (place - self.low) / (self.high - self.low)


def linear_scale(values: Iterable[float]) -> Scale:
    """Return an axis from one round number to another, around all values."""
    finite = [value for value in values if abs(value) < _LARGEST] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    if high - low <= 1e-9 * abs(low):
        high = low + max(1.0, abs(low))
    stride = 10.0 ** math.floor(math.log10(high - low))
    stride *= next(k for k in (0.2, 0.5, 1, 2) if (high - low) / (k * stride) <= _TICKS)
    first, last = math.floor(low / stride), math.ceil(high / stride)
    ticks = tuple((n * stride, f"{n * stride:.10g}") for n in range(first, last + 1))
    return Scale(first * stride, last * stride, ticks)


def log_scale(values: Iterable[float]) -> Scale:
    """Return an axis of whole decades around all values."""
    values = list(values)
    decades = [math.log10(abs(value)) for value in values if 0 < abs(value) < _LARGEST]
    low, high = math.floor(min(decades, default=-16)), math.ceil(max(decades, default=-15))
    high = max(high, low + 1)
    stride = math.ceil((high - low) / _TICKS)
    ticks = [(place, f"1e{place}") for place in range(low, high + 1, stride)]
    if 0 in values:
        low -= stride
        ticks.insert(0, (low, "0"))
    if not all(abs(value) < _LARGEST for value in values):
        high = ticks[-1][0] + stride
        ticks.append((high, "inf, nan"))
    return Scale(low, high, tuple(ticks), log=True)


@dataclasses.dataclass(frozen=True)
class Panel:
    """A rectangle of a drawing with an axis below and one at its left, in units of the drawing."""

    x: Scale
    y: Scale
    left: float
    top: float
    width: float
    height: float

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return the position of a point in the drawing."""
        across, up = self.x.share(x), self.y.share(y)
        return self.left + self.width * across, self.top + self.height * (1 - up)

    def axes(self, x_name: str = "", y_name: str = "", x_ticks: bool = True) -> Markup:
        """Draw a grid line for each tick of y, and labels on both axes."""
        bottom, right = self.top + self.height, self.left + self.width
        parts = []
        for place, label in self.y.ticks:
            y = bottom - self.height * (place - self.y.low) / (self.y.high - self.y.low)
            parts.append(tag("path", d=f"M{self.left:g} {y:.1f}H{right:g}", class_="grid"))
            parts.append(tag("text", label, x=self.left - 7, y=y + 4, class_="end tick"))
        for place, label in self.x.ticks if x_ticks else ():
            x = self.left + self.width * self.x.share(place)
            parts.append(tag("text", label, x=x, y=bottom + 17, class_="middle tick"))
        parts.append(tag("path", d=f"M{self.left:g} {bottom:g}H{right:g}", class_="axis"))
        if x_name:
            parts.append(tag("text", x_name, x=right, y=bottom + 34, class_="end tick"))
        if y_name:
            parts.append(tag("text", y_name, x=0.0, y=self.top - 14, class_="tick"))
        return Markup("").join(parts)

    def line(self, xs: Sequence[float], ys: Sequence[float], css: str) -> Markup:
        """Draw a line through the points, broken where one has no place."""
        words, pen = [], "M"
        for across, down in map(self.at, xs, ys):
            if not math.isnan(down):
                words.append(f"{pen}{across:.1f} {down:.1f}")
            pen = "M" if math.isnan(down) else "L"
        return tag("path", d="".join(words), class_=f"line {css}")

    def dots(self, xs: Sequence[float], ys: Sequence[float], css: str) -> Markup:
        """Draw all points as one element; a title for each would outweigh the rest of a page."""
        places = (self.at(x, y) for x, y in zip(xs, ys, strict=True))
        return tag("path", d="".join(f"M{x:.1f} {y:.1f}h0" for x, y in places), class_=css)

    def rule(self, y: float, label: str, css: str = "", below: bool = False) -> Markup:
        """Draw a dotted line at a value of y, with a label above or below its right end."""
        down = self.at(self.x.low, y)[1]
        right, beside = self.left + self.width, down + 14 if below else down - 5
        line = tag("path", d=f"M{self.left:g} {down:.1f}H{right:g}", class_=f"rule {css}")
        return line + tag("text", label, x=right, y=beside, class_=f"end note {css}")


def drawing(
    title: str, description: str, size: tuple[int, int], *elements: str, css: str = ""
) -> Markup:
    """Return a whole SVG element; a screen reader reads its title and description."""
    box, label = f"0 0 {size[0]} {size[1]}", f"{title}. {description}"
    words = tag("title", title), tag("desc", description)
    return tag("svg", *words, *elements, viewBox=box, role="img", aria_label=label, class_=css)
