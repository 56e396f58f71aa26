"""Arrays on disk are the same arrays."""

import errno
import os

import numpy as np

from parity.frameworks.leaves import different_leaves
from parity.system.memory import on_disk


def test_what_is_put_on_disk_is_read_back_the_same(monkeypatch):
    leaves = {"a": np.arange(6.0).reshape(2, 3), "b": np.array(3, np.int32), "c": np.zeros((0, 2))}
    found = on_disk(leaves)
    assert isinstance(found["a"], np.memmap) and not different_leaves(leaves, found)
    assert all(np.array_equal(found[name], leaf) for name, leaf in leaves.items())

    def full(*_):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert on_disk(leaves)["a"] is leaves["a"]
