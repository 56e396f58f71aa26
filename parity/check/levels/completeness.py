"""The first record of the level weights: the map leaves nothing over, on either side."""

from parity.check.session import Session
from parity.report.record import Record, judge
from parity.weights.weight_map import TransplantError


def every_leaf_once(session: Session, dtype: str = "float32") -> Record:
    """Whether the rules use each leaf exactly once, and what is wrong if they do not.

    Args:
        session: whose weight map it is.
        dtype: of the weights.
    """
    name = "every leaf once"
    try:
        weight_map = session.weight_map
    except TransplantError as error:
        problems = error.problems
        note = "; ".join(problems)
        return judge(name, dtype, "problems", len(problems), 0, len(problems), note=note)
    used = sum(len(link.flax) for link in weight_map.links)
    ignored = ", ".join(weight_map.ignored)
    note = f"ignored by the rules: {ignored}" if ignored else None
    return judge(name, dtype, "problems", 0, 0, used, note=note)
