"""Attention by hand: over the new tokens, and over what the cache holds beside them.

Read beside torch_gpt/attention.py.

Dimension key: B batch, T new tokens, S columns, K kv heads, Q query heads of one kv head, H head
dim. A column is a slot of the cache or a new token. Query heads are grouped by the kv head that
they read, so keys and values are never repeated.

Written by hand, because the frameworks' fused attentions compute their softmax in float32, which
spoils float64. Here it is float32 for the 16-bit types and the compute dtype for others.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from flax_gpt.cache import LayerCache
from flax_gpt.positions import Placement, choose


def weigh(
    q_BKQTH: jax.Array,
    parts: Sequence[LayerCache],
    mask_BTS: jax.Array,
    bias_BKQTS: jax.Array | None = None,
) -> jax.Array:
    """The attention weights, softmax(q k / sqrt(H) + bias), of columns in more than one place.

    Args:
        q_BKQTH: queries.
        parts: keys and values, which side by side are the S columns.
        mask_BTS: True where a query sees a column.
        bias_BKQTS: added to the scores; None for nothing.

    Returns:
        Weights (B, K, Q, T, S) in the dtype of the queries.
    """
    scores = [_score(q_BKQTH, part.keys_BKSH.astype(q_BKQTH.dtype)) for part in parts]
    scores_BKQTS = scores[0] if len(scores) == 1 else jnp.concatenate(scores, axis=-1)
    scores_BKQTS = scores_BKQTS * q_BKQTH.shape[-1] ** -0.5
    # Not -inf: a row that sees nothing, such as padding, must stay finite.
    scores_BKQTS = scores_BKQTS.astype(jnp.promote_types(scores_BKQTS.dtype, jnp.float32))
    if bias_BKQTS is not None:
        scores_BKQTS = scores_BKQTS + bias_BKQTS.astype(scores_BKQTS.dtype)
    lowest = jnp.finfo(scores_BKQTS.dtype).min
    scores_BKQTS = jnp.where(mask_BTS[:, None, None, :, :], scores_BKQTS, lowest)
    return jax.nn.softmax(scores_BKQTS, axis=-1).astype(q_BKQTH.dtype)


def mix(weights_BKQTS: jax.Array, parts: Sequence[LayerCache]) -> jax.Array:
    """The values of all columns by their weights, (B, K, Q, T, H)."""
    mixed, start = [], 0
    for part in parts:
        end = start + part.values_BKSH.shape[2]
        values = part.values_BKSH.astype(weights_BKQTS.dtype)
        mixed.append(_mixed(weights_BKQTS[..., start:end], values))
        start = end
    return sum(mixed[1:], mixed[0])


def attend(
    q_BKQTH: jax.Array, new: LayerCache, layer: LayerCache, placement: Placement
) -> tuple[jax.Array, LayerCache]:
    """Attention over what the cache holds, no further than needed, and over the new tokens.

    Args:
        q_BKQTH: queries.
        new: keys and values of the new tokens.
        layer: those of the tokens before them.
        placement: of the call.

    Returns:
        The mixed values (B, K, Q, T, H), and the layer with the new tokens in it.
    """
    # twin: XLA copies a cache that is read after it was written, so jax attends to the slots and
    # to the tokens apart and writes last; torch writes first and reads one piece.
    longer = layer.append(new.keys_BKSH, new.values_BKSH, placement)
    if placement.exact:
        held = cleaned(longer, placement.mask_BTS)
        weights_BKQTS = weigh(q_BKQTH, [held], placement.mask_BTS, placement.bias_BKQTS)
        return mix(weights_BKQTS, [held]), longer
    careful = functools.partial(_over, placement.rungs[-1], True)

    @jax.custom_jvp
    def quick(rung, *operands):
        branches = [functools.partial(_over, num_slots, False) for num_slots in placement.rungs]
        mixed_BKQTH = choose(rung, branches, *operands)
        # 0 times NaN is NaN, so garbage that is not finite shows.
        shows = ~jnp.all(jnp.isfinite(mixed_BKQTH))
        branches = [lambda mixed_BKQTH, *_: mixed_BKQTH, lambda _, *operands: careful(*operands)]
        return choose(shows, branches, mixed_BKQTH, *operands)

    # It need not show in a gradient, which takes the careful way.
    quick.defjvp(lambda given, tangents: jax.jvp(careful, given[1:], tangents[1:]))
    operands = q_BKQTH, new, layer, placement.mask_BTS, placement.bias_BKQTS
    return quick(placement.rung, *operands), longer


def cleaned(layer: LayerCache, mask_BTS: jax.Array) -> LayerCache:
    """The layer with zeros where no query looks, for 0 times NaN is NaN."""
    seen = jnp.any(mask_BTS, axis=1)[:, None, :, None]
    return LayerCache(
        jnp.where(seen, layer.keys_BKSH, 0.0), jnp.where(seen, layer.values_BKSH, 0.0)
    )


def _score(q_BKQTH: jax.Array, keys_BKSH: jax.Array) -> jax.Array:
    """Products of queries and keys, (B, K, Q, T, S)."""
    # twin: XLA takes keys that it has to swap at half the speed; BLAS swaps them as it reads.
    B, K, Q, T, H = q_BKQTH.shape
    scores = jnp.einsum("BKTH,BKSH->BKTS", q_BKQTH.reshape(B, K, Q * T, H), keys_BKSH)
    return scores.reshape(B, K, Q, T, -1)


def _mixed(weights_BKQTS: jax.Array, values_BKSH: jax.Array) -> jax.Array:
    """Products of weights and values, (B, K, Q, T, H)."""
    B, K, Q, T, S = weights_BKQTS.shape
    return (weights_BKQTS.reshape(B, K, Q * T, S) @ values_BKSH).reshape(B, K, Q, T, -1)


def _over(
    num_slots: int,
    clean: bool,
    q_BKQTH: jax.Array,
    new: LayerCache,
    layer: LayerCache,
    mask_BTS: jax.Array,
    bias_BKQTS: jax.Array | None,
) -> jax.Array:
    """Attention over the first slots of the cache and the new tokens."""
    num_tokens = new.keys_BKSH.shape[2]
    mask_BTS, bias_BKQTS = jax.tree.map(
        lambda x: jnp.concatenate([x[..., :num_slots], x[..., -num_tokens:]], axis=-1),
        (mask_BTS, bias_BKQTS),
    )
    past = LayerCache(layer.keys_BKSH[:, :, :num_slots], layer.values_BKSH[:, :, :num_slots])
    parts = [past, new]
    if clean:
        masks = mask_BTS[..., :num_slots], mask_BTS[..., num_slots:]
        parts = [cleaned(*pair) for pair in zip(parts, masks, strict=True)]
    return mix(weigh(q_BKQTH, parts, mask_BTS, bias_BKQTS), parts)
