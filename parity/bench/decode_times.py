"""What was timed behind one prompt, as values: they print as a table and go to JSON."""

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from parity.bench.complexity import Traffic
from parity.bench.step_pairs import StepPairs

REFERENCE = "transformers"  # whom speeds are relative to


@dataclasses.dataclass(frozen=True)
class Tie:
    """A token that another contender chose differently, between two that are as good as equal.

    Attributes:
        row: of the batch.
        number: of the token, from 0 for the prompt's.
        gap: between their logits, in the reference.
    """

    row: int
    number: int
    gap: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """One contender in one cell; without turns where it could not run.

    Attributes:
        name: of the contender.
        framework: flax, torch, transformers or ctranslate2.
        form: cached, uncached or loop.
        ran: what exactly was timed.
        unavailable: why it could not run; None where it did.
        compile_s: seconds of compilation for writing, which no turn contains; None where nothing
            is compiled.
        prefill_compile_s: the same for reading the prompt.
        prefills_s: seconds to read the prompt, by repetition; none where it does not read.
        memory_bytes: by how much memory grew while it was set up and ran first; None where unknown.
        extra_bytes: of weights that it holds beside the twin's own; None where unknown.
        num_steps: steps of a turn.
        turns_s: seconds per step, by round; a slow contender sits out the later rounds.
        num_tokens: tokens that were compared before.
        ties: those that differed by a tie; behind one a row is not compared.
        recompiled: programs that were compiled during its turns.
    """

    name: str
    framework: str
    form: str
    ran: str
    unavailable: str | None = None
    compile_s: float | None = None
    prefill_compile_s: float | None = None
    prefills_s: tuple[float, ...] = ()
    memory_bytes: int | None = None
    extra_bytes: int | None = None
    num_steps: int = 0
    turns_s: tuple[float, ...] = ()
    num_tokens: int = 0
    ties: tuple[Tie, ...] = ()
    recompiled: int = 0

    @property
    def step_s(self) -> float:
        """Median seconds per step."""
        return statistics.median(self.turns_s)

    @property
    def prefill_s(self) -> float | None:
        """Median seconds to read the prompt."""
        return statistics.median(self.prefills_s) if self.prefills_s else None


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How the twins' logits compare, behind the prompt and along the tokens of a turn.

    Attributes:
        gap: largest difference over the largest logit.
        bound: see `LOGITS`.
        noise: largest difference. Two tokens are a tie when their logits are within twice this.
        count: logits that were compared.
        distinct: different tokens among the reference's, so that repetition shows.
    """

    gap: float
    bound: float
    noise: float
    count: int
    distinct: int


@dataclasses.dataclass(frozen=True)
class CacheAccount:
    """Bytes of one layer of a twin's cache behind the prompt; all layers are alike.

    Attributes:
        framework: whose cache.
        capacity: slots per row.
        allocated: what the slots take.
        valid: the part of it that holds tokens.
        read: the part of it that the first step reads.
    """

    framework: str
    capacity: int
    allocated: int
    valid: int
    read: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeCell:
    """All contenders behind one prompt.

    Attributes:
        dtype: of weights, cache and computation.
        batch_size: rows.
        context: tokens of a row when a full turn ends.
        prompt_length: tokens of a row when it begins.
        traffic: bytes that a step must read.
        agreement: of the twins.
        accounts: of their caches.
        contenders: by name, in the order of the table.
        bandwidths: bytes per second in each round, by program.
        handle: steps of torch's handle beside those in place; None where one of them is missing.
        cache_copies: cache-shaped arrays that flax's compiled step makes anew.
        step_costs: FLOP and bytes of it by XLA's account, where there is one.
    """

    dtype: str
    batch_size: int
    context: int
    prompt_length: int
    traffic: Traffic
    agreement: Agreement
    accounts: tuple[CacheAccount, ...]
    contenders: tuple[Decoding, ...]
    bandwidths: Mapping[str, Sequence[float]]
    handle: StepPairs | None = None
    cache_copies: int = 0
    step_costs: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def label(self) -> str:
        """Its place in the grid."""
        return f"{self.dtype}, batch {self.batch_size}, context {self.context}"

    @property
    def roofs(self) -> list[float]:
        """The fastest program's bytes per second in each round."""
        return [max(of_round) for of_round in zip(*self.bandwidths.values(), strict=True)]

    def get(self, name: str) -> Decoding | None:
        """A contender that ran; None otherwise."""
        found = (x for x in self.contenders if x.name == name and x.turns_s)
        return next(found, None)

    def speed(self, ours: str, theirs: str) -> float | None:
        """How many times as fast one contender is as another; median of the rounds of both."""
        one, other = self.get(ours), self.get(theirs)
        if one is None or other is None:
            return None
        pairs = zip(one.turns_s, other.turns_s, strict=False)
        return statistics.median(b / a for a, b in pairs)

    def mean_length(self, decoding: Decoding) -> float:
        """Tokens that a row holds before a step, the mean of a turn's steps."""
        return self.prompt_length + (decoding.num_steps - 1) / 2

    def bytes_per_step(self, decoding: Decoding) -> float | None:
        """Weights and valid cache, the mean of a turn's steps; None without a cache."""
        if decoding.form == "uncached":
            return None
        return self.traffic.per_step(self.mean_length(decoding))

    def share(self, name: str) -> float | None:
        """Bytes per second over the best read bandwidth; median of rounds."""
        decoding = self.get(name)
        num_bytes = decoding and self.bytes_per_step(decoding)
        if num_bytes is None:
            return None
        pairs = zip(decoding.turns_s, self.roofs, strict=False)
        return statistics.median(num_bytes / seconds / roof for seconds, roof in pairs)

    def to_dict(self) -> dict[str, Any]:
        """The cell as JSON has it."""
        config = self.traffic.config
        return {
            "dtype": self.dtype,
            "batch_size": self.batch_size,
            "context": self.context,
            "prompt_length": self.prompt_length,
            "agreement": dataclasses.asdict(self.agreement),
            "bandwidth": {
                name: {"bytes_per_s": statistics.median(rates), "rounds_bytes_per_s": list(rates)}
                for name, rates in self.bandwidths.items()
            },
            "best_bytes_per_s": statistics.median(self.roofs),
            "weight_bytes_per_step": self.traffic.weights,
            "cache": [
                {
                    "framework": account.framework,
                    "capacity": account.capacity,
                    "formula": "2 * B * K * S * H * itemsize per layer",
                    "layers": [
                        {
                            "allocated_bytes": account.allocated,
                            "valid_bytes": account.valid,
                            "read_bytes_per_step": account.read,
                        }
                        for _ in range(config.num_layers)
                    ],
                }
                for account in self.accounts
            ],
            "torch_handle": None if self.handle is None else self.handle.to_dict(),
            "flax_step_program": {"cache_copies": self.cache_copies} | dict(self.step_costs),
            "contenders": [self._contender(x) for x in self.contenders],
        }

    def _contender(self, decoding: Decoding) -> dict[str, Any]:
        ran = bool(decoding.turns_s)
        num_bytes = self.bytes_per_step(decoding) if ran else None
        return {
            "name": decoding.name,
            "framework": decoding.framework,
            "form": decoding.form,
            "ran": decoding.ran,
            "unavailable": decoding.unavailable,
            "compile_s": decoding.compile_s,
            "prefill_compile_s": decoding.prefill_compile_s,
            "prefill_s": decoding.prefill_s,
            "prefills_s": list(decoding.prefills_s),
            "step_s": decoding.step_s if ran else None,
            "fastest_s": min(decoding.turns_s) if ran else None,
            "slowest_s": max(decoding.turns_s) if ran else None,
            "rounds_s": list(decoding.turns_s),
            "steps_per_round": decoding.num_steps,
            "tokens_per_s": self.batch_size / decoding.step_s if ran else None,
            "bytes_per_step": num_bytes,
            "bytes_per_s": num_bytes / decoding.step_s if num_bytes else None,
            "share_of_bandwidth": self.share(decoding.name),
            "speed_over_transformers": self.speed(decoding.name, REFERENCE),
            "memory_bytes": decoding.memory_bytes,
            "extra_weight_bytes": decoding.extra_bytes,
            "tokens_compared": decoding.num_tokens,
            "ties": [dataclasses.asdict(tie) for tie in decoding.ties],
            "programs_compiled_after_warm_up": decoding.recompiled,
        }

    def __rich__(self) -> RenderableType:
        # Narrow enough for 80 columns.
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
        table.add_column("", no_wrap=True)
        heads = (
            "build\ns", "prompt\nms", "token\nms", "spread\n%", "tokens\n/s", "\nGB/s", "\nshare",
            "x tf", "mem.\nGB",
        )  # fmt: skip
        for head in heads:
            table.add_column(head, justify="right", no_wrap=True)
        for decoding in self.contenders:
            if not decoding.turns_s:
                table.add_row(decoding.name, Text("none", style="yellow"))
                continue
            num_bytes, share = self.bytes_per_step(decoding), self.share(decoding.name)
            speed = self.speed(decoding.name, REFERENCE)
            spread = min(decoding.turns_s), max(decoding.turns_s)
            table.add_row(
                decoding.name,
                _or_nothing(decoding.compile_s, lambda x: f"{x:.1f}"),
                _or_nothing(decoding.prefill_s, lambda x: f"{x * 1e3:,.0f}"),
                _milliseconds(decoding.step_s, decoding.step_s),
                f"{(spread[1] - spread[0]) / decoding.step_s * 100:.0f}",
                f"{self.batch_size / decoding.step_s:,.1f}",
                _or_nothing(num_bytes, lambda x, s=decoding.step_s: f"{x / s / 1e9:.1f}"),
                _or_nothing(share, lambda x: f"{x * 100:.0f}%"),
                _or_nothing(speed, lambda x: f"{x:.2f}x"),
                _or_nothing(decoding.memory_bytes, lambda x: f"{x / 1e9:.2f}"),
            )
        return Group(
            Text(self.label, style="bold"),
            table,
            *(Text(note, style="dim") for note in self._notes()),
        )

    def _notes(self) -> Iterator[str]:
        layers, agreement = self.traffic.config.num_layers, self.agreement
        rounds = max((len(x.turns_s) for x in self.contenders), default=0)
        slots = self.prompt_length
        bandwidths = ", ".join(
            f"{name} {statistics.median(rates) / 1e9:.1f}"
            for name, rates in self.bandwidths.items()
        )
        weights, cache = _megabytes(self.traffic.weights), _megabytes(self.traffic.cache(slots))
        yield (
            f"{slots} tokens of prompt, {rounds} rounds; a step reads {weights} of weights and "
            f"{cache} of valid cache and up; read bandwidth in GB/s: {bandwidths}"
        )
        for account in self.accounts:
            yield (
                f"{account.framework} cache: {layers} x {_megabytes(account.allocated)} "
                f"allocated ({account.capacity} slots), {_megabytes(account.valid)} valid, "
                f"{_megabytes(account.read)} read per step; 2 B K S H x itemsize, which num_bytes "
                "confirms"
            )
        yield (
            f"agreement: twins' logits {agreement.gap:.1e} of the largest apart (bound "
            f"{agreement.bound:.0e}) over {agreement.count:,} of them; tokens of every contender "
            f"equal, {agreement.distinct} different ones"
            + "".join(
                f"; {x.name}: {len(x.ties)} tied ({max(tie.gap for tie in x.ties):.1e} apart)"
                for x in self.contenders
                if x.ties
            )
        )
        for decoding in self.contenders:
            if decoding.unavailable is not None:
                yield f"{decoding.name}: {decoding.unavailable}"


def _milliseconds(seconds: float, like: float) -> str:
    """Three digits or so, as many behind the point as another time has."""
    return f"{seconds * 1e3:,.{2 if like < 0.1 else 1 if like < 1.0 else 0}f}"


def _megabytes(num_bytes: float) -> str:
    scaled = num_bytes / 1e6
    return f"{scaled:,.{0 if scaled >= 100 else 1 if scaled >= 1 else 3}f}MB"


def _or_nothing(value: float | None, words: Callable[[float], str]) -> str:
    return "" if value is None else words(value)
