"""A small GPT: learned positions, pre-norm blocks, output weights tied to the token table.

Dimension key: B batch, T tokens read, S tokens seen, D embed dim, N heads, H head dim, F mlp dim,
V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and constants.

    Attributes:
        vocab_size: V, how many different tokens there are.
        context_length: the most tokens that the model reads at once.
        embed_dim: D, numbers per token in the residual stream.
        num_layers: blocks.
        num_heads: N; each has embed_dim / num_heads numbers.
        mlp_dim: F, hidden numbers per token in an MLP.
        init_std: standard deviation of all initial matrices and tables.
        norm_epsilon: added to the variance in a norm.
    """

    vocab_size: int
    context_length: int
    embed_dim: int = 32
    num_layers: int = 2
    num_heads: int = 4
    mlp_dim: int = 96
    init_std: float = 0.02
    norm_epsilon: float = 1e-5


class Attention(nnx.Module):
    """Multi-head causal self-attention."""

    def __init__(self, config: Config, rng: np.random.Generator):
        self.num_heads = config.num_heads
        self.query = linear(config.embed_dim, config.embed_dim, config.init_std, rng)
        self.key = linear(config.embed_dim, config.embed_dim, config.init_std, rng)
        self.value = linear(config.embed_dim, config.embed_dim, config.init_std, rng)
        self.out = linear(config.embed_dim, config.embed_dim, config.init_std, rng)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Mix along time: each token reads from itself and from those before it."""
        q_BNTH = self.split_heads(self.query(x_BTD))
        k_BNSH = self.split_heads(self.key(x_BTD))
        v_BNSH = self.split_heads(self.value(x_BTD))
        scores_BNTS = q_BNTH @ k_BNSH.swapaxes(2, 3) / q_BNTH.shape[-1] ** 0.5
        T, S = scores_BNTS.shape[2:]
        times_T1, slots_S = jnp.arange(T)[:, None], jnp.arange(S)
        visible_TS = slots_S <= times_T1
        lowest = jnp.finfo(scores_BNTS.dtype).min
        scores_BNTS = jnp.where(visible_TS, scores_BNTS, lowest)
        weights_BNTS = jax.nn.softmax(scores_BNTS, axis=-1)
        mixed_BNTH = weights_BNTS @ v_BNSH
        return self.out(self.join_heads(mixed_BNTH))

    def split_heads(self, x_BTD: jax.Array) -> jax.Array:
        """Give each head its own share of the channels, in order."""
        B, T, D = x_BTD.shape
        return x_BTD.reshape(B, T, self.num_heads, D // self.num_heads).swapaxes(1, 2)

    def join_heads(self, x_BNTH: jax.Array) -> jax.Array:
        """Undo `split_heads`."""
        B, N, T, H = x_BNTH.shape
        return x_BNTH.swapaxes(1, 2).reshape(B, T, N * H)


class MLP(nnx.Module):
    """Two linear maps around a GELU, in its tanh form."""

    def __init__(self, config: Config, rng: np.random.Generator):
        self.up = linear(config.embed_dim, config.mlp_dim, config.init_std, rng)
        self.down = linear(config.mlp_dim, config.embed_dim, config.init_std, rng)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Transform each token alone."""
        return self.down(jax.nn.gelu(self.up(x_BTD), approximate=True))


class Block(nnx.Module):
    """Attention, then MLP: each reads the stream through a norm, and is added to the stream."""

    def __init__(self, config: Config, rng: np.random.Generator):
        self.norm_1 = norm(config)
        self.attention = Attention(config, rng)
        self.norm_2 = norm(config)
        self.mlp = MLP(config, rng)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Return the stream."""
        x_BTD = x_BTD + self.attention(self.norm_1(x_BTD))
        x_BTD = x_BTD + self.mlp(self.norm_2(x_BTD))
        return x_BTD


class GPT(nnx.Module):
    """A decoder-only language model.

    Args:
        config: sizes and constants.
        seed: of the initial weights; norms start as the identity, biases at zero.
    """

    def __init__(self, config: Config, seed: int = 0):
        rng = np.random.default_rng(seed)
        self.config = config
        self.token_embedding = table(config.vocab_size, config.embed_dim, config.init_std, rng)
        self.position_embedding = table(
            config.context_length, config.embed_dim, config.init_std, rng
        )
        self.blocks = nnx.List([Block(config, rng) for _ in range(config.num_layers)])
        self.norm = norm(config)

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """Score the next token at every position.

        Args:
            tokens_BT: ids in [0, V), at most context_length of them in a row.

        Returns:
            Logits (B, T, V).
        """
        positions_T = jnp.arange(tokens_BT.shape[1])
        x_BTD = self.token_embedding(tokens_BT) + self.position_embedding(positions_T)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        x_BTD = self.norm(x_BTD)
        return x_BTD @ self.token_embedding.embedding[...].T


# Layers are made in the default type of floats: float32, or float64 under jax_enable_x64. nnx
# layers ask for a random stream and draw at once; the weights come from NumPy afterwards.
ZEROS = nnx.initializers.zeros_init()


def linear(in_dim: int, out_dim: int, std: float, rng: np.random.Generator) -> nnx.Linear:
    """Make a linear map with normal weights, and a bias of zero."""
    dtype = jnp.result_type(float)
    layer = nnx.Linear(in_dim, out_dim, kernel_init=ZEROS, param_dtype=dtype, rngs=nnx.Rngs(0))
    layer.kernel.set_value(jnp.asarray(rng.normal(0.0, std, (in_dim, out_dim)), dtype))
    return layer


def table(num_rows: int, dim: int, std: float, rng: np.random.Generator) -> nnx.Embed:
    """Make a table with a learned vector per row, normal at first."""
    dtype = jnp.result_type(float)
    layer = nnx.Embed(
        num_rows, dim, embedding_init=ZEROS, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0)
    )
    layer.embedding.set_value(jnp.asarray(rng.normal(0.0, std, (num_rows, dim)), dtype))
    return layer


def norm(config: Config) -> nnx.LayerNorm:
    """Make a layer norm over D with scale and bias, by the two-pass variance."""
    return nnx.LayerNorm(
        config.embed_dim,
        epsilon=config.norm_epsilon,
        use_fast_variance=False,
        param_dtype=jnp.result_type(float),
        rngs=nnx.Rngs(0),
    )
