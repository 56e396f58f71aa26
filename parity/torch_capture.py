"""What goes into and comes out of every submodule of a PyTorch module, seen from outside.

Read beside parity/flax_capture.py.
"""

from collections.abc import Callable
from typing import Any

import torch

from parity.capture import Sink, tell
from parity.torch_leaves import to_numpy


def capture_torch(module: torch.nn.Module, call: Callable[[], Any], sink: Sink) -> None:
    """Runs `call` and tells what every submodule took and gave, in order of completion."""

    def hook(path: str):
        def record(_, inputs: tuple, keywords: dict, output: Any) -> None:
            tell(sink, path, (inputs, keywords), output, torch.Tensor, to_numpy)

        return record

    handles = [
        submodule.register_forward_hook(hook(path), with_kwargs=True)
        for path, submodule in module.named_modules()
    ]
    try:
        with torch.no_grad():
            call()
    finally:
        for handle in handles:
            handle.remove()
