"""A mixture of experts: a list of modules visited by index against stacked arrays and one-hots."""

import jax
import jax.numpy as jnp
import torch
from flax import nnx
from torch import nn

D, F, E, K = 10, 14, 4, 2


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w3 = nn.Linear(D, F, bias=False), nn.Linear(D, F, bias=False)
        self.w2 = nn.Linear(F, D, bias=False)

    def forward(self, x):
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class SparseMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList([Expert() for _ in range(E)])

    def forward(self, x):
        shape, x = x.shape, x.reshape(-1, x.shape[-1])
        logits = self.gate(x)
        weights, chosen = torch.topk(nn.functional.softmax(logits, dim=1, dtype=torch.float), K)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            row, place = torch.where(chosen == number)
            out.index_add_(0, row, expert(x[row]) * weights[row, place, None])
        return out.reshape(shape), logits


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.moe = nn.LayerNorm(D), SparseMLP()

    def forward(self, x):
        y, router_logits = self.moe(self.norm(x))
        return {"hidden": x + y, "router_logits": router_logits}


class MoE(nnx.Module):
    def __init__(self, rngs):
        init = nnx.initializers.lecun_normal(batch_axis=(0,))
        self.router = nnx.Linear(D, E, use_bias=False, rngs=rngs)
        self.w_gate, self.w_up = (nnx.Param(init(rngs.params(), (E, D, F))) for _ in range(2))
        self.w_down = nnx.Param(init(rngs.params(), (E, F, D)))

    def __call__(self, x):
        logits = self.router(x)
        probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
        top, index = jax.lax.top_k(probs, K)
        top = top / jnp.sum(top, axis=-1, keepdims=True)
        mix = jnp.sum(jax.nn.one_hot(index, E) * top[..., None], axis=-2).astype(x.dtype)
        gate = jnp.einsum("btd,edf->btef", x, self.w_gate[...])
        up = jnp.einsum("btd,edf->btef", x, self.w_up[...])
        y = jnp.einsum("btef,efd->bted", jax.nn.silu(gate) * up, self.w_down[...])
        return jnp.einsum("bted,bte->btd", y, mix), logits.reshape(-1, E)


class Port(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.norm = nnx.LayerNorm(D, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        self.mlp = MoE(rngs)

    def __call__(self, x):
        y, logits = self.mlp(self.norm(x))
        return {"hidden": x + y, "router_logits": logits}


net, port = Net, Port


def make(rng):
    return rng.normal(size=(2, 5, D)).astype("float32")


FAULTS = [
    (
        "weights not normalised",
        "        top = top / jnp.sum(top, axis=-1, keepdims=True)\n",
        "",
        "mlp|moe",
        "x / y",
    ),
    ("gelu in the experts", "jax.nn.silu(gate)", "jax.nn.gelu(gate)", "mlp|moe", "gelu"),
    ("epsilon of Flax", "epsilon=1e-5, ", "", "norm", "1e-06"),
]
