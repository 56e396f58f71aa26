"""A plan carried out on a twin, and the same written as Python."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from parity.frameworks.plan import (
    Empty,
    Fill,
    Grow,
    Operation,
    Plan,
    Read,
    Readings,
    Refuse,
    Select,
    Truncate,
)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from parity.twins.twin import Array, Cache, Config, Twin

_PADDING = 1  # an id that means something, so that padding which is read shows


class NotRefusedError(AssertionError):
    """What should have raised a ValueError did not."""


class Follower:
    """A twin with the decoders that plans use, which are made once.

    Args:
        twin: whose caches are used.
    """

    def __init__(self, twin: Twin):
        self._twin, self._package = twin, twin.package
        self._decoder = functools.cache(self._make_decoder)
        self._definition = functools.cache(lambda: twin.with_definition())

    def __call__(self, plan: Plan) -> Readings:
        """Return the logits (k, V) of each row of each read; nothing for other operations.

        A model's call gives those of all new tokens, a prefill or a step those of the last.

        Raises:
            NotRefusedError: when a cache does what it must refuse.
        """
        caches: list[Cache] = []
        found: list[Sequence[np.ndarray]] = []
        for operation in plan:
            logits: Sequence[np.ndarray] = ()
            if isinstance(operation, Read):
                logits, cache = self.read(operation, caches[operation.source])
            else:
                source = None if isinstance(operation, Empty) else caches[operation.source]
                cache = self.cache_of(operation, source)
            caches.append(cache)
            found.append(logits)
        return found

    def cache_of(self, operation: Operation, source: Cache) -> Cache:
        """Return the cache that an operation gives, which is no read."""
        twin = self._twin
        if isinstance(operation, Empty):
            return self._empty(operation)
        if isinstance(operation, Truncate):
            return twin.truncate(source, np.array(operation.lengths))
        if isinstance(operation, Select):
            return twin.select(source, np.array(operation.rows))
        with twin.scope():
            if isinstance(operation, Grow):
                return source.grow(operation.capacity)
            if isinstance(operation, Fill):
                return filled(source, operation.value)
            assert isinstance(operation, Refuse)
            self._refuse(operation, source)
            return source

    def read(self, read: Read, cache: Cache) -> tuple[Sequence[np.ndarray], Cache]:
        """Return logits (k, V) of each row's last tokens, and the longer cache."""
        twin, way = self._twin, read.way
        counts = [len(tokens) for tokens in read.tokens]
        tokens_BT, counts_B = _padded(read)
        if way.call in ("GPT", "definition"):
            reader = twin if way.call == "GPT" else self._definition()
            logits_BTV, longer = reader.read(cache, tokens_BT, counts_B)
            return [x[:count] for x, count in zip(logits_BTV, counts, strict=True)], longer
        invariant = isinstance(cache, self._package.BatchInvariantCache)
        with twin.scope():
            tokens, ints = twin.ints(tokens_BT), twin.ints(counts_B)
            decoder = self._decoder(len(counts), way.packed, invariant)
            if way.call == "prefill":
                result = twin.call(
                    decoder, decoder.steps.prefill, tokens, cache, ints, static=(way.chunk,)
                )
            elif way.call == "decode_step":
                result = twin.call(decoder, decoder.steps.decode_step, tokens[:, 0], cache)
            elif way.call == "Decoder.advance":
                result = decoder.advance(tokens[:, 0], cache)
            else:
                result = decoder.prefill(tokens_BT, counts_B, cache.capacity, way.chunk)
            logits_BV, longer = result
            return [x[None] for x in twin.numpy(logits_BV)], longer

    def _make_decoder(self, rows: int, packed: bool, invariant: bool) -> Any:
        if invariant:
            return self._package.BatchInvariantDecoder(self._twin.model, rows, packed)
        # Of matrices so small a measurement is noise, so each number of rows takes another kernel.
        kernels = [name for name in self._package.KERNELS if name != "plain"]
        place = (len(kernels) // 2 + rows - 2) % len(kernels)  # one that can take one row first
        kernel = kernels[place] if packed else None
        return self._package.Decoder(self._twin.model, rows, packed, kernels=kernel)

    def _empty(self, operation: Empty) -> Cache:
        twin, sizes = self._twin, (operation.rows, operation.capacity)
        if not operation.invariant:
            return twin.empty(*sizes)
        with twin.scope():
            kind = self._package.BatchInvariantCache
            return kind.empty(twin.config, *sizes, device=twin.device)

    def _refuse(self, operation: Refuse, cache: Cache) -> None:
        twin = self._twin
        lengths = twin.numpy(cache.lengths_B)
        rows, longest = len(lengths), int(lengths.max())
        asked: dict[str, Callable[[], object]] = {
            "full": lambda: twin.model(
                twin.ints(np.zeros((rows, cache.capacity - longest + 1), np.int32)), cache
            ),
            "longer": lambda: cache.truncate(twin.ints(lengths + 1)),
            "row": lambda: cache.select(twin.ints([rows])),
            "smaller": lambda: cache.grow(cache.capacity - 1),
        }
        try:
            asked[operation.what]()
        except ValueError:
            return
        raise NotRefusedError(f"{operation.what}: nothing was raised")


def filled(cache: Cache, value: float) -> Cache:
    """Return a cache of either twin with a value in every slot that holds no token."""
    if hasattr(cache, "blocks"):  # of the batch-invariant mode
        return dataclasses.replace(cache, blocks=filled(cache.blocks, value))
    free_BS = np.arange(cache.capacity) >= np.asarray(cache.lengths_B)[:, None]

    def changed(x_BKSH: Array) -> Array:
        host = np.asarray(x_BKSH.detach().cpu() if hasattr(x_BKSH, "detach") else x_BKSH)
        host = np.where(free_BS[:, None, :, None], value, host).astype(host.dtype)
        is_torch = hasattr(x_BKSH, "new_tensor")
        return x_BKSH.new_tensor(host) if is_torch else x_BKSH.__array_namespace__().asarray(host)

    layers = tuple(
        type(layer)(changed(layer.keys_BKSH), changed(layer.values_BKSH)) for layer in cache.layers
    )
    return type(cache)(layers, cache.lengths_B)


def _padded(read: Read) -> tuple[np.ndarray, np.ndarray | None]:
    """Return tokens (B, T) of a call and its counts (B,)."""
    counts = np.array([len(tokens) for tokens in read.tokens], np.int32)
    tokens_BT = np.full((len(counts), read.width or int(counts[0])), _PADDING, np.int32)
    for row, tokens in enumerate(read.tokens):
        tokens_BT[row, : len(tokens)] = tokens
    return tokens_BT, None if read.width is None else counts


def script(twin: Twin, plan: Plan, row: int, index: int, history: Sequence[int]) -> str:
    """Write a plan as Python that a person can run; it prints how far its last read is off.

    Args:
        twin: that the plan failed on; the lines build one of its config with other weights.
        plan: that ends with a read.
        row: of that read, which differs.
        index: of the token in the logits of that row.
        history: all tokens of the row up to that one.

    Returns:
        A line per import and operation; operations that only the next one uses are inside it.
    """
    name, ints = twin.original.__name__, twin.ints_name
    lines = [f"import {ints.rpartition('.')[0]}, {name} as gpt"]
    if any(isinstance(operation, Fill) for operation in plan):
        lines.append("from parity.twins.follow import filled")
    lines.append(f"model = gpt.GPT({_python(twin.config)}, gpt.random.key(0))")
    caches: list[str] = []
    for number, operation in enumerate(plan):
        source = "" if isinstance(operation, Empty) else caches[operation.source]
        if isinstance(operation, Read):
            empty = plan[operation.source]
            lines.append(f"logits, c{number} = {_read(operation, source, empty, ints, plan)}")
            caches.append(f"c{number}")
            continue
        users = [x for x, y in enumerate(plan) if getattr(y, "source", None) == number]
        expression = _expression(operation, source)
        if users != [number + 1]:
            lines.append(f"c{number} = {expression}")
            expression = f"c{number}"
        caches.append(expression)
    last = plan[-1]
    at = f"[{row}, {index}]" if isinstance(last, Read) and _is_call(last) else f"[{row}]"
    whole = f"model({ints}([{list(history)}]))[0][0, -1]"
    return "\n".join([*lines, f"print(abs(logits{at} - {whole}).max())"])


def _is_call(read: Read) -> bool:
    return read.way.call in ("GPT", "definition")


def _python(config: Config) -> str:
    """Return a config as Python, without its dtype and what is as by default."""
    weights = dataclasses.replace(config, dtype="float32", init_std=0.5)
    return f"gpt.GPTConfig({_fields(weights)})"


def _fields(value: DataclassInstance) -> str:
    given = []
    for field in dataclasses.fields(value):
        found = getattr(value, field.name)
        if found != field.default:
            inside = dataclasses.is_dataclass(found) and not isinstance(found, type)
            text = f"gpt.{type(found).__name__}({_fields(found)})" if inside else repr(found)
            given.append(f"{field.name}={text}")
    return ", ".join(given)


def _expression(operation: Operation, source: str) -> str:
    """Return an operation that is no read as Python."""
    if isinstance(operation, Empty):
        kind = "BatchInvariantCache" if operation.invariant else "KVCache"
        return f"gpt.{kind}.empty(model.config, {operation.rows}, {operation.capacity})"
    if isinstance(operation, Truncate):
        return f"{source}.truncate({list(operation.lengths)})"
    if isinstance(operation, Select):
        return f"{source}.select({list(operation.rows)})"
    if isinstance(operation, Grow):
        return f"{source}.grow({operation.capacity})"
    if isinstance(operation, Fill):
        return f"filled({source}, float('{operation.value}'))"
    return source


def _read(read: Read, source: str, before: Operation, ints: str, plan: Plan) -> str:
    """Return a read as Python."""
    tokens_BT, counts_B = _padded(read)
    tokens = f"{ints}({tokens_BT.tolist()})"
    counts = "None" if counts_B is None else f"{ints}({counts_B.tolist()})"
    way, invariant = read.way, _is_invariant(read, plan)
    place = "gpt.decoding.batch_invariant" if invariant else "gpt"
    chunk = "" if way.chunk is None else f", {way.chunk}"
    if way.call == "GPT":
        return f"model({tokens}, {source}, {counts})"
    if way.call == "definition":
        return f"model.with_attend(gpt.attention.attend)({tokens}, {source}, {counts})"
    if way.call == "prefill":
        return f"{place}.prefill(model, {tokens}, {source}, {counts}{chunk})"
    first = f"{ints}({tokens_BT[:, 0].tolist()})"
    if way.call == "decode_step":
        return f"{place}.decode_step(model, {first}, {source})"
    kind = "BatchInvariantDecoder" if invariant else "Decoder"
    decoder = f"gpt.{kind}(model, {len(tokens_BT)}, packed={way.packed})"
    if way.call == "Decoder.advance":
        return f"{decoder}.advance({first}, {source})"
    assert isinstance(before, Empty)
    return f"{decoder}.prefill({tokens_BT.tolist()}, {counts}, {before.capacity}{chunk})"


def _is_invariant(read: Read, plan: Plan) -> bool:
    operation: Operation = read
    while not isinstance(operation, Empty):
        operation = plan[operation.source]
    return operation.invariant
