"""The PyTorch twin's cached decoding: step by step, and in place without a handle."""

from collections.abc import Iterable
from typing import cast

import numpy as np
import torch
from torch.nn import functional as F

import torch_gpt
from parity.bench.decoders.protocol import Arrays, DecodeTask, State, noise_like
from parity.bench.decoders.twins import StepDecoder
from parity.bench.machine import wait_for_torch

TorchStep = StepDecoder[torch_gpt.KVCache, torch.Tensor]


def _on_host(array: torch.Tensor) -> np.ndarray:
    array = array.detach().cpu()
    return (array.float() if array.is_floating_point() else array).numpy()


@torch.no_grad()
def _copy(cache: torch_gpt.KVCache) -> torch_gpt.KVCache:
    # A selection of all rows is a new allocation, which owns its free slots.
    return cache.select(torch.arange(cache.batch_size))


@torch.no_grad()
def _with_noise(cache: torch_gpt.KVCache, length: int) -> torch_gpt.KVCache:
    cache = _copy(cache)
    for layer in cache.layers:
        for slots_BKSH in (layer.keys_BKSH, layer.values_BKSH):
            noise = torch.from_numpy(noise_like(tuple(slots_BKSH.shape)))
            slots_BKSH[:, :, length:] = noise[:, :, length:].to(slots_BKSH)
    return cache


TORCH = Arrays(
    framework="torch",
    tokens=lambda token_B, device: torch.from_numpy(token_B.copy()).long().to(device),
    greedy=lambda logits_BV: torch.argmax(logits_BV, dim=-1),
    on_host=_on_host,
    copy=_copy,
    with_noise=_with_noise,
    grow=lambda cache, slots: cache if cache.capacity >= slots else cache.grow(slots),
    wait=wait_for_torch,
)


def torch_step(
    decoder: torch_gpt.Decoder, task: DecodeTask, capacity: int | None = None
) -> TorchStep:
    """Return a decoder's `advance`; `capacity` are the slots of its cache, None for its default."""
    prompt_BT = torch.from_numpy(task.prompt_BT).long().to(task.device)
    how = "eager" if task.device.type == "cpu" else "one compiled graph per step"
    return StepDecoder(
        "torch step",
        f"Decoder.advance in a Python loop, {how}; the newest handle writes in place",
        TORCH,
        task,
        torch.no_grad()(lambda: decoder.prefill(prompt_BT, capacity=capacity)),
        lambda state: decoder.advance(state.token_B, state.cache),
        decoder.extra_bytes,
    )


def torch_in_place(model: torch_gpt.GPT, reader: TorchStep) -> TorchStep:
    """Return a bare step of a decoder's model that writes into the buffers of a cache.

    No handle, no lengths, no checks: all rows have the same length.
    """
    blocks = cast(Iterable[torch_gpt.Block], model.blocks)
    positions_TD = model.get_parameter("position_embedding.weight")

    @torch.no_grad()
    def step(
        state: State[torch_gpt.KVCache, torch.Tensor],
    ) -> tuple[torch.Tensor, torch_gpt.KVCache]:
        cache, token_B, length = state
        B = len(token_B)
        x_B1D = model.token_embedding(token_B[:, None]) + positions_TD[length]
        for block, layer in zip(blocks, cache.layers, strict=True):
            keys_BKSH, values_BKSH = layer.keys_BKSH, layer.values_BKSH
            attention, y_B1D = block.attention, block.norm_1(x_B1D)
            q_B1KH, k_B1KH, v_B1KH = attention.project(y_B1D)
            keys_BKSH[:, :, length], values_BKSH[:, :, length] = k_B1KH[:, 0], v_B1KH[:, 0]
            mixed_BK1H = F.scaled_dot_product_attention(
                q_B1KH.view(B, keys_BKSH.shape[1], 1, -1),
                keys_BKSH[:, :, : length + 1],
                values_BKSH[:, :, : length + 1],
            )
            x_B1D = x_B1D + attention.out(mixed_BK1H.view(B, 1, -1))
            x_B1D = x_B1D + block.mlp(block.norm_2(x_B1D))
        return model.unembed(model.norm(x_B1D))[:, 0], cache

    ran = "an eager step with the decoder's kernels that writes into (B, K, S, H) buffers"
    return reader.other("torch in place", ran, step, reader.extra_weight_bytes)
