"""Small models of transformers with random numbers in every leaf, in float64 throughout."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import torch
import transformers
from torch.overrides import TorchFunctionMode

import flax_gpt
import torch_gpt
from parity.checkpoints import Checkpoint, flax_model, torch_model

IDS = dict(bos_token_id=None, eos_token_id=None, pad_token_id=0)
# Odd sizes, all different: 3 layers, 6 heads of 20 in a stream that is not their product.
LLAMA = IDS | dict(
    vocab_size=97, hidden_size=42, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2, intermediate_size=34, max_position_embeddings=40, head_dim=20,
)  # fmt: skip
# The same where heads make up the stream.
WHOLE = {name: x for name, x in LLAMA.items() if name != "head_dim"} | dict(hidden_size=120)
YARN = dict(rope_type="yarn", rope_theta=300.0, factor=4.0, original_max_position_embeddings=16,
            beta_fast=4.0, beta_slow=0.5)  # fmt: skip
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", IDS | dict(
        vocab_size=97, n_embd=100, n_layer=3, n_head=5, n_inner=34, n_positions=40)),
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA | dict(
        rope_parameters=dict(rope_type="llama3", rope_theta=300.0, factor=4.0, low_freq_factor=1.0,
                             high_freq_factor=4.0, original_max_position_embeddings=16),
        attention_bias=True, mlp_bias=True)),
    "mistral": ("MistralForCausalLM", "MistralConfig", LLAMA | dict(
        sliding_window=5, rope_parameters=dict(rope_type="linear", rope_theta=200.0, factor=2.0))),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", WHOLE | dict(
        use_sliding_window=True, sliding_window=6, max_window_layers=1,
        tie_word_embeddings=True)),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", LLAMA),
    "bloom": ("BloomForCausalLM", "BloomConfig", IDS | dict(
        vocab_size=97, hidden_size=100, n_layer=3, n_head=5, seq_length=40)),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", LLAMA),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", LLAMA | dict(
        hidden_size=48, sliding_window=5, query_pre_attn_scalar=23, attn_logit_softcapping=4.0,
        final_logit_softcapping=5.0)),
    "gemma3_text": ("Gemma3ForCausalLM", "Gemma3TextConfig", LLAMA | dict(
        hidden_size=48, sliding_window=5, query_pre_attn_scalar=23,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters=dict(
            full_attention=dict(rope_type="linear", rope_theta=900.0, factor=8.0),
            sliding_attention=dict(rope_type="default", rope_theta=70.0)))),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", WHOLE | dict(attention_bias=True)),
    "olmo3": ("Olmo3ForCausalLM", "Olmo3Config", WHOLE | dict(
        num_hidden_layers=4, sliding_window=5,
        rope_parameters=dict(full_attention=YARN,
                             sliding_attention=dict(rope_type="default", rope_theta=300.0)))),
    "glm4": ("Glm4ForCausalLM", "Glm4Config", LLAMA),
    "smollm3": ("SmolLM3ForCausalLM", "SmolLM3Config", WHOLE | dict(
        no_rope_layers=[1, 0, 1], use_sliding_window=True, sliding_window=5)),
    "granite": ("GraniteForCausalLM", "GraniteConfig", WHOLE | dict(
        embedding_multiplier=3.0, logits_scaling=1.5, residual_multiplier=0.7,
        attention_multiplier=0.15)),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", WHOLE | dict(
        original_max_position_embeddings=30, rope_parameters=dict(
            rope_type="longrope", rope_theta=300.0, partial_rotary_factor=0.5,
            short_factor=[1.0, 1.1, 1.2, 1.3, 1.4], long_factor=[1.5, 2.0, 3.0, 4.0, 5.0]))),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", WHOLE | dict(sliding_window=5)),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", IDS | dict(
        vocab_size=97, hidden_size=120, num_hidden_layers=3, num_attention_heads=5,
        intermediate_size=34, max_position_embeddings=40)),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", WHOLE | dict(
        hidden_size=144, use_qkv_bias=True, use_parallel_residual=True)),
    "cohere": ("CohereForCausalLM", "CohereConfig", WHOLE | dict(
        logit_scale=0.4, attention_bias=True)),
    "exaone4": ("Exaone4ForCausalLM", "Exaone4Config", LLAMA | dict(
        sliding_window=5, sliding_window_pattern=2)),
    "falcon": ("FalconForCausalLM", "FalconConfig", IDS | dict(
        vocab_size=97, hidden_size=120, num_hidden_layers=3, num_attention_heads=6,
        num_kv_heads=2, ffn_hidden_size=34, max_position_embeddings=40, bias=True,
        new_decoder_architecture=True)),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", LLAMA | dict(
        num_local_experts=5, num_experts_per_tok=2, sliding_window=5)),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", WHOLE | dict(
        num_experts=5, num_experts_per_tok=2, moe_intermediate_size=14, mlp_only_layers=[1],
        shared_expert_intermediate_size=18)),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", LLAMA | dict(
        num_experts=5, num_experts_per_tok=2, moe_intermediate_size=14, norm_topk_prob=True,
        decoder_sparse_step=2)),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", WHOLE | dict(
        num_experts=5, num_experts_per_tok=2)),
    "granitemoe": ("GraniteMoeForCausalLM", "GraniteMoeConfig", WHOLE | dict(
        num_local_experts=5, num_experts_per_tok=2, embedding_multiplier=3.0, logits_scaling=1.5,
        residual_multiplier=0.7, attention_multiplier=0.15)),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", LLAMA | dict(
        num_local_experts=5, num_experts_per_tok=2, sliding_window=5,
        rope_parameters=YARN | dict(truncate=False))),
}  # fmt: skip


class Wide(TorchFunctionMode):
    """float64 wherever a library asks for float32, as it does in norms, angles and softmax."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        wide = {torch.float32: torch.float64}
        kwargs = {
            name: wide.get(x, x) if isinstance(x, torch.dtype) else x
            for name, x in (kwargs or {}).items()
        }
        args = tuple(wide.get(x, x) if isinstance(x, torch.dtype) else x for x in args)
        if function is torch.Tensor.float:
            function = torch.Tensor.double
        return function(*args, **kwargs)

    def __enter__(self):
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error):
        torch.set_default_dtype(torch.float32)
        return super().__exit__(*error)


