"""What a check has seen beyond its verdicts: the numbers behind the plots of its page."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ModuleGaps:
    """How far the outputs of each module are apart in float64.

    Attributes:
        probe: name of the input.
        gaps: path and largest difference, in the order in which modules finish.
        bound: the largest gap of the model's own output that passes.
        note: why there are none.
    """

    probe: str
    gaps: tuple[tuple[str, float], ...]
    bound: float
    note: str = ""


@dataclasses.dataclass(frozen=True)
class LossCurves:
    """The losses of both sides by step, and the largest gap that passes."""

    dtype: str
    flax: tuple[float, ...]
    torch: tuple[float, ...]
    bound: float


@dataclasses.dataclass(frozen=True)
class Flip:
    """The first token of a row, both counted from 0, that differs from the reference's."""

    name: str
    dtype: str
    row: int
    index: int


@dataclasses.dataclass
class Generation:
    """Tokens behind each prompt, as the first decoder in float64 chose them.

    Attributes:
        kind: greedy or drawn.
        tokens: ids by row.
        margins: by row, how far the first choice is above the second, in logits.
        reach: by dtype, the margin below which rounding can flip a choice.
        flips: where other decoders first chose otherwise.
    """

    kind: str
    tokens: list[list[int]]
    margins: list[list[float]]
    reach: dict[str, float]
    flips: list[Flip] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class PlotData:
    """Filled by the levels as they are climbed; what they do not reach stays empty."""

    modules: ModuleGaps | None = None
    losses: list[LossCurves] = dataclasses.field(default_factory=list)
    generations: list[Generation] = dataclasses.field(default_factory=list)
