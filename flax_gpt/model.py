"""A decoder-only model of pre-norm blocks: GPT-2, and by its config Llama, Qwen, BLOOM and others.

Read beside torch_gpt/model.py. What differs between them is chosen in build.py; no call looks at
the config.

Dimension key: B batch, T new tokens, S cache slots, D embed dim, N query heads, K kv heads, Q query
heads of one kv head, H head dim, F mlp dim, V vocab.

A call without a key is an evaluation: dropout is active only where a key says which elements fall.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from flax_gpt import attention, build, fast_attention
from flax_gpt.attention import Attend
from flax_gpt.cache import KVCache, LayerCache
from flax_gpt.config import GPTConfig
from flax_gpt.layers import dropout, dropping, embedding, linear, residual_std, split_or_none
from flax_gpt.metadata import AttentionMetadata, attention_metadata, check_arguments


class Attention(nnx.Module):
    """Causal multi-head attention over what the cache holds and the new tokens."""

    def __init__(
        self,
        config: GPTConfig,
        key: jax.Array | None = None,
        attend: Attend = fast_attention.attend,
    ):
        subkeys = split_or_none(key, 4)
        width, std, bias = config.embed_dim, config.init_std, config.qkv_bias
        inside = config.num_heads * config.head_width
        shared = config.kv_heads * config.head_width
        self.num_heads, self.num_kv_heads = config.num_heads, config.kv_heads
        self.dropout = config.dropout
        self.query = linear(config, width, inside, std, subkeys[0], bias)
        self.key = linear(config, width, shared, std, subkeys[1], bias)
        self.value = linear(config, width, shared, std, subkeys[2], bias)
        self.out = linear(config, inside, width, residual_std(config), subkeys[3], config.out_bias)
        self.query_norm = build.head_norm(config, config.num_heads)
        self.key_norm = build.head_norm(config, config.kv_heads)
        self.query_scale, self.scores = build.query_scale(config), build.scores(config)
        self.positions = build.positions(config)
        self.attend = attend

    def __call__(
        self,
        x_BTD: jax.Array,
        metadata: AttentionMetadata,
        layer: LayerCache | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Return the attention output, and the layer with the new tokens appended."""
        B, T, _ = x_BTD.shape
        subkeys = split_or_none(key, 2)
        q_BTNH, k_BTKH, v_BTKH = self.project(x_BTD)
        # Keys turn before they are cached: their position does not change any more.
        q_BTNH = self.positions.rotate(self.query_scale(self.query_norm(q_BTNH)), metadata)
        k_BTKH = self.positions.rotate(self.key_norm(k_BTKH), metadata)
        q_BNTH, k_BKTH, v_BKTH = (jnp.swapaxes(x, 1, 2) for x in (q_BTNH, k_BTKH, v_BTKH))
        q_BKQTH = q_BNTH.reshape(B, self.num_kv_heads, -1, *q_BNTH.shape[2:])
        new, drop = LayerCache(k_BKTH, v_BKTH), dropping(self.dropout, subkeys[0])
        values_BKQTH, layer = self.attend(q_BKQTH, new, layer, self.scores(metadata), drop)
        values_BNTH = values_BKQTH.reshape(q_BNTH.shape)
        y_BTD = self.out(jnp.swapaxes(values_BNTH, 1, 2).reshape(B, T, -1))
        return dropout(y_BTD, self.dropout, subkeys[1]), layer

    def project(self, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return queries, keys and values of every token."""
        B, T, _ = x_BTD.shape
        q_BTNH = self.query(x_BTD).reshape(B, T, self.num_heads, -1)
        k_BTKH = self.key(x_BTD).reshape(B, T, self.num_kv_heads, -1)
        v_BTKH = self.value(x_BTD).reshape(B, T, self.num_kv_heads, -1)
        return q_BTNH, k_BTKH, v_BTKH


class MLP(nnx.Module):
    """Two linear maps around a nonlinear function; in the gated form, times a third map."""

    def __init__(self, config: GPTConfig, key: jax.Array | None = None):
        subkeys = split_or_none(key, 3)
        width, inside, bias = config.embed_dim, config.mlp_dim, config.mlp_bias
        self.up = linear(config, width, inside, config.init_std, subkeys[0], bias)
        self.down = linear(config, inside, width, residual_std(config), subkeys[1], bias)
        self.gate = build.gate(config, subkeys[2])
        self.activation = build.activation(config)
        self.dropout = config.dropout

    def __call__(self, x_BTD: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Transform each token by itself."""
        h_BTF = self.activation(self.up(x_BTD), self.gate(x_BTD))
        return dropout(self.down(h_BTF), self.dropout, key)


class Block(nnx.Module):
    """Attention, then MLP, or both at once, each added to the residual stream."""

    def __init__(
        self,
        config: GPTConfig,
        key: jax.Array | None = None,
        attend: Attend = fast_attention.attend,
    ):
        subkeys = split_or_none(key, 2)
        self.norm_1, self.after_1 = build.norm_before(config), build.after(config)
        self.attention = Attention(config, subkeys[0], attend)
        self.norm_2, self.after_2 = build.norm_before(config, 2), build.after(config)
        self.mlp = build.mlp(config, subkeys[1], MLP)
        self.mlp_input = build.mlp_input(config)

    def __call__(
        self,
        x_BTD: jax.Array,
        metadata: AttentionMetadata,
        layer: LayerCache | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Return the residual stream, and the layer with the new tokens appended."""
        subkeys = split_or_none(key, 2)
        normed_BTD = self.norm_1(x_BTD)
        y_BTD, layer = self.attention(normed_BTD, metadata, layer, subkeys[0])
        after_BTD = x_BTD + self.after_1(y_BTD)
        read_BTD = self.norm_2(self.mlp_input(x_BTD, normed_BTD, after_BTD))
        return after_BTD + self.after_2(self.mlp(read_BTD, subkeys[1])), layer


class GPT(nnx.Module):
    """A decoder-only language model.

    Radford et al., "Language models are unsupervised multitask learners", 2019; what else its
    config can say is cited there.

    Args:
        config: sizes, choices and constants.
        key: draws the initial weights, the same ones in both twins; None leaves zeros, for weights
            that come from elsewhere.
        attend: the attention of every block, with the signature of `attention.attend`.
    """

    def __init__(
        self,
        config: GPTConfig,
        key: jax.Array | None = None,
        attend: Attend = fast_attention.attend,
    ):
        subkeys = split_or_none(key, config.num_layers + 3)
        self.config, self.context_length = config, config.context_length
        self.dropout = config.dropout
        self.positions = build.positions(config)
        self.token_embedding = embedding(config, config.vocab_size, subkeys[0])
        self.position_embedding = build.position_embedding(config, subkeys[1])
        self.distance_embedding = build.distance_embedding(config, subkeys[1])
        self.embedding_norm = build.embedding_norm(config)
        self.embedding_scale = build.embedding_scale(config)
        self.kinds = build.kinds(config)
        blocks = zip(config.blocks, subkeys[2:-1], strict=True)
        self.blocks = nnx.List([Block(*x, attend) for x in blocks])
        self.norm = build.norm(config)
        self.head: build.Part | None = build.head(config, subkeys[-1])
        self.logits = build.logits(config)

    def __call__(
        self,
        tokens_BT: jax.Array,
        cache: KVCache | None = None,
        counts_B: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Score the next token at every position.

        Args:
            tokens_BT: ids in [0, V).
            cache: what came before; None for a sequence that starts here.
            counts_B: real tokens per row, the rest is padding on the right; None for T.
            key: active dropout, in calls without a cache; None for evaluation.

        Returns:
            Logits (B, T, V), and the cache with the real tokens appended (None without a cache).

        Raises:
            ValueError: see `check_arguments`.
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
        """Return the normed stream (B, T, D) that `unembed` reads, and the cache."""
        check_arguments(tokens_BT, cache, counts_B, key, self.context_length)
        metadata = attention_metadata(tokens_BT, cache, counts_B, self.context_length)
        keys = split_or_none(key, len(self.blocks) + 1)
        x_BTD = self.embed(tokens_BT, metadata, keys[0])
        table, kinds = self.distance_embedding, dict.fromkeys(self.kinds)
        calls = {x: x.prepare(metadata, table) for x in dict.fromkeys(x for x, _ in kinds)}
        views = {(x, window): calls[x].within(window) for x, window in kinds}
        layers: list = [None] * len(self.blocks) if cache is None else list(cache.layers)
        for i, block in enumerate(self.blocks):
            x_BTD, layers[i] = block(x_BTD, views[self.kinds[i]], layers[i], keys[i + 1])
        cache = None if cache is None else KVCache(tuple(layers), metadata.ends_B)
        return self.norm(x_BTD), cache

    def embed(
        self, tokens_BT: jax.Array, metadata: AttentionMetadata, key: jax.Array | None = None
    ) -> jax.Array:
        """Return the residual stream that the first block reads."""
        x_BTD = self.embedding_norm(self.token_embedding(metadata.valid_ids(tokens_BT)))
        x_BTD = self.embedding_scale(x_BTD)
        x_BTD = self.positions.embed(x_BTD, metadata, self.position_embedding)
        return dropout(x_BTD, self.dropout, key)

    def unembed(self, x_BTD: jax.Array) -> jax.Array:
        """Return logits (B, T, V); a tied head is the token embedding itself, not an alias."""
        if self.head is not None:
            return self.logits(self.head(x_BTD))
        return self.logits(jnp.einsum("BTD,VD->BTV", x_BTD, self.token_embedding.embedding[...]))

    def with_attend(self, attend: Attend) -> "GPT":
        """Return this model, its weights shared, with another attention in every block."""
        model = nnx.merge(*nnx.split(self))
        for block in model.blocks:
            block.attention.attend = attend
        return model

    def attention_maps(
        self, tokens_BT: jax.Array, counts_B: jax.Array | None = None
    ) -> list[jax.Array]:
        """Return the attention weights (B, N, T, T) of every block, in a call without a cache."""
        maps = []

        def recording(q_BKQTH, new, past, metadata, drop):
            def keep(weights_BKQTS):
                weights_BKQTS = drop(weights_BKQTS)
                B, K, Q, T, S = weights_BKQTS.shape
                maps.append(weights_BKQTS.reshape(B, K * Q, T, S))
                return weights_BKQTS

            return attention.attend(q_BKQTH, new, past, metadata, keep)

        self.with_attend(recording).hidden(tokens_BT, counts_B=counts_B)
        return maps
