"""The machine is described without loading more than is asked for."""

import json
import subprocess
import sys

import jax
import torch

from parity.system.devices import choose_devices, fingerprint, versions

LOADED = """
import json, sys
from parity.system.devices import num_threads, versions
found = versions("flax") | {"threads": num_threads("flax")}
print(json.dumps([found, [name for name in ("jax", "torch") if name in sys.modules]]))
"""


def test_versions_and_threads_of_one_framework_load_none():
    done = subprocess.run(
        [sys.executable, "-c", LOADED], capture_output=True, text=True, check=True
    )
    found, loaded = json.loads(done.stdout)
    assert found.keys() == {"jax", "flax", "numpy", "threads"} and loaded == []


def test_the_fingerprint_has_the_versions_that_the_packages_state():
    found = fingerprint(choose_devices("cpu"))
    assert found["jax"] == jax.__version__ and found["torch"] == torch.__version__
    assert found.items() >= versions("flax", "torch").items()
    assert found["devices"] == "flax on cpu, torch on cpu"
