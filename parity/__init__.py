"""Proves that a Flax NNX model and a PyTorch model are the same function, or says where they part.

    from parity import check_pair

    report = check_pair(torch_module, nnx_module, inputs)
    print(report)
    report.raise_if_diverged()

Names are imported when they are asked for: `parity --help` does not wait for two frameworks.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parity.check.modules import check_pair, pair_of
    from parity.report import ParityError, Report
    from parity.weights.infer import infer_rules
    from parity.weights.layouts import Layout
    from parity.weights.rules import Rule, Rules

_PLACES = {
    "check_pair": "parity.check.modules",
    "infer_rules": "parity.weights.infer",
    "pair_of": "parity.check.modules",
    "ParityError": "parity.report",
    "Report": "parity.report",
    "Layout": "parity.weights.layouts",
    "Rule": "parity.weights.rules",
    "Rules": "parity.weights.rules",
}

__all__ = [
    "Layout",
    "ParityError",
    "Report",
    "Rule",
    "Rules",
    "check_pair",
    "infer_rules",
    "pair_of",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'parity' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)
