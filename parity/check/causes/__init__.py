"""Why two models differ: the change to one of them that makes it match the other, by name.

forward.py      a module's output, with one operation changed
program.py      likewise, in flax: its program with one operation changed
backward.py     a loss or a gradient, likewise
decode.py       a decode, likewise
operations.py   alternatives to an operation
numbers.py      other numbers in an operation, held or fitted
values.py       values in each other's place
weights.py      alternatives to the weights
replay.py       a torch module run again, alone
statistics.py   how batch norms keep their running statistics
training.py     why a training diverges where the optimizers do the same
optimizer/      an optimizer's constants, inferred from its steps
fit.py          least squares with error bounds, for these
"""

import dataclasses
from collections.abc import Callable

from parity.report import Divergence


def explain(found: Divergence, search: Callable[[Divergence], Divergence]) -> Divergence:
    """Return the divergence with its cause; a search that raises only adds a sentence."""
    try:
        return search(found)
    except Exception as error:
        words = f"The search for a cause ended with {type(error).__name__}: {error}"
        return dataclasses.replace(found, detail=f"{found.detail} {words.splitlines()[0]}")
