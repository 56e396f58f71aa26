"""Caches in files: saved by either twin, gone on from by either, refused by another model.

Read beside torch_gpt/decoding/files.py.

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

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike
from safetensors import SafetensorError, safe_open
from safetensors.flax import save

from flax_gpt.cache import KVCache, LayerCache
from flax_gpt.model import GPT

_FORMAT = "gpt cache 1"


def save_cache(path: str | Path, model: GPT, cache: KVCache, tokens_BT: ArrayLike) -> None:
    """Write a cache to a file, whole or not at all.

    Args:
        path: of the file; one that is there is replaced.
        model: of the cache.
        cache: of any capacity; only slots that hold tokens are written.
        tokens_BT: the tokens that it holds, padded on the right.

    Raises:
        ValueError: when there are fewer tokens than the cache holds.
    """
    path, lengths_B = Path(path), np.asarray(cache.lengths_B).astype(np.int32)
    longest = int(lengths_B.max())
    tokens_BT = np.asarray(tokens_BT)[:, :longest].astype(np.int32)
    if tokens_BT.shape != (len(lengths_B), longest):
        raise ValueError(
            f"save_cache: tokens of shape {tokens_BT.shape}, and rows that hold "
            f"{lengths_B.tolist()}. A file says which text it is of. Give every token of the cache."
        )
    held_BT = np.arange(longest)[None, :] < lengths_B[:, None]
    tokens_BT = np.where(held_BT, tokens_BT, 0)
    tensors = {"lengths": jnp.asarray(lengths_B), "tokens": jnp.asarray(tokens_BT)}
    # What lies after a row's length is garbage, which would make two files of one cache differ.
    real_B1T1 = jnp.asarray(held_BT)[:, None, :, None]
    for number, layer in enumerate(cache.layers):
        for name, x_BKSH in (("keys", layer.keys_BKSH), ("values", layer.values_BKSH)):
            tensors[f"layers.{number}.{name}"] = jnp.where(real_B1T1, x_BKSH[:, :, :longest], 0)
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
    with _readable(path), safe_open(path, framework="flax") as file:
        found = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if found.get("format") != _FORMAT or not {"lengths", "tokens"} <= set(tensors):
        raise ValueError(f"cache file {path}: not a cache. Give a file that save_cache wrote.")
    tokens_BT = np.asarray(tensors["tokens"])
    problems = _differences(found, _about(model, tokens_BT))
    if problems:
        raise ValueError(
            f"cache file {path}: {'; '.join(problems)}. A cache goes on only where it began. Fill "
            "it again with this model."
        )
    layers = tuple(
        LayerCache(tensors[f"layers.{number}.keys"], tensors[f"layers.{number}.values"])
        for number in range(model.config.num_layers)
    )
    device = next(iter(model.token_embedding.embedding[...].devices()))
    cache = jax.device_put(KVCache(layers, tensors["lengths"].astype(jnp.int32)), device)
    return cache.grow(max(capacity or 0, cache.capacity)), tokens_BT


def weights_digest(model: GPT) -> str:
    """Return a digest of all weights, the same for both twins of a model."""
    digest = hashlib.sha256()
    for name, x in sorted(_leaves(model), key=lambda item: item[0]):
        digest.update(f"{name} {x.dtype.name} {x.shape}".encode())
        digest.update(np.ascontiguousarray(x).tobytes())
    return digest.hexdigest()


def _leaves(model: GPT) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the weights by the names and in the layout of torch."""
    # twin: flax calls a weight by its kind, and keeps a matrix by its inputs.
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        *parents, kind = map(str, path)
        x = np.asarray(variable[...])
        name = "weight" if kind in ("kernel", "embedding", "scale") else kind
        yield ".".join([*parents, name]), x.T if kind == "kernel" else x


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
