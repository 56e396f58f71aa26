"""Two that decode in turns, step by step: for differences smaller than those between rounds.

A machine that others share drifts by a tenth from one second to the next. Two steps, one right
behind the other, meet the same machine, and the median of many such pairs tells 3 % from nothing.
"""

import dataclasses
import statistics
import time
from typing import Any, Protocol


@dataclasses.dataclass(frozen=True)
class StepPairs:
    """Seconds of single steps of two contenders, by pair.

    Attributes:
        name: what the first over the second is called.
        context: tokens that a row holds, in the end or all along.
        one: who the first is.
        other: and the second.
        one_s: of its steps.
        other_s: of the steps beside them.
    """

    name: str
    context: int
    one: str
    other: str
    one_s: tuple[float, ...]
    other_s: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """The first over the second; median of pairs."""
        pairs = zip(self.one_s, self.other_s, strict=True)
        return statistics.median(one / other for one, other in pairs)

    def to_dict(self) -> dict[str, Any]:
        """The pairs as JSON has them."""
        return dataclasses.asdict(self) | {"ratio": self.ratio}


class Steps(Protocol):
    """Who can be stopped after each step."""

    def state(self) -> Any:
        """What stands behind the prompt, to be used up."""
        ...

    def advance(self, state: Any) -> Any:
        """The state a step later; it may not be there yet."""
        ...

    def wait(self, state: Any) -> None:
        """Until it is there."""
        ...


def pair_steps(
    name: str,
    context: int,
    one: tuple[str, Steps],
    other: tuple[str, Steps],
    rounds: int,
    num_steps: int,
) -> StepPairs:
    """Times single steps, the two in turns; each is the first of every other pair.

    Args:
        name: see `StepPairs`.
        context: likewise.
        one: name, and who has read the prompt and run once.
        other: likewise.
        rounds: how often both begin anew behind the prompt.
        num_steps: pairs of a round.
    """
    both, seconds = (one[1], other[1]), ([], [])
    for _ in range(rounds):
        states = [steps.state() for steps in both]
        for number in range(num_steps):
            for which in (0, 1) if number % 2 == 0 else (1, 0):
                start = time.perf_counter()
                states[which] = both[which].advance(states[which])
                both[which].wait(states[which])
                seconds[which].append(time.perf_counter() - start)
    return StepPairs(name, context, one[0], other[0], *map(tuple, seconds))
