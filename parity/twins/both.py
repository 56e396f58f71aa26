"""Both twins from the same weights."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from parity.system.devices import Devices
from parity.twins.flax import FlaxTwin
from parity.twins.names import FRAMEWORKS
from parity.twins.torch import TorchTwin

if TYPE_CHECKING:
    from parity.twins.twin import Config

# The class of each handle, by framework.
HANDLES = {"flax": FlaxTwin, "torch": TorchTwin}


def build_twins(
    config: "Config",
    devices: Devices,
    leaves: Callable[[], Iterable[tuple[str, np.ndarray]]],
    frameworks: Sequence[str] = FRAMEWORKS,
) -> dict[str, FlaxTwin | TorchTwin]:
    """Return the twins by framework, with the same weights.

    Args:
        config: of both.
        devices: where each is.
        leaves: called for each twin, to its weights; see `Twin.build`.
        frameworks: the twins to build.

    Raises:
        ValueError: when the leaves are not exactly the model's.
    """
    return {
        name: HANDLES[name].build(config, getattr(devices, name), leaves=leaves())
        for name in frameworks
    }
