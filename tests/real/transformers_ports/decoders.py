"""Llama, Qwen 3, Gemma and Mixtral of transformers against one port of all four."""

import dataclasses

import jax
import jax.numpy as jnp
import transformers
from flax import nnx

SIZES = dict(
    vocab_size=23,
    hidden_size=20,
    intermediate_size=28,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    max_position_embeddings=32,
    use_cache=False,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)


@dataclasses.dataclass(frozen=True)
class Config:
    act: str = "silu"
    norm_offset: float = 0.0
    eps: float = 1e-6
    qk_norm: bool = False
    scale_embed: bool = False
    tied: bool = False
    experts: int = 0
    theta: float = 10000.0
    vocab: int = 23
    D: int = 20
    F: int = 28
    N: int = 4
    K: int = 2
    H: int = 6


class RMSNorm(nnx.Module):
    def __init__(self, size, cfg):
        self.weight, self.cfg = nnx.Param(jnp.zeros(size) + 1 - cfg.norm_offset), cfg

    def __call__(self, x):
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.cfg.eps)
        if self.cfg.norm_offset:
            return ((self.weight[...].astype(jnp.float32) + 1) * y).astype(x.dtype)
        return self.weight[...] * y.astype(x.dtype)


def rope(x, positions, theta):
    half = x.shape[-1] // 2
    frequency = theta ** -(jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[:, None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    left, right = x[..., :half], x[..., half:]
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


class Attention(nnx.Module):
    def __init__(self, cfg, rngs):
        linear = lambda *io: nnx.Linear(*io, use_bias=False, rngs=rngs)  # noqa: E731
        self.q_proj, self.o_proj = linear(cfg.D, cfg.N * cfg.H), linear(cfg.N * cfg.H, cfg.D)
        self.k_proj, self.v_proj = linear(cfg.D, cfg.K * cfg.H), linear(cfg.D, cfg.K * cfg.H)
        self.cfg = cfg
        if cfg.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(cfg.H, cfg), RMSNorm(cfg.H, cfg)

    def __call__(self, x, positions):
        c, (b, t, _) = self.cfg, x.shape
        q = self.q_proj(x).reshape(b, t, c.N, c.H)
        k, v = (f(x).reshape(b, t, c.K, c.H) for f in (self.k_proj, self.v_proj))
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rope(q, positions, c.theta), rope(k, positions, c.theta)
        q = q.reshape(b, t, c.K, c.N // c.K, c.H)
        scores = jnp.einsum("btkgh,bskh->bkgts", q, k) * c.H**-0.5
        scores = jnp.where(positions[:, None] >= positions, scores, jnp.finfo(scores.dtype).min)
        probs = jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(x.dtype)
        return self.o_proj(jnp.einsum("bkgts,bskh->btkgh", probs, v).reshape(b, t, c.N * c.H))


class MLP(nnx.Module):
    def __init__(self, cfg, rngs):
        linear = lambda *io: nnx.Linear(*io, use_bias=False, rngs=rngs)  # noqa: E731
        self.gate_proj, self.up_proj = linear(cfg.D, cfg.F), linear(cfg.D, cfg.F)
        self.down_proj, self.act = linear(cfg.F, cfg.D), getattr(jax.nn, cfg.act)

    def __call__(self, x):
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


class Experts(nnx.Module):
    def __init__(self, cfg, rngs):
        self.cfg, init = cfg, nnx.initializers.lecun_normal(batch_axis=(0,))
        self.gate = nnx.Linear(cfg.D, cfg.experts, use_bias=False, rngs=rngs)
        self.wi_0, self.wi_1 = (
            nnx.Param(init(rngs.params(), (cfg.experts, cfg.D, cfg.F))) for _ in range(2)
        )
        self.wo = nnx.Param(init(rngs.params(), (cfg.experts, cfg.F, cfg.D)))

    def __call__(self, x):
        weights, chosen = jax.lax.top_k(jax.nn.softmax(self.gate(x).astype(jnp.float32)), 2)
        weights = (weights / weights.sum(-1, keepdims=True)).astype(x.dtype)
        hidden = jax.nn.silu(jnp.einsum("btd,edf->btef", x, self.wi_0[...]))
        hidden = hidden * jnp.einsum("btd,edf->btef", x, self.wi_1[...])
        out = jnp.einsum("btef,efd->bted", hidden, self.wo[...])
        return (jnp.take_along_axis(out, chosen[..., None], axis=2) * weights[..., None]).sum(2)


class Block(nnx.Module):
    def __init__(self, cfg, rngs):
        self.attn, self.mlp = Attention(cfg, rngs), (Experts if cfg.experts else MLP)(cfg, rngs)
        self.pre_attn_norm, self.pre_mlp_norm = RMSNorm(cfg.D, cfg), RMSNorm(cfg.D, cfg)

    def __call__(self, x, positions):
        x = x + self.attn(self.pre_attn_norm(x), positions)
        return x + self.mlp(self.pre_mlp_norm(x))


class LanguageModel(nnx.Module):
    def __init__(self, cfg):
        rngs = nnx.Rngs(0)
        self.cfg, self.embed = cfg, nnx.Embed(cfg.vocab, cfg.D, rngs=rngs)
        self.layers = nnx.List([Block(cfg, rngs) for _ in range(2)])
        self.final_norm = RMSNorm(cfg.D, cfg)
        if not cfg.tied:
            self.lm_head = nnx.Linear(cfg.D, cfg.vocab, use_bias=False, rngs=rngs)

    def __call__(self, input_ids):
        x = self.embed(input_ids)
        if self.cfg.scale_embed:
            x = x * jnp.asarray(self.cfg.D**0.5, x.dtype)
        for layer in self.layers:
            x = layer(x, jnp.arange(input_ids.shape[1]))
        x = self.final_norm(x)
        return {"logits": self.embed.attend(x) if self.cfg.tied else self.lm_head(x)}


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, rms_norm_eps=1e-6))


def qwen3():
    eager = dict(attn_implementation="eager", tie_word_embeddings=False)
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, **eager))


