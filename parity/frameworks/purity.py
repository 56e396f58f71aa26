"""Proof that a float64 run computes in float64 alone.

In float64 two correct programs agree to 1e-15 and the smallest bug shows at 1e-5, so that no
tolerance is disputed. One operation that falls back to float32 spoils that without a sign.
"""

import dataclasses

# The end of the words on a constant that was rounded when the model was built, and is no more.
AGAIN = "computed again"


@dataclasses.dataclass(frozen=True)
class Purity:
    """The operations of a run.

    Attributes:
        num_operations: operations examined.
        impure: operations with an input or output float narrower than 64 bits, and those that
            cannot be examined, with their counts.
        lifted: operations that the model asks for in a narrower type and that ran in float64, and
            constants that it holds in one, with their counts.
    """

    num_operations: int
    impure: dict[str, int]
    lifted: dict[str, int] = dataclasses.field(default_factory=dict)
