"""When a flipped token is a tie: the margin of the choice is within what the noise can overturn."""

import math

from parity.check import bounds
from parity.report.record import Verdict


def overturned(noise: float, temperature: float = 0.0) -> float:
    """Return the largest margin between two tokens that logit errors can overturn.

    Two logits that err by e each can trade places when they are less than 2e apart. A draw adds
    noise of its own, and a temperature below 1 widens the errors of logits with their distances.

    Args:
        noise: measured error of a logit.
        temperature: of the draw; 0 for a greedy choice.
    """
    return 2 * (noise / temperature + bounds.DRAW) if temperature > 0.0 else 2 * noise


def verdict_of_flip(
    margin: float, noise: float, bound: float = math.inf, temperature: float = 0.0
) -> Verdict:
    """Return TIE for a flip that noise explains, else FAIL; NaN never excuses a flip.

    Args:
        margin: by how much the best score is above the second best.
        noise: measured error of a logit.
        bound: the largest noise that excuses anything, so that a fault does not excuse itself.
        temperature: of the draw; 0 for a greedy choice.
    """
    excused = noise <= bound and margin <= overturned(noise, temperature)
    return Verdict.TIE if excused else Verdict.FAIL
