"""Caches in files: saved by either twin, gone on from by either, refused by another model.

Read beside flax_gpt/decoding/files.py.

A file is safetensors: keys and values of every layer as far as rows hold tokens, the lengths, and
the tokens. Its metadata has the config, and digests of the weights and of the tokens.

Dimension key: B batch, T tokens, S slots, K kv heads, H head dim.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from torch_gpt.cache import KVCache, LayerCache
from torch_gpt.model import GPT

_FORMAT = "gpt cache 1"


def save_cache(
    path: str | Path, model: GPT, cache: KVCache, tokens_BT: torch.Tensor | np.ndarray
) -> None:
    """Write a cache to a file, whole or not at all.

    Args:
        path: of the file; one that is there is replaced.
        model: of the cache.
        cache: of any capacity; only slots that hold tokens are written.
        tokens_BT: the tokens that it holds, padded on the right.

    Raises:
        ValueError: when there are fewer tokens than the cache holds.
    """
    path, lengths_B = Path(path), cache.lengths_B.cpu().numpy().astype(np.int32)
    longest = int(lengths_B.max())
    tokens_BT = torch.as_tensor(tokens_BT).cpu().numpy()[:, :longest].astype(np.int32)
    if tokens_BT.shape != (len(lengths_B), longest):
        raise ValueError(
            f"save_cache: tokens of shape {tokens_BT.shape}, and rows that hold "
            f"{lengths_B.tolist()}. A file says which text it is of. Give every token of the cache."
        )
    held_BT = np.arange(longest)[None, :] < lengths_B[:, None]
    tokens_BT = np.where(held_BT, tokens_BT, 0)
    tensors = {"lengths": torch.from_numpy(lengths_B), "tokens": torch.from_numpy(tokens_BT)}
    # What lies after a row's length is garbage, which would make two files of one cache differ.
    real_B1T1 = torch.from_numpy(held_BT)[:, None, :, None]
    for number, layer in enumerate(cache.layers):
        for name, x_BKSH in (("keys", layer.keys_BKSH), ("values", layer.values_BKSH)):
            tensors[f"layers.{number}.{name}"] = torch.where(
                real_B1T1, x_BKSH[:, :, :longest].cpu(), 0.0
            )
    _write(path, save(tensors, metadata=_about(model, tokens_BT)))


def load_cache(
    path: str | Path, model: GPT, capacity: int | None = None
) -> tuple[KVCache, np.ndarray]:
    """Read a cache that `save_cache` of either twin wrote.

    Args:
        path: of the file.
        model: that goes on; the one that filled the cache, or its twin.
        capacity: slots per row; as many as the longest row holds when None.

    Returns:
        The cache, and its tokens (B, T), padded on the right.

    Raises:
        ValueError: for a file of other weights, of another config or of other tokens than it says,
            and for one that is damaged; in one line.
    """
    with _readable(path), safe_open(path, framework="pt") as file:
        found = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if found.get("format") != _FORMAT or not {"lengths", "tokens"} <= set(tensors):
        raise ValueError(f"cache file {path}: not a cache. Give a file that save_cache wrote.")
    tokens_BT = tensors["tokens"].numpy()
    problems = _differences(found, _about(model, tokens_BT))
    if problems:
        raise ValueError(
            f"cache file {path}: {'; '.join(problems)}. A cache goes on only where it began. Fill "
            "it again with this model."
        )
    device = model.token_embedding.weight.device
    tensors = {name: x.to(device) for name, x in tensors.items()}
    layers = tuple(
        LayerCache(tensors[f"layers.{number}.keys"], tensors[f"layers.{number}.values"])
        for number in range(model.config.num_layers)
    )
    cache = KVCache(layers, tensors["lengths"].long())
    return cache.grow(max(capacity or 0, cache.capacity)), tokens_BT


def weights_digest(model: GPT) -> str:
    """Return a digest of all weights, the same for both twins of a model."""
    digest = hashlib.sha256()
    for name, x in sorted(_leaves(model), key=lambda item: item[0]):
        dtype, shape = str(x.dtype).removeprefix("torch."), tuple(x.shape)
        digest.update(f"{name} {dtype} {shape}".encode())
        digest.update(x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _leaves(model: GPT) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights by the names and in the layout of torch."""
    # twin: flax calls a weight by its kind, and keeps a matrix by its inputs.
    for name, x in model.named_parameters():
        yield name, x.detach().cpu()


def _about(model: GPT, tokens_BT: np.ndarray) -> dict[str, str]:
    """Return the metadata of a file."""
    return {
        "format": _FORMAT,
        "weights": weights_digest(model),
        "config": json.dumps(dataclasses.asdict(model.config), sort_keys=True),
        "tokens": hashlib.sha256(np.ascontiguousarray(tokens_BT).tobytes()).hexdigest(),
    }


def _differences(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    """Return what a file says that is not so here."""
    theirs, ours = (json.loads(x["config"]) for x in (found, expected))
    problems = [
        f"its {name} is {theirs.get(name)}, here {value}"
        for name, value in ours.items()
        if theirs.get(name) != value
    ]
    if not problems and found["weights"] != expected["weights"]:
        problems.append("its weights are others")
    if found["tokens"] != expected["tokens"]:
        problems.append("its tokens have changed")
    return problems


@contextlib.contextmanager
def _readable(path: str | Path) -> Iterator[None]:
    """Turn what can be wrong with a file into one line."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"cache file {path}: cannot be read ({reason}). It is missing or damaged. Save the "
            "cache again."
        ) from error


def _write(path: Path, data: bytes) -> None:
    """Write beside the place and rename, so that there is never half a file."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(data)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
