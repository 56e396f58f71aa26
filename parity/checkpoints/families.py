"""Each family of checkpoints as a table: entries of config.json, fixed fields, tensors."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from flax_gpt import GPTConfig
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
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A field of GPTConfig in a config.json.

    Attributes:
        names: its spellings there; the first is the one that is written.
        field: its name in GPTConfig.
        default: its value where the entry is missing; an entry that is null means None, which
            leaves it to GPTConfig, or to four widths in the MLP.
    """

    names: tuple[str, ...]
    field: str
    default: object = REQUIRED


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
        rotary: whether it has rotary positions.
        window: the entries (switch, size, first layers without) of a window; "" for none.
    """

    name: str
    architecture: str
    prefix: str
    entries: tuple[Entry, ...]
    fixed: Mapping[str, object]
    accepted: Mapping[str, tuple[object, ...]]
    rules: Callable[[GPTConfig], Rules]
    activation: tuple[str, str] | None = None
    rotary: bool = False
    window: tuple[str, str, str] | None = None


def _llama_rules(config: GPTConfig) -> Rules:
    """Return the rules of Llama, Mistral and Qwen, which name their tensors alike."""
    theirs, ours = "model.layers.*", "blocks.*"
    linear = {
        **{f"self_attn.{name[0]}_proj": f"attention.{name}" for name in ("query", "key", "value")},
        "self_attn.o_proj": "attention.out",
        **{f"mlp.{name}_proj": f"mlp.{name}" for name in ("gate", "up", "down")},
    }
    norms = {"input_layernorm": "norm_1", "post_attention_layernorm": "norm_2"}
    rules = [Rule("model.embed_tokens.weight", "token_embedding.embedding")]
    for name, module in linear.items():
        kernel = f"{ours}.{module}.kernel"
        rules.append(Rule(f"{theirs}.{name}.weight", kernel, Layout.TRANSPOSED))
        rules.append(Rule(f"{theirs}.{name}.bias", f"{ours}.{module}.bias", optional=True))
    if config.qk_norm:
        norms |= {
            f"self_attn.{name[0]}_norm": f"attention.{name}_norm" for name in ("query", "key")
        }
    rules += [
        Rule(f"{theirs}.{name}.weight", f"{ours}.{module}.scale") for name, module in norms.items()
    ]
    rules.append(Rule("model.norm.weight", "norm.scale"))
    ignored = ("model.layers.*.self_attn.rotary_emb.inv_freq",)
    return _with_head(rules, config, "model.embed_tokens.weight", ignored)


def _bloom_rules(config: GPTConfig) -> Rules:
    theirs, ours = "transformer.h.*", "blocks.*"
    fused = f"{ours}.attention.{{query,key,value}}"
    attention = f"{theirs}.self_attention.query_key_value"
    rules = [
        Rule("transformer.word_embeddings.weight", "token_embedding.embedding"),
        *_norm("transformer.word_embeddings_layernorm", "embedding_norm"),
        *_norm(f"{theirs}.input_layernorm", f"{ours}.norm_1"),
        *_norm(f"{theirs}.post_attention_layernorm", f"{ours}.norm_2"),
        # Fused head by head: query, key and value of the first, then those of the second.
        Rule(f"{attention}.weight", f"{fused}.kernel", Layout.TRANSPOSED, heads=config.num_heads),
        Rule(f"{attention}.bias", f"{fused}.bias", heads=config.num_heads),
        *_linear(f"{theirs}.self_attention.dense", f"{ours}.attention.out"),
        *_linear(f"{theirs}.mlp.dense_h_to_4h", f"{ours}.mlp.up"),
        *_linear(f"{theirs}.mlp.dense_4h_to_h", f"{ours}.mlp.down"),
        *_norm("transformer.ln_f", "norm"),
    ]
    return _with_head(rules, config, "transformer.word_embeddings.weight", ())


def _gpt2_rules(config: GPTConfig) -> Rules:
    return _with_head(list(HF_GPT2.rules), config, HF_GPT2.ties[0][1], HF_GPT2.ignored)


def _with_head(
    rules: list[Rule], config: GPTConfig, embedding: str, ignored: tuple[str, ...]
) -> Rules:
    """Add the rule of a head that is the embedding or has a matrix of its own."""
    if config.tied_head:
        return Rules(tuple(rules), (("lm_head.weight", embedding),), ignored)
    head = Rule("lm_head.weight", "head.kernel", Layout.TRANSPOSED)
    return Rules((*rules, head), (), ignored)


def _norm(theirs: str, ours: str) -> tuple[Rule, Rule]:
    return Rule(f"{theirs}.weight", f"{ours}.scale"), Rule(f"{theirs}.bias", f"{ours}.bias")


def _linear(theirs: str, ours: str) -> tuple[Rule, Rule]:
    kernel = Rule(f"{theirs}.weight", f"{ours}.kernel", Layout.TRANSPOSED)
    return kernel, Rule(f"{theirs}.bias", f"{ours}.bias")


_VOCABULARY = Entry(("vocab_size",), "vocab_size")
_INIT = Entry(("initializer_range",), "init_std", 0.02)
_TIED = Entry(("tie_word_embeddings",), "tied_head", True)
_UNTIED = Entry(("tie_word_embeddings",), "tied_head", False)


def _llama_entries(
    kv_heads: int | None, head_dim: int | None, has_head_dim: bool = True
) -> tuple[Entry, ...]:
    """Return the entries of Llama and its kin, which differ in their defaults."""
    own = (Entry(("head_dim",), "head_dim", head_dim),) if has_head_dim else ()
    return (
        _VOCABULARY,
        Entry(("max_position_embeddings",), "context_length", 2048),
        Entry(("hidden_size",), "embed_dim"),
        Entry(("num_hidden_layers",), "num_layers"),
        Entry(("num_attention_heads",), "num_heads"),
        Entry(("num_key_value_heads",), "num_kv_heads", kv_heads),
        *own,
        Entry(("intermediate_size",), "mlp_dim"),
        Entry(("rms_norm_eps",), "norm_epsilon", 1e-6),
        _INIT,
    )


_BIASES = (
    Entry(("attention_bias",), "qkv_bias", False),
    Entry(("attention_bias",), "out_bias", False),
)
_LLAMA_FIXED = dict(positions="rotary", norm="rms", gated=True)
_LLAMA: dict[str, Any] = dict(
    prefix="model.", rules=_llama_rules, activation=("hidden_act", "silu"), rotary=True
)

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
            window=("", "sliding_window", ""),
            **_LLAMA,
        ),
        Family(
            name="qwen2",
            architecture="Qwen2ForCausalLM",
            entries=(*_llama_entries(32, None, False), _UNTIED),
            fixed=_LLAMA_FIXED | dict(qkv_bias=True, out_bias=False, mlp_bias=False),
            accepted={},
            window=("use_sliding_window", "sliding_window", "max_window_layers"),
            **_LLAMA,
        ),
        Family(
            name="qwen3",
            architecture="Qwen3ForCausalLM",
            entries=(*_llama_entries(32, 128), *_BIASES, _UNTIED),
            fixed=_LLAMA_FIXED | dict(qk_norm=True, mlp_bias=False),
            accepted={},
            window=("use_sliding_window", "sliding_window", "max_window_layers"),
            **_LLAMA,
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
            rules=_bloom_rules,
        ),
    )
}
