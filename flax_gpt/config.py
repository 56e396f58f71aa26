"""The shape of a GPT and of its training. Byte for byte the same file in both twins.

Dimension key of the whole project. An array's name ends in the letters of its axes:

    B batch    T new tokens    S cache slots    D embed dim    H head dim
    N query heads   K kv heads   Q query heads of one kv head, so N = K * Q
    F mlp dim  V vocabulary    L layers         G generated tokens
    C classes  R selected rows   P tokens of one pass of a prefill
    I inputs   O outputs of a linear map        1 a unit axis
    X experts  U experts of one token
    E pairs of a head's numbers that a rotation turns
"""

import dataclasses
from typing import Any

DTYPES = "float64", "float32", "bfloat16", "float16"
POSITIONS = "learned", "rotary", "alibi", "t5", "none"
NORMS = "layer", "layer_no_bias", "rms", "rms_plus_one"
NORM_PLACES = "before", "after", "both"
QK_NORMS = "none", "head", "width"
RESIDUALS = "sequential", "parallel", "parallel_one_norm"
ACTIVATIONS = "gelu_tanh", "gelu_bloom", "gelu", "silu", "relu", "relu_squared", "silu_clamped"
ROUTERS = "softmax", "sigmoid"
SCALINGS = "none", "linear", "dynamic", "llama3", "yarn", "longrope"

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
            `original_length` (NTK-aware); llama3 divides the slow ones and leaves the fast ones;
            yarn does so too, and goes over by the number of the pair (Peng et al., 2023);
            longrope divides each by a number of its own, one of `short_factors` for tokens within
            `original_length` and one of `long_factors` for others (Ding et al., 2024).
        factor: by which the context is longer.
        low_frequency: turns in `original_length` below which llama3 and yarn divide an angle.
        high_frequency: turns above which they leave an angle; between, they go over.
        whole_pairs: whether yarn goes over from a whole pair to a whole pair.
        short_factors: E divisors of longrope.
        long_factors: E divisors of longrope.
        attention_factor: by which turned numbers are multiplied, in yarn and longrope.
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
    whole_pairs: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    attention_factor: float = 1.0
    original_length: int | None = None

    def __post_init__(self):
        problems = []
        for name in ("short_factors", "long_factors"):  # lists, as JSON has them
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if not all(0.0 < x < float("inf") for x in getattr(self, name)):
                problems.append(f"{name} are {getattr(self, name)}, they must be positive")
        if not 0.0 < self.attention_factor < float("inf"):
            problems.append(f"attention_factor is {self.attention_factor}, it must be positive")
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
class Experts:
    """Constants of MLPs of which each token takes a few. Shazeer et al., 2017.

    Attributes:
        num_experts: X.
        num_chosen: U, experts of each token.
        width: inside an expert.
        router: from scores to weights: softmax over all experts, or sigmoid of each, with a bias
            that takes part in the choice alone (DeepSeek-AI, "DeepSeek-V3", 2024).
        renormalise: whether the weights of a token's experts are divided by their sum, which is
            the softmax over the chosen ones.
        scale: of all weights.
        router_bias: whether scores have a bias.
        shared_width: inside an MLP that every token takes besides; None for none.
        shared_gate: whether a sigmoid of each token weighs that one.

    Raises:
        ValueError: on numbers that cannot be built, all problems in one message.
    """

    num_experts: int
    num_chosen: int
    width: int
    router: str = "softmax"
    renormalise: bool = True
    scale: float = 1.0
    router_bias: bool = False
    shared_width: int | None = None
    shared_gate: bool = False

    def __post_init__(self):
        sizes = ["num_experts", "num_chosen", "width"]
        sizes += [] if self.shared_width is None else ["shared_width"]
        problems = [
            f"{name} is {getattr(self, name)!r}, it must be an integer of at least 1"
            for name in sizes
            if not (isinstance(getattr(self, name), int) and getattr(self, name) >= 1)
        ]
        if not problems and self.num_chosen > self.num_experts:
            problems.append(f"num_chosen is {self.num_chosen} of {self.num_experts} experts")
        if self.router not in ROUTERS:
            problems.append(f"router is {self.router!r}, it must be one of {', '.join(ROUTERS)}")
        if problems:
            raise ValueError(f"Experts: {'; '.join(problems)}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """What one block does unlike others.

    Attributes:
        window: tokens that a token sees, itself among them; None for all before it.
        positions: see GPTConfig, whose are meant where this is None.
        rotary: see GPTConfig, whose are meant where this is None.
        dense: whether its MLP is one, in a model of experts.
    """

    window: int | None = None
    positions: str | None = None
    rotary: Rotary | None = None
    dense: bool = False

    def __post_init__(self):
        if isinstance(self.rotary, dict):
            object.__setattr__(self, "rotary", Rotary(**self.rotary))
        problems = []
        if self.window is not None and not (isinstance(self.window, int) and self.window >= 1):
            problems.append(f"window is {self.window!r}, it must be an integer of at least 1")
        if self.positions not in (None, "rotary", "none"):
            problems.append(f"positions is {self.positions!r}, of a block it is rotary or none")
        if problems:
            raise ValueError(f"Layer: {'; '.join(problems)}.")


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
        layers: what each block does, where that is more than a window from some block on.
        norm: layer (mean and variance), layer_no_bias, rms (Zhang and Sennrich, 2019), or
            rms_plus_one, which multiplies by 1 + its weight.
        norm_place: before attention and MLP, after them, before they are added to the residual
            stream, or both.
        residual: sequential (the MLP reads what attention added to), parallel (both read the same
            stream, each through its norm), or parallel_one_norm.
        qk_norm: of queries and keys before they turn: none, head (each head by itself, with the
            same weights) or width (all heads together).
        embedding_norm: whether token embeddings are normed.
        embedding_scale: multiplies token embeddings.
        residual_scale: multiplies what attention and MLP add to the residual stream.
        attention_scale: multiplies the products of queries and keys; None for 1 / sqrt(H).
        logit_scale: multiplies the logits.
        score_cap: c, where scores s become c tanh(s / c); None for none.
        logit_cap: the same for logits.
        sinks: whether each query head has a learned score that takes part in its softmax and
            has no value. Xiao et al., "Efficient streaming language models", 2024.
        activation: of the MLP: gelu_tanh (the approximation that GPT-2 has), gelu_bloom (the same
            with its constant cut to eight digits), gelu, silu, relu, relu_squared, or silu_clamped
            (of a gated MLP, as gpt-oss has it).
        gated: whether the MLP has a second map that multiplies: SwiGLU with silu, GeGLU with gelu.
            Shazeer, "GLU variants improve transformer", 2020.
        experts: of the MLP; None for one MLP that every token takes.
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
    layers: tuple[Layer, ...] = ()
    norm: str = "layer"
    norm_place: str = "before"
    residual: str = "sequential"
    qk_norm: str = "none"
    embedding_norm: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    attention_scale: float | None = None
    logit_scale: float = 1.0
    score_cap: float | None = None
    logit_cap: float | None = None
    sinks: bool = False
    activation: str = "gelu_tanh"
    gated: bool = False
    experts: Experts | None = None
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
        if isinstance(self.experts, dict):
            object.__setattr__(self, "experts", Experts(**self.experts))
        layers = (Layer(**x) if isinstance(x, dict) else x for x in self.layers)
        object.__setattr__(self, "layers", tuple(layers))
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
        for name in (
            "init_std", "embedding_scale", "residual_scale", "attention_scale", "logit_scale",
            "score_cap", "logit_cap",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not 0.0 < value < float("inf"):
                problems.append(f"{name} is {value}, it must be positive")
        for name, choices in (
            ("positions", POSITIONS), ("norm", NORMS), ("activation", ACTIVATIONS),
            ("dtype", DTYPES), ("norm_place", NORM_PLACES), ("residual", RESIDUALS),
            ("qk_norm", QK_NORMS),
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
            of_layers = [x.rotary for x in self.layers if x.rotary is not None]
            for rotary in dict.fromkeys([self.rotary, *of_layers]):
                problems += self._turned_badly(rotary)
        if self.positions == "t5" and not 2 <= self.t5_buckets < 2 * self.t5_max_distance:
            problems.append(
                f"t5_buckets {self.t5_buckets} and t5_max_distance {self.t5_max_distance}: there "
                "are at least 2 buckets, half of them for one distance each, below the largest"
            )
        if self.residual != "sequential" and self.norm_place != "before":
            problems.append(f"residual {self.residual} with norms {self.norm_place} attention")
        if self.norm_place != "before" and self.residual_scale != 1.0:
            problems.append(f"residual_scale {self.residual_scale} of what has been normed")
        if self.embedding_norm and self.embedding_scale != 1.0:
            problems.append(f"embedding_scale {self.embedding_scale} of what is normed")
        if self.logit_cap is not None and self.logit_scale != 1.0:
            problems.append(f"logit_scale {self.logit_scale} and logit_cap {self.logit_cap}")
        if self.qk_norm == "width" and self.norm != "rms":
            problems.append(f"qk_norm over the width is an RMS norm, and norm is {self.norm!r}")
        if self.experts is not None and not self.gated:
            problems.append("experts that are not gated")
        if self.activation == "silu_clamped" and not self.gated:
            problems.append("silu_clamped in an MLP that is not gated")
        if self.sinks and self.score_cap is not None:
            problems.append(f"sinks and a score_cap of {self.score_cap}")
        if self.layers:
            if len(self.layers) != self.num_layers:
                problems.append(f"layers has {len(self.layers)} of {self.num_layers} blocks")
            if self.window is not None or self.num_full_layers:
                problems.append("layers and a window or num_full_layers beside them")
            if self.positions != "rotary" and any(x.positions or x.rotary for x in self.layers):
                problems.append(f"blocks turn or not, and positions is {self.positions!r}")
        if not 0 <= self.num_full_layers <= self.num_layers:
            problems.append(
                f"num_full_layers is {self.num_full_layers} of {self.num_layers} layers"
            )
        return problems

    def _turned_badly(self, rotary: Rotary) -> list[str]:
        """Describe what keeps heads from turning so."""
        problems = []
        turned, pairs = int(self.head_width * rotary.fraction), set()
        least = 4 if rotary.scaling == "dynamic" else 2
        if turned % 2 or turned < least:
            problems.append(
                f"{turned} of {self.head_width} numbers of a head turn, they must be an even "
                f"number of at least {least}"
            )
        if rotary.scaling == "longrope":
            pairs = {len(rotary.short_factors), len(rotary.long_factors)} - {turned // 2}
        problems += [f"longrope has {x} factors for {turned // 2} pairs" for x in sorted(pairs)]
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

    @property
    def blocks(self) -> tuple["GPTConfig", ...]:
        """A config for each block, in which all blocks are as that one."""
        layers = self.layers or tuple(
            Layer(window=None if i < self.num_full_layers else self.window)
            for i in range(self.num_layers)
        )
        return tuple(
            dataclasses.replace(
                self,
                layers=(),
                num_full_layers=0,
                window=layer.window,
                positions=self.positions if layer.positions is None else layer.positions,
                rotary=self.rotary if layer.rotary is None else layer.rotary,
                experts=None if layer.dense else self.experts,
            )
            for layer in layers
        )

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
