"""The shape of a GPT and of its training. Byte for byte the same file in both twins.

Dimension key of the whole project. An array's name ends in the letters of its axes:

    B batch    T new tokens    S cache slots    D embed dim    K kv heads    H head dim
    F mlp dim  V vocabulary    L layers         G generated tokens
    R selected rows             1 a unit axis

Every head has keys and values of its own here, so K is also the number of query heads.
"""

import dataclasses

DTYPES = ("float32", "float64")

_PRESETS = {
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
class GPTConfig:
    """Sizes and constants of one GPT-2 class model.

    Attributes:
        vocab_size: number of token ids.
        context_length: number of positions in the learned table, hence the longest sequence.
        embed_dim: width of the residual stream.
        num_layers: number of blocks.
        num_heads: attention heads per block; divides embed_dim.
        mlp_dim: width inside the MLP.
        dropout: probability of zeroing an element, wherever GPT-2 drops (embeddings, attention
            weights, both residual branches). Active only in calls that are given a key.
        norm_epsilon: added to the variance in every norm. Stated, because the frameworks'
            defaults differ (torch 1e-5, flax 1e-6).
        init_std: standard deviation of the initial weights; the two projections into the
            residual stream use init_std / sqrt(2 * num_layers). GPT-2 report, 2019, section 2.3.
        dtype: of parameters and of all computation, by name.

    Raises:
        ValueError: on sizes that cannot be built, all problems in one message.
    """

    vocab_size: int
    context_length: int
    embed_dim: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    dropout: float = 0.0
    norm_epsilon: float = 1e-5
    init_std: float = 0.02
    dtype: str = "float32"

    def __post_init__(self):
        sizes = "vocab_size", "context_length", "embed_dim", "num_layers", "num_heads", "mlp_dim"
        problems = [
            f"{name} is {getattr(self, name)!r}, it must be an integer of at least 1"
            for name in sizes
            if not (isinstance(getattr(self, name), int) and getattr(self, name) >= 1)
        ]
        if not problems and self.embed_dim % self.num_heads:
            problems.append(
                f"embed_dim {self.embed_dim} does not divide into {self.num_heads} heads"
            )
        if not 0.0 <= self.dropout < 1.0:
            problems.append(f"dropout is {self.dropout}, it must be in [0, 1)")
        if not self.norm_epsilon > 0.0:
            problems.append(f"norm_epsilon is {self.norm_epsilon}, it must be positive")
        if not self.init_std > 0.0:
            problems.append(f"init_std is {self.init_std}, it must be positive")
        if self.dtype not in DTYPES:
            problems.append(f"dtype is {self.dtype!r}, it must be one of {', '.join(DTYPES)}")
        if problems:
            raise ValueError(f"GPTConfig: {'; '.join(problems)}.")

    @property
    def head_dim(self) -> int:
        """Width of one head, H."""
        return self.embed_dim // self.num_heads

    @classmethod
    def preset(cls, name: str, **changes) -> "GPTConfig":
        """A published size by name, with any field changed.

        Raises:
            ValueError: for a name that is not in `PRESETS`.
        """
        if name not in _PRESETS:
            raise ValueError(f"GPTConfig: no preset {name!r}. Choose one of {', '.join(PRESETS)}.")
        return cls(**(_PRESETS[name] | changes))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """AdamW at a constant rate. Loshchilov and Hutter, "Decoupled weight decay", 2019.

    Attributes:
        learning_rate: step size.
        beta1: decay of the first moment, per step.
        beta2: decay of the second moment, per step.
        epsilon: added to the root of the corrected second moment, outside the root.
        weight_decay: decoupled, times the learning rate, on every parameter. Stated, because the
            frameworks' defaults differ (torch 1e-2, optax 1e-4).

    Raises:
        ValueError: on constants outside their range, all problems in one message.
    """

    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1

    def __post_init__(self):
        problems = [
            f"{name} is {getattr(self, name)}, it must be in (0, 1)"
            for name in ("beta1", "beta2")
            if not 0.0 < getattr(self, name) < 1.0
        ]
        if not self.learning_rate > 0.0:
            problems.append(f"learning_rate is {self.learning_rate}, it must be positive")
        if not self.epsilon > 0.0:
            problems.append(f"epsilon is {self.epsilon}, it must be positive")
        if not self.weight_decay >= 0.0:
            problems.append(f"weight_decay is {self.weight_decay}, it must not be negative")
        if problems:
            raise ValueError(f"TrainConfig: {'; '.join(problems)}.")
