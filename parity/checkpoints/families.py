"""Each family of checkpoints as a table: entries of config.json, fixed fields, tensors."""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from flax_gpt import GPTConfig
from parity.checkpoints.files import Json, JsonMapping
from parity.weights.layouts import Layout
from parity.weights.rules import Rule, Rules
from parity.weights.tables import HF_GPT2

REQUIRED = object()

# Their names for an activation, and ours.
ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "relu2": "relu_squared",
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A field of GPTConfig in a config.json.

    Attributes:
        names: its spellings there; the first is the one that is written.
        field: its name in GPTConfig.
        default: its value where the entry is missing; an entry that is null means None, which
            leaves it to GPTConfig, or to four widths in the MLP.
        power: the field is the entry to this power.
    """

    names: tuple[str, ...]
    field: str
    default: object = REQUIRED
    power: float = 1.0

    def read(self, value: Any) -> Any:
        """Return the field."""
        return value if self.power == 1.0 or value is None else value**self.power

    def write(self, value: Any) -> Any:
        """Return the entry, whole where a whole number means the same."""
        if self.power == 1.0 or value is None:
            return value
        found = value ** (1.0 / self.power)
        return round(found) if abs(round(found) - found) <= 1e-12 * found else found


@dataclasses.dataclass(frozen=True)
class Kinds:
    """Which blocks of a family have a window and which turn.

    Attributes:
        size: the entry with the window.
        default: the window where the entry is missing.
        switch: the entry that says whether there is a window; "" for always.
        rest: "first" where blocks before a number have none, "every" where every n-th has none.
        number: the entry with that number; "" where it does not differ.
        every: the number where the entry is missing.
        unturned: "full" where blocks without a window have no positions, if others have one;
            "listed" where an entry lists those that turn; "" where all turn.
        others: more entries that are read.
    """

    size: str = "sliding_window"
    default: int | None = 4096
    switch: str = ""
    rest: str = "first"
    number: str = ""
    every: int = 0
    unturned: str = ""
    others: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class ExpertEntries:
    """Entries of config.json about experts, and where they lie.

    Attributes:
        num: the entry with the number of experts, and its default.
        chosen: of each token.
        width: of one.
        renormalise: the entry that says whether weights are renormalised; "" where they are.
        shared: the entry with the width of a shared MLP; "" for none.
        fixed: constants of `Experts` that have one value in the family.
        dense: whether entries say which layers have an MLP of all tokens.
    """

    num: tuple[str, int]
    chosen: tuple[str, int]
    width: tuple[str, int]
    renormalise: str = ""
    shared: str = ""
    fixed: Mapping[str, object] = dataclasses.field(default_factory=dict)
    dense: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """One `model_type` of transformers.

    Attributes:
        name: the model_type.
        architecture: the class in transformers.
        prefix: of all tensors but the head's; a base model is saved without it.
        entries: of config.json.
        fixed: fields of GPTConfig that have one value in the family.
        accepted: entries without a field, and their values that change nothing; the first is the
            default.
        rules: the weight map of a config.
        activation: the entry that names the activation, where there is one.
        activations: names of activations that mean another one in this family.
        derived: fields of GPTConfig that follow from others.
        switched: an entry, its default, and what fields of GPTConfig it turns on and off.
        one_kv_head: an entry, true where missing, that says whether there is one kv head or one
            per query head, and another that says that their number counts.
        rotary: whether it has rotary positions.
        base: of the rotation where it is not said.
        local_base: the same of blocks with a window, where they turn by a base of their own.
        fraction: of a head that turns where it is not said; None where all of it does.
        outer_length: whether the length before scaling is an entry beside those of the rotation.
        kinds: of blocks, where they can differ.
        head: the tensor of a head that is not tied.
        experts: of the MLP, where it has some.
    """

    name: str
    architecture: str
    prefix: str
    entries: tuple[Entry, ...]
    fixed: Mapping[str, object]
    accepted: Mapping[str, tuple[object, ...]]
    rules: Callable[[GPTConfig], Rules]
    activation: tuple[str, str] | None = None
    activations: Mapping[str, str] = dataclasses.field(default_factory=dict)
    derived: Mapping[str, Callable[[JsonMapping], object]] = dataclasses.field(default_factory=dict)
    switched: "tuple[Switch, ...]" = ()
    one_kv_head: tuple[str, str] | None = None
    rotary: bool = False
    base: float = 10_000.0
    local_base: float | None = None
    fraction: float | None = None
    outer_length: bool = False
    kinds: Kinds | None = None
    head: str = "lm_head.weight"
    experts: ExpertEntries | None = None


@dataclasses.dataclass(frozen=True)
class Switch:
    """An entry that is true or false and chooses a field of GPTConfig.

    Attributes:
        name: of the entry.
        default: where it is missing.
        field: of GPTConfig.
        on: its value for true.
        off: its value for false.
    """

    name: str
    default: bool
    field: str
    on: object
    off: object


# Where tensors of a family lie: their names in a block, and ours. Names in braces are fused.
Names = Mapping[str, str]

_ATTENTION = {
    "self_attn.q_proj": "attention.query",
    "self_attn.k_proj": "attention.key",
    "self_attn.v_proj": "attention.value",
    "self_attn.o_proj": "attention.out",
}
_MLP = {f"mlp.{name}_proj": f"mlp.{name}" for name in ("gate", "up", "down")}
_FUSED_MLP = {"mlp.gate_up_proj": "mlp.{gate,up}", "mlp.down_proj": "mlp.down"}
_QK_NORMS = {f"self_attn.{name[0]}_norm": f"attention.{name}_norm" for name in ("query", "key")}
_BEFORE = {"input_layernorm": "norm_1", "post_attention_layernorm": "norm_2"}
_AFTER = {"post_attention_layernorm": "after_1", "post_feedforward_layernorm": "after_2"}
_BOTH = {
    "input_layernorm": "norm_1",
    "post_attention_layernorm": "after_1",
    "pre_feedforward_layernorm": "norm_2",
    "post_feedforward_layernorm": "after_2",
}
_FUSED_BY_HEAD = "attention.{query,key,value}"


def _rules(
    names: Names,
    *,
    blocks: str = "model.layers",
    embedding: str = "model.embed_tokens",
    head: str = "lm_head.weight",
    outside: Names = MappingProxyType({"model.norm": "norm"}),
    ignored: tuple[str, ...] = ("model.layers.*.self_attn.rotary_emb.inv_freq",),
    neighbours: bool = False,
    stacked: Callable[[GPTConfig], tuple[Rule, ...]] = lambda config: (),
) -> Callable[[GPTConfig], Rules]:
    """Return the weight map of a family whose linear maps are stored (out, in).

    Args:
        names: of the modules of a block.
        blocks: the module that holds blocks.
        embedding: the module of the token embedding.
        head: the tensor of a head that is not tied.
        outside: modules outside of blocks, by name.
        ignored: tensors that are no weights.
        neighbours: whether the pairs that turn are neighbours in a head.
        stacked: more rules, of a block's experts.
    """

    def rules(config: GPTConfig) -> Rules:
        found = [Rule(f"{embedding}.weight", "token_embedding.embedding")]
        modules = {f"{blocks}.*.{theirs}": f"blocks.*.{ours}" for theirs, ours in names.items()}
        for theirs, ours in {**modules, **outside}.items():
            last = ours.rpartition(".")[2]
            if last.endswith("norm") or last.startswith(("norm_", "after_")):
                found += _norm(theirs, ours)
            else:
                found += _linear(theirs, ours, config, neighbours)
        found += stacked(config)
        if config.tied_head:
            return Rules(tuple(found), ((head, f"{embedding}.weight"),), ignored)
        found.append(Rule(head, "head.kernel", Layout.TRANSPOSED))
        return Rules(tuple(found), (), ignored)

    return rules


def _experts_apart(theirs: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """Return the rules of experts that have tensors of their own."""
    names = {gate: "gate", up: "up", down: "down"}
    return tuple(
        Rule(
            f"model.layers.*.{theirs}.[expert].{name}.weight",
            f"blocks.*.mlp.experts.{ours}",
            "o i -> [expert] i o",
        )
        for name, ours in names.items()
    )


def _qwen_experts(config: GPTConfig) -> tuple[Rule, ...]:
    return _experts_apart("mlp.experts", "gate_proj", "up_proj", "down_proj")


def _experts_stacked(config: GPTConfig) -> tuple[Rule, ...]:
    """Return the rules of experts whose tensors are stacked, gate and up one after the other."""
    theirs, ours = "model.layers.*.block_sparse_moe", "blocks.*.mlp.experts"
    return (
        Rule(f"{theirs}.input_linear.weight", f"{ours}.{{gate,up}}", "e o+ i -> e i o"),
        Rule(f"{theirs}.output_linear.weight", f"{ours}.down", "e o i -> e i o"),
    )


def _experts_by_turns(config: GPTConfig) -> tuple[Rule, ...]:
    """Return the rules of stacked experts in which gate and up alternate."""
    assert config.experts is not None
    theirs, ours = "model.layers.*.mlp.experts", "blocks.*.mlp.experts"
    turns = f"n={config.experts.width}"
    return (
        Rule(
            f"{theirs}.gate_up_proj", f"{ours}.{{gate,up}}", f"e i ({turns} o+) -> e i ({turns} o)"
        ),
        Rule(
            f"{theirs}.gate_up_proj_bias",
            f"{ours}.{{gate_bias,up_bias}}",
            f"e ({turns} o+) -> e ({turns} o)",
        ),
        Rule(f"{theirs}.down_proj", f"{ours}.down"),
        Rule(f"{theirs}.down_proj_bias", f"{ours}.down_bias"),
        Rule("model.layers.*.self_attn.sinks", "blocks.*.attention.scores.weight"),
    )


def _norm(theirs: str, ours: str) -> tuple[Rule, Rule]:
    return (
        Rule(f"{theirs}.weight", f"{ours}.scale", optional=True),
        Rule(f"{theirs}.bias", f"{ours}.bias", optional=True),
    )


def _linear(theirs: str, ours: str, config: GPTConfig, neighbours: bool) -> tuple[Rule, Rule]:
    heads, layouts = 1, (Layout.TRANSPOSED.value, Layout.SAME.value)
    if ours.endswith(_FUSED_BY_HEAD) and "query_key_value" in theirs:
        # Query, key and value of the first group of heads, then those of the second.
        heads = config.kv_heads
    if neighbours and ours.endswith(("attention.query", "attention.key")):
        num = config.num_heads if ours.endswith("query") else config.kv_heads
        # Every run of as many numbers as turn; what lies beyond them may have any order, as long
        # as queries and keys have the same.
        runs = config.head_width // config.rotary_dim
        head = f"n={num} p={runs}"
        layouts = f"({head} e s=2) i -> i ({head} s=2 e)", f"({head} e s=2) -> ({head} s=2 e)"
    missing = config.experts is not None and ".mlp." in ours  # in some blocks
    kernel = Rule(f"{theirs}.weight", f"{ours}.kernel", layouts[0], heads, missing)
    return kernel, Rule(f"{theirs}.bias", f"{ours}.bias", layouts[1], heads, optional=True)


def _falcon_rules(config: GPTConfig) -> Rules:
    norms = {"ln_attn": "norm_1", "ln_mlp": "norm_2"}
    if config.residual == "parallel_one_norm":
        norms = {"input_layernorm": "norm_1"}
    return _rules(
        {
            "self_attention.query_key_value": _FUSED_BY_HEAD,
            "self_attention.dense": "attention.out",
            "mlp.dense_h_to_4h": "mlp.up",
            "mlp.dense_4h_to_h": "mlp.down",
        }
        | norms,
        blocks="transformer.h",
        embedding="transformer.word_embeddings",
        outside={"transformer.ln_f": "norm"},
        ignored=("transformer.h.*.self_attention.rotary_emb.inv_freq",),
    )(config)


def _gpt2_rules(config: GPTConfig) -> Rules:
    if config.tied_head:
        return HF_GPT2
    head = Rule("lm_head.weight", "head.kernel", Layout.TRANSPOSED)
    return Rules((*HF_GPT2.rules, head), (), HF_GPT2.ignored)


_VOCABULARY = Entry(("vocab_size",), "vocab_size")
_INIT = Entry(("initializer_range",), "init_std", 0.02)
_TIED = Entry(("tie_word_embeddings",), "tied_head", True)
_UNTIED = Entry(("tie_word_embeddings",), "tied_head", False)


def _llama_entries(
    kv_heads: int | None,
    head_dim: int | None = None,
    *,
    has_head_dim: bool = True,
    length: int = 2048,
    epsilon: float = 1e-6,
    epsilon_name: str = "rms_norm_eps",
) -> tuple[Entry, ...]:
    """Return the entries of Llama and its kin, which differ in their defaults."""
    own = (Entry(("head_dim",), "head_dim", head_dim),) if has_head_dim else ()
    return (
        _VOCABULARY,
        Entry(("max_position_embeddings",), "context_length", length),
        Entry(("hidden_size",), "embed_dim"),
        Entry(("num_hidden_layers",), "num_layers"),
        Entry(("num_attention_heads",), "num_heads"),
        Entry(("num_key_value_heads",), "num_kv_heads", kv_heads),
        *own,
        Entry(("intermediate_size",), "mlp_dim"),
        Entry((epsilon_name,), "norm_epsilon", epsilon),
        _INIT,
    )


_BIASES = (
    Entry(("attention_bias",), "qkv_bias", False),
    Entry(("attention_bias",), "out_bias", False),
)
_LLAMA_FIXED = dict(positions="rotary", norm="rms", gated=True)
_NO_BIASES = dict(qkv_bias=False, out_bias=False, mlp_bias=False)
_LLAMA_NAMES = _ATTENTION | _MLP
_LLAMA: Json = dict(
    prefix="model.",
    rules=_rules(_LLAMA_NAMES | _BEFORE),
    activation=("hidden_act", "silu"),
    rotary=True,
)


def _with(shared: Json, **changes: Any) -> Json:
    """Return what some families share, with changes."""
    return shared | changes


_GEMMA = _with(
    _LLAMA,
    activation=("hidden_activation", "gelu_pytorch_tanh"),
    derived={"embedding_scale": lambda fields: fields["embed_dim"] ** 0.5},
)
_GEMMA_FIXED = _LLAMA_FIXED | dict(norm="rms_plus_one", mlp_bias=False)
_GRANITE = (
    Entry(("embedding_multiplier",), "embedding_scale", 1.0),
    Entry(("residual_multiplier",), "residual_scale", 1.0),
    Entry(("attention_multiplier",), "attention_scale", 1.0),
    Entry(("logits_scaling",), "logit_scale", 1.0, power=-1.0),
)
# How routers are trained.
_ROUTING: dict[str, tuple[object, ...]] = {
    "output_router_logits": (False, True),
    "router_jitter_noise": (0.0,),
}
_QWEN_EXPERTS = _LLAMA_NAMES | _BEFORE | {"mlp.gate": "mlp.router.linear"}
_QWEN_EXPERTS |= {f"mlp.shared_expert.{x}_proj": f"mlp.shared.mlp.{x}" for x in ("gate", "up")}
_QWEN_EXPERTS |= {"mlp.shared_expert.down_proj": "mlp.shared.mlp.down"}
_QWEN_EXPERTS |= {"mlp.shared_expert_gate": "mlp.shared.gate"}
_QUERY_SCALE = Entry(("query_pre_attn_scalar",), "attention_scale", 256, power=-0.5)
_CAUSAL = {"use_bidirectional_attention": (None, False)}


FAMILIES = {
    family.name: family
    for family in (
        Family(
            name="gpt2",
            architecture="GPT2LMHeadModel",
            prefix="transformer.",
            entries=(
                _VOCABULARY,
                Entry(("n_positions", "n_ctx"), "context_length", 1024),
                Entry(("n_embd",), "embed_dim"),
                Entry(("n_layer",), "num_layers"),
                Entry(("n_head",), "num_heads"),
                Entry(("n_inner",), "mlp_dim", None),
                Entry(("layer_norm_epsilon",), "norm_epsilon", 1e-5),
                _INIT,
                _TIED,
            ),
            fixed={},
            accepted={
                "scale_attn_weights": (True,),
                "scale_attn_by_inverse_layer_idx": (False,),
                "add_cross_attention": (False,),
            },
            rules=_gpt2_rules,
            activation=("activation_function", "gelu_new"),
        ),
        Family(
            name="llama",
            architecture="LlamaForCausalLM",
            entries=(
                *_llama_entries(None, None),
                *_BIASES,
                Entry(("mlp_bias",), "mlp_bias", False),
                _UNTIED,
            ),
            fixed=_LLAMA_FIXED,
            accepted={},
            **_LLAMA,
        ),
        Family(
            name="mistral",
            architecture="MistralForCausalLM",
            entries=(*_llama_entries(8, None), _UNTIED),
            fixed=_LLAMA_FIXED | dict(qkv_bias=False, out_bias=False, mlp_bias=False),
            accepted={},
            kinds=Kinds(),
            **_LLAMA,
        ),
        Family(
            name="qwen2",
            architecture="Qwen2ForCausalLM",
            entries=(*_llama_entries(32, has_head_dim=False), _UNTIED),
            fixed=_LLAMA_FIXED | dict(qkv_bias=True, out_bias=False, mlp_bias=False),
            accepted={},
            kinds=Kinds(switch="use_sliding_window", number="max_window_layers"),
            **_LLAMA,
        ),
        Family(
            name="qwen3",
            architecture="Qwen3ForCausalLM",
            entries=(*_llama_entries(32, 128), *_BIASES, _UNTIED),
            fixed=_LLAMA_FIXED | dict(qk_norm="head", mlp_bias=False),
            accepted={},
            kinds=Kinds(switch="use_sliding_window", number="max_window_layers"),
            **_with(_LLAMA, rules=_rules(_LLAMA_NAMES | _BEFORE | _QK_NORMS)),
        ),
        Family(
            name="bloom",
            architecture="BloomForCausalLM",
            prefix="transformer.",
            entries=(
                _VOCABULARY,
                Entry(("seq_length", "n_positions"), "context_length", 2048),
                Entry(("hidden_size", "n_embed"), "embed_dim"),
                Entry(("n_layer", "num_hidden_layers"), "num_layers"),
                Entry(("n_head", "num_attention_heads"), "num_heads"),
                Entry(("layer_norm_epsilon",), "norm_epsilon", 1e-5),
                _INIT,
                _TIED,
            ),
            fixed=dict(positions="alibi", activation="gelu_bloom", embedding_norm=True),
            accepted={
                "apply_residual_connection_post_layernorm": (False,),
                "n_inner": (None,),
            },
            rules=_rules(
                {
                    "self_attention.query_key_value": _FUSED_BY_HEAD,
                    "self_attention.dense": "attention.out",
                    "mlp.dense_h_to_4h": "mlp.up",
                    "mlp.dense_4h_to_h": "mlp.down",
                }
                | _BEFORE,
                blocks="transformer.h",
                embedding="transformer.word_embeddings",
                outside={
                    "transformer.word_embeddings_layernorm": "embedding_norm",
                    "transformer.ln_f": "norm",
                },
                ignored=(),
            ),
        ),
        Family(
            name="gemma",
            architecture="GemmaForCausalLM",
            entries=(*_llama_entries(16, 256, length=8192), *_BIASES, _TIED),
            fixed=_GEMMA_FIXED,
            accepted=_CAUSAL,
            **_with(
                _GEMMA,
                activation=("hidden_act", "gelu_pytorch_tanh"),
                # The exact function was never meant; the library reads it so, too.
                activations={"gelu": "gelu_tanh"},
            ),
        ),
        Family(
            name="gemma2",
            architecture="Gemma2ForCausalLM",
            entries=(
                *_llama_entries(4, 256, length=8192),
                *_BIASES,
                _TIED,
                _QUERY_SCALE,
                Entry(("attn_logit_softcapping",), "score_cap", 50.0),
                Entry(("final_logit_softcapping",), "logit_cap", 30.0),
            ),
            fixed=_GEMMA_FIXED | dict(norm_place="both"),
            accepted=_CAUSAL,
            kinds=Kinds(rest="every", every=2),
            **_with(_GEMMA, rules=_rules(_LLAMA_NAMES | _BOTH)),
        ),
        Family(
            name="gemma3_text",
            architecture="Gemma3ForCausalLM",
            entries=(
                *_llama_entries(4, 256, length=131_072),
                *_BIASES,
                _TIED,
                _QUERY_SCALE,
                Entry(("attn_logit_softcapping",), "score_cap", None),
                Entry(("final_logit_softcapping",), "logit_cap", None),
            ),
            fixed=_GEMMA_FIXED | dict(norm_place="both", qk_norm="head"),
            accepted=_CAUSAL,
            kinds=Kinds(
                rest="every",
                number="sliding_window_pattern",
                every=6,
                others=("rope_local_base_freq", "_sliding_window_pattern"),
            ),
            base=1_000_000.0,
            local_base=10_000.0,
            **_with(_GEMMA, rules=_rules(_LLAMA_NAMES | _BOTH | _QK_NORMS)),
        ),
        Family(
            name="olmo2",
            architecture="Olmo2ForCausalLM",
            entries=(*_llama_entries(None, epsilon=1e-5), *_BIASES, _UNTIED),
            fixed=_LLAMA_FIXED | dict(norm_place="after", qk_norm="width", mlp_bias=False),
            accepted={},
            **_with(_LLAMA, rules=_rules(_LLAMA_NAMES | _AFTER | _QK_NORMS)),
        ),
        Family(
            name="olmo3",
            architecture="Olmo3ForCausalLM",
            entries=(*_llama_entries(None, epsilon=1e-5), *_BIASES, _UNTIED),
            fixed=_LLAMA_FIXED | dict(norm_place="after", qk_norm="width", mlp_bias=False),
            accepted={},
            kinds=Kinds(rest="every", every=4),
            base=500_000.0,
            local_base=500_000.0,
            **_with(_LLAMA, rules=_rules(_LLAMA_NAMES | _AFTER | _QK_NORMS)),
        ),
        Family(
            name="glm4",
            architecture="Glm4ForCausalLM",
            entries=(
                *_llama_entries(2, 128, length=131_072, epsilon=0.00000015625),
                Entry(("attention_bias",), "qkv_bias", True),
                _UNTIED,
            ),
            fixed=_LLAMA_FIXED | dict(norm_place="both", out_bias=False, mlp_bias=False),
            accepted={},
            fraction=0.5,
            **_with(
                _LLAMA,
                rules=_rules(
                    _ATTENTION
                    | _FUSED_MLP
                    | {
                        "input_layernorm": "norm_1",
                        "post_self_attn_layernorm": "after_1",
                        "post_attention_layernorm": "norm_2",
                        "post_mlp_layernorm": "after_2",
                    },
                    neighbours=True,
                ),
            ),
        ),
        Family(
            name="smollm3",
            architecture="SmolLM3ForCausalLM",
            entries=(
                *_llama_entries(4, length=32_768),
                *_BIASES,
                Entry(("mlp_bias",), "mlp_bias", False),
                _TIED,
            ),
            fixed=_LLAMA_FIXED,
            accepted={},
            kinds=Kinds(
                default=None,
                switch="use_sliding_window",
                rest="listed",
                unturned="listed",
                others=("no_rope_layers", "no_rope_layer_interval"),
            ),
            base=2_000_000.0,
            **_LLAMA,
        ),
        Family(
            name="granite",
            architecture="GraniteForCausalLM",
            entries=(
                *_llama_entries(None),
                *_BIASES,
                Entry(("mlp_bias",), "mlp_bias", False),
                _UNTIED,
                *_GRANITE,
            ),
            fixed=_LLAMA_FIXED,
            accepted={},
            **_LLAMA,
        ),
        Family(
            name="phi3",
            architecture="Phi3ForCausalLM",
            entries=(*_llama_entries(None, length=4096, epsilon=1e-5), _UNTIED),
            fixed=_LLAMA_FIXED | _NO_BIASES,
            accepted={},
            kinds=Kinds(default=None),
            fraction=1.0,
            outer_length=True,
            **_with(
                _LLAMA,
                rules=_rules(
                    {
                        "self_attn.qkv_proj": _FUSED_BY_HEAD,
                        "self_attn.o_proj": "attention.out",
                    }
                    | _FUSED_MLP
                    | _BEFORE
                ),
            ),
        ),
        Family(
            name="starcoder2",
            architecture="Starcoder2ForCausalLM",
            entries=(
                *_llama_entries(2, length=4096, epsilon=1e-5, epsilon_name="norm_epsilon"),
                *(Entry(("use_bias",), x, True) for x in ("qkv_bias", "out_bias", "mlp_bias")),
                _TIED,
            ),
            fixed=dict(positions="rotary"),
            accepted={},
            kinds=Kinds(default=None),
            **_with(
                _LLAMA,
                activation=("hidden_act", "gelu_pytorch_tanh"),
                rules=_rules(
                    _ATTENTION | {"mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down"} | _BEFORE
                ),
            ),
        ),
        Family(
            name="gpt_neox",
            architecture="GPTNeoXForCausalLM",
            prefix="gpt_neox.",
            entries=(
                _VOCABULARY,
                Entry(("max_position_embeddings",), "context_length", 2048),
                Entry(("hidden_size",), "embed_dim"),
                Entry(("num_hidden_layers",), "num_layers"),
                Entry(("num_attention_heads",), "num_heads"),
                Entry(("intermediate_size",), "mlp_dim"),
                Entry(("layer_norm_eps",), "norm_epsilon", 1e-5),
                Entry(("attention_bias",), "qkv_bias", True),
                Entry(("attention_bias",), "out_bias", True),
                _INIT,
                _UNTIED,
            ),
            fixed=dict(positions="rotary"),
            accepted={},
            rules=_rules(
                {
                    "attention.query_key_value": _FUSED_BY_HEAD,
                    "attention.dense": "attention.out",
                    "mlp.dense_h_to_4h": "mlp.up",
                    "mlp.dense_4h_to_h": "mlp.down",
                }
                | _BEFORE,
                blocks="gpt_neox.layers",
                embedding="gpt_neox.embed_in",
                outside={"gpt_neox.final_layer_norm": "norm"},
                head="embed_out.weight",
                ignored=(
                    "gpt_neox.layers.*.attention.bias",
                    "gpt_neox.layers.*.attention.masked_bias",
                    "gpt_neox.layers.*.attention.rotary_emb.inv_freq",
                ),
            ),
            activation=("hidden_act", "gelu"),
            switched=(Switch("use_parallel_residual", True, "residual", "parallel", "sequential"),),
            rotary=True,
            fraction=0.25,
            head="embed_out.weight",
        ),
        Family(
            name="stablelm",
            architecture="StableLmForCausalLM",
            entries=(
                *_llama_entries(32, length=4096, epsilon=1e-5, epsilon_name="layer_norm_eps"),
                Entry(("use_qkv_bias",), "qkv_bias", False),
                _UNTIED,
            ),
            fixed=dict(positions="rotary", gated=True, out_bias=False, mlp_bias=False),
            accepted={"qk_layernorm": (False,)},
            switched=(
                Switch(
                    "use_parallel_residual", False, "residual", "parallel_one_norm", "sequential"
                ),
            ),
            fraction=0.25,
            **_LLAMA,
        ),
        Family(
            name="cohere",
            architecture="CohereForCausalLM",
            entries=(
                *_llama_entries(None, length=8192, epsilon=1e-5, epsilon_name="layer_norm_eps"),
                *_BIASES,
                _TIED,
                Entry(("logit_scale",), "logit_scale", 0.0625),
            ),
            fixed=dict(
                positions="rotary",
                norm="layer_no_bias",
                gated=True,
                mlp_bias=False,
                residual="parallel_one_norm",
            ),
            accepted={"use_qk_norm": (False,)},
            base=500_000.0,
            **_with(
                _LLAMA, rules=_rules(_LLAMA_NAMES | {"input_layernorm": "norm_1"}, neighbours=True)
            ),
        ),
        Family(
            name="exaone4",
            architecture="Exaone4ForCausalLM",
            entries=(*_llama_entries(32, epsilon=1e-5), _UNTIED),
            fixed=_LLAMA_FIXED | _NO_BIASES | dict(norm_place="after", qk_norm="head"),
            accepted={},
            kinds=Kinds(rest="every", number="sliding_window_pattern", every=4, unturned="full"),
            **_with(_LLAMA, rules=_rules(_LLAMA_NAMES | _AFTER | _QK_NORMS)),
        ),
        Family(
            name="falcon",
            architecture="FalconForCausalLM",
            prefix="transformer.",
            entries=(
                _VOCABULARY,
                Entry(("max_position_embeddings",), "context_length", 2048),
                Entry(("hidden_size", "n_embed"), "embed_dim"),
                Entry(("num_hidden_layers", "n_layer"), "num_layers"),
                Entry(("num_attention_heads", "n_head"), "num_heads"),
                Entry(("num_kv_heads", "n_head_kv"), "num_kv_heads", None),
                Entry(("ffn_hidden_size",), "mlp_dim", None),
                Entry(("layer_norm_epsilon",), "norm_epsilon", 1e-5),
                *(Entry(("bias",), x, False) for x in ("qkv_bias", "out_bias", "mlp_bias")),
                _INIT,
                _TIED,
            ),
            fixed=dict(positions="rotary"),
            accepted={
                "alibi": (False,),
                "parallel_attn": (True,),
                "num_ln_in_parallel_attn": (None, 2),
            },
            rules=_falcon_rules,
            switched=(
                Switch(
                    "new_decoder_architecture", False, "residual", "parallel", "parallel_one_norm"
                ),
            ),
            one_kv_head=("multi_query", "new_decoder_architecture"),
            activation=("activation", "gelu"),
            rotary=True,
        ),
        Family(
            name="mixtral",
            architecture="MixtralForCausalLM",
            entries=(*_llama_entries(8, length=131_072, epsilon=1e-5), _UNTIED),
            fixed=_LLAMA_FIXED | _NO_BIASES,
            accepted=_ROUTING,
            kinds=Kinds(default=None),
            base=1_000_000.0,
            experts=ExpertEntries(
                ("num_local_experts", 8), ("num_experts_per_tok", 2), ("intermediate_size", 14336)
            ),
            **_with(
                _LLAMA,
                rules=_rules(
                    _ATTENTION | _BEFORE | {"block_sparse_moe.gate": "mlp.router.linear"},
                    stacked=lambda config: _experts_apart(
                        "block_sparse_moe.experts", "w1", "w3", "w2"
                    ),
                ),
            ),
        ),
        Family(
            name="qwen2_moe",
            architecture="Qwen2MoeForCausalLM",
            entries=(
                *_llama_entries(16, has_head_dim=False, length=32_768),
                Entry(("qkv_bias",), "qkv_bias", True),
                _UNTIED,
            ),
            fixed=_LLAMA_FIXED | dict(out_bias=False, mlp_bias=False),
            accepted=_ROUTING | {"use_sliding_window": (False,)},
            kinds=Kinds(switch="use_sliding_window", number="max_window_layers"),
            experts=ExpertEntries(
                ("num_experts", 60),
                ("num_experts_per_tok", 4),
                ("moe_intermediate_size", 1408),
                renormalise="norm_topk_prob",
                shared="shared_expert_intermediate_size",
                fixed=dict(shared_gate=True),
                dense=True,
            ),
            **_with(_LLAMA, rules=_rules(_QWEN_EXPERTS, stacked=_qwen_experts)),
        ),
        Family(
            name="qwen3_moe",
            architecture="Qwen3MoeForCausalLM",
            entries=(*_llama_entries(4, length=32_768), *_BIASES, _UNTIED),
            fixed=_LLAMA_FIXED | dict(qk_norm="head", mlp_bias=False),
            accepted=_ROUTING | {"use_sliding_window": (False,)},
            kinds=Kinds(switch="use_sliding_window"),
            experts=ExpertEntries(
                ("num_experts", 128),
                ("num_experts_per_tok", 8),
                ("moe_intermediate_size", 768),
                renormalise="norm_topk_prob",
                dense=True,
            ),
            **_with(_LLAMA, rules=_rules(_QWEN_EXPERTS | _QK_NORMS, stacked=_qwen_experts)),
        ),
        Family(
            name="olmoe",
            architecture="OlmoeForCausalLM",
            entries=(*_llama_entries(None, length=4096, epsilon=1e-5), *_BIASES, _UNTIED),
            fixed=_LLAMA_FIXED | dict(qk_norm="width", mlp_bias=False),
            accepted=_ROUTING | {"clip_qkv": (None,)},
            experts=ExpertEntries(
                ("num_experts", 64),
                ("num_experts_per_tok", 8),
                ("intermediate_size", 2048),
                renormalise="norm_topk_prob",
            ),
            **_with(
                _LLAMA,
                rules=_rules(
                    _ATTENTION | _BEFORE | _QK_NORMS | {"mlp.gate": "mlp.router.linear"},
                    stacked=_qwen_experts,
                ),
            ),
        ),
        Family(
            name="granitemoe",
            architecture="GraniteMoeForCausalLM",
            entries=(*_llama_entries(None), *_BIASES, _UNTIED, *_GRANITE),
            fixed=_LLAMA_FIXED | dict(mlp_bias=False),
            accepted=_ROUTING,
            experts=ExpertEntries(
                ("num_local_experts", 8), ("num_experts_per_tok", 2), ("intermediate_size", 11008)
            ),
            **_with(
                _LLAMA,
                rules=_rules(
                    _ATTENTION | _BEFORE | {"block_sparse_moe.router.layer": "mlp.router.linear"},
                    stacked=_experts_stacked,
                ),
            ),
        ),
        Family(
            name="gpt_oss",
            architecture="GptOssForCausalLM",
            entries=(
                *_llama_entries(8, 64, length=131_072, epsilon=1e-5),
                Entry(("attention_bias",), "qkv_bias", True),
                Entry(("attention_bias",), "out_bias", True),
                _UNTIED,
            ),
            fixed=_LLAMA_FIXED | dict(mlp_bias=True, sinks=True, activation="silu_clamped"),
            accepted=_ROUTING
            | {
                "hidden_act": ("silu",),
                "swiglu_alpha": (1.702,),
                "swiglu_limit": (7.0,),
                "initial_context_length": (4096,),
                "experts_per_token": (4,),
            },
            kinds=Kinds(default=128, rest="every", every=2),
            base=150_000.0,
            experts=ExpertEntries(
                ("num_local_experts", 128),
                ("num_experts_per_tok", 4),
                ("intermediate_size", 2880),
                fixed=dict(router_bias=True),
            ),
            **_with(
                _LLAMA,
                activation=None,
                rules=_rules(
                    _ATTENTION | _BEFORE | {"mlp.router": "mlp.router.linear"},
                    stacked=_experts_by_turns,
                ),
            ),
        ),
    )
}
