"""What jax has compiled is found again by the next process, where nobody asked otherwise."""

import os
import subprocess
import sys

import pytest

CODE = """
from parity.system.programs import keep_programs
keep_programs()
import jax
jax.jit(lambda x: x * 2 + 1)(1.0)
"""


@pytest.mark.parametrize("wanted", [True, False])
def test_programs_are_kept_in_the_users_cache_folder_unless_jax_is_told_otherwise(tmp_path, wanted):
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    environment |= {} if wanted else {"JAX_COMPILATION_CACHE_DIR": ""}
    for _ in range(2):
        subprocess.run([sys.executable, "-c", CODE], env=environment, check=True)
    kept = [x for x in tmp_path.rglob("*") if x.name.endswith("-cache")]
    assert bool(kept) == wanted
