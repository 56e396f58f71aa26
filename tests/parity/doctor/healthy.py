"""Small healthy language models in the styles that people publish: torch and NNX.

A function or class of no arguments builds each; the doctor must find nothing in any of them.

Dimension key: B batch, T tokens, S slots, N heads, H head dim, D embed dim, V vocab.
"""

import math
import types
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import torch
from flax import nnx
from torch import nn
from torch.nn import functional as F

V, CONTEXT, D, N, LAYERS = 43, 20, 24, 3, 2
H = D // N
HEALTHY: dict[str, Callable[[], nn.Module | nnx.Module]] = {}


def healthy(make):
    """Add a model to those that are examined."""
    HEALTHY[make.__name__] = make
    return make


def heads(x_BTD):
    return x_BTD.reshape(*x_BTD.shape[:2], -1, H).transpose(1, 2)


def merged(x_BNTH):
    return x_BNTH.transpose(1, 2).reshape(x_BNTH.shape[0], x_BNTH.shape[2], -1)


class Fused(nn.Module):
    """One matrix for three, and a mask in a float buffer of ones and zeros."""

    bias, drop = True, 0.1

    def __init__(self):
        super().__init__()
        self.c_attn = nn.Linear(D, 3 * D, bias=self.bias)
        self.c_proj = nn.Linear(D, D, bias=self.bias)
        self.attn_dropout, self.resid_dropout = nn.Dropout(self.drop), nn.Dropout(self.drop)
        self.register_buffer(
            "tril", torch.tril(torch.ones(CONTEXT, CONTEXT)).view(1, 1, CONTEXT, CONTEXT)
        )

    def scores(self, q, k):
        T = q.shape[2]
        scores = q @ k.transpose(-2, -1) * H**-0.5
        return scores.masked_fill(self.tril[:, :, :T, :T] == 0, float("-inf"))

    def forward(self, x):
        B, T, _ = x.shape
        q, k, v = (y.view(B, T, N, H).transpose(1, 2) for y in self.c_attn(x).split(D, dim=2))
        y = self.attn_dropout(F.softmax(self.scores(q, k), dim=-1)) @ v
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).contiguous().view(B, T, D)))


class Additive(Fused):
    """A mask of zeros and -inf that is added, in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.full((CONTEXT, CONTEXT), -math.inf).triu(1))

    def scores(self, q, k):
        T = q.shape[2]
        return q @ k.transpose(-2, -1) * H**-0.5 + self.mask[:T, :T]


class OneMinus(Fused):
    """(1 - mask) times the lowest number, with the mask a parameter that is not trained."""

    def __init__(self):
        super().__init__()
        self.seen = nn.Parameter(torch.ones(CONTEXT, CONTEXT).tril(), requires_grad=False)

    def scores(self, q, k):
        T = q.shape[2]
        hidden = (1.0 - self.seen[:T, :T]) * torch.finfo(q.dtype).min
        return q @ k.transpose(-2, -1) * H**-0.5 + hidden


class Sdpa(Fused):
    """The kernel of the framework, which masks by itself."""

    def forward(self, x):
        q, k, v = (heads(y) for y in self.c_attn(x).chunk(3, dim=-1))
        return self.c_proj(merged(F.scaled_dot_product_attention(q, k, v, is_causal=True)))


class OneHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(D, H, bias=False) for _ in range(3))
        self.register_buffer("tril", torch.tril(torch.ones(CONTEXT, CONTEXT)))
        self.dropout = nn.Dropout(0.2)

    def forward(self, x):
        T = x.shape[1]
        wei = self.query(x) @ self.key(x).transpose(-2, -1) * H**-0.5
        wei = wei.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
        return self.dropout(F.softmax(wei, dim=-1)) @ self.value(x)


class ListOfHeads(nn.Module):
    """Heads one by one, then together."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList([OneHead() for _ in range(N)])
        self.proj, self.dropout = nn.Linear(D, D), nn.Dropout(0.2)

    def forward(self, x):
        return self.dropout(self.proj(torch.cat([h(x) for h in self.heads], dim=-1)))


