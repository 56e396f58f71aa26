"""A planted fault as data, and what the check should say of it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from parity.faults import Edit

KINDS = {
    "weights": "forward",
    "logits": "forward",
    "gradients": "gradient",
    "optimizer": "optimizer",
    "trajectory": "optimizer",
    "cache": "cache",
    "tokens": "cache",
}


@dataclasses.dataclass(frozen=True)
class Fault:
    """One wrong place, and what the check should make of it.

    Attributes:
        title: what is wrong, in a few words.
        subject: flax_gpt or torch_gpt, whose copy has the fault, or one of the ports.
        edits: places of the twin's files, or of the pair's.
        rules: for a fault of the map: words of the right rules file, and what stands there instead.
        level: that must fail, and the only one.
        where: the guilty module, leaf or model; "" where any will do.
        step: of the optimizer or the trajectory; None for some step.
        cause: words that the named cause must have; None where none must be named.
        changes: of the twins' config.
        options: of the twins.
        float32: whether it shows there alone.
    """

    title: str
    subject: str
    edits: tuple[Edit, ...] = ()
    rules: tuple[tuple[str, str], ...] = ()
    level: str = "logits"
    where: str = ""
    step: int | None = 0
    cause: str | None = None
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    float32: bool = False

    @property
    def kind(self) -> str:
        """What goes wrong: forward, mapping, gradient, optimizer or cache."""
        return "mapping" if self.rules else KINDS[self.level]
