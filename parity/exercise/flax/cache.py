"""The KV cache, complete: for part 2.

Dimension key: B batch, T new tokens, S slots, N heads, H head dim.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, for the tokens that a model has read so far.

    A value: `append` and `advance` return a new cache, and the old one stays as it was. There is a
    slot for every position; those at and beyond the length are empty and hold zeros.

    Attributes:
        length: how many tokens have been read.
        keys: of each layer, (B, N, S, H).
        values: of each layer, (B, N, S, H).
    """

    length: jax.Array
    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]

    @classmethod
    def empty(cls, config, batch_size: int) -> "KVCache":
        """Make a cache of no tokens, with context_length slots.

        Args:
            config: of the model that will fill it.
            batch_size: B, rows.

        Returns:
            A cache of length 0.
        """
        head_dim = config.embed_dim // config.num_heads
        nothing_BNSH = jnp.zeros((batch_size, config.num_heads, config.context_length, head_dim))
        layers = (nothing_BNSH,) * config.num_layers
        return cls(jnp.array(0), layers, layers)

    def append(self, layer: int, keys_BNTH: jax.Array, values_BNTH: jax.Array) -> "KVCache":
        """Return this cache with new tokens in the first empty slots of a layer; the length stays.

        Args:
            layer: which block's, from 0.
            keys_BNTH: of the new tokens.
            values_BNTH: of the new tokens.
        """
        keys, values = list(self.keys), list(self.values)
        keys[layer] = _written(keys[layer], keys_BNTH, self.length)
        values[layer] = _written(values[layer], values_BNTH, self.length)
        return KVCache(self.length, tuple(keys), tuple(values))

    def advance(self, num_tokens: int) -> "KVCache":
        """Return this cache with a greater length, once all layers have been appended to."""
        return KVCache(self.length + num_tokens, self.keys, self.values)


def _written(x_BNSH: jax.Array, new_BNTH: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x_BNSH, new_BNTH, start, axis=2)
