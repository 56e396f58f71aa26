"""Time two decoders in alternating single steps, to resolve differences below run-to-run noise.

A machine that others share drifts by a tenth from one second to the next. Two steps in direct
succession meet the same machine, and the median of many such pairs tells 3 % from nothing.
"""

import dataclasses
import statistics
import time
from collections.abc import Mapping

from parity.bench.decoders.protocol import Stepwise


@dataclasses.dataclass(frozen=True)
class StepPairs:
    """Seconds of single steps of two decoders, by pair.

    Attributes:
        name: of the ratio of the first to the second.
        context: tokens that a row holds, in the end or throughout.
        seconds: by decoder, its steps beside those of the other.
        ratio: the first over the second; median of pairs.
    """

    name: str
    context: int
    seconds: Mapping[str, tuple[float, ...]]
    ratio: float


def pair_steps(
    name: str, context: int, decoders: Mapping[str, Stepwise], rounds: int, num_steps: int
) -> StepPairs:
    """Return times of single steps of two decoders in turns; each comes first in every other pair.

    Args:
        name: see `StepPairs`.
        context: see `StepPairs`.
        decoders: two by name, which have read the prompt and run once.
        rounds: how often both start again after the prompt.
        num_steps: pairs of a round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(rounds):
        states = {name: decoder.start() for name, decoder in decoders.items()}
        for number in range(num_steps):
            for which in list(decoders)[:: 1 if number % 2 == 0 else -1]:
                start = time.perf_counter()
                states[which] = decoders[which].advance(states[which])
                decoders[which].wait(states[which])
                seconds[which].append(time.perf_counter() - start)
    ratio = statistics.median(a / b for a, b in zip(*seconds.values(), strict=True))
    found = {name: tuple(times) for name, times in seconds.items()}
    return StepPairs(name, context, found, ratio)
