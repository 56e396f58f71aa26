"""Measures of how far two arrays are apart; NaN and different shapes are never small."""

import math
from collections.abc import Mapping

import numpy as np

from parity.frameworks.leaves import Leaves, real_view


def largest(values: Mapping[str, float]) -> str:
    """Return the key of the largest value; NaN counts as larger than all."""
    return max(values, key=lambda key: math.inf if math.isnan(values[key]) else values[key])


def ratio(a: float, b: float, floor: float) -> float:
    """Return the larger error over the smaller, neither below `floor`; NaN if either is."""
    if math.isnan(a) or math.isnan(b):
        return math.nan
    a, b = max(a, floor), max(b, floor)
    return max(a, b) / min(a, b) if min(a, b) else math.nan


def size_of(array: np.ndarray) -> float:
    """Return the largest absolute value; 0 for an empty array."""
    return float(np.max(np.abs(array), initial=0.0))


def scale_of(array: np.ndarray) -> float:
    """Return the largest finite absolute value, at least 1: rounding grows with the numbers."""
    return max(1.0, size_of(_wide(array[np.isfinite(array)])))


def max_abs(a: np.ndarray, b: np.ndarray) -> float:
    """Return the largest absolute difference; NaN if there is one, infinity for unlike shapes."""
    if a.shape != b.shape:
        return math.inf
    if a.size == 0:
        return 0.0
    with np.errstate(invalid="ignore"):  # inf - inf is NaN, which fails as it should
        return float(np.max(np.abs(_wide(a) - _wide(b))))


def relative_max_abs(a: np.ndarray, b: np.ndarray, truth: np.ndarray) -> float:
    """Return the largest absolute difference in units of the largest number in `truth`, if > 1."""
    return max_abs(a, b) / scale_of(truth)


def rms_error(a: np.ndarray, b: np.ndarray) -> float:
    """Return the root of the mean squared difference; infinity for unlike shapes."""
    if a.shape != b.shape:
        return math.inf
    with np.errstate(invalid="ignore"):
        return float(np.sqrt(np.mean(np.abs(_wide(a) - _wide(b)) ** 2))) if a.size else 0.0


def relative_l2(a: np.ndarray, b: np.ndarray) -> float:
    """Return |a - b| / max(|a|, |b|) in the Euclidean norm; 0 when both are zero."""
    if a.shape != b.shape:
        return math.inf
    with np.errstate(invalid="ignore"):
        gap = float(np.linalg.norm(_wide(a) - _wide(b)))
        scale = max(float(np.linalg.norm(_wide(a))), float(np.linalg.norm(_wide(b))))
    return gap / scale if scale else gap


def different_bits(a: np.ndarray, b: np.ndarray) -> int:
    """Count the elements whose bytes differ, so that NaN equals itself; integers as numbers."""
    if a.shape == b.shape and a.dtype.kind in "iub" and b.dtype.kind in "iub":
        return int(np.count_nonzero(a != b))
    if a.shape != b.shape or a.dtype != b.dtype:
        return max(a.size, b.size, 1)
    a, b = real_view(a), real_view(b)
    words = f"u{a.dtype.itemsize}"
    bits_a, bits_b = np.ascontiguousarray(a).view(words), np.ascontiguousarray(b).view(words)
    return int(np.count_nonzero(bits_a != bits_b))


def error_ratio(a: np.ndarray, b: np.ndarray, truth: np.ndarray, noise: float = 0.0) -> float:
    """Return the larger of two RMS errors against `truth` over the smaller; 1 is a fair draw.

    Errors below the rounding of `truth` to the narrower dtype count as that rounding, because a
    ratio of two numbers that are both exact says nothing. Where a noise is given that rounding
    makes elsewhere, so do errors below that.
    """
    floor = float(np.finfo(a.dtype).eps) * rms_error(truth, np.zeros_like(truth))
    return ratio(rms_error(a, truth), rms_error(b, truth), max(floor, noise))


def _wide(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, np.complex128 if array.dtype.kind == "c" else np.float64)


def along_ones(array: np.ndarray, axis: int) -> np.ndarray:
    """Return the component of an array along the unit vector of ones of an axis."""
    return array.sum(axis=axis) / np.sqrt(array.shape[axis])


def gradient_norm(gradients: Leaves) -> float:
    """Return the Euclidean norm of a whole gradient."""
    squares = (np.sum(np.square(real_view(g), dtype=np.float64)) for g in gradients.values())
    return float(np.sqrt(sum(squares)))
