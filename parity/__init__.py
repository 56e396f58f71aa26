"""Prove that a Flax NNX and a PyTorch model are the same function, or say where they diverge.

    from parity import check_pair

    report = check_pair(torch_module, nnx_module, inputs)
    print(report)
    report.raise_if_diverged()

Names are imported on first use, so that `parity --help` does not wait for two frameworks.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from parity.check.modules import check_pair as check_pair
    from parity.check.modules import pair_of as pair_of
    from parity.frameworks.spec import ModuleUse as ModuleUse
    from parity.report import ParityError as ParityError
    from parity.report import Report as Report
    from parity.report.page import page as page
    from parity.weights.infer import infer_rules as infer_rules
    from parity.weights.layouts import Layout as Layout
    from parity.weights.rules import Rule as Rule
    from parity.weights.rules import Rules as Rules

_MODULES = {
    "Layout": "parity.weights.layouts",
    "ModuleUse": "parity.frameworks.spec",
    "ParityError": "parity.report",
    "Report": "parity.report",
    "Rule": "parity.weights.rules",
    "Rules": "parity.weights.rules",
    "check_pair": "parity.check.modules",
    "infer_rules": "parity.weights.infer",
    "page": "parity.report.page",
    "pair_of": "parity.check.modules",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'parity' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
