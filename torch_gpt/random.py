"""One counter-based generator for both twins: a key always gives the same numbers.

Read beside flax_gpt/random.py. The generator is Threefry-2x32 with 20 rounds (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011), with keys and counters laid out as in
`jax.random`. Integers, uniforms and booleans are the same bits in both twins; normals and Gumbels
pass through logarithms and agree to a few units in the last place.

A key is a value of two 32-bit words. It is never advanced: split it, or fold a number into it.
"""

import math

import numpy as np
import torch


def key(seed: int) -> torch.Tensor:
    """Make the key of a seed.

    Returns:
        Two uint32 words.

    Raises:
        ValueError: for a seed outside [0, 2**64).
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"random.key: seed {seed} is outside [0, 2**64). Take a seed inside.")
    return torch.from_numpy(np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32))


def split(key: torch.Tensor, num: int = 2) -> torch.Tensor:
    """Split a key into `num` independent ones, shape (num, 2)."""
    low = torch.arange(num, dtype=torch.int32, device=key.device)
    first, second = _threefry(key, torch.zeros_like(low), low)
    return torch.stack([first, second], dim=-1).view(torch.uint32)


def fold_in(key: torch.Tensor, data: int | torch.Tensor) -> torch.Tensor:
    """Derive the key for item `data` of a series (a step, a row), 0 <= data < 2**32.

    fold_in(key, i) is split(key, n)[i]: give one key to one of the two.

    Returns:
        A key.
    """
    low = torch.as_tensor(data, dtype=torch.int64, device=key.device).reshape(1).to(torch.int32)
    first, second = _threefry(key, torch.zeros_like(low), low)
    return torch.cat([first, second]).view(torch.uint32)


def bits(key: torch.Tensor, shape: tuple[int, ...], width: int = 32) -> torch.Tensor:
    """Draw uniform unsigned integers of 32 or 64 bits."""
    words = torch.empty(math.prod(shape), dtype=_SIGNED[width], device=key.device)
    size = _CHUNK[key.device.type]
    for start in range(0, words.numel(), size):
        part = words[start : start + size]
        count = torch.arange(start, start + part.numel(), device=key.device)
        first, second = _threefry(key, (count >> 32).to(torch.int32), count.to(torch.int32))
        if width == 32:
            part.copy_(first ^ second)
        else:
            part.copy_((first.to(torch.int64) << 32) | (second.to(torch.int64) & 0xFFFFFFFF))
    return words.view(_UNSIGNED[width]).reshape(shape)


def uniform(key: torch.Tensor, shape: tuple[int, ...], dtype: str = "float32") -> torch.Tensor:
    """Draw uniform numbers in [0, 1): 23 random bits in float32, 52 in float64."""
    # The bits become the fraction of a float in [1, 2), whose exponent is that of one.
    width, fraction, one = _FLOAT[dtype]
    words = (_shift_right(bits(key, shape, width), width - fraction)) | one
    return words.view(getattr(torch, dtype)) - 1.0


def normal(key: torch.Tensor, shape: tuple[int, ...], dtype: str = "float32") -> torch.Tensor:
    """Draw standard normal numbers, by the inverse of the distribution function.

    `jax.random.normal` takes sqrt(2) * erf_inv(x) of the same x; its erf_inv rounds x * x near 1
    and is off there by 90 units in the last place. The tail probability (1 - |x|) / 2 is exact.

    Returns:
        Numbers of that shape and dtype.
    """
    # The distribution is infinite at -1, so the interval starts one float above it.
    low = float(np.nextafter(np.asarray(-1.0, dtype), np.asarray(0.0, dtype)))
    centred = torch.clamp(uniform(key, shape, dtype) * 2.0 + low, min=low)
    return torch.copysign(torch.special.ndtri((1.0 - torch.abs(centred)) * 0.5), centred)


def bernoulli(key: torch.Tensor, probability: float, shape: tuple[int, ...]) -> torch.Tensor:
    """Draw booleans that are true with `probability`, whatever the model's dtype."""
    return uniform(key, shape) < float(np.float32(probability))


def gumbel(key: torch.Tensor, shape: tuple[int, ...], dtype: str = "float32") -> torch.Tensor:
    """Draw standard Gumbel numbers, -log(-log(u))."""
    tiny = float(np.finfo(dtype).tiny)
    return -torch.log(-torch.log(torch.clamp(uniform(key, shape, dtype), min=tiny)))


def perturb(key: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Add Gumbel noise: the id of the highest is then a draw from softmax(logits), last axis."""
    # Noise of float32 in every dtype, because float64 draws other bits: a seed would mean another
    # text there, and the float64 run could not judge the float32 one.
    return logits + gumbel(key, tuple(logits.shape)).to(logits.dtype)


_SIGNED = {32: torch.int32, 64: torch.int64}
_UNSIGNED = {32: torch.uint32, 64: torch.uint64}

# dtype: (bits of a word, bits of its fraction, the word of 1.0)
_FLOAT = {
    "float32": (32, 23, 0x3F800000),
    "float64": (64, 52, 0x3FF0000000000000),
}

# Counters per pass. On a CPU as many as torch gives to one thread: with more, each of the hundred
# small operations waits for the others to wake up, which takes four times as long.
_CHUNK = {"cpu": 1 << 15, "cuda": 1 << 22}
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def _threefry(key: torch.Tensor, high: torch.Tensor, low: torch.Tensor):
    """Encrypt the counters (high, low) under `key`: two int32 words per counter.

    Torch has no arithmetic on unsigned integers. Addition and exclusive or give the same bits on
    signed ones; only the shift to the right must not drag the sign along.

    Returns:
        Both words.
    """
    word_0, word_1 = key.view(torch.int32).unbind()
    schedule = word_0, word_1, word_0 ^ word_1 ^ 0x1BD11BDA
    x, y = high + schedule[0], low + schedule[1]
    for turn in range(5):
        for distance in _ROTATIONS[turn % 2]:
            x += y
            y = (y << distance) | _shift_right(y, 32 - distance)
            y ^= x
        x += schedule[(turn + 1) % 3]
        y += schedule[(turn + 2) % 3] + (turn + 1)
    return x, y


def _shift_right(words: torch.Tensor, distance: int) -> torch.Tensor:
    """Shift in zeros from the left, as for unsigned words."""
    width = words.element_size() * 8
    return (words.view(_SIGNED[width]) >> distance) & ((1 << (width - distance)) - 1)
