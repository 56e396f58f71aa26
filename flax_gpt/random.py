"""One counter-based generator for both twins: a key always gives the same numbers.

Read beside torch_gpt/random.py. The generator is Threefry-2x32 with 20 rounds (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011), with keys and counters laid out as in
`jax.random`. Integers, uniforms and booleans are the same bits in both twins; normals and Gumbels
pass through logarithms and agree to a few units in the last place.

A key is a value of two 32-bit words. It is never advanced: split it, or fold a number into it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def key(seed: int) -> jax.Array:
    """Make the key of a seed.

    Returns:
        Two uint32 words.

    Raises:
        ValueError: for a seed outside [0, 2**64).
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"random.key: seed {seed} is outside [0, 2**64). Take a seed inside.")
    return jnp.asarray(np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32))


def split(key: jax.Array, num: int = 2) -> jax.Array:
    """Split a key into `num` independent ones, shape (num, 2)."""
    with jax.threefry_partitionable(True):
        return jax.random.key_data(jax.random.split(_typed(key), num))


def fold_in(key: jax.Array, data: int | jax.Array) -> jax.Array:
    """Derive the key for item `data` of a series (a step, a row), 0 <= data < 2**32.

    fold_in(key, i) is split(key, n)[i]: give one key to one of the two.

    Returns:
        A key.
    """
    with jax.threefry_partitionable(True):
        return jax.random.key_data(jax.random.fold_in(_typed(key), data))


def bits(key: jax.Array, shape: tuple[int, ...], width: int = 32) -> jax.Array:
    """Draw uniform unsigned integers of 32 or 64 bits."""
    with jax.threefry_partitionable(True):
        return jax.random.bits(_typed(key), shape, _UNSIGNED[width])


def uniform(key: jax.Array, shape: tuple[int, ...], dtype: str = "float32") -> jax.Array:
    """Draw uniform numbers in [0, 1): 23 random bits in float32, 52 in float64."""
    # The bits become the fraction of a float in [1, 2), whose exponent is that of one.
    width, fraction, one = _FLOAT[dtype]
    words = (bits(key, shape, width) >> _UNSIGNED[width](width - fraction)) | one
    return jax.lax.bitcast_convert_type(words, jnp.dtype(dtype)) - 1.0


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def normal(key: jax.Array, shape: tuple[int, ...], dtype: str = "float32") -> jax.Array:
    """Draw standard normal numbers, by the inverse of the distribution function.

    `jax.random.normal` takes sqrt(2) * erf_inv(x) of the same x; its erf_inv rounds x * x near 1
    and is off there by 90 units in the last place. The tail probability (1 - |x|) / 2 is exact.

    Returns:
        Numbers of that shape and dtype.
    """
    # The distribution is infinite at -1, so the interval starts one float above it.
    low = float(np.nextafter(np.asarray(-1.0, dtype), np.asarray(0.0, dtype)))
    centred = jnp.maximum(uniform(key, shape, dtype) * 2.0 + low, low)
    return jnp.copysign(jax.scipy.special.ndtri((1.0 - jnp.abs(centred)) * 0.5), centred)


def bernoulli(key: jax.Array, probability: float, shape: tuple[int, ...]) -> jax.Array:
    """Draw booleans that are true with `probability`, whatever the model's dtype."""
    return uniform(key, shape) < np.float32(probability)


def gumbel(key: jax.Array, shape: tuple[int, ...], dtype: str = "float32") -> jax.Array:
    """Draw standard Gumbel numbers, -log(-log(u))."""
    tiny = float(np.finfo(dtype).tiny)
    return -jnp.log(-jnp.log(jnp.maximum(uniform(key, shape, dtype), tiny)))


def perturb(key: jax.Array, logits: jax.Array) -> jax.Array:
    """Add Gumbel noise: the id of the highest is then a draw from softmax(logits), last axis."""
    # Noise of float32 in every dtype, because float64 draws other bits: a seed would mean another
    # text there, and the float64 run could not judge the float32 one.
    return logits + gumbel(key, logits.shape).astype(logits.dtype)


_UNSIGNED = {32: np.uint32, 64: np.uint64}

# dtype: (bits of a word, bits of its fraction, the word of 1.0)
_FLOAT = {
    "float32": (32, 23, np.uint32(0x3F800000)),
    "float64": (64, 52, np.uint64(0x3FF0000000000000)),
}


def _typed(key: jax.Array) -> jax.Array:
    return jax.random.wrap_key_data(key, impl="threefry2x32")
