"""A selective state space: a loop over time against a scan, with rates kept in float32."""

import jax
import jax.numpy as jnp
import torch
from flax import nnx
from torch import nn

D, E, S, R, W = 8, 12, 4, 3, 4


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.in_proj = nn.Linear(D, 2 * E, bias=False)
        self.conv1d = nn.Conv1d(E, E, W, groups=E, padding=W - 1)
        self.x_proj, self.dt_proj = nn.Linear(E, R + 2 * S, bias=False), nn.Linear(R, E)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, S + 1).repeat(E, 1)))
        self.D = nn.Parameter(torch.ones(E))
        self.out_proj = nn.Linear(E, D, bias=False)

    def forward(self, u):
        x, z = self.in_proj(u).chunk(2, dim=-1)
        x = self.conv1d(x.transpose(1, 2))[..., : u.shape[1]].transpose(1, 2)
        x = nn.functional.silu(x)
        dt, b, c = torch.split(self.x_proj(x), [R, S, S], dim=-1)
        dt = nn.functional.softplus(self.dt_proj(dt))
        a = -torch.exp(self.A_log.float())
        state, ys = x.new_zeros(len(x), E, S), []
        for t in range(u.shape[1]):
            decay = torch.exp(dt[:, t, :, None] * a)
            state = decay * state + dt[:, t, :, None] * b[:, t, None] * x[:, t, :, None]
            ys.append((state * c[:, t, None]).sum(-1))
        y = torch.stack(ys, 1) + x * self.D.float()
        return self.out_proj(y.to(u.dtype) * nn.functional.silu(z))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mixer = nn.RMSNorm(D, eps=1e-5), Mixer()

    def forward(self, u):
        return u + self.mixer(self.norm(u))


class SSM(nnx.Module):
    def __init__(self, rngs):
        bare = dict(use_bias=False, rngs=rngs)
        self.up, self.down = nnx.Linear(D, 2 * E, **bare), nnx.Linear(E, D, **bare)
        conv = dict(feature_group_count=E, padding="CAUSAL", rngs=rngs)
        self.conv = nnx.Conv(E, E, (W,), **conv)
        self.to_dbc, self.to_dt = nnx.Linear(E, R + 2 * S, **bare), nnx.Linear(R, E, rngs=rngs)
        self.log_a = nnx.Param(jnp.log(jnp.tile(jnp.arange(1.0, S + 1), (E, 1))))
        self.skip = nnx.Param(jnp.ones(E))

    def __call__(self, u):
        x, gate = jnp.split(self.up(u), 2, axis=-1)
        x = jax.nn.silu(self.conv(x))
        dt, b, c = jnp.split(self.to_dbc(x), [R, R + S], axis=-1)
        dt = jax.nn.softplus(self.to_dt(dt))
        a = -jnp.exp(self.log_a[...].astype(jnp.float32))

        def step(h, now):
            x, dt, b, c = now
            h = jnp.exp(dt[..., None] * a) * h + (dt * x)[..., None] * b[:, None, :]
            return h, jnp.einsum("bes,bs->be", h, c)

        times = jax.tree.map(lambda v: v.swapaxes(0, 1), (x, dt, b, c))
        _, y = jax.lax.scan(step, jnp.zeros((x.shape[0], E, S), x.dtype), times)
        y = y.swapaxes(0, 1) + x * self.skip[...]
        return self.down(y.astype(u.dtype) * jax.nn.silu(gate))


class Port(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.rms = nnx.RMSNorm(D, epsilon=1e-5, rngs=rngs)
        self.ssm = SSM(rngs)

    def __call__(self, u):
        return u + self.ssm(self.rms(u))


net, port = Net, Port


def make(rng):
    return rng.normal(size=(2, 6, D))


FAULTS = [
    ("epsilon of Flax", "D, epsilon=1e-5, rngs", "D, rngs", "rms|norm", "1e-06"),
    (
        "convolution that sees ahead",
        'padding="CAUSAL"',
        'padding="SAME"',
        "ssm.conv|mixer.conv1d|ssm|mixer",
        "SAME|half",
    ),
    ("gate without activation", "jax.nn.silu(gate)", "gate", "ssm|mixer", "no activation"),
]
