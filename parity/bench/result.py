"""What was timed, as frozen values: numbers for the tables, and JSON for machines."""

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Generic, TypeVar

import flax_gpt
from parity.bench.names import LIBRARIES
from parity.bench.pairs import StepPairs
from parity.bench.roofline import BytesMoved
from parity.bench.scaling import ScalingFit

Numbers = dict[str, float | None]


@dataclasses.dataclass(frozen=True)
class Tie:
    """A token that a decoder chose differently, between two of practically equal logits.

    Attributes:
        row: of the batch.
        number: of the token, from 0 for the prompt's.
        gap: between the logits, in the reference.
    """

    row: int
    number: int
    gap: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """The time of one training step or decoder; without rounds if it could not run.

    Attributes:
        name: of the step or decoder; its first word is the framework or library.
        ran: description of what was timed.
        unavailable: why it could not run; None if it did.
        compile_s: seconds of compilation, which no round contains; None if nothing is compiled.
        memory_bytes: what a training step needs beyond weights, moments and batch, or by how much
            memory grew while a decoder was set up and first ran; None where unknown.
        steps_per_round: steps of a round.
        rounds_s: seconds per step, by round; a slow decoder sits out the later rounds.
    """

    name: str
    ran: str = ""
    unavailable: str | None = None
    compile_s: float | None = None
    memory_bytes: int | None = None
    steps_per_round: int = 0
    rounds_s: tuple[float, ...] = ()

    @property
    def framework(self) -> str:
        """flax, torch, or the library of a peer."""
        return self.name.split()[0]

    @property
    def step_s(self) -> float:
        """Median seconds per step; it must have run."""
        return statistics.median(self.rounds_s)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding(Timing):
    """The time of one decoder; `compile_s` is that of writing.

    Attributes:
        form: cached, uncached or loop.
        prefills_s: seconds to read the prompt, by repetition; empty if it does not read.
        extra_weight_bytes: memory of weights beside the twin's own; None if unknown.
        tokens_compared: tokens compared before it was timed.
        ties: tokens that differed by a tie, after which a row is not compared.
        programs_compiled_after_warm_up: programs compiled during its rounds.
    """

    form: str = "cached"
    prefills_s: tuple[float, ...] = ()
    extra_weight_bytes: int | None = None
    tokens_compared: int = 0
    ties: tuple[Tie, ...] = ()
    programs_compiled_after_warm_up: int = 0


T = TypeVar("T", bound=Timing)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rounds(Generic[T]):
    """Steps or decoders timed in the same rounds, beside what the machine can do.

    Attributes:
        timings: in the order of the table.
        rates: bytes or FLOP per second of measured programs in each round, by program.
    """

    timings: tuple[T, ...]
    rates: Mapping[str, Sequence[float]]

    @property
    def roofline(self) -> list[float]:
        """The fastest program's rate in each round."""
        return [max(of_round) for of_round in zip(*self.rates.values(), strict=True)]

    def get(self, name: str) -> T | None:
        """Return a timing by name; None if it did not run."""
        return next((x for x in self.timings if x.name == name and x.rounds_s), None)

    def speed(self, ours: str, theirs: str) -> float | None:
        """Return how many times as fast one is as another; median over the rounds of both."""
        one, other = self.get(ours), self.get(theirs)
        if one is None or other is None:
            return None
        pairs = zip(one.rounds_s, other.rounds_s, strict=False)
        return statistics.median(b / a for a, b in pairs)

    def numbers(self, timing: T) -> Numbers:
        """Return what follows from a timing that ran, by its name in JSON."""
        times, seconds = timing.rounds_s, timing.step_s
        return {"step_s": seconds, "spread": (max(times) - min(times)) / seconds}


