"""The shape of a GPT and of its training. Byte for byte the same file in both twins.

Dimension key of the whole project. An array's name ends in the letters of its axes:

    B batch    T new tokens    S cache slots    D embed dim    H head dim
    N query heads   K kv heads   Q query heads of one kv head, so N = K * Q
    F mlp dim  V vocabulary    L layers         G generated tokens
    C classes  R selected rows   P tokens of one pass of a prefill
    I inputs   O outputs of a linear map        1 a unit axis
    E pairs of a head's numbers that a rotation turns
"""

import dataclasses
from typing import Any

DTYPES = "float64", "float32", "bfloat16", "float16"
POSITIONS = "learned", "rotary", "alibi", "t5", "none"
NORMS = "layer", "rms", "rms_plus_one"
ACTIVATIONS = "gelu_tanh", "gelu_bloom", "gelu", "silu"
SCALINGS = "none", "linear", "dynamic", "llama3"

_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        vocab_size=128, context_length=384, embed_dim=64, num_layers=3, num_heads=4, mlp_dim=256
    ),
    "gpt2": dict(
        vocab_size=50257, context_length=1024, embed_dim=768, num_layers=12, num_heads=12,
        mlp_dim=3072,
    ),
    "gpt2-medium": dict(
        vocab_size=50257, context_length=1024, embed_dim=1024, num_layers=24, num_heads=16,
        mlp_dim=4096,
    ),
    "gpt2-large": dict(
        vocab_size=50257, context_length=1024, embed_dim=1280, num_layers=36, num_heads=20,
        mlp_dim=5120,
    ),
    "gpt2-xl": dict(
        vocab_size=50257, context_length=1024, embed_dim=1600, num_layers=48, num_heads=25,
        mlp_dim=6400,
    ),
}  # fmt: skip

