"""The faults of the self-test, as data, and what the check should report of each."""

import dataclasses
from pathlib import Path
from typing import Literal, TypedDict

from parity.faults.catalogue import read_catalogue
from parity.faults.edit import Edit

RULES = "rules.toml"
_KINDS = {
    "weights": "forward",
    "logits": "forward",
    "gradients": "gradient",
    "optimizer": "optimizer",
    "trajectory": "optimizer",
    "cache": "cache",
    "tokens": "cache",
}


class Changes(TypedDict, total=False):
    """Changes of the twins' config, for an architecture that a fault needs."""

    positions: str
    num_kv_heads: int
    head_dim: int
    window: int
    dropout: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault of one model of a pair, and what the check should report.

    Attributes:
        title: what is wrong, in a few words.
        subject: the pair; flax_gpt or torch_gpt for a fault of that twin.
        level: that must fail, and the only one.
        edits: of the twin's files, the pair's file, or the pair's correct rules, `RULES`.
        where: the divergent module, leaf or model; "" where any will do.
        step: of the optimizer or the trajectory; "later" for any after step 0.
        cause: words that the named cause must have; None where none must be named.
        changes: of the twins' config.
        task: of the twins.
        float32: whether it shows in float32 alone.
        companion: of all pairs that a check has beside its own, the one that must show it, if any.
    """

    title: str
    subject: str
    level: str
    edits: tuple[Edit, ...]
    where: str = ""
    step: int | Literal["later"] = 0
    cause: str | None = None
    changes: Changes = dataclasses.field(default_factory=Changes)
    task: str = "next-token"
    float32: bool = False
    companion: str = ""

    @property
    def kind(self) -> str:
        """What goes wrong: forward, mapping, gradient, optimizer or cache."""
        return "mapping" if self.edits[0].file == RULES else _KINDS[self.level]


# Those of the cache and the decoder, which plans must see; most have no cause to hold.
PLAN_FAULTS = read_catalogue(Path(__file__).with_name("plan_faults.toml"), Fault)
FAULTS = tuple(
    fault
    for name in ("pair_faults.toml", "twin_faults.toml")
    for fault in read_catalogue(Path(__file__).with_name(name), Fault)
)
