"""Numbers that the plots of a report's page show."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ModuleGaps:
    """Differences between the two outputs of each module in float64."""

    probe: str  # name of the input
    gaps: tuple[tuple[str, float], ...]  # path and largest difference, as modules finish
    bound: float  # the largest gap of the model's own output that passes
    note: str = ""  # why there are no gaps


@dataclasses.dataclass(frozen=True)
class LossCurves:
    """Losses of both models by step, and the largest gap that passes."""

    dtype: str
    flax: tuple[float, ...]
    torch: tuple[float, ...]
    bound: float


@dataclasses.dataclass(frozen=True)
class Flip:
    """The first token of a row that differs from the reference; both count from 0."""

    name: str
    dtype: str
    row: int
    index: int


@dataclasses.dataclass
class Generation:
    """Tokens after each prompt, as the first decoder in float64 chose them."""

    kind: str  # greedy or drawn
    tokens: list[list[int]]  # ids by row
    margins: list[list[float]]  # by row, how far the first choice is above the second, in logits
    reach: dict[str, float]  # by dtype, the margin below which rounding can flip a choice
    flips: list[Flip] = dataclasses.field(default_factory=list)  # of other decoders


@dataclasses.dataclass
class PlotData:
    """Data for all plots, filled by the levels as they run; blocked levels leave theirs empty."""

    modules: ModuleGaps | None = None
    losses: list[LossCurves] = dataclasses.field(default_factory=list)
    generations: list[Generation] = dataclasses.field(default_factory=list)
