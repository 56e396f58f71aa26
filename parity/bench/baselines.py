"""Decoding as people first write it, on the same weights: what the twins' own is held against.

Neither is a value: one cache is donated whole to every step and read to its capacity, the other is
a set of buffers that each step writes into.
"""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch.nn import functional as F

import flax_gpt
from parity.bench.contenders import Cell, Turn
from parity.bench.flax_decoders import FlaxSteps
from parity.bench.torch_decoders import TorchSteps, torch_turn, wait_for_torch
from parity.frameworks.flax.scope import jax_scope

Layers = list[tuple[jax.Array, jax.Array]]
Buffers = list[tuple[torch.Tensor, torch.Tensor]]
_State = tuple[Buffers, torch.Tensor, int]


class FlaxNaive:
    """A donated jit step that writes its token into the cache and attends over all of it.

    Args:
        model: the flax twin.
        cell: what is decoded.
        reader: reads the prompt for it.
    """

    name = "flax naive"
    framework = "flax"
    form = "cached"
    ran = (
        "a jit step with donated (B, K, S, H) buffers per layer: dynamic_update_slice, then "
        "attention over the whole capacity; no compiler option"
    )
    reads = False
    extra_bytes = 0

    def __init__(self, model: nnx.Module, cell: Cell, reader: FlaxSteps):
        self._cell, self._reader = cell, reader
        with jax_scope(cell.config.dtype, cell.devices.flax):
            self._weights = nnx.to_pure_dict(nnx.state(model, nnx.Param))
            self._step = jax.jit(
                lambda weights, token_B, length, layers: _naive_step(
                    weights, cell.config, token_B, length, layers
                ),
                donate_argnums=3,
            )

    def prefill(self) -> None:
        """The decoder reads the prompt for it, see `reader`."""

    def turn(self, num_steps: int) -> Turn:
        """The choice is part of the step."""
        with jax_scope(self._cell.config.dtype, self._cell.devices.flax):
            layers, token_B = self._state()
            found = [token_B]
            length = self._cell.prompt_length
            start = time.perf_counter()
            for number in range(num_steps):
                token_B, layers = self._step(
                    self._weights, token_B, np.int32(length + number), layers
                )
                found.append(token_B)
            jax.block_until_ready((token_B, layers))
            seconds = time.perf_counter() - start
            return Turn(np.stack([np.asarray(x) for x in found], axis=1), seconds)

    def _state(self) -> tuple[Layers, jax.Array]:
        """Buffers with as many slots as the context has tokens, garbage in the free ones."""
        cache, token_B = self._reader.state()
        capacity = self._cell.context
        if cache.capacity < capacity:
            cache = cache.grow(capacity)
        layers = [
            (
                jnp.copy(layer.keys_BKSH[:, :, :capacity]),
                jnp.copy(layer.values_BKSH[:, :, :capacity]),
            )
            for layer in cache.layers
        ]
        return jax.block_until_ready(layers), token_B


