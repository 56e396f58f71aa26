"""What rounding may have done to constants that a model holds in a narrow type."""

import math

import numpy as np
from ml_dtypes import finfo

# Numbers of so few digits are taken for what was written: a random float32 has more than five in
# 299 of 300 cases.
_DIGITS = 5
# Of larger tables no number is taken for a decimal that was written.
_TABLE = 4096
# Numbers of that size mask.
MASK = 1e30


def unrounded(array: np.ndarray) -> np.ndarray:
    """Return narrow floats in float64: of a float32 the shortest decimal that rounds to it.

    So 0.1 is 0.1 again. All numbers that round to the same float32 are as good; this is the one
    that was written, if one was. Complex numbers become complex128.
    """
    if np.iscomplexobj(array):
        return unrounded(array.real) + 1j * unrounded(array.imag)
    wide = array.astype(np.float64)
    if array.dtype != np.float32 or array.size > _TABLE:
        return wide
    short = np.array([float(str(x)) for x in array.ravel()], np.float64).reshape(array.shape)
    return np.where(np.abs(wide) < MASK, short, wide)


def half_units(array: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return half a unit in the last place of narrow floats in float64, up or down at random.

    It is 0 where no rounding is left: for whole numbers, infinities, the limits of a type, binary
    fractions of half the digits, such as 0.375, and decimals of few digits.
    """
    if np.iscomplexobj(array):
        return half_units(array.real, seed) + 1j * half_units(array.imag, seed + 1)
    digits = 1 - round(math.log2(float(finfo(array.dtype).eps)))
    wide = array.astype(np.float64)
    with np.errstate(all="ignore"):
        _, exponent = np.frexp(wide)
        short = np.ldexp(wide, digits // 2 - exponent)
        scale = 10.0 ** (_DIGITS - 1 - np.floor(np.log10(np.abs(wide))))
        exact = (wide == np.rint(wide)) | (short == np.rint(short)) | ~(np.abs(wide) < MASK)
        if array.dtype == np.float32:
            exact |= (np.rint(wide * scale) / scale).astype(np.float32) == array
        signs = np.random.default_rng(seed).choice([-1.0, 1.0], wide.shape)
        return np.where(exact, 0.0, np.ldexp(signs, exponent - digits - 1))
