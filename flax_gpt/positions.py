"""How a model knows where its tokens stand: a class for each kind, all with the same methods.

Read beside torch_gpt/positions.py.

Dimension key: B batch, T new tokens, S columns, N query heads, K kv heads, Q query heads of one kv
head, D embed dim, E pairs of a head's numbers that a rotation turns. A column is a slot of the
cache or a new token.

Positions and distances are those of slots, never of places in a call; so prefill, chunks, ragged
rows and single steps all get the same.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_gpt import config
from flax_gpt.metadata import AttentionMetadata, Rotation


@dataclasses.dataclass(frozen=True)
class NoPositions:
    """A model that only the causal mask tells in which order its tokens came."""

    def embed(
        self, x_BTD: jax.Array, metadata: AttentionMetadata, table: nnx.Embed | None
    ) -> jax.Array:
        """Add to the token embeddings what says where they stand."""
        return x_BTD

    def prepare(self, metadata: AttentionMetadata, table: nnx.Embed | None) -> AttentionMetadata:
        """Add what every block needs, the rotation or the bias, computed once per call."""
        return metadata

    def rotate(self, x: jax.Array, metadata: AttentionMetadata) -> jax.Array:
        """Rotate queries or keys (B, T, heads, H) by the position of their token."""
        return x


@dataclasses.dataclass(frozen=True)
class Learned(NoPositions):
    """A learned vector for each position, added to the token embedding."""

    def embed(
        self, x_BTD: jax.Array, metadata: AttentionMetadata, table: nnx.Embed | None
    ) -> jax.Array:
        """Add each token's row of the table."""
        assert table is not None
        return x_BTD + table(metadata.positions_BT)


@dataclasses.dataclass(frozen=True)
class Rotary(NoPositions):
    """Queries and keys turn by angles that grow with their position.

    Their product then depends on how far apart they are. Su et al., "RoFormer", 2021.

    Attributes:
        constants: base and scaling of the angles.
        num_pairs: E.
        original_length: tokens that the angles were made for before they were scaled.
        dtype: of the model, by name; angles are in float32 at least.
    """

    constants: config.Rotary
    num_pairs: int
    original_length: int
    dtype: str

    def prepare(self, metadata: AttentionMetadata, table: nnx.Embed | None) -> AttentionMetadata:
        """Add the rotation of the call's positions."""
        return dataclasses.replace(metadata, rotation=self.rotation(metadata.positions_BT))

    def rotate(self, x: jax.Array, metadata: AttentionMetadata) -> jax.Array:
        """Rotate queries or keys (B, T, heads, H); numbers beyond the pairs stay."""
        rotation, num_pairs = metadata.rotation, self.num_pairs
        assert rotation is not None
        wide = x.astype(rotation.cos_BT1E.dtype)
        first = wide[..., :num_pairs]
        second = wide[..., num_pairs : 2 * num_pairs]
        parts = [
            first * rotation.cos_BT1E - second * rotation.sin_BT1E,
            second * rotation.cos_BT1E + first * rotation.sin_BT1E,
            wide[..., 2 * num_pairs :],
        ]
        return jnp.concatenate(parts, axis=-1).astype(x.dtype)

    def rotation(self, positions_BT: jax.Array) -> Rotation:
        """Compute the rotation of tokens at these positions.

        A token's angles depend on its own position alone, so a key that was cached stays right,
        with dynamic scaling too.

        Returns:
            Cosines and sines of its angles.
        """
        wide = jnp.promote_types(self.dtype, jnp.float32)
        positions_BT1 = positions_BT[:, :, None].astype(wide)
        if self.constants.scaling == "dynamic":
            steps_11E = -jnp.arange(self.num_pairs).astype(wide)[None, None, :]
            powers_11E = steps_11E / self.num_pairs
            lengths_BT1 = jnp.maximum(positions_BT1 + 1.0, float(self.original_length))
            angles = jnp.exp(powers_11E * jnp.log(self.stretched_base(lengths_BT1)))
        else:
            angles = jnp.asarray(self.frequencies(), wide)[None, None, :]
        if self.constants.scaling == "longrope":
            far = jnp.asarray(self.frequencies(far=True), wide)[None, None, :]
            angles = jnp.where(positions_BT1 < self.original_length, angles, far)
        angles_BT1E = (positions_BT1 * angles)[:, :, None, :]
        size = self.constants.attention_factor
        return Rotation(jnp.cos(angles_BT1E) * size, jnp.sin(angles_BT1E) * size)

    def frequencies(self, far: bool = False) -> np.ndarray:
        """Return the angle per token of each pair (E,), in float64; unscaled where dynamic.

        `far` are those of tokens beyond the original length, which differ in longrope.
        """
        rotary = self.constants
        angles_E = rotary.base ** (-np.arange(self.num_pairs) / self.num_pairs)
        if rotary.scaling == "linear":
            return angles_E / rotary.factor
        if rotary.scaling == "llama3":
            # How often a pair goes round in the original length decides: slow ones are divided.
            rounds_E = self.original_length * angles_E / (2.0 * np.pi)
            span = rotary.high_frequency - rotary.low_frequency
            kept_E = np.clip((rounds_E - rotary.low_frequency) / span, 0.0, 1.0)
            return kept_E * angles_E + (1.0 - kept_E) * angles_E / rotary.factor
        if rotary.scaling == "yarn":
            kept_E = self.kept_by_yarn()
            return kept_E * angles_E + (1.0 - kept_E) * angles_E / rotary.factor
        if rotary.scaling == "longrope":
            return angles_E / np.array(rotary.long_factors if far else rotary.short_factors)
        return angles_E

    def kept_by_yarn(self) -> np.ndarray:
        """Return the share of each pair's angle that yarn does not divide, (E,).

        It falls evenly from the pair that goes round `high_frequency` times in the original length
        to the one that does so `low_frequency` times.
        """
        rotary = self.constants
        turns = np.array([rotary.high_frequency, rotary.low_frequency])
        pairs = np.log(self.original_length / (turns * 2.0 * np.pi)) / np.log(rotary.base)
        first, last = self.num_pairs * pairs
        if rotary.whole_pairs:
            first, last = np.floor(first), np.ceil(last)
        first, last = max(first, 0.0), min(last, 2.0 * self.num_pairs - 1.0)
        last += 0.001 if first == last else 0.0
        return 1.0 - np.clip((np.arange(self.num_pairs) - first) / (last - first), 0.0, 1.0)

    def stretched_base(self, lengths_BT1: jax.Array) -> jax.Array:
        """Return the base for sequences of these lengths, of the original one at least.

        NTK-aware scaling, as in the `dynamic` type of transformers.

        Returns:
            One base per token.
        """
        rotary, size = self.constants, 2 * self.num_pairs
        growth_BT1 = rotary.factor * lengths_BT1 / self.original_length - (rotary.factor - 1.0)
        return rotary.base * growth_BT1 ** (size / (size - 2))


