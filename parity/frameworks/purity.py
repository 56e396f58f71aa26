"""The float64 oracle: copies of foreign modules, and the proof that a run really is float64.

In float64 two correct programs agree to 1e-15 and the smallest bug shows at 1e-5, so nobody has to
argue about a tolerance. One operation that falls back to float32 spoils that, silently.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Purity:
    """What a run was made of.

    Attributes:
        num_operations: operations looked at.
        impure: operations that took or gave a float narrower than 64 bits, or hide what they do,
            with their counts.
    """

    num_operations: int
    impure: dict[str, int]
