"""First record of the level `weights`: the map uses every leaf of both models once."""

from parity.check.session import Session
from parity.frameworks.protocols import Runner
from parity.report.record import Record, judge
from parity.weights.weight_map import TransplantError


def every_leaf_once(session: Session[Runner, Runner], dtype: str = "float32") -> Record:
    """Return a record of all problems of the weight map; none when each leaf is used once."""
    try:
        weight_map = session.weight_map
        problems, count = 0, sum(len(link.flax) for link in weight_map.links)
        ignored = ", ".join((*weight_map.ignored, *(f"flax {x}" for x in weight_map.flax_ignored)))
        notes = [f"ignored by the rules: {ignored}"] if ignored else []
        note = "; ".join((*notes, *session.pair.rules.notes)) or None
    except TransplantError as error:
        problems = count = len(error.problems)
        note = "; ".join(error.problems)
    return judge("every leaf once", dtype, "problems", problems, 0, count, note=note)
