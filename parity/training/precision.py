"""What narrower numbers cost: the same training in several types, each judged by float64."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from parity.check.bounds import LOSS, LOSS_ROUNDING, RATIO
from parity.pair.text import Corpus
from parity.system.devices import Devices, fingerprint, pinned_precision
from parity.training.loop import Trainers, batch
from parity.training.run import RunConfig
from parity.twins.names import DTYPES


def precision_report(
    config: RunConfig,
    corpus: Corpus,
    devices: Devices,
    num_steps: int,
    dtypes: tuple[str, ...] = ("float64", "float32", "bfloat16"),
    progress: Callable[[str, float], None] = lambda dtype, fraction: None,
) -> dict[str, Any]:
    """Trains both twins in each type from the same weights on the same batches.

    Args:
        config: a run's; its dtypes are replaced by those asked for.
        corpus: the text to learn from.
        devices: where to train.
        num_steps: of every training.
        dtypes: float64 first. The 16-bit types keep their weights in float32.
        progress: told the type and how far it is.

    Returns:
        Curves by type and framework; by type the error against float64 (root mean square up to
        each step) of flax over that of torch, and the verdict: PASS when it ends within `RATIO`,
        and for float64 itself when the twins agree.

    Raises:
        ValueError: for types that do not start with float64, or an unknown one.
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
    truth = curves["float64"]["flax"]
    gap = float(np.max(np.abs(np.array(truth) - np.array(curves["float64"]["torch"]))))
    ratios, verdicts = {}, {"float64": "PASS" if gap <= LOSS["float64"] else "FAIL"}
    for dtype in dtypes[1:]:
        flax, torch = (_running_error(curves[dtype][name], truth) for name in ("flax", "torch"))
        ratios[dtype] = (flax / torch).tolist()
        sound = 1 / RATIO <= ratios[dtype][-1] <= RATIO
        verdicts[dtype] = "PASS" if sound else "FAIL"
    return {
        "schema": 1,
        "verdict": "PASS" if set(verdicts.values()) == {"PASS"} else "FAIL",
        "environment": fingerprint(devices),
        "config": dataclasses.asdict(config) | {"vocabulary": len(config.vocabulary)},
        "steps": num_steps,
        "float64_gap": gap,
        "bound": RATIO,
        "verdicts": verdicts,
        "curves": curves,
        "ratios": ratios,
    }


def check_dtypes(dtypes: tuple[str, ...]) -> None:
    """Refuses types that cannot be compared.

    Raises:
        ValueError: unless float64 comes first and others follow.
    """
    if dtypes[:1] != ("float64",) or len(dtypes) < 2 or not set(dtypes) <= set(DTYPES):
        raise ValueError(
            f"precision: types {', '.join(dtypes)}. float64 is the truth that judges the others: "
            f"it comes first and they follow, from {', '.join(DTYPES[1:])}."
        )


def in_dtype(config: RunConfig, dtype: str) -> RunConfig:
    """A run in another type; the 16-bit ones compute in it and keep weights in float32."""
    narrow = dtype in ("bfloat16", "float16")
    return dataclasses.replace(
        config,
        model=dict(config.model) | {"dtype": "float32" if narrow else dtype},
        training=dict(config.training) | {"compute_dtype": dtype if narrow else None},
    )


def _running_error(curve: list[float], truth: list[float]) -> np.ndarray:
    """Root mean square distance up to each step, at least the rounding of the loss itself."""
    squares = (np.array(curve) - np.array(truth)) ** 2
    error = np.sqrt(np.cumsum(squares) / (1 + np.arange(len(squares))))
    return np.maximum(error, LOSS_ROUNDING * np.abs(np.array(truth)))