@dataclasses.dataclass(frozen=True)
class Alibi(NoPositions):
    """Scores fall with the distance, in each head at its own rate.

    Press et al., "Train short, test long", 2022.

    Attributes:
        num_heads: N.
        num_kv_heads: K.
        dtype: of the model, by name; the bias is in float32 at least.
    """

    num_heads: int
    num_kv_heads: int
    dtype: str

    def prepare(self, metadata: AttentionMetadata, table: nnx.Embed | None) -> AttentionMetadata:
        """Add the bias: minus the distance, times the slope of the head."""
        wide = jnp.promote_types(self.dtype, jnp.float32)
        back_B11TS = distances(metadata)[:, None, None].astype(wide)
        slopes_1KQ11 = jnp.asarray(alibi_slopes(self.num_heads), wide)
        slopes_1KQ11 = slopes_1KQ11.reshape(1, self.num_kv_heads, -1, 1, 1)
        return dataclasses.replace(metadata, bias_BKQTS=-slopes_1KQ11 * back_B11TS)


@dataclasses.dataclass(frozen=True)
class T5(NoPositions):
    """A learned score for each range of distances in each head, the same in all blocks.

    Raffel et al., "Exploring the limits of transfer learning", 2020. Unlike in T5 itself, products
    are scaled by the head's width.

    Attributes:
        num_buckets: ranges of distances.
        max_distance: from which on all distances are in the last range.
        num_kv_heads: K.
    """

    num_buckets: int
    max_distance: int
    num_kv_heads: int

    def prepare(self, metadata: AttentionMetadata, table: nnx.Embed | None) -> AttentionMetadata:
        """Add the bias, from the table of scores (ranges, N)."""
        bucket_of = jnp.asarray(t5_buckets(self.num_buckets, self.max_distance), jnp.int32)
        bucket_BTS = bucket_of[jnp.minimum(distances(metadata), self.max_distance)]
        assert table is not None
        bias_BNTS = jnp.moveaxis(table.embedding[...][bucket_BTS], -1, 1)
        B, _, T, S = bias_BNTS.shape
        bias_BKQTS = bias_BNTS.reshape(B, self.num_kv_heads, -1, T, S)
        return dataclasses.replace(metadata, bias_BKQTS=bias_BKQTS)


def distances(metadata: AttentionMetadata) -> jax.Array:
    """Return how many tokens before its query a column is, (B, T, S); 0 for unseen ones."""
    back_BTS = metadata.positions_BT[:, :, None] - metadata.columns_BS[:, None, :]
    return jnp.maximum(back_BTS, 0)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """Return the rate of each head (N,), in float64.

    2 ** (-8 n / N) for a power of two; for other numbers those of the power below, and then every
    second one of the power above.
    """
    power = 1 << (num_heads.bit_length() - 1)
    lower = 2.0 ** (-8.0 / power * np.arange(1, power + 1))
    upper = 2.0 ** (-4.0 / power * np.arange(1, 2 * power, 2))
    return np.concatenate([lower, upper])[:num_heads]


def t5_buckets(num_buckets: int, max_distance: int) -> np.ndarray:
    """Return the range that each distance from 0 to `max_distance` falls into.

    Half of them for one distance each, the others in equal steps of its logarithm.
    """
    num_exact = num_buckets // 2
    far = np.maximum(np.arange(max_distance + 1), 1)
    steps = np.log(far / num_exact) / np.log(max_distance / num_exact)
    logarithmic = num_exact + (steps * (num_buckets - num_exact)).astype(np.int64)
    logarithmic = np.minimum(logarithmic, num_buckets - 1)
    near = np.arange(max_distance + 1)
    return np.where(near < num_exact, near, logarithmic)
