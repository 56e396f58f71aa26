"""A twin is read and run without the other framework."""

import subprocess
import sys

import pytest

# Every module of the package, then the names at the top of all that this has loaded.
CODE = """
import importlib, pkgutil, sys
package = importlib.import_module({package!r})
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    importlib.import_module(module.name)
print(*sorted({{name.partition(".")[0] for name in sys.modules}}))
"""


@pytest.mark.parametrize(
    "package, present, absent",
    [
        ("flax_gpt", {"jax", "flax", "optax"}, {"torch", "torch_gpt", "parity"}),
        ("torch_gpt", {"torch"}, {"jax", "jaxlib", "flax", "optax", "flax_gpt", "parity"}),
    ],
)
def test_importing_a_twin_loads_only_its_own_framework(package, present, absent):
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(package=package)],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(done.stdout.split())
    assert present | {package} <= loaded
    assert not absent & loaded
