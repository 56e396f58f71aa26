"""A fixture for the tests of a port: `parity.assert_same(torch_module, nnx_module, inputs)`.

pytest finds it when the package is installed; nothing has to be configured.
"""

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from parity.report import Report


class Parity:
    """What a test asks of two modules."""

    def check(self, torch_module: Any, flax_module: Any, inputs: Any, **options: Any) -> "Report":
        """The report of `parity.check_pair`, whatever it says."""
        from parity import check_pair  # two frameworks, which only tests that ask should load

        return check_pair(torch_module, flax_module, inputs, **options)

    def assert_same(
        self, torch_module: Any, flax_module: Any, inputs: Any, **options: Any
    ) -> "Report":
        """Fails the test, with the whole report as its message, unless the check passes.

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
    """Compares a PyTorch module with a Flax NNX module."""
    return Parity()
