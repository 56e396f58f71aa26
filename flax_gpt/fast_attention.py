"""The same attention, reading only the slots in use. Read beside torch_gpt/fast_attention.py.

Dimension key: B batch, T new tokens, S columns, K kv heads, Q query heads of one kv head, H head
dim.
"""

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp

from flax_gpt import attention
from flax_gpt.attention import Drop, attention_weights, weighted_values, zero_unattended
from flax_gpt.cache import LayerCache, host_values
from flax_gpt.layers import identity
from flax_gpt.metadata import AttentionMetadata

_Result = TypeVar("_Result")

_SMALLEST_SIZE = 256  # slots; reading fewer costs a step as much, and one program more to compile


def attend(
    q_BKQTH: jax.Array,
    new: LayerCache,
    past: LayerCache | None,
    metadata: AttentionMetadata,
    drop: Drop = identity,
) -> tuple[jax.Array, LayerCache | None]:
    """Compute `attention.attend` at a cost that follows a cache's length, not its capacity.

    The results are equal up to rounding. With any `drop` but `identity`, which must see the weights
    of all slots, it is `attention.attend` itself.

    Returns:
        See `attention.attend`.
    """
    if past is None or drop is not identity:
        return attention.attend(q_BKQTH, new, past, metadata, drop)
    longest = jnp.max(metadata.lengths_B)
    sizes, size_index = slots_to_read(past.keys_BKSH.shape[2], longest)
    cap = metadata.score_cap
    careful = functools.partial(_over_slots, sizes[-1], True, cap)

    @jax.custom_jvp
    def quick(size_index, *operands):
        branches = [functools.partial(_over_slots, size, False, cap) for size in sizes]
        values_BKQTH = switch(size_index, branches, *operands)
        # Garbage that is not finite shows, because 0 * NaN is NaN.
        shows = ~jnp.all(jnp.isfinite(values_BKQTH))
        branches = [lambda values_BKQTH, *_: values_BKQTH, lambda _, *operands: careful(*operands)]
        return switch(shows, branches, values_BKQTH, *operands)

    # In a gradient it need not show, so that is always taken with zeros in place of garbage.
    quick.defjvp(lambda given, tangents: jax.jvp(careful, given[1:], tangents[1:]))
    scores = metadata.bias_BKQTS, metadata.sinks_KQ
    operands = q_BKQTH, new, past, metadata.mask_BTS, scores
    return quick(size_index, *operands), past.append(new, metadata)


def slots_to_read(
    num_slots: int, longest: int | jax.Array
) -> tuple[tuple[int, ...], int | jax.Array]:
    """Choose how many slots of each row to read.

    Args:
        num_slots: of the cache.
        longest: tokens in the longest row.

    Returns:
        Sizes in rising order, the last of which reaches every token, and the index of the smallest
        one that reaches `longest`.
    """
    # twin: a compiled program has static shapes, so jax reads the smallest of a few sizes, each
    # twice the one before; torch, where it can read the lengths, reads exactly so far.
    sizes = [0]
    size = _SMALLEST_SIZE
    while size < num_slots:
        sizes.append(size)
        size *= 2
    sizes.append(num_slots)
    found = host_values(longest)
    if found is None:
        return tuple(sizes), jnp.sum(longest > jnp.asarray(sizes[:-1]))
    return (next(size for size in sizes if size >= found),), 0


def switch(
    index: int | bool | jax.Array, branches: Sequence[Callable[..., _Result]], *operands: object
) -> _Result:
    """Call `branches[index]` on the operands.

    The last branch must be correct for every index. It is taken where an accelerator would have to
    tell the host which one to start.

    Returns:
        What the branch returns.
    """
    # twin: under jax.jit a CPU branches as it runs; torch traces for accelerators only.
    if host_values(index) is not None:
        return branches[int(index)](*operands)
    return jax.lax.platform_dependent(
        *operands,
        cpu=lambda *operands: jax.lax.switch(jnp.int32(index), branches, *operands),
        default=branches[-1],
    )


def _over_slots(
    num_slots: int,
    clean: bool,
    score_cap: float | None,
    q_BKQTH: jax.Array,
    new: LayerCache,
    past: LayerCache,
    mask_BTS: jax.Array,
    scores: tuple[jax.Array | None, jax.Array | None],
) -> jax.Array:
    """Attend to the first slots of the cache and to the new tokens."""
    bias_BKQTS, sinks_KQ = scores
    num_tokens = new.keys_BKSH.shape[2]
    mask_BTS, bias_BKQTS = jax.tree.map(
        lambda x: jnp.concatenate([x[..., :num_slots], x[..., -num_tokens:]], axis=-1),
        (mask_BTS, bias_BKQTS),
    )
    parts = [jax.tree.map(lambda x: x[:, :, :num_slots], past), new]
    if clean:
        parts = zero_unattended(parts, mask_BTS)
    rules = bias_BKQTS, sinks_KQ, score_cap
    return weighted_values(attention_weights(q_BKQTH, parts, mask_BTS, *rules), parts)