def gemma():
    eager = dict(attn_implementation="eager", tie_word_embeddings=True)
    return transformers.GemmaForCausalLM(transformers.GemmaConfig(**SIZES, **eager))


def mixtral():
    experts = dict(num_local_experts=4, num_experts_per_tok=2, rope_theta=1e6)
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SIZES | {"num_hidden_layers": 2}, **experts)
    )


def port_llama():
    return LanguageModel(Config())


def port_qwen3():
    return LanguageModel(Config(qk_norm=True))


def port_gemma():
    return LanguageModel(Config(act="gelu", norm_offset=1.0, scale_embed=True, tied=True))


def port_mixtral():
    return LanguageModel(Config(experts=4, theta=1e6, eps=1e-5))


def make(rng):
    return {"input_ids": rng.integers(0, 23, (2, 7))}


PAIRS = {
    "hf_llama": (
        llama,
        port_llama,
        make,
        [
            (
                "epsilon 1e-5",
                "Config())",
                "Config(eps=1e-5))",
                "model.layers.0.input_layernorm",
                "1e-05",
            ),
            ("gelu", "Config())", 'Config(act="gelu"))', "model.layers.0.mlp", "gelu"),
        ],
    ),
    "hf_qwen3": (
        qwen3,
        port_qwen3,
        make,
        [
            (
                "keys not normed",
                "self.q_norm(q), self.k_norm(k)",
                "self.q_norm(q), k + 0 * self.k_norm(k)",
                "model.layers.0.self_attn",
                "k_norm left out|no norm",
            ),
            (
                "scale by the width",
                "c.H**-0.5",
                "c.D**-0.5",
                "model.layers.0.self_attn",
                "20**-0.5",
            ),
        ],
    ),
    "hf_gemma": (
        gemma,
        port_gemma,
        make,
        [
            (
                "embeddings not scaled",
                "scale_embed=True, ",
                "",
                "model.embed_tokens",
                "x in place of x * y|a scale of 1 ",
            ),
            (
                "norm without one",
                "(self.weight[...].astype(jnp.float32) + 1) * y",
                "self.weight[...].astype(jnp.float32) * y",
                "model.layers.0.input_layernorm",
                "x in place of x + 1",
            ),
        ],
    ),
    "hf_mixtral": (
        mixtral,
        port_mixtral,
        make,
        [
            (
                "weights not normalised",
                "weights / weights.sum(-1, keepdims=True)",
                "weights",
                "model.layers.0.mlp|model.layers.0.mlp.gate",
                "x in place of x / y",
            ),
            (
                "experts' halves swapped",
                "self.wi_1[...])\n        out",
                "self.wi_0[...] + 0 * self.wi_1[...])\n        out",
                "model.layers.0.mlp",
                "part 1 in place of both",
            ),
        ],
    ),
}
