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

DTYPES = "float64", "float32", "bfloat16", "float16"
SCHEDULES = "constant", "linear", "cosine"
POSITIONS = "learned", "rotary", "alibi", "t5", "none"
NORMS = "layer", "rms", "rms_plus_one"
ACTIVATIONS = "gelu_tanh", "gelu_bloom", "gelu", "silu"
SCALINGS = "none", "linear", "dynamic", "llama3"

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
class Rotary:
    """How far queries and keys turn per token. Su et al., "RoFormer", 2021.

    Number i of a head and number i + E turn together, by base ** (-i / E) per token (half-split, as
    in Llama; GPT-J pairs neighbours instead).

    Attributes:
        base: of the angles, often called theta.
        fraction: of each head's numbers that turn; the others have no position.
        scaling: of the angles, so that a model reads more tokens than it was trained on: none;
            linear divides them by `factor`; dynamic makes the base larger for tokens behind
            `original_length` (NTK-aware); llama3 divides the slow ones and leaves the fast ones.
        factor: by which the context is longer.
        low_frequency: llama3 divides angles that turn less than so often in `original_length`.
        high_frequency: llama3 leaves angles that turn more often than so; between, it goes over.
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
        out_bias: the same of the map behind attention.
        mlp_bias: the same of the maps of the MLP.
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
        """Which sizes do not go together, in words."""
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
    """AdamW with warm-up, decay of the rate and clipping. Loshchilov and Hutter, "Decoupled weight
    decay regularization", 2019.

    Attributes:
        learning_rate: step size at the end of the warm-up.
        schedule: of the rate after the warm-up: constant, linear or cosine.
        warmup_steps: updates over which the rate rises; update n of them, from 1, has
            n / warmup_steps of it, so that no update is lost to a rate of 0.
        total_steps: updates after which the rate stays at its end; needed to come down.
        final_fraction: of the rate, left at the end of a linear or cosine schedule.
        beta1: decay of the first moment, per step.
        beta2: decay of the second moment, per step.
        epsilon: added to the root of the corrected second moment, outside the root.
        weight_decay: decoupled, times the rate, on the matrices of linear layers. Stated, because
            the frameworks' defaults differ (torch 1e-2, optax 1e-4).
        decay_all: also decay embeddings, biases and norms.
        clip_norm: largest global gradient norm; None does not clip.
        label_smoothing: share of each target spread evenly over all classes, in [0, 1).
        accumulation_steps: parts into which the rows of a batch are cut, run one after the other;
            every scored token counts the same, whichever part it is in.
        compute_dtype: of forward and backward pass, with weights and optimizer in their own dtype:
            bfloat16, or float16 with dynamic loss scaling; None for the weights' dtype.

    Raises:
        ValueError: on constants outside their range, all problems in one message.
    """

    learning_rate: float = 1e-3
    schedule: str = "constant"
    warmup_steps: int = 0
    total_steps: int | None = None
    final_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    decay_all: bool = False
    clip_norm: float | None = 1.0
    label_smoothing: float = 0.0
    accumulation_steps: int = 1
    compute_dtype: str | None = None

    def __post_init__(self):
        problems = [
            f"{name} is {getattr(self, name)}, it must be in (0, 1)"
            for name in ("beta1", "beta2")
            if not 0.0 < getattr(self, name) < 1.0
        ]
        problems += [
            f"{name} is {getattr(self, name)}, it must be positive and finite"
            for name in ("learning_rate", "epsilon")
            if not 0.0 < getattr(self, name) < float("inf")
        ]
        if self.schedule not in SCHEDULES:
            problems.append(
                f"schedule is {self.schedule!r}, it must be one of {', '.join(SCHEDULES)}"
            )
        elif self.schedule != "constant" and self.total_steps is None:
            problems.append(f"schedule {self.schedule} has no total_steps, it must have an end")
        if not self.warmup_steps >= 0:
            problems.append(f"warmup_steps is {self.warmup_steps}, it must not be negative")
        if self.total_steps is not None and not self.total_steps > self.warmup_steps:
            problems.append(
                f"total_steps is {self.total_steps}, it must be more than the "
                f"{self.warmup_steps} of the warm-up"
            )
        if not 0.0 <= self.final_fraction <= 1.0:
            problems.append(f"final_fraction is {self.final_fraction}, it must be in [0, 1]")
        if not self.weight_decay >= 0.0:
            problems.append(f"weight_decay is {self.weight_decay}, it must not be negative")
        if self.clip_norm is not None and not self.clip_norm > 0.0:
            problems.append(f"clip_norm is {self.clip_norm}, it must be positive or None")
        if not 0.0 <= self.label_smoothing < 1.0:
            problems.append(f"label_smoothing is {self.label_smoothing}, it must be in [0, 1)")
        if not (isinstance(self.accumulation_steps, int) and self.accumulation_steps >= 1):
            problems.append(
                f"accumulation_steps is {self.accumulation_steps!r}, it must be an integer of at "
                "least 1"
            )
        if self.compute_dtype not in (None, "bfloat16", "float16"):
            problems.append(
                f"compute_dtype is {self.compute_dtype!r}, it must be bfloat16, float16 or None"
            )
        if problems:
            raise ValueError(f"TrainConfig: {'; '.join(problems)}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen from its logits. The filters apply in the order given here, each
    to what the one before it left.

    Attributes:
        temperature: divides the logits; 0 takes the most likely token and needs no key.
        top_k: keeps the k most likely tokens; None keeps all.
        top_p: keeps the fewest most likely tokens whose probabilities add up to at least p, so
            always the first. Holtzman et al., "The curious case of neural text degeneration", 2020.
        min_p: keeps tokens at least p times as likely as the first. Nguyen et al., "Turning up the
            heat: min-p sampling", 2024.

    Raises:
        ValueError: on values outside their range, all problems in one message.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        problems = []
        if not 0.0 <= self.temperature < float("inf"):
            problems.append(
                f"temperature is {self.temperature}, it must be finite and not negative"
            )
        if self.top_k is not None and not (isinstance(self.top_k, int) and self.top_k >= 1):
            problems.append(f"top_k is {self.top_k!r}, it must be an integer of at least 1 or None")
        if not 0.0 < self.top_p <= 1.0:
            problems.append(f"top_p is {self.top_p}, it must be in (0, 1]")
        if not 0.0 <= self.min_p <= 1.0:
            problems.append(f"min_p is {self.min_p}, it must be in [0, 1]")
        if problems:
            raise ValueError(f"Sampling: {'; '.join(problems)}.")


GREEDY = Sampling(temperature=0.0)
