"""A fixture for the tests of a port: `parity.assert_same(torch_module, nnx_module, inputs)`.

pytest finds it when the package is installed; nothing has to be configured.
"""

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import torch
    from flax import nnx

    from parity.report import Report


class Parity:
    """Checks of a PyTorch module against a Flax NNX module, for tests."""

    def check(
        self,
        torch_module: "torch.nn.Module",
        flax_module: "nnx.Module",
        inputs: object,
        **options: Any,
    ) -> "Report":
        """Return the report of `parity.check_pair`, whatever its verdict."""
        from parity import check_pair  # two frameworks, which only tests that ask should load

        return check_pair(torch_module, flax_module, inputs, **options)

    def assert_same(
        self,
        torch_module: "torch.nn.Module",
        flax_module: "nnx.Module",
        inputs: object,
        **options: Any,
    ) -> "Report":
        """Fail the test, with the whole report as its message, unless the check passes.

        Args:
            torch_module: the PyTorch module.
            flax_module: the Flax NNX module.
            inputs: what to call both with.
            options: of `parity.check_pair`.
        """
        __tracebackhide__ = True
        report = self.check(torch_module, flax_module, inputs, **options)
        report.raise_if_diverged()
        return report


@pytest.fixture
def parity() -> Parity:
    """Compare a PyTorch module with a Flax NNX module."""
    return Parity()