def share_of(rates: Sequence[float], work: float, seconds: Sequence[float]) -> float:
    """Return the achieved rate over the machine's; median of rounds."""
    pairs = zip(seconds, rates, strict=False)
    return statistics.median(work / second / rate for second, rate in pairs)


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far the twins' logits differ, after the prompt and along the tokens of a round.

    Attributes:
        gap: largest difference over the largest logit.
        bound: its upper limit.
        noise: largest difference. Two tokens are a tie if their logits are within twice this.
        count: logits that were compared.
        distinct: different tokens among the reference's, so that repetition shows.
    """

    gap: float
    bound: float
    noise: float
    count: int
    distinct: int


@dataclasses.dataclass(frozen=True)
class KernelChoice:
    """What a decoder computes one kind of product with.

    Attributes:
        kernel: its name.
        ratios: time of each candidate over the plain layer's; empty where none was timed.
    """

    kernel: str
    ratios: Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeCell(Rounds[Decoding]):
    """All decoders after one prompt, one cell of the grid.

    Attributes:
        dtype: of weights, cache and computation.
        batch_size: rows.
        context: tokens of a row at the end of a full round.
        prompt_length: tokens of a row at its beginning.
        bytes_moved: that a step must read.
        agreement: of the twins.
        cache_layers: by twin, capacity in slots per row of a layer of its cache, and the bytes of
            all slots (2 B K S H x itemsize), of valid ones, and of those that the first step reads.
        handle: steps of torch's handle beside those in place; None if one of them is missing.
        cache_copies: cache-shaped arrays that flax's compiled step allocates.
        kernels: by twin and product, what was chosen and by how much.
    """

    dtype: str
    batch_size: int
    context: int
    prompt_length: int
    bytes_moved: BytesMoved
    agreement: Agreement
    cache_layers: Mapping[str, Mapping[str, int]]
    handle: StepPairs | None = None
    cache_copies: int = 0
    kernels: Mapping[str, Mapping[str, KernelChoice]] = dataclasses.field(default_factory=dict)

    def speed_over_best_peer(self, ours: str) -> float | None:
        """Return how many times as fast one is as the peer with the least median time."""
        peers = [x for x in self.timings if x.framework in LIBRARIES and x.rounds_s]
        return self.speed(ours, min(peers, key=lambda x: x.step_s).name) if peers else None

    def mean_length(self, decoding: Decoding) -> float:
        """Return the mean number of tokens that a row holds before a step."""
        return self.prompt_length + (decoding.steps_per_round - 1) / 2

    def numbers(self, timing: Decoding) -> Numbers:
        """Return what follows from a decoder that ran, by its name in JSON.

        The bytes of a step are weights and valid cache, the mean of a round's steps.
        """
        found = super().numbers(timing) | {
            "prefill_s": statistics.median(timing.prefills_s) if timing.prefills_s else None,
            "tokens_per_s": self.batch_size / timing.step_s,
            "speed_over_transformers": self.speed(timing.name, "transformers"),
            "speed_over_best_peer": self.speed_over_best_peer(timing.name),
        }
        if timing.form == "uncached":
            return found
        num_bytes = self.bytes_moved.per_step(self.mean_length(timing))
        return found | {
            "bytes_per_step": num_bytes,
            "bytes_per_s": num_bytes / timing.step_s,
            "share_of_bandwidth": share_of(self.roofline, num_bytes, timing.rounds_s),
        }


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A number that sums up the bench: its name, where it was found, and at which context."""

    name: str
    cell: str
    context: int
    found: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeBench:
    """Everything that `parity bench` found.

    Attributes:
        environment: everything about the machine that can change a time.
        preset: name of the model's size.
        config: of the model.
        seed: of weights and prompts.
        cells: the grid.
        capacity: steps in a large cache beside steps in a small one, by framework.
        ratios: that sum it up.
        complexity: how the time of a token grows with the context.
    """

    environment: Mapping[str, object]
    preset: str
    config: flax_gpt.GPTConfig
    seed: int
    cells: tuple[DecodeCell, ...]
    capacity: tuple[StepPairs, ...]
    ratios: tuple[Ratio, ...]
    complexity: tuple[ScalingFit, ...]
    schema: int = 1
    bench: str = "decode"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingResult(Rounds[Timing]):
    """All training steps on one preset.

    Attributes:
        preset: its name.
        config: of the model.
        batch_size: rows of a batch.
        width: tokens of a row.
        flop_per_step: see `roofline.flop_per_step`.
        losses: of the first steps, by training step, which agree within `bound`.
        bound: on the gap between two losses.
        matmul_sizes: size of the fastest product, by framework; its FLOP/s are the `rates`.
    """

    preset: str
    config: flax_gpt.GPTConfig
    batch_size: int
    width: int
    flop_per_step: int
    losses: Mapping[str, Sequence[float]]
    bound: float
    matmul_sizes: Mapping[str, int]

    def numbers(self, timing: Timing) -> Numbers:
        """Return what follows from a step that ran, by its name in JSON."""
        flop, times, own = self.flop_per_step, timing.rounds_s, self.rates[timing.framework]
        return super().numbers(timing) | {
            "tokens_per_s": self.batch_size * self.width / timing.step_s,
            "flop_per_s": flop / timing.step_s,
            "share_of_own_matmul": share_of(own, flop, times),
            "share_of_fastest_matmul": share_of(self.roofline, flop, times),
            "speed_over_torch_eager": self.speed(timing.name, "torch eager"),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainBench:
    """Everything that `parity bench training` found.

    Attributes:
        environment: everything about the machine that can change a time.
        dtype: of forward and backward pass.
        training: constants of the optimizer.
        presets: a result for each.
    """

    environment: Mapping[str, object]
    dtype: str
    training: flax_gpt.TrainConfig
    presets: tuple[TrainingResult, ...]
    schema: int = 1
    bench: str = "training"


def to_json(bench: DecodeBench | TrainBench) -> str:
    """Return the outcome as one line of JSON: fields under their names, and numbers of timings."""
    return json.dumps(_plain(bench), allow_nan=False) + "\n"


def _plain(value: object) -> object:
    if isinstance(value, Rounds):
        numbers = {x: value.numbers(x) if x.rounds_s else {} for x in value.timings}
        timings = [{"framework": x.framework} | vars(x) | y for x, y in numbers.items()]
        return _plain(vars(value) | {"timings": timings})
    if dataclasses.is_dataclass(value):
        return _plain(vars(value))
    if isinstance(value, Mapping):
        return {name: _plain(x) for name, x in value.items()}
    return [_plain(x) for x in value] if isinstance(value, list | tuple) else value
