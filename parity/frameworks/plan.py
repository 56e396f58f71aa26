"""Plans: what a program does with its caches, as data, drawn from a seed.

A plan is a tuple of operations. Each takes the cache that an earlier one gave, which it names by
number, and gives another. So an old cache can be taken again, and one can be continued twice.
What every row of every cache holds follows from the plan alone, see `follow`; so one pass without a
cache over those rows says what each read must give.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple, TypeAlias, cast

import numpy as np

Row: TypeAlias = tuple[int, ...]  # ids of tokens
Call = Literal["GPT", "definition", "prefill", "decode_step", "Decoder.prefill", "Decoder.advance"]

_PASS_SIZE = 1 << 17  # scores of one head
Refused = Literal["full", "longer", "row", "smaller"]
# Overwritten in every free slot.
GARBAGE = float("nan"), 1e30, float("inf"), -1e30


@dataclasses.dataclass(frozen=True)
class Way:
    """How tokens are read into a cache.

    Attributes:
        call: what is called; "definition" is GPT with the attention of `attention.py`.
        packed: whether the Decoder lays its weights out.
        chunk: tokens of a pass of a prefill; None for all.
    """

    call: Call
    packed: bool = False
    chunk: int | None = None

    @property
    def is_step(self) -> bool:
        """Whether every row reads exactly one token."""
        return self.call in ("decode_step", "Decoder.advance")

    def __str__(self) -> str:
        chunk = [] if self.chunk is None else [f"chunk={self.chunk}"]
        packed = [f"packed={self.packed}"] if self.call.startswith("Decoder") else []
        options = ", ".join(packed + chunk)
        return f"{self.call}({options})" if options else self.call


@dataclasses.dataclass(frozen=True)
class Empty:
    """A new cache.

    Attributes:
        rows: B.
        capacity: slots of each row.
        invariant: whether it is that of the batch-invariant mode.
    """

    rows: int
    capacity: int
    invariant: bool = False


@dataclasses.dataclass(frozen=True)
class Read:
    """Tokens are appended and scored.

    Attributes:
        source: number of the operation whose cache is continued.
        tokens: new ones of each row, perhaps none.
        way: how.
        width: T of the call, the rest of which is padding; None for rows that all have T tokens,
            in a call without counts.
    """

    source: int
    tokens: tuple[Row, ...]
    way: Way
    width: int | None = None


@dataclasses.dataclass(frozen=True)
class Truncate:
    """Rows are cut back to lengths."""

    source: int
    lengths: Row


@dataclasses.dataclass(frozen=True)
class Select:
    """Rows are taken, some perhaps twice."""

    source: int
    rows: Row


@dataclasses.dataclass(frozen=True)
class Grow:
    """Slots are added."""

    source: int
    capacity: int


@dataclasses.dataclass(frozen=True)
class Fill:
    """Garbage is written into all slots that hold no token."""

    source: int
    value: float


@dataclasses.dataclass(frozen=True)
class Refuse:
    """Something is asked for that a cache must refuse with a ValueError.

    Attributes:
        source: number of the operation whose cache is asked.
        what: "full" appends one token more than a row has slots, "longer" truncates to more than a
            row holds, "row" selects one that does not exist, "smaller" grows to fewer slots.
    """

    source: int
    what: Refused


Operation: TypeAlias = Empty | Read | Truncate | Select | Grow | Fill | Refuse
Plan: TypeAlias = tuple[Operation, ...]
# Logits (k, V) of each row's last k tokens; nothing of an operation that is no read.
Readings: TypeAlias = Sequence[Sequence[np.ndarray]]


class Held(NamedTuple):
    """What a cache holds after an operation.

    Attributes:
        rows: all tokens of each row.
        capacity: slots of each row.
        invariant: whether it is that of the batch-invariant mode.
        memory: number of the operation that allocated arrays of it.
    """

    rows: tuple[Row, ...]
    capacity: int
    invariant: bool
    memory: int


@dataclasses.dataclass(frozen=True)
class Limits:
    """What plans are drawn from.

    Attributes:
        vocab_size: of the model.
        context_length: of the model.
        ways: to read.
        rows: batch sizes.
        width: of the calls that read chunks.
        first: of the call that reads a prompt; None for `width`.
        capacities: of caches, in rising order; the last is grown to.
        invariant: whether there are caches of the batch-invariant mode.
        counted: whether calls of several tokens always have counts.
        donates: whether a Decoder's step takes the memory of its cache, which is gone then.
        operations: in one plan, before those that read every cache once more.
        plans: of a check.
    """

    vocab_size: int
    context_length: int
    ways: tuple[Way, ...]
    rows: tuple[int, ...] = (3,)
    width: int = 4
    first: int | None = None
    capacities: tuple[int, ...] = (8,)
    invariant: bool = False
    counted: bool = False
    donates: bool = False
    operations: int = 8
    plans: int = 12


class ImpossibleError(ValueError):
    """A plan that asks for what no cache can do."""


def follow(plan: Plan, limits: Limits) -> list[Held]:
    """Return what the cache of each operation holds.

    Raises:
        ImpossibleError: for a plan that takes a cache that is gone, or more than there is.
    """
    found: list[Held] = []
    gone: set[int] = set()  # memory that was given to a step
    for number, operation in enumerate(plan):
        if isinstance(operation, Empty):
            rows = ((),) * operation.rows
            found.append(Held(rows, operation.capacity, operation.invariant, number))
            continue
        if not 0 <= operation.source < number or found[operation.source].memory in gone:
            raise ImpossibleError
        held = found[operation.source]
        if isinstance(operation, Read):
            new = isinstance(plan[operation.source], Empty)
            if operation.way.call == "Decoder.prefill" and not new:
                raise ImpossibleError
            if operation.way.call == "Decoder.advance" and limits.donates:
                gone.add(held.memory)
            found.append(_longer(held, operation, number, limits))
        elif isinstance(operation, Truncate):
            if held.invariant or len(operation.lengths) != len(held.rows):
                raise ImpossibleError
            pairs = list(zip(held.rows, operation.lengths, strict=True))
            if not all(0 <= length <= len(row) for row, length in pairs):
                raise ImpossibleError
            found.append(held._replace(rows=tuple(row[:length] for row, length in pairs)))
        elif isinstance(operation, Select):
            if held.invariant or not operation.rows or max(operation.rows) >= len(held.rows):
                raise ImpossibleError
            rows = tuple(held.rows[row] for row in operation.rows)
            found.append(held._replace(rows=rows, memory=number))
        elif isinstance(operation, Grow):
            if operation.capacity < held.capacity:
                raise ImpossibleError
            found.append(held._replace(capacity=operation.capacity))
        else:
            found.append(held)
    return found


def _longer(held: Held, read: Read, number: int, limits: Limits) -> Held:
    """Return what a cache holds after a read."""
    counts = [len(tokens) for tokens in read.tokens]
    capacity, width = held.capacity, max(counts) if read.width is None else read.width
    rows = tuple(row + new for row, new in zip(held.rows, read.tokens, strict=False))
    longest = max(map(len, rows))
    if read.way.call == "Decoder.advance" and longest > capacity:
        capacity = limits.context_length  # no plan's context is longer than a Decoder's least
    possible = (
        len(counts) == len(held.rows)
        and longest <= min(capacity, limits.context_length)
        and (read.width is not None or min(counts) == width > 0)
        and (read.way.call in ("GPT", "definition") or min(counts) > 0)
        and (not read.way.is_step or (read.width is None and width == 1))
        and max(counts) <= width
        and not (held.invariant and read.way.call in ("GPT", "definition"))
    )
    if not possible:
        raise ImpossibleError
    return Held(rows, capacity, held.invariant, number)


# ---- drawing -----------------------------------------------------------------------------------


def draw(rng: np.random.Generator, limits: Limits) -> Plan:
    """Return a plan that is possible; at its end every cache that is left reads a token.

    Kinds of operations are dealt like cards, so that a few plans have all of them.
    """
    plan: Plan = ()
    deck: list[Way | str] = []
    for _ in range(limits.operations):
        if not deck:
            cards = [*limits.ways, *_KINDS, *(("invariant",) if limits.invariant else ())]
            deck = [cards[index] for index in rng.permutation(len(cards))]
        card = deck.pop()
        if not plan or card in ("begin", "invariant"):
            often = limits.invariant and not plan and rng.random() < 0.3
            plan = _begun(rng, plan, limits, invariant=card == "invariant" or often)
        elif (operation := _dealt(rng, card, plan, limits)) is not None:
            plan += (operation,)
    for source, operation in enumerate(plan):
        if isinstance(operation, Empty):
            continue
        ways = [way for way in limits.ways if way.call != "Decoder.prefill" and way.chunk is None]
        for index in rng.permutation(len(ways)):
            read = _read(rng, ways[index], source, plan, limits, one=True)
            if read is not None:
                plan += (read,)
                break
    return plan


_REFUSED: tuple[Refused, ...] = "full", "longer", "row", "smaller"
_KINDS = (
    "begin", "truncate", "same length", "select", "all rows", "grow", "fill", "fill", *_REFUSED,
)  # fmt: skip


def _begun(rng: np.random.Generator, plan: Plan, limits: Limits, invariant: bool) -> Plan:
    """Return the plan with a new cache and a prompt in it."""
    capacities = limits.capacities[-1:] if invariant else limits.capacities
    rows, capacity = (int(rng.choice(x)) for x in (limits.rows, capacities))
    plan += (Empty(rows, capacity, invariant),)
    ways = [way for way in limits.ways if not way.is_step]
    for index in rng.permutation(len(ways)):
        read = _read(rng, ways[index], len(plan) - 1, plan, limits, width=limits.first)
        if read is not None:
            return (*plan, read)
    return plan


def _dealt(
    rng: np.random.Generator, card: Way | str, plan: Plan, limits: Limits
) -> Operation | None:
    """Return an operation of a kind on one of the caches; half the time not on the newest."""
    sources = [x for x, operation in enumerate(plan) if not isinstance(operation, Empty)]
    if not sources:
        return None
    source = sources[-1] if rng.random() < 0.5 else int(rng.choice(sources))
    held = follow(plan, limits)[source]
    lengths = tuple(map(len, held.rows))
    operation: Operation | None = None
    if isinstance(card, Way):
        if card.call == "Decoder.prefill":
            source = next(x for x, operation in enumerate(plan) if isinstance(operation, Empty))
        return _read(rng, card, source, plan, limits)
    if card == "truncate":
        operation = Truncate(source, tuple(int(rng.integers(0, x + 1)) for x in lengths))
    elif card == "same length":
        operation = Truncate(source, lengths)
    elif card == "select":
        size = len(lengths) if rng.random() < 0.5 else int(rng.choice(limits.rows))
        operation = Select(source, tuple(map(int, rng.integers(0, len(lengths), size))))
    elif card == "all rows":
        operation = Select(source, tuple(range(len(lengths))))
    elif card == "grow":
        operation = Grow(source, limits.capacities[-1])
    elif card == "fill":
        operation = Fill(source, GARBAGE[int(rng.integers(len(GARBAGE)))])
    elif card in _REFUSED and not held.invariant:
        operation = Refuse(source, cast("Refused", card))
    return operation if operation and is_possible((*plan, operation), limits) else None


def _read(
    rng: np.random.Generator,
    way: Way,
    source: int,
    plan: Plan,
    limits: Limits,
    width: int | None = None,
    one: bool = False,
) -> Read | None:
    """Return a read of a cache, of one token per row or of rows ragged or equal; None if full."""
    try:
        held = follow(plan, limits)[source]
    except ImpossibleError:
        return None
    width = width or limits.width
    lengths = np.array([len(row) for row in held.rows])
    room = min(held.capacity, limits.context_length) - lengths
    if way.is_step or one:
        counts = np.ones(len(lengths), int)
    elif rng.random() < 0.3:
        counts = np.full(len(lengths), width)
    else:
        least = 0 if way.call in ("GPT", "definition") else 1
        counts = rng.integers(least, width + 1, len(lengths))
        counts[rng.integers(len(counts))] = width  # a long row beside short ones
        counts = np.minimum(counts, room)
    tokens = tuple(tuple(map(int, rng.integers(0, limits.vocab_size, n))) for n in counts)
    alike = np.all(counts == (1 if way.is_step else width))
    bare = alike and not limits.counted and rng.random() < 0.7
    wide = None if way.is_step or bare else width
    read = Read(source, tokens, way, wide)
    return read if is_possible((*plan, read), limits) else None


def is_possible(plan: Plan, limits: Limits) -> bool:
    """Tell whether caches can do what a plan asks for."""
    try:
        follow(plan, limits)
    except ImpossibleError:
        return False
    return True


# ---- shrinking and explaining ------------------------------------------------------------------


def shrunk(plan: Plan, limits: Limits, fails: Callable[[Plan], bool], seconds: float) -> Plan:
    """Return a shorter plan that fails as well, the best that is found in the time."""
    end = time.perf_counter() + seconds
    smaller = True
    while smaller:
        smaller = False
        for candidate in _smaller(plan):
            if time.perf_counter() > end:
                return plan
            if is_possible(candidate, limits) and fails(candidate):
                plan, smaller = candidate, True
                break
    return plan


def _smaller(plan: Plan) -> Iterator[Plan]:
    """Yield plans with less in them: first fewer operations, then fewer rows and tokens."""
    for number in reversed(range(len(plan))):
        yield from _without(plan, number)
    for number, operation in enumerate(plan):
        if isinstance(operation, Empty) and operation.invariant:
            yield _with(plan, number, dataclasses.replace(operation, invariant=False))
    for row in range(max((x.rows for x in plan if isinstance(x, Empty)), default=0)):
        yield from _without_row(plan, row)
    for number, operation in enumerate(plan):
        if isinstance(operation, Read):
            for row, tokens in enumerate(operation.tokens):
                if tokens and operation.width is not None:
                    for keep in dict.fromkeys((0, 1, len(tokens) // 2, len(tokens) - 1)):
                        if keep < len(tokens):
                            rows = operation.tokens[:row], operation.tokens[row + 1 :]
                            rows = (*rows[0], tokens[:keep], *rows[1])
                            yield _with(plan, number, dataclasses.replace(operation, tokens=rows))


def _with(plan: Plan, number: int, operation: Operation) -> Plan:
    """Return a plan with another operation in one place."""
    return (*plan[:number], operation, *plan[number + 1 :])


def _without(plan: Plan, number: int) -> Iterator[Plan]:
    """Yield the plan without an operation, whose users take the cache before it."""
    gone = plan[number]
    used = any(getattr(x, "source", None) == number for x in plan)
    if isinstance(gone, Empty) and used:
        return

    def moved(operation: Operation) -> Operation:
        if isinstance(operation, Empty) or operation.source < number:
            return operation
        before = gone.source if not isinstance(gone, Empty) else 0
        source = before if operation.source == number else operation.source - 1
        return dataclasses.replace(operation, source=source)

    yield (*plan[:number], *map(moved, plan[number + 1 :]))


def _without_row(plan: Plan, row: int) -> Iterator[Plan]:
    """Yield the plan without one row of every cache, where none is selected."""
    if any(isinstance(x, Select) and x.rows != tuple(range(len(x.rows))) for x in plan):
        return

    def cut(values: tuple) -> tuple:
        return values[:row] + values[row + 1 :]

    fewer: list[Operation] = []
    for operation in plan:
        if isinstance(operation, Empty):
            operation = dataclasses.replace(operation, rows=operation.rows - 1)
            if operation.rows == 0:
                return
        elif isinstance(operation, Read):
            operation = dataclasses.replace(operation, tokens=cut(operation.tokens))
        elif isinstance(operation, Truncate):
            operation = dataclasses.replace(operation, lengths=cut(operation.lengths))
        elif isinstance(operation, Select):
            operation = dataclasses.replace(operation, rows=tuple(range(len(operation.rows) - 1)))
        fewer.append(operation)
    yield tuple(fewer)


def alternatives(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """Yield plans that must give the same, one operation done in another way, with descriptions."""
    for number in reversed(range(len(plan))):
        operation = plan[number]
        if isinstance(operation, Read):
            for way in _plainer(operation.way):
                words = f"{way} in place of {operation.way}"
                yield words, _with(plan, number, dataclasses.replace(operation, way=way))
    for number in reversed(range(len(plan))):
        operation = plan[number]
        if isinstance(operation, Read) and operation.way.call != "Decoder.prefill":
            rows = tuple(range(len(operation.tokens)))
            copied = plan[:number], (Select(operation.source, rows),), plan[number:]
            words = "a copy of the cache that is continued"
            yield words, _inserted(*copied)
    for number in reversed(range(len(plan))):
        operation = plan[number]
        if isinstance(operation, Empty) and operation.invariant:
            plain = dataclasses.replace(operation, invariant=False)
            yield "a KVCache in place of a BatchInvariantCache", _with(plan, number, plain)
        if isinstance(operation, Read | Empty):
            continue
        kinds = {
            Truncate: "no truncate", Select: "no select", Grow: "no grow",
            Fill: "zeros in the free slots", Refuse: "nothing to refuse",
        }  # fmt: skip
        yield from ((kinds[type(operation)], fewer) for fewer in _without(plan, number))


def _plainer(way: Way) -> Iterator[Way]:
    """Yield ways to read the same tokens that do less, the nearest first."""
    if way.packed:
        yield dataclasses.replace(way, packed=False)
    if way.chunk is not None:
        yield dataclasses.replace(way, chunk=None)
    if way.call == "Decoder.advance":
        yield Way("decode_step")
    if way.call == "Decoder.prefill":
        yield Way("prefill", chunk=way.chunk)
    if way.call in ("decode_step", "prefill"):
        yield Way("GPT")
    if way.call != "definition":
        yield Way("definition")


def _inserted(before: Plan, new: Plan, after: Plan) -> Plan:
    """Return a plan with an operation between, which the first one after it takes."""
    number = len(before)

    def moved(operation: Operation) -> Operation:
        if isinstance(operation, Empty) or operation.source < number:
            return operation
        return dataclasses.replace(operation, source=operation.source + 1)

    first = after[0]
    assert not isinstance(first, Empty)
    first = dataclasses.replace(first, source=number)
    return (*before, *new, first, *map(moved, after[1:]))


def prefixes(histories: Sequence[Row]) -> tuple[list[Row], dict[Row, int]]:
    """Return rows of which each history is the beginning of one, and which one that is."""
    ordered = sorted(set(histories))
    rows: list[Row] = []
    index: dict[Row, int] = {}
    last: Row | None = None
    for history in reversed(ordered):
        if last is None or last[: len(history)] != history:
            rows.append(history)
            last = history
        index[history] = len(rows) - 1
    return rows, index


def rows_of_pass(context_length: int) -> int:
    """Return rows of one pass without a cache, whose scores grow with the square of the context."""
    return max(4, min(64, _PASS_SIZE // context_length**2))


def reads(plan: Plan, limits: Limits) -> Iterator[tuple[int, tuple[Row, ...]]]:
    """Yield the number of each read and all tokens of each row after it."""
    for number, (operation, held) in enumerate(zip(plan, follow(plan, limits), strict=True)):
        if isinstance(operation, Read):
            yield number, held.rows
