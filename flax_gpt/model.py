"""GPT-2 class model: learned positions, pre-norm blocks, tied head. Read beside torch_gpt/model.py.

Dimension key: B batch, T new tokens, S cache slots, D embed dim, K kv heads, H head dim,
F mlp dim, V vocab.

A call without a key is an evaluation: dropout is active only where a key says which elements fall.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from flax_gpt import random
from flax_gpt.attention import attend, mix, weigh
from flax_gpt.cache import EXACT_TOKENS, KVCache, LayerCache
from flax_gpt.config import GPTConfig
from flax_gpt.positions import NOWHERE, Placement, check_counts, place


class Attention(nnx.Module):
    """Causal multi-head attention over what the cache holds and the new tokens."""

    def __init__(self, config: GPTConfig, key: jax.Array | None = None):
        subkeys = split_or_none(key, 4)
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.query = linear(config, config.embed_dim, config.embed_dim, config.init_std, subkeys[0])
        self.key = linear(config, config.embed_dim, config.embed_dim, config.init_std, subkeys[1])
        self.value = linear(config, config.embed_dim, config.embed_dim, config.init_std, subkeys[2])
        self.out = linear(
            config, config.embed_dim, config.embed_dim, residual_std(config), subkeys[3]
        )

    def __call__(
        self,
        x_BTD: jax.Array,
        placement: Placement,
        layer: LayerCache | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Mixes along time; returns the new stream part and the layer with the new tokens in it."""
        B, T, D = x_BTD.shape
        subkeys = split_or_none(key, 2)
        q_BTKH = self.query(x_BTD).reshape(B, T, self.num_heads, -1)
        k_BTKH = self.key(x_BTD).reshape(B, T, self.num_heads, -1)
        v_BTKH = self.value(x_BTD).reshape(B, T, self.num_heads, -1)
        q_BKTH, k_BKTH, v_BKTH = (jnp.swapaxes(x, 1, 2) for x in (q_BTKH, k_BTKH, v_BTKH))
        new = LayerCache(k_BKTH, v_BKTH)
        if layer is None:
            weights_BKTS = weigh(q_BKTH, [new], placement.mask_BTS)
            weights_BKTS = dropout(weights_BKTS, self.dropout, subkeys[0])
            mixed_BKTH = mix(weights_BKTS, [new])
        else:
            mixed_BKTH, layer = attend(q_BKTH, new, layer, placement)
        y_BTD = self.out(jnp.swapaxes(mixed_BKTH, 1, 2).reshape(B, T, D))
        return dropout(y_BTD, self.dropout, subkeys[1]), layer