@functools.cache
def theirs(family: str, loud: float = 3.0) -> Any:
    """A model of transformers with random numbers in every leaf, in float64 throughout.

    Loud blocks write many different tokens, though a head that is the embedding favours the last.
    """
    model, config, sizes = MODELS[family]
    with Wide():
        torch.manual_seed(0)
        # Its grouped products know no float64.
        eager = dict(attn_implementation="eager", experts_implementation="eager")
        made = getattr(transformers, config)(**sizes, **eager)
        model = getattr(transformers, model)(made).double().eval()
    randomize(model, loud)
    return model


def randomize(model: torch.nn.Module, loud: float = 3.0) -> None:
    """Put random numbers into every leaf, around those that change nothing."""
    rng = np.random.default_rng(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre, spread = float(name.endswith("weight")), 0.3
            if parameter.ndim > 1:
                # Experts multiply rounding, so they are less loud.
                size = 1.0 if "embed" in name or "wte" in name else loud / (parameter.ndim - 1)
                centre, spread = 0.0, size * min(parameter.shape[-2:]) ** -0.5
            parameter.copy_(torch.from_numpy(rng.normal(centre, spread, parameter.shape)))


def prompts(rows: int = 6, num_tokens: int = 11) -> np.ndarray:
    """Tokens of every model here."""
    return np.random.default_rng(1).integers(0, 97, (rows, num_tokens))


@contextlib.contextmanager
def both(checkpoint: Checkpoint) -> Iterator[list]:
    """Both twins of a checkpoint, as functions of arrays."""
    with jax.enable_x64(True), torch.no_grad():
        flax, torch_twin = flax_model(checkpoint), torch_model(checkpoint)
        yield [
            (flax_gpt, flax, lambda x: jax.numpy.asarray(np.asarray(x)), np.asarray),
            (torch_gpt, torch_twin, lambda x: torch.from_numpy(np.array(x)), lambda x: x.numpy()),
        ]
