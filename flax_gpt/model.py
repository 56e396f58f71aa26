"""A decoder-only model of pre-norm blocks: GPT-2, and by its config Llama, Qwen, BLOOM and others.
Read beside torch_gpt/model.py.

Dimension key: B batch, T new tokens, S cache slots, D embed dim, N query heads, K kv heads, Q query
heads of one kv head, H head dim, F mlp dim, V vocab.

A call without a key is an evaluation: dropout is active only where a key says which elements fall.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from flax_gpt import relative, rotary
from flax_gpt.attention import attend, mix, weigh
from flax_gpt.cache import EXACT_TOKENS, KVCache, LayerCache
from flax_gpt.config import GPTConfig
from flax_gpt.layers import activate, dropout, embedding, linear, norm, residual_std, split_or_none
from flax_gpt.positions import NOWHERE, Placement, check_counts, place, windowed


class Attention(nnx.Module):
    """Causal multi-head attention over what the cache holds and the new tokens."""

    def __init__(self, config: GPTConfig, key: jax.Array | None = None):
        subkeys = split_or_none(key, 4)
        self.num_heads, self.num_kv_heads = config.num_heads, config.kv_heads
        self.dropout = config.dropout
        std, bias = config.init_std, config.qkv_bias
        inside = config.num_heads * config.head_width
        shared = config.kv_heads * config.head_width
        self.query = linear(config, config.embed_dim, inside, std, subkeys[0], bias)
        self.key = linear(config, config.embed_dim, shared, std, subkeys[1], bias)
        self.value = linear(config, config.embed_dim, shared, std, subkeys[2], bias)
        self.out = linear(
            config, inside, config.embed_dim, residual_std(config), subkeys[3], config.out_bias
        )
        self.query_norm = norm(config, config.head_width) if config.qk_norm else None
        self.key_norm = norm(config, config.head_width) if config.qk_norm else None

    def __call__(
        self,
        x_BTD: jax.Array,
        placement: Placement,
        layer: LayerCache | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Mixes along time; returns the new stream part and the layer with the new tokens in it."""
        B, T, _ = x_BTD.shape
        subkeys = split_or_none(key, 2)
        q_BTNH, k_BTKH, v_BTKH = self.project(x_BTD)
        if self.query_norm is not None:
            q_BTNH, k_BTKH = self.query_norm(q_BTNH), self.key_norm(k_BTKH)
        if placement.turn is not None:
            # Keys turn before they are cached: what they are at does not change any more.
            q_BTNH = rotary.rotate(q_BTNH, placement.turn)
            k_BTKH = rotary.rotate(k_BTKH, placement.turn)
        q_BNTH, k_BKTH, v_BKTH = (jnp.swapaxes(x, 1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
        q_BKQTH = q_BNTH.reshape(B, self.num_kv_heads, -1, *q_BNTH.shape[2:])
        new = LayerCache(k_BKTH, v_BKTH)
        if layer is None:
            weights_BKQTS = weigh(q_BKQTH, [new], placement.mask_BTS, placement.bias_BKQTS)
            weights_BKQTS = dropout(weights_BKQTS, self.dropout, subkeys[0])
            mixed_BKQTH = mix(weights_BKQTS, [new])
        else:
            mixed_BKQTH, layer = attend(q_BKQTH, new, layer, placement)
        mixed_BNTH = mixed_BKQTH.reshape(q_BNTH.shape)
        y_BTD = self.out(jnp.swapaxes(mixed_BNTH, 1, 2).reshape(B, T, -1))
        return dropout(y_BTD, self.dropout, subkeys[1]), layer

    def project(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values of every token."""
        B, T, _ = x_BTD.shape
        q_BTNH = self.query(x_BTD).reshape(B, T, self.num_heads, -1)
        k_BTKH = self.key(x_BTD).reshape(B, T, self.num_kv_heads, -1)
        v_BTKH = self.value(x_BTD).reshape(B, T, self.num_kv_heads, -1)
        return q_BTNH, k_BTKH, v_BTKH


class MLP(nnx.Module):
    """Two linear maps around a nonlinear function; in the gated form, times a third map."""

    def __init__(self, config: GPTConfig, key: jax.Array | None = None):
        subkeys = split_or_none(key, 3 if config.gated else 2)
        self.config = config
        sizes, std, bias = (config.embed_dim, config.mlp_dim), config.init_std, config.mlp_bias
        self.up = linear(config, *sizes, std, subkeys[0], bias)
        self.down = linear(config, *sizes[::-1], residual_std(config), subkeys[1], bias)
        self.gate = linear(config, *sizes, std, subkeys[2], bias) if config.gated else None

    def __call__(self, x_BTD: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Works on each token alone."""
        h_BTF = self.up(x_BTD)
        if self.gate is None:
            h_BTF = activate(self.config, h_BTF)
        else:
            h_BTF = activate(self.config, self.gate(x_BTD)) * h_BTF
        return dropout(self.down(h_BTF), self.config.dropout, key)


class Block(nnx.Module):
    """Attention, then MLP, each normed before and added to the stream after."""

    def __init__(self, config: GPTConfig, key: jax.Array | None = None):
        subkeys = split_or_none(key, 2)
        self.norm_1 = norm(config)
        self.attention = Attention(config, subkeys[0])
        self.norm_2 = norm(config)
        self.mlp = MLP(config, subkeys[1])

    def __call__(
        self,
        x_BTD: jax.Array,
        placement: Placement,
        layer: LayerCache | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Returns the stream and the layer with the new tokens in it."""
        subkeys = split_or_none(key, 2)
        y_BTD, layer = self.attention(self.norm_1(x_BTD), placement, layer, subkeys[0])
        x_BTD = x_BTD + y_BTD
        x_BTD = x_BTD + self.mlp(self.norm_2(x_BTD), subkeys[1])
        return x_BTD, layer


class GPT(nnx.Module):
    """A decoder-only language model. Radford et al., "Language models are unsupervised multitask
    learners", 2019; what else its config can say is cited there.

    Args:
        config: sizes and constants.
        key: draws the initial weights, the same ones in both twins; None leaves zeros, for weights
            that come from elsewhere.
    """

    def __init__(self, config: GPTConfig, key: jax.Array | None = None):
        num_layers = config.num_layers
        subkeys = split_or_none(key, num_layers + (2 if config.tied_head else 3))
        self.config = config
        self.token_embedding = embedding(config, config.vocab_size, subkeys[0])
        self.position_embedding = (
            embedding(config, config.context_length, subkeys[1])
            if config.positions == "learned"
            else None
        )
        self.distance_embedding = (
            embedding(config, config.t5_buckets, subkeys[1], config.num_heads)
            if config.positions == "t5"
            else None
        )
        self.embedding_norm = norm(config) if config.embedding_norm else None
        block_keys = subkeys[2 : num_layers + 2]
        self.blocks = nnx.List([Block(config, block_key) for block_key in block_keys])
        self.norm = norm(config)
        sizes, std = (config.embed_dim, config.vocab_size), config.init_std
        self.head = None if config.tied_head else linear(config, *sizes, std, subkeys[-1], False)

    def __call__(
        self,
        tokens_BT: jax.Array,
        cache: KVCache | None = None,
        counts_B: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Scores the next token at every position.

        Args:
            tokens_BT: ids in [0, V).
            cache: what came before; None for a sequence that starts here.
            counts_B: real tokens per row, the rest is padding on the right; None for T.
            key: active dropout, in calls without a cache; None for evaluation.

        Returns:
            Logits (B, T, V), and the cache with the real tokens in it (None without a cache).

        Raises:
            ValueError: when a row would outgrow the cache or the context, when rows or counts do
                not fit the call, or for a key together with a cache.
        """
        x_BTD, cache = self.hidden(tokens_BT, cache, counts_B, key)
        return self.unembed(x_BTD), cache

    def hidden(
        self,
        tokens_BT: jax.Array,
        cache: KVCache | None = None,
        counts_B: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """The normed stream (B, T, D) that `unembed` reads, and the cache. See `__call__`."""
        batch_size, num_tokens = tokens_BT.shape
        check_counts(counts_B, batch_size, num_tokens)
        subkeys = split_or_none(key, len(self.blocks) + 1)
        if cache is None:
            if num_tokens > self.config.context_length:
                raise ValueError(
                    f"GPT: {num_tokens} tokens > context_length {self.config.context_length}. "
                    "Positions end there. Cut the sequence or build a longer context."
                )
            starts_1 = jnp.zeros(1, jnp.int32)
            placement = place(num_tokens, num_tokens, starts_1, counts_B, cached=False)
            layers = [None] * len(self.blocks)
        else:
            if batch_size != cache.batch_size:
                raise ValueError(
                    f"GPT: {batch_size} rows of tokens and a cache of {cache.batch_size}. Each "
                    "row continues its own. Select as many rows of the cache."
                )
            if cache.exact and num_tokens != EXACT_TOKENS:
                raise ValueError(
                    f"GPT: {num_tokens} tokens and an exact cache. Each of its calls has "
                    f"{EXACT_TOKENS}, padding before and behind among them. Use prefill and "
                    "decode_step, which see to that."
                )
            if key is not None:
                raise ValueError(
                    "GPT: a key and a cache. Dropout is for training, which reads whole sequences. "
                    "Leave one of them out."
                )
            cache.check_room(num_tokens, counts_B, self.config.context_length)
            num_slots = min(cache.capacity, self.config.context_length)
            placement = place(num_tokens, num_slots, cache.lengths_B, counts_B, exact=cache.exact)
            layers = list(cache.layers)
        # Padding may be any id; a negative one elsewhere must not wrap around.
        tokens_BT = jnp.where(tokens_BT < 0, NOWHERE, tokens_BT)
        tokens_BT = jnp.where(placement.real_BT, tokens_BT, 0)
        # A token for which there is no slot is no token either.
        tokens_BT = jnp.where(placement.positions_BT == NOWHERE, NOWHERE, tokens_BT)
        x_BTD = self.token_embedding(tokens_BT)
        if self.embedding_norm is not None:
            x_BTD = self.embedding_norm(x_BTD)
        if self.position_embedding is not None:
            x_BTD = x_BTD + self.position_embedding(placement.positions_BT)
        x_BTD = dropout(x_BTD, self.config.dropout, subkeys[0])
        placement = self._oriented(placement)
        narrow = placement
        if self.config.window is not None:
            narrow = windowed(placement, self.config.window)
        for index, block in enumerate(self.blocks):
            seen = placement if index < self.config.num_full_layers else narrow
            x_BTD, layers[index] = block(x_BTD, seen, layers[index], subkeys[index + 1])
        if cache is not None:
            cache = KVCache(tuple(layers), placement.ends_B, cache.exact)
        return self.norm(x_BTD), cache

    def unembed(self, x_BTD: jax.Array) -> jax.Array:
        """Logits (B, T, V); a tied head is the token embedding itself, so tying needs no alias."""
        if self.head is not None:
            return self.head(x_BTD)
        return jnp.einsum("BTD,VD->BTV", x_BTD, self.token_embedding.embedding[...])

    def _oriented(self, placement: Placement) -> Placement:
        """The placement with what blocks must know of positions; nothing where they are learned."""
        config = self.config
        if config.positions == "rotary":
            turn = rotary.rotation(config, placement.positions_BT)
            return dataclasses.replace(placement, turn=turn)
        if config.positions == "alibi":
            return dataclasses.replace(placement, bias_BKQTS=relative.alibi(config, placement))
        if config.positions == "t5":
            table = self.distance_embedding.embedding[...]
            bias_BKQTS = relative.t5(config, placement, table)
            return dataclasses.replace(placement, bias_BKQTS=bias_BKQTS)
        return placement
