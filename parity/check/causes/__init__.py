"""Why two models differ: what a fault did, read back until it has a name.

forward.py      a module's output, by doing one thing in another way
backward.py     a loss or a gradient, likewise
decode.py       a decode, likewise
operations.py   the other ways to do an operation
weights.py      the other ways to read weights
replay.py       a torch module again, alone
optimizer/      an optimizer's constants, read off its steps
fit.py          least squares with error bounds, for these
"""

import dataclasses
from collections.abc import Callable

from parity.report import Divergence


def explained(found: Divergence, explain: Callable[[Divergence], Divergence]) -> Divergence:
    """The divergence with its cause; what the search for it may raise takes nothing away."""
    try:
        return explain(found)
    except Exception as error:
        words = f"The search for a cause ended with {type(error).__name__}: {error}"
        return dataclasses.replace(found, detail=f"{found.detail} {words.splitlines()[0]}")