class MLP(nnx.Module):
    """Two linear maps around a GELU, in its tanh form as in GPT-2."""

    def __init__(self, config: GPTConfig, key: jax.Array | None = None):
        subkeys = split_or_none(key, 2)
        self.dropout = config.dropout
        self.up = linear(config, config.embed_dim, config.mlp_dim, config.init_std, subkeys[0])
        self.down = linear(
            config, config.mlp_dim, config.embed_dim, residual_std(config), subkeys[1]
        )

    def __call__(self, x_BTD: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Works on each token alone."""
        h_BTF = jax.nn.gelu(self.up(x_BTD), approximate=True)
        return dropout(self.down(h_BTF), self.dropout, key)


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
    learners", 2019.

    Args:
        config: sizes and constants.
        key: draws the initial weights, the same ones in both twins; None leaves zeros, for weights
            that come from elsewhere.
    """

    def __init__(self, config: GPTConfig, key: jax.Array | None = None):
        subkeys = split_or_none(key, config.num_layers + 2)
        self.config = config
        self.token_embedding = embedding(config, config.vocab_size, subkeys[0])
        self.position_embedding = embedding(config, config.context_length, subkeys[1])
        self.blocks = nnx.List([Block(config, block_key) for block_key in subkeys[2:]])
        self.norm = norm(config)

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
                    f"GPT: {num_tokens} tokens > context_length {self.config.context_length}. The "
                    "position table ends there. Cut the sequence or build a longer context."
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
        x_BTD = self.token_embedding(tokens_BT) + self.position_embedding(placement.positions_BT)
        x_BTD = dropout(x_BTD, self.config.dropout, subkeys[0])
        for index, block in enumerate(self.blocks):
            x_BTD, layers[index] = block(x_BTD, placement, layers[index], subkeys[index + 1])
        if cache is not None:
            cache = KVCache(tuple(layers), placement.ends_B, cache.exact)
        return self.norm(x_BTD), cache

    def unembed(self, x_BTD: jax.Array) -> jax.Array:
        """Logits (B, T, V) by the token embedding itself, so tying needs no alias."""
        return jnp.einsum("BTD,VD->BTV", x_BTD, self.token_embedding.embedding[...])


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes elements with probability `rate` and scales up the rest; does nothing without a key.

    By hand, because the frameworks' own layers draw from different generators.
    """
    if key is None or rate == 0.0:
        return x
    kept = random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(kept, x / (1.0 - rate), 0.0)


def norm(config: GPTConfig) -> nnx.LayerNorm:
    """Layer norm over D with scale and bias, by the two-pass variance."""
    return nnx.LayerNorm(
        config.embed_dim,
        epsilon=config.norm_epsilon,
        use_fast_variance=False,
        param_dtype=parameter_dtype(config),
        rngs=nnx.Rngs(0),
    )


def linear(
    config: GPTConfig, in_dim: int, out_dim: int, std: float, key: jax.Array | None
) -> nnx.Linear:
    """The native linear layer with weights from our generator and biases of zero."""
    # nnx layers ask for a stream of their own. The weights come afterwards: an initializer of our
    # own would be part of the graph definition, and no two models would share a compiled program.
    layer = nnx.Linear(
        in_dim,
        out_dim,
        kernel_init=nnx.initializers.zeros_init(),
        bias_init=nnx.initializers.zeros_init(),
        param_dtype=parameter_dtype(config),
        rngs=nnx.Rngs(0),
    )
    layer.kernel.set_value(initial(config, (in_dim, out_dim), std, key))
    return layer


def embedding(config: GPTConfig, num_rows: int, key: jax.Array | None) -> nnx.Embed:
    """The native embedding table with weights from our generator."""
    table = nnx.Embed(
        num_rows,
        config.embed_dim,
        embedding_init=nnx.initializers.zeros_init(),
        param_dtype=parameter_dtype(config),
        dtype=parameter_dtype(config),
        rngs=nnx.Rngs(0),
    )
    table.embedding.set_value(initial(config, (num_rows, config.embed_dim), config.init_std, key))
    return table


def initial(
    config: GPTConfig, shape: tuple[int, ...], std: float, key: jax.Array | None
) -> jax.Array:
    """Normal numbers of the given standard deviation; zeros without a key.

    In the 16-bit types they are those of float32, rounded.
    """
    if key is None:
        return jnp.zeros(shape, parameter_dtype(config))
    dtype = parameter_dtype(config)
    wide = jnp.promote_types(dtype, jnp.float32)
    return (random.normal(key, shape, wide.name) * std).astype(dtype)


def residual_std(config: GPTConfig) -> float:
    """Smaller for the two maps per block that add to the stream, so that its variance does not
    grow with depth. GPT-2 report, 2019, section 2.3."""
    return config.init_std / (2 * config.num_layers) ** 0.5


def parameter_dtype(config: GPTConfig) -> jnp.dtype:
    """The framework's dtype of that name.

    Raises:
        ValueError: where the framework would silently compute in another one.
    """
    # twin: jax makes float64 into float32 unless told otherwise; torch needs no switch.
    dtype = jnp.dtype(config.dtype)
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(
            f"GPT: dtype {config.dtype} with jax_enable_x64 off. jax would compute in float32. "
            "Build and run the model inside jax.enable_x64()."
        )
    return dtype


def split_or_none(key: jax.Array | None, num: int) -> list[jax.Array | None]:
    """`num` keys from one, or as many Nones from None."""
    return [None] * num if key is None else list(random.split(key, num))