class Rotary(nn.Module):
    """Separate projections, fewer heads of keys, rotary tables in buffers that are saved."""

    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(D, D, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(D, H, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(D, D, bias=False)
        angles = torch.outer(torch.arange(CONTEXT), 1e4 ** (-torch.arange(0, H, 2) / H))
        self.register_buffer("cos", angles.cos().repeat(1, 2))
        self.register_buffer("sin", angles.sin().repeat(1, 2))

    def rotate(self, x):
        T, (a, b) = x.shape[2], x.chunk(2, dim=-1)
        return x * self.cos[:T] + torch.cat([-b, a], dim=-1) * self.sin[:T]

    def forward(self, x):
        q, k, v = (heads(p(x)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = self.rotate(q), self.rotate(k).expand(-1, N, -1, -1), v.expand(-1, N, -1, -1)
        return self.o_proj(merged(F.scaled_dot_product_attention(q, k, v, is_causal=True)))


class Alibi(Fused):
    """A slope per head, in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("slopes", torch.tensor([0.5, 0.25, 0.125]).view(N, 1, 1))

    def scores(self, q, k):
        steps = torch.arange(q.shape[2])
        return super().scores(q, k) + self.slopes * (steps[None] - steps[:, None])


class Relative(Fused):
    """A bias for each distance, learned: an embedding that is no table of positions."""

    def __init__(self):
        super().__init__()
        self.relative_attention_bias = nn.Embedding(CONTEXT, N)

    def scores(self, q, k):
        steps = torch.arange(q.shape[2])
        behind = (steps[:, None] - steps[None]).clamp(min=0)
        return super().scores(q, k) + self.relative_attention_bias(behind).permute(2, 0, 1)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up = (nn.Linear(D, 40, bias=False) for _ in range(2))
        self.down = nn.Linear(40, D, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


def mlp():
    return nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D), nn.Dropout(0.1))


class Experts(nn.Module):
    """Two experts of four; a bias that only chooses, so that it gets no gradient."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(D, 4, bias=False)
        self.choice_bias = nn.Parameter(torch.zeros(4))
        self.experts = nn.ModuleList([mlp() for _ in range(4)])

    def forward(self, x):
        weights = self.router(x).sigmoid()
        chosen = torch.zeros_like(weights).scatter(
            -1, (weights + self.choice_bias).topk(2).indices, 1.0
        )
        weights = weights * chosen
        return sum(weights[..., i : i + 1] * e(x) for i, e in enumerate(self.experts))


class Block(nn.Module):
    def __init__(self, attention=Fused, feed=mlp, norm=nn.LayerNorm, post=False):
        super().__init__()
        self.ln_1, self.ln_2, self.post = norm(D), norm(D), post
        self.attn, self.mlp = attention(), feed()

    def forward(self, x):
        if self.post:
            x = self.ln_1(x + self.attn(x))
            return self.ln_2(x + self.mlp(x))
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Parallel(Block):
    """Both halves read the same."""

    def forward(self, x):
        return x + self.attn(self.ln_1(x)) + self.mlp(self.ln_2(x))


class Scaled(Block):
    """Each half enters through a vector that starts at zero."""

    def __init__(self, **more):
        super().__init__(**more)
        self.gain_1, self.gain_2 = (nn.Parameter(torch.zeros(D)) for _ in range(2))

    def forward(self, x):
        x = x + self.gain_1 * self.attn(self.ln_1(x))
        return x + self.gain_2 * self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """What the styles below share: a stream, blocks, a norm and a head."""

    def __init__(
        self,
        block=Block,
        *,
        positions=True,
        tied=False,
        rows=V,
        zero_head=False,
        config=True,
        **more,
    ):
        super().__init__()
        torch.manual_seed(0)
        if config:
            self.config = types.SimpleNamespace(vocab_size=V, block_size=CONTEXT)
        self.wte = nn.Embedding(rows, D)
        self.wpe = nn.Embedding(CONTEXT, D) if positions else None
        self.drop = nn.Dropout(0.1)
        self.h = nn.ModuleList([block(**more) for _ in range(LAYERS)])
        self.ln_f, self.lm_head = more.get("norm", nn.LayerNorm)(D), nn.Linear(D, rows, bias=False)
        self.apply(self.init)
        if tied:
            self.lm_head.weight = self.wte.weight
        if zero_head:
            nn.init.zeros_(self.lm_head.weight)

    @staticmethod
    def init(part):
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=0.02)

    def embedded(self, idx):
        x = self.wte(idx)
        return x if self.wpe is None else x + self.wpe(torch.arange(idx.size(1)))

    def forward(self, idx):
        x = self.drop(self.embedded(idx))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


def compiled(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the compiler's own import
        return torch.compile(model)


def style(name, net=GPT, after=lambda model: model, **more):
    """Add a net with these parts."""
    HEALTHY[name] = lambda: after(net(**more))


style("mask_buffer")
style("tied", tied=True)
style("mask_added", attention=Additive)
style("mask_parameter", attention=OneMinus)
style("sdpa", attention=Sdpa)
style("list_of_heads", attention=ListOfHeads)
style("rotary_rms_gated", attention=Rotary, feed=Gated, norm=nn.RMSNorm, positions=False)
style("alibi", attention=Alibi, positions=False)
style("relative", attention=Relative, positions=False)
style("experts", feed=Experts)
style("parallel", block=Parallel)
style("post_norm", post=True)
style("zero_gains", block=Scaled)
style("zero_head", zero_head=True)
style("padded", rows=48)
style("padded_tied", rows=64, tied=True)
style("compiled", after=compiled)
style("float16", after=lambda model: model.half())
style("bfloat16", after=lambda model: model.bfloat16())
style("double", after=lambda model: model.double())


@healthy
class zero_positions(GPT):
    """A table as one parameter, that starts at zero."""

    def __init__(self):
        super().__init__(positions=False)
        self.pos_emb = nn.Parameter(torch.zeros(1, CONTEXT, D))

    def embedded(self, idx):
        return self.wte(idx) + self.pos_emb[:, : idx.size(1)]


@healthy
class sinusoidal(GPT):
    """A table that is computed once, and tokens as large."""

    def __init__(self):
        super().__init__(positions=False)
        angles = torch.arange(CONTEXT)[:, None] * 1e4 ** (-torch.arange(0, D, 2) / D)
        self.register_buffer("pe", torch.cat([angles.sin(), angles.cos()], dim=1))

    def embedded(self, idx):
        return self.wte(idx) * 50.0 + self.pe[: idx.size(1)]


@healthy
class flat_ids(GPT):
    """Ids are looked up as one vector."""

    def embedded(self, idx):
        x = self.wte(idx.view(-1)).view(*idx.shape, D)
        return x + self.wpe(torch.arange(idx.size(1)).expand(idx.size(0), -1))


@healthy
class time_first(GPT):
    """Ids are looked up with time first, and positions by keyword."""

    def embedded(self, idx):
        return self.wte(input=idx.t()).transpose(0, 1) + self.wpe(input=torch.arange(idx.size(1)))


@healthy
class autocast(GPT):
    def forward(self, idx):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(idx).float()


@healthy
class encoder_layers(nn.Module):
    """The framework's own layers under a mask, norm last."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.vocab_size, self.context_length = V, CONTEXT
        self.embedding, self.position_embedding = nn.Embedding(V, D), nn.Embedding(CONTEXT, D)
        layer = nn.TransformerEncoderLayer(D, N, 48, 0.1, batch_first=True)
        self.encoder, self.out = (
            nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
            nn.Linear(D, V),
        )

    def forward(self, x):
        T = x.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(T)
        y = self.embedding(x) + self.position_embedding(torch.arange(T))
        return self.out(self.encoder(y, mask=mask, is_causal=True))


class Recurrent(nn.Module):
    """A stack of layers that pass a state on."""

    kind, layers = nn.GRU, 2

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.vocab_size, self.max_seq_len = V, CONTEXT
        self.embed, self.drop = nn.Embedding(V, D), nn.Dropout(0.2)
        self.rnn = self.kind(D, D, num_layers=self.layers, dropout=0.1, batch_first=True)
        self.fc = nn.Linear(D, V)

    def forward(self, x):
        out, state = self.rnn(self.drop(self.embed(x)))
        return self.fc(out), state


@healthy
class gru(Recurrent):
    pass


@healthy
class lstm(Recurrent):
    kind = nn.LSTM


@healthy
class gru_list(nn.Module):
    """Layers in a list, so that they have numbers, each of them as wide as it likes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.vocab_size, self.max_seq_len = V, CONTEXT
        self.embed = nn.Embedding(V, D)
        self.layers = nn.ModuleList(
            [nn.GRU(D, 32, batch_first=True), nn.GRU(32, D, batch_first=True)]
        )
        self.fc = nn.Linear(D, V)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x, _ = layer(x)
        return self.fc(x)


class FlaxBlock(nnx.Module):
    def __init__(self, rngs, dtype):
        self.norm_1, self.norm_2 = (nnx.LayerNorm(D, dtype=dtype, rngs=rngs) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(
            num_heads=N, in_features=D, dropout_rate=0.1, decode=False, dtype=dtype, rngs=rngs
        )
        self.up = nnx.Linear(D, 48, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(48, D, dtype=dtype, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        mask = nnx.make_causal_mask(jnp.ones(x.shape[:2]))
        x = x + self.attention(self.norm_1(x), mask=mask)
        return x + self.drop(self.down(nnx.gelu(self.up(self.norm_2(x)))))


class FlaxGPT(nnx.Module):
    dtype = None

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.wte, self.wpe = (
            nnx.Embed(n, D, embedding_init=nnx.initializers.normal(0.02), rngs=rngs)
            for n in (V, CONTEXT)
        )
        self.blocks = nnx.List([FlaxBlock(rngs, self.dtype) for _ in range(LAYERS)])
        self.norm = nnx.LayerNorm(D, rngs=rngs)

    def __call__(self, tokens):
        x = self.wte(tokens) + self.wpe(jnp.arange(tokens.shape[1]))[None]
        for block in self.blocks:
            x = block(x)
        return self.wte.attend(self.norm(x))


@healthy
class nnx_attention(FlaxGPT):
    pass


@healthy
class nnx_bfloat16(FlaxGPT):
    dtype = jnp.bfloat16


@healthy
class nnx_float16(FlaxGPT):
    dtype = jnp.float16


@healthy
class nnx_mask_variable(nnx.Module):
    """One block, a mask in a variable of its own, and a head that starts at zero."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.vocab_size, self.block_size = V, CONTEXT
        self.wte = nnx.Embed(V, D, rngs=rngs)
        self.wpe = nnx.Param(jnp.zeros((CONTEXT, D)))
        self.tril = nnx.Variable(jnp.tril(jnp.ones((CONTEXT, CONTEXT))))
        self.qkv, self.out = (nnx.Linear(D, n, use_bias=False, rngs=rngs) for n in (3 * D, D))
        self.norm = nnx.RMSNorm(D, rngs=rngs)
        self.head = nnx.Linear(D, V, kernel_init=nnx.initializers.zeros_init(), rngs=rngs)

    def __call__(self, tokens):
        B, T = tokens.shape
        x = self.wte(tokens) + self.wpe[None, :T]
        q, k, v = (y.reshape(B, T, N, H) for y in jnp.split(self.qkv(self.norm(x)), 3, axis=-1))
        scores = jnp.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(H)
        scores = jnp.where(self.tril[None, None, :T, :T] == 0, -jnp.inf, scores)
        y = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v).reshape(B, T, D)
        return self.head(x + self.out(y))


@healthy
class nnx_gru(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.vocab_size, self.max_seq_len = V, CONTEXT
        self.embed = nnx.Embed(V, D, rngs=rngs)
        self.layers = nnx.List([nnx.RNN(nnx.GRUCell(D, D, rngs=rngs)) for _ in range(LAYERS)])
        self.head = nnx.Linear(D, V, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)
