"""What narrower numbers cost: the same training in several dtypes, each judged by float64."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from parity.check import bounds
from parity.pair.text import Corpus
from parity.system.devices import Devices, fingerprint, pinned_precision
from parity.training.loop import Trainers, batch
from parity.training.run import RunConfig
from parity.twins.names import DTYPES


@dataclasses.dataclass(frozen=True)
class PrecisionReport:
    """Trainings of both twins in several dtypes, from the same weights on the same batches.

    Attributes:
        config: of the run; its dtypes are replaced by those of the curves.
        environment: versions and devices.
        curves: losses by dtype, float64 first, and by framework.
    """

    config: RunConfig
    environment: Mapping[str, str | int]
    curves: Mapping[str, Mapping[str, Sequence[float]]]

    @property
    def float64_gap(self) -> float:
        """Largest gap between the twins' losses in float64."""
        flax, torch = (np.array(self.curves["float64"][name]) for name in ("flax", "torch"))
        return float(np.max(np.abs(flax - torch)))

    @property
    def ratios(self) -> dict[str, list[float]]:
        """The error of flax over that of torch, up to each step, by narrower dtype.

        An error is the root mean square distance from flax in float64.
        """
        truth = np.array(self.curves["float64"]["flax"])
        return {
            dtype: (
                _error(np.array(x["flax"]), truth) / _error(np.array(x["torch"]), truth)
            ).tolist()
            for dtype, x in self.curves.items()
            if dtype != "float64"
        }

    @property
    def verdicts(self) -> dict[str, str]:
        """PASS or FAIL by dtype: agreement in float64, the last ratio within bounds in others."""
        sound = {"float64": self.float64_gap <= bounds.LOSS["float64"]}
        for dtype, ratios in self.ratios.items():
            sound[dtype] = 1 / bounds.RATIO <= ratios[-1] <= bounds.RATIO
        return {dtype: "PASS" if passes else "FAIL" for dtype, passes in sound.items()}

    @property
    def verdict(self) -> str:
        """PASS when every dtype passes."""
        return "PASS" if set(self.verdicts.values()) == {"PASS"} else "FAIL"

    def to_dict(self) -> dict[str, object]:
        """Return the report as JSON has it."""
        return {
            "schema": 1,
            "verdict": self.verdict,
            "environment": self.environment,
            "config": dataclasses.asdict(self.config) | {"vocabulary": len(self.config.vocabulary)},
            "steps": len(self.curves["float64"]["flax"]),
            "float64_gap": self.float64_gap,
            "bound": bounds.RATIO,
            "verdicts": self.verdicts,
            "curves": self.curves,
            "ratios": self.ratios,
        }


def precision_report(
    config: RunConfig,
    corpus: Corpus,
    devices: Devices,
    num_steps: int,
    dtypes: tuple[str, ...] = ("float64", "float32", "bfloat16"),
    progress: Callable[[str, float], None] = lambda dtype, fraction: None,
) -> PrecisionReport:
    """Return how both twins train in each dtype from the same weights on the same batches.

    Args:
        config: of a run; its dtypes are replaced.
        corpus: the text to learn from.
        devices: where to train.
        num_steps: of every training.
        dtypes: float64 first. The 16-bit types keep their weights in float32.
        progress: called with the dtype and the fraction of its steps that is done.

    Raises:
        ValueError: for dtypes that do not start with float64, or an unknown one.
    """
    check_dtypes(dtypes)
    curves: dict[str, dict[str, list[float]]] = {}
    for dtype in dtypes:
        trainers = Trainers(in_dtype(config, dtype), devices)
        curves[dtype] = {name: [] for name in trainers.by_framework}
        with pinned_precision():
            for step in range(num_steps):
                for name, trainer in trainers.by_framework.items():
                    curves[dtype][name].append(trainer.step(*batch(config, corpus, step)))
                progress(dtype, (step + 1) / num_steps)
    return PrecisionReport(config, fingerprint(devices), curves)


def check_dtypes(dtypes: tuple[str, ...]) -> None:
    """Refuse dtypes that cannot be compared.

    Raises:
        ValueError: unless float64 comes first and others follow.
    """
    if dtypes[:1] != ("float64",) or len(dtypes) < 2 or not set(dtypes) <= set(DTYPES):
        raise ValueError(
            f"precision: types {', '.join(dtypes)}. float64 is the truth that judges the others: "
            f"it comes first and they follow, from {', '.join(DTYPES[1:])}."
        )


def in_dtype(config: RunConfig, dtype: str) -> RunConfig:
    """Return a run in another dtype; the 16-bit ones compute in it and keep weights in float32."""
    narrow = dtype in ("bfloat16", "float16")
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, dtype="float32" if narrow else dtype),
        training=dataclasses.replace(config.training, compute_dtype=dtype if narrow else None),
    )


def _error(curve: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return the error up to each step, at least the rounding of the loss itself."""
    error = np.sqrt(np.cumsum((curve - truth) ** 2) / (1 + np.arange(len(curve))))
    return np.maximum(error, bounds.LOSS_ROUNDING * np.abs(truth))