class TorchInPlace:
    """A bare torch step: the decoder's products and attention, and buffers that are written into.

    No handle, no lengths, no check: rows are all as long as one number says.

    Args:
        cell: what is decoded.
        reader: reads the prompt for it, and has the layers.
    """

    name = "torch in place"
    framework = "torch"
    form = "cached"
    ran = "an eager step with the decoder's kernels that writes into (B, K, S, H) buffers"
    reads = False

    def __init__(self, cell: Cell, reader: TorchSteps):
        self._cell, self._reader = cell, reader
        self._model, self.extra_bytes = reader.model, reader.extra_bytes

    def prefill(self) -> None:
        """The decoder reads the prompt for it, see `reader`."""

    def turn(self, num_steps: int) -> Turn:
        """The choice is on the device."""
        return torch_turn(self, num_steps)

    def state(self) -> _State:
        """Buffers with as many slots as the context has tokens, the first token, and the length."""
        cache, token_B = self._reader.state()
        if cache.capacity < self._cell.context:
            cache = cache.grow(self._cell.context)
        layers = [(layer.keys_BKSH, layer.values_BKSH) for layer in cache.layers]
        return layers, token_B, self._cell.prompt_length

    def advance(self, state: _State) -> _State:
        """The buffers with one more token in them, and the chosen one."""
        layers, token_B, length = state
        logits_BV = self._step(token_B, length, layers)
        return layers, torch.argmax(logits_BV, dim=-1), length + 1

    def wait(self, state: _State) -> None:
        """Until the device has done all that it was asked."""
        wait_for_torch(self._cell.devices.torch)

    @torch.no_grad()
    def _step(
        self,
        token_B: torch.Tensor,
        length: int,
        layers: Buffers,
    ) -> torch.Tensor:
        """Logits (B, V) behind one more token in every row."""
        model, config = self._model, self._cell.config
        B, K = len(token_B), config.num_heads
        x_B1D = model.token_embedding(token_B[:, None])
        x_B1D = x_B1D + model.position_embedding.weight[length]
        for block, (keys_BKSH, values_BKSH) in zip(model.blocks, layers, strict=True):
            attention, y_B1D = block.attention, block.norm_1(x_B1D)
            q_B1KH, k_B1KH, v_B1KH = attention.project(y_B1D)
            keys_BKSH[:, :, length], values_BKSH[:, :, length] = k_B1KH[:, 0], v_B1KH[:, 0]
            mixed_BK1H = F.scaled_dot_product_attention(
                q_B1KH.view(B, K, 1, -1),
                keys_BKSH[:, :, : length + 1],
                values_BKSH[:, :, : length + 1],
            )
            x_B1D = x_B1D + attention.out(mixed_BK1H.view(B, 1, -1))
            x_B1D = x_B1D + block.mlp(block.norm_2(x_B1D))
        return model.unembed(model.norm(x_B1D))[:, 0]


def _naive_step(
    weights: dict[str, Any],
    config: flax_gpt.GPTConfig,
    token_B: jax.Array,
    length: jax.Array,
    layers: Layers,
) -> tuple[jax.Array, Layers]:
    """The next token of every row, and the buffers with this one in them."""
    B, K = token_B.shape[0], config.num_heads
    written = []
    table_VD = weights["token_embedding"]["embedding"]
    x_BD = table_VD[token_B] + weights["position_embedding"]["embedding"][length][None]
    for index, (keys_BKSH, values_BKSH) in enumerate(layers):
        block = weights["blocks"][index]
        attention = block["attention"]
        y_BD = _norm(block["norm_1"], x_BD, config)
        q_BKH, k_BKH, v_BKH = (
            _linear(attention[name], y_BD).reshape(B, K, -1) for name in ("query", "key", "value")
        )
        where = (0, 0, length, 0)
        keys_BKSH = jax.lax.dynamic_update_slice(keys_BKSH, k_BKH[:, :, None], where)
        values_BKSH = jax.lax.dynamic_update_slice(values_BKSH, v_BKH[:, :, None], where)
        written.append((keys_BKSH, values_BKSH))
        scores_BKS = jnp.einsum("BKH,BKSH->BKS", q_BKH, keys_BKSH) * config.head_width**-0.5
        seen_11S = (jnp.arange(keys_BKSH.shape[2]) <= length)[None, None]
        scores_BKS = jnp.where(seen_11S, scores_BKS.astype(jnp.float32), -jnp.inf)
        weights_BKS = jax.nn.softmax(scores_BKS, axis=-1).astype(values_BKSH.dtype)
        mixed_BKH = jnp.einsum("BKS,BKSH->BKH", weights_BKS, values_BKSH)
        x_BD = x_BD + _linear(attention["out"], mixed_BKH.reshape(B, -1))
        y_BD = _linear(block["mlp"]["up"], _norm(block["norm_2"], x_BD, config))
        x_BD = x_BD + _linear(block["mlp"]["down"], jax.nn.gelu(y_BD, approximate=True))
    x_BD = _norm(weights["norm"], x_BD, config)
    logits_BV = jnp.einsum("BD,VD->BV", x_BD, table_VD)
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32), written


def _linear(layer: dict[str, jax.Array], x_BD: jax.Array) -> jax.Array:
    return x_BD @ layer["kernel"] + layer["bias"][None]


def _norm(layer: dict[str, jax.Array], x_BD: jax.Array, config: flax_gpt.GPTConfig) -> jax.Array:
    wide_BD = x_BD.astype(jnp.float32)
    wide_BD = jax.nn.standardize(wide_BD, axis=-1, epsilon=config.norm_epsilon)
    return wide_BD.astype(x_BD.dtype) * layer["scale"][None] + layer["bias"][None]
