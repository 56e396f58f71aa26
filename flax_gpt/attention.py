"""Attention over what the cache holds and over the new tokens: the definition.

Read beside torch_gpt/attention.py. `fast_attention` computes the same and reads less.

Dimension key: B batch, T new tokens, S columns, K kv heads, Q query heads of one kv head, H head
dim. A column is a slot of the cache or a new token. Query heads are grouped by the kv head that
they read, so keys and values are never repeated.

Written by hand, because the frameworks' fused attentions compute their softmax in float32, which
spoils float64. Here it is float32 for the 16-bit types and the compute dtype for others.
"""

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from flax_gpt.cache import LayerCache
from flax_gpt.layers import SoftCap, identity
from flax_gpt.metadata import AttentionMetadata
from flax_gpt.scores import softmax_with_sinks

Drop = Callable[[jax.Array], jax.Array]
Attend = Callable[
    [jax.Array, LayerCache, LayerCache | None, AttentionMetadata, Drop],
    tuple[jax.Array, LayerCache | None],
]  # the signature of `attend`


def attend(
    q_BKQTH: jax.Array,
    new: LayerCache,
    past: LayerCache | None,
    metadata: AttentionMetadata,
    drop: Drop = identity,
) -> tuple[jax.Array, LayerCache | None]:
    """Attend to the cached and the new tokens that `metadata.mask_BTS` shows.

    Slots that no query sees may hold anything, even NaN.

    Args:
        q_BKQTH: queries of the new tokens.
        new: their keys and values.
        past: keys and values of the tokens before them; None without a cache.
        metadata: of the call.
        drop: applied to the attention weights.

    Returns:
        Weighted values (B, K, Q, T, H), and `past` with the new tokens appended.
    """
    # twin: XLA copies a cache that is read after it was written, so jax attends to the slots and
    # to the tokens apart and writes last; torch writes first and reads one piece.
    mask_BTS = metadata.mask_BTS
    parts = [new] if past is None else zero_unattended([past, new], mask_BTS)
    scores = metadata.bias_BKQTS, metadata.sinks_KQ, metadata.score_cap
    weights_BKQTS = drop(attention_weights(q_BKQTH, parts, mask_BTS, *scores))
    layer = None if past is None else past.append(new, metadata)
    return weighted_values(weights_BKQTS, parts), layer


def attention_weights(
    q_BKQTH: jax.Array,
    parts: Sequence[LayerCache],
    mask_BTS: jax.Array,
    bias_BKQTS: jax.Array | None = None,
    sinks_KQ: jax.Array | None = None,
    score_cap: float | None = None,
) -> jax.Array:
    """Compute softmax(q k / sqrt(H) + bias) over the columns of all parts.

    Args:
        q_BKQTH: queries.
        parts: keys and values, which side by side are the S columns.
        mask_BTS: True where a query sees a column.
        bias_BKQTS: added to the scores; None for nothing.
        sinks_KQ: scores of one more column, which has no value; None for none.
        score_cap: that products do not reach; None for none.

    Returns:
        Weights (B, K, Q, T, S) in the dtype of the queries.
    """
    scores = [_scores(q_BKQTH, part.keys_BKSH.astype(q_BKQTH.dtype)) for part in parts]
    scores_BKQTS = scores[0] if len(scores) == 1 else jnp.concatenate(scores, axis=-1)
    scores_BKQTS = scores_BKQTS * q_BKQTH.shape[-1] ** -0.5
    scores_BKQTS = scores_BKQTS.astype(jnp.promote_types(scores_BKQTS.dtype, jnp.float32))
    if score_cap is not None:
        scores_BKQTS = SoftCap(score_cap)(scores_BKQTS)
    if bias_BKQTS is not None:
        scores_BKQTS = scores_BKQTS + bias_BKQTS.astype(scores_BKQTS.dtype)
    # Not -inf: a row that sees nothing, such as padding, must stay finite.
    lowest = jnp.finfo(scores_BKQTS.dtype).min
    scores_BKQTS = jnp.where(mask_BTS[:, None, None, :, :], scores_BKQTS, lowest)
    if sinks_KQ is not None:
        return softmax_with_sinks(scores_BKQTS, sinks_KQ).astype(q_BKQTH.dtype)
    return jax.nn.softmax(scores_BKQTS, axis=-1).astype(q_BKQTH.dtype)


def weighted_values(weights_BKQTS: jax.Array, parts: Sequence[LayerCache]) -> jax.Array:
    """Sum the values of all columns by their weights, (B, K, Q, T, H)."""
    dtype = weights_BKQTS.dtype
    sums = [
        _products(weights_BKQTS[..., columns], part.values_BKSH.astype(dtype))
        for part, columns in zip(parts, _columns(parts), strict=True)
    ]
    return sum(sums[1:], sums[0])


def zero_unattended(parts: Sequence[LayerCache], mask_BTS: jax.Array) -> list[LayerCache]:
    """Zero the keys and values that no query attends to, because 0 * NaN is NaN."""
    seen_BS = jnp.any(mask_BTS, axis=1)
    cleaned = []
    for part, columns in zip(parts, _columns(parts), strict=True):
        seen = seen_BS[:, None, columns, None]
        keys, values = (jnp.where(seen, x, 0.0) for x in (part.keys_BKSH, part.values_BKSH))
        cleaned.append(LayerCache(keys, values))
    return cleaned


def _columns(parts: Sequence[LayerCache]) -> list[slice]:
    """Return which of the columns each part holds."""
    sizes = [part.keys_BKSH.shape[2] for part in parts]
    ends = itertools.accumulate(sizes)
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _scores(q_BKQTH: jax.Array, keys_BKSH: jax.Array) -> jax.Array:
    """Multiply queries by keys, (B, K, Q, T, S)."""
    # twin: XLA takes keys that it has to swap at half the speed; BLAS swaps them as it reads.
    B, K, Q, T, H = q_BKQTH.shape
    scores = jnp.einsum("BKTH,BKSH->BKTS", q_BKQTH.reshape(B, K, Q * T, H), keys_BKSH)
    return scores.reshape(B, K, Q, T, -1)


def _products(weights_BKQTS: jax.Array, values_BKSH: jax.Array) -> jax.Array:
    """Multiply weights by values, (B, K, Q, T, H)."""
    B, K, Q, T, S = weights_BKQTS.shape
    return (weights_BKQTS.reshape(B, K, Q * T, S) @ values_BKSH).reshape(B, K, Q, T, -1)