PRESETS = tuple(_PRESETS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotary:
    """Constants of rotary positions. Su et al., "RoFormer", 2021.

    Number i of a head and number i + E turn together, by base ** (-i / E) per token (half-split, as
    in Llama; GPT-J pairs neighbours instead).

    Attributes:
        base: of the angles, often called theta.
        fraction: of each head's numbers that turn; the others have no position.
        scaling: of the angles, so that a model reads more tokens than it was trained on: none;
            linear divides them by `factor`; dynamic makes the base larger for tokens beyond
            `original_length` (NTK-aware); llama3 divides the slow ones and leaves the fast ones.
        factor: by which the context is longer.
        low_frequency: turns in `original_length` below which llama3 divides an angle.
        high_frequency: turns above which llama3 leaves an angle; between, it goes over.
        original_length: tokens that the model was trained on; None for the context_length.

    Raises:
        ValueError: on constants outside their range, all problems in one message.
    """

    base: float = 10_000.0
    fraction: float = 1.0
    scaling: str = "none"
    factor: float = 1.0
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    original_length: int | None = None

    def __post_init__(self):
        problems = []
        if not 1.0 < self.base < float("inf"):
            problems.append(f"base is {self.base}, it must be finite and more than 1")
        if not 0.0 < self.fraction <= 1.0:
            problems.append(f"fraction is {self.fraction}, it must be in (0, 1]")
        if self.scaling not in SCALINGS:
            problems.append(f"scaling is {self.scaling!r}, it must be one of {', '.join(SCALINGS)}")
        if not 1.0 <= self.factor < float("inf"):
            problems.append(f"factor is {self.factor}, it must be finite and at least 1")
        if not 0.0 < self.low_frequency < self.high_frequency:
            problems.append(
                f"low_frequency is {self.low_frequency} and high_frequency {self.high_frequency}, "
                "they must be positive and rise"
            )
        if self.original_length is not None and not self.original_length >= 1:
            problems.append(f"original_length is {self.original_length}, it must be at least 1")
        if problems:
            raise ValueError(f"Rotary: {'; '.join(problems)}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Sizes, parts and constants of one decoder-only model; the defaults are those of GPT-2.

    Attributes:
        vocab_size: number of token ids.
        context_length: the longest sequence; rows of the position table where there is one.
        embed_dim: width of the residual stream.
        num_layers: number of blocks.
        num_heads: query heads per block.
        mlp_dim: width inside the MLP.
        num_kv_heads: heads of keys and values; divides num_heads, and each is read by as many query
            heads in a row (GQA; 1 is MQA). None for num_heads; `kv_heads` is the number.
        head_dim: width of one head. None for embed_dim / num_heads; `head_width` is the number.
        positions: how a model knows where tokens stand: learned (a table), rotary, alibi (scores
            fall with the distance; Press et al., 2022), t5 (a learned score for each range of
            distances, the same in all blocks; Raffel et al., 2020), or none.
        rotary: constants of rotary positions.
        t5_buckets: ranges of distances that have a score of their own.
        t5_max_distance: from which on all distances have the last one.
        window: tokens that a token sees, itself among them; None for all before it.
        num_full_layers: first blocks that have no window.
        norm: layer (mean and variance), rms (Zhang and Sennrich, 2019), or rms_plus_one, which
            multiplies by 1 + its weight.
        qk_norm: whether queries and keys are normed in each head, before they turn.
        embedding_norm: whether token embeddings are normed.
        activation: of the MLP: gelu_tanh (the approximation that GPT-2 has), gelu_bloom (the same
            with its constant cut to eight digits), gelu or silu.
        gated: whether the MLP has a second map that multiplies: SwiGLU with silu, GeGLU with gelu.
            Shazeer, "GLU variants improve transformer", 2020.
        qkv_bias: whether the maps to queries, keys and values have biases.
        out_bias: whether the map after attention has a bias.
        mlp_bias: whether the maps of the MLP have biases.
        tied_head: whether logits are read from the token embedding, or a matrix of their own.
        dropout: probability of zeroing an element, wherever GPT-2 drops (embeddings, attention
            weights, both residual branches). Active only in calls that are given a key.
        norm_epsilon: added to the variance in every norm. Stated, because the frameworks'
            defaults differ (torch 1e-5, flax 1e-6).
        init_std: standard deviation of the initial weights; the two projections into the
            residual stream use init_std / sqrt(2 * num_layers). GPT-2 report, 2019, section 2.3.
        dtype: of parameters and of all computation, by name. In the 16-bit types softmax, angles
            and loss still run in float32; for float32 weights with 16-bit computation see
            `TrainConfig`.

    Raises:
        ValueError: on sizes that cannot be built, all problems in one message.
    """

    vocab_size: int
    context_length: int
    embed_dim: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    positions: str = "learned"
    rotary: Rotary = Rotary()
    t5_buckets: int = 32
    t5_max_distance: int = 128
    window: int | None = None
    num_full_layers: int = 0
    norm: str = "layer"
    qk_norm: bool = False
    embedding_norm: bool = False
    activation: str = "gelu_tanh"
    gated: bool = False
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    tied_head: bool = True
    dropout: float = 0.0
    norm_epsilon: float = 1e-5
    init_std: float = 0.02
    dtype: str = "float32"

    def __post_init__(self):
        if isinstance(self.rotary, dict):  # as dataclasses.asdict and JSON have it
            object.__setattr__(self, "rotary", Rotary(**self.rotary))
        sizes = ["vocab_size", "context_length", "embed_dim", "num_layers", "num_heads", "mlp_dim"]
        optional = "num_kv_heads", "head_dim", "window"
        sizes += [name for name in optional if getattr(self, name) is not None]
        problems = [
            f"{name} is {getattr(self, name)!r}, it must be an integer of at least 1"
            for name in sizes
            if not (isinstance(getattr(self, name), int) and getattr(self, name) >= 1)
        ]
        if not problems:
            problems += self._clashes()
        if not 0.0 <= self.dropout < 1.0:
            problems.append(f"dropout is {self.dropout}, it must be in [0, 1)")
        if not self.norm_epsilon > 0.0:
            problems.append(f"norm_epsilon is {self.norm_epsilon}, it must be positive")
        if not self.init_std > 0.0:
            problems.append(f"init_std is {self.init_std}, it must be positive")
        for name, choices in (
            ("positions", POSITIONS), ("norm", NORMS), ("activation", ACTIVATIONS),
            ("dtype", DTYPES),
        ):  # fmt: skip
            if getattr(self, name) not in choices:
                problems.append(
                    f"{name} is {getattr(self, name)!r}, it must be one of {', '.join(choices)}"
                )
        if problems:
            raise ValueError(f"GPTConfig: {'; '.join(problems)}.")

    def _clashes(self) -> list[str]:
        """Describe which sizes do not go together."""
        problems = []
        if self.head_dim is None and self.embed_dim % self.num_heads:
            problems.append(
                f"embed_dim {self.embed_dim} does not divide into {self.num_heads} heads"
            )
        if self.num_heads % self.kv_heads:
            problems.append(
                f"num_heads {self.num_heads} does not divide into {self.kv_heads} kv heads"
            )
        if self.positions == "rotary":
            turned = self.rotary_dim
            least = 4 if self.rotary.scaling == "dynamic" else 2
            if turned % 2 or turned < least:
                problems.append(
                    f"{turned} of {self.head_width} numbers of a head turn, they must be an even "
                    f"number of at least {least}"
                )
        if self.positions == "t5" and not 2 <= self.t5_buckets < 2 * self.t5_max_distance:
            problems.append(
                f"t5_buckets {self.t5_buckets} and t5_max_distance {self.t5_max_distance}: there "
                "are at least 2 buckets, half of them for one distance each, below the largest"
            )
        if not 0 <= self.num_full_layers <= self.num_layers:
            problems.append(
                f"num_full_layers is {self.num_full_layers} of {self.num_layers} layers"
            )
        return problems

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values, K."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        """Width of one head, H."""
        return self.embed_dim // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def rotary_dim(self) -> int:
        """Numbers of a head that turn, 2 E."""
        return int(self.head_width * self.rotary.fraction)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "GPTConfig":
        """Return the config of a published size, with any field changed.

        Args:
            name: one of `PRESETS`.
            changes: fields by name.

        Returns:
            The config.

        Raises:
            ValueError: for a name that is not in `PRESETS`.
        """
        if name not in _PRESETS:
            raise ValueError(f"GPTConfig: no preset {name!r}. Choose one of {', '.join(PRESETS)}.")
        return cls(**(_PRESETS[name] | changes))
