"""Tables of a bench, for a terminal and in markdown."""

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

from rich import box
from rich import table as rich_table
from rich.console import Group, RenderableType
from rich.text import Text

from parity.bench.result import DecodeBench, DecodeCell, Rounds, TrainBench, TrainingResult
from parity.bench.scaling import EXPECTED, MIN_CONTEXTS


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of text under heads, with notes below.

    Attributes:
        title: above the heads.
        heads: of the columns.
        rows: one text per column.
        notes: paragraphs.
        left: numbers of the columns of words, which are not aligned to the right.
    """

    title: str = ""
    heads: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = ()
    left: tuple[int, ...] = (0,)

    def __rich__(self) -> RenderableType:
        # Narrow enough for 80 columns.
        found = rich_table.Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
        for number, head in enumerate(self.heads):
            side = "left" if number in self.left else "right"
            # Numbers stay whole; what stands on the left may take a second line.
            whole = side == "right"
            found.add_column(head.replace(" ", "\n"), justify=side, no_wrap=whole, overflow="fold")
        for row in self.rows:
            found.add_row(*map(Text, row))
        notes = (Text(note, style="dim") for note in self.notes)
        return Group(*[Text(self.title, style="bold"), found] * bool(self.rows), *notes)

    def markdown(self) -> str:
        """Return the table and its notes as markdown."""
        rules = ["---" if number in self.left else "--:" for number in range(len(self.heads))]
        lines = [self.heads, rules, *self.rows] if self.rows else []
        text = f"{self.title}\n\n" if self.title else ""
        text += "".join(f"| {' | '.join(line)} |\n" for line in lines)
        return text + "".join(f"\n{note}\n" for note in self.notes)


def _digits(value: float) -> str:
    """Write a number with three digits or so."""
    return f"{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}"


def _percent(value: float) -> str:
    return f"{value * 100:.0f}%"


# Head, name in JSON, and how the number is written.
_Columns = Mapping[str, tuple[str, Callable[[float], str]]]
_DECODING: _Columns = {
    "build s": ("compile_s", "{:.1f}".format),
    "prompt ms": ("prefill_s", lambda x: f"{x * 1e3:,.0f}"),
    "token ms": ("step_s", lambda x: _digits(x * 1e3)),
    "spread": ("spread", _percent),
    "tokens /s": ("tokens_per_s", "{:,.1f}".format),
    "GB/s": ("bytes_per_s", lambda x: f"{x / 1e9:.1f}"),
    "share": ("share_of_bandwidth", _percent),
    "x best": ("speed_over_best_peer", "{:.2f}x".format),
    "mem. GB": ("memory_bytes", lambda x: f"{x / 1e9:.2f}"),
}
_TRAINING: _Columns = {
    "build s": ("compile_s", "{:.1f}".format),
    "step ms": ("step_s", lambda x: _digits(x * 1e3)),
    "spread": ("spread", _percent),
    "tokens /s": ("tokens_per_s", "{:,.0f}".format),
    "GFLOP /s": ("flop_per_s", lambda x: f"{x / 1e9:,.1f}"),
    "own matmul": ("share_of_own_matmul", _percent),
    "best matmul": ("share_of_fastest_matmul", _percent),
    "speed": ("speed_over_torch_eager", "{:.2f}x".format),
}


def tables(bench: DecodeBench | TrainBench) -> list[Table]:
    """Return a table per cell or preset, what sums them up, and notes on what ran where."""
    found: list[Table] = []
    results: Sequence[Rounds]
    environment = bench.environment
    load = f"{environment['load_before']} before and {environment['load_after']} after"
    machine = f"{environment['devices']}; {environment['cores']} cores, load {load}"
    medians = "Medians over rounds in turns; spread: from fastest to slowest round"
    if isinstance(bench, TrainBench):
        results = bench.presets
        found = [_table(x.preset, _TRAINING, x, _training_notes(x)) for x in bench.presets]
        about = (
            f"{bench.dtype}; {machine}. {medians}; own and best matmul: share of the product rate "
            "of the step's framework, and of the faster one; speed: against torch eager, round by "
            "round."
        )
    else:
        results = bench.cells
        found = [cell_table(cell) for cell in bench.cells]
        found += [_ratio_table(bench), _scaling_table(bench)]
        about = (
            f"{bench.preset}; {machine}, {environment['threads']} torch threads. {medians}; share: "
            "weights and valid cache read once per step, over the best read bandwidth of the same "
            "round; x best: speed against the fastest peer of the cell, round by round; handle and "
            "large cache: "
            "medians of single steps in turns; mem.: growth while it was set up and ran first, the "
            "twins' own weights left out."
        )
    ran = {x.name: x.ran for result in results for x in result.timings if x.rounds_s}
    notes = [about, *(f"{name}: {what}." for name, what in ran.items())]
    return [*found, Table(notes=notes)]


def cell_table(cell: DecodeCell) -> Table:
    """Return the table of one cell."""
    title = f"{cell.dtype}, batch {cell.batch_size}, context {cell.context}"
    return _table(title, _DECODING, cell, _cell_notes(cell))


def terminal(bench: DecodeBench | TrainBench, shown: int = 0) -> RenderableType:
    """Return all tables for a terminal, but for the first that have been shown already."""
    return Group(*tables(bench)[shown:])


def markdown(bench: DecodeBench | TrainBench) -> str:
    """Return all tables as markdown."""
    return "\n".join(table.markdown() for table in tables(bench))


def _table(title: str, columns: _Columns, result: Rounds, notes: Iterator[str]) -> Table:
    rows = []
    for timing in result.timings:
        texts = ["none", *[""] * (len(columns) - 1)]
        if timing.rounds_s:
            found = vars(timing) | result.numbers(timing)
            values = ((found.get(key), text) for key, text in columns.values())
            texts = ["" if value is None else text(value) for value, text in values]
        rows.append((timing.name, *texts))
    absent = (f"{x.name}: {x.unavailable}" for x in result.timings if x.unavailable)
    return Table(title, ("", *columns), rows, [*notes, *absent])


def _cell_notes(cell: DecodeCell) -> Iterator[str]:
    layers, agreement = cell.bytes_moved.config.num_layers, cell.agreement
    rounds = max(len(x.rounds_s) for x in cell.timings)
    rates = (f"{name} {statistics.median(x) / 1e9:.1f}" for name, x in cell.rates.items())
    yield (
        f"{cell.prompt_length} tokens of prompt, {rounds} rounds; a step reads "
        f"{_megabytes(cell.bytes_moved.weights)} of weights and "
        f"{_megabytes(cell.bytes_moved.cache(cell.prompt_length))} of valid cache and up; read "
        f"bandwidth in GB/s: {', '.join(rates)}"
    )
    for name, layer in cell.cache_layers.items():
        allocated, valid, read = (_megabytes(layer[x]) for x in ("allocated", "valid", "read"))
        yield (
            f"{name} cache: {layers} x {allocated} allocated ({layer['capacity']} slots), {valid} "
            f"valid, {read} read per step; 2 B K S H x itemsize, which num_bytes confirms"
        )
    for name, products in cell.kernels.items():
        chosen = (
            f"{product}: {x.kernel}" + (f" {x.ratios[x.kernel]:.2f}" if x.ratios else "")
            for product, x in products.items()
        )
        yield f"{name} kernels, time over the plain layer's: {'; '.join(chosen)}"
    ties = (
        f"; {x.name}: {len(x.ties)} tied ({max(tie.gap for tie in x.ties):.1e} apart)"
        for x in cell.timings
        if x.ties
    )
    yield (
        f"agreement: twins' logits {agreement.gap:.1e} of the largest apart (bound "
        f"{agreement.bound:.0e}) over {agreement.count:,} of them; tokens of every decoder equal, "
        f"{agreement.distinct} different ones{''.join(ties)}"
    )


def _training_notes(result: TrainingResult) -> Iterator[str]:
    rounds = max(len(timing.rounds_s) for timing in result.timings)
    rates = (
        f"{name} {statistics.median(x) / 1e9:,.1f} GFLOP/s (size {result.matmul_sizes[name]})"
        for name, x in result.rates.items()
    )
    yield (
        f"{result.batch_size} x {result.width} tokens, {result.flop_per_step / 1e9:,.2f} GFLOP a "
        f"step, {rounds} rounds; matmul: {', '.join(rates)}"
    )


def _ratio_table(bench: DecodeBench) -> Table:
    rows: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for ratio in bench.ratios:
        pair = f"{ratio.found:.3g}", str(ratio.context)
        rows.setdefault((ratio.name, ratio.cell), []).append(pair)
    found = [
        (name, *map(" ".join, zip(*pairs, strict=True)), cell)
        for (name, cell), pairs in rows.items()
    ]
    return Table("ratios", ("", "found", "context", "in"), found, left=(0, 3))


def _scaling_table(bench: DecodeBench) -> Table:
    rows = [(x.name, str(x.exponent)) for x in bench.complexity if x.exponent is not None]
    if not rows:
        return Table(notes=[f"no exponents are fitted: they need {MIN_CONTEXTS} contexts"])
    how = (
        "powers: least squares of logarithms over all rounds of all contexts; in brackets 95 % by "
        "Student's t."
    )
    notes = [*(f"{form}: {why}." for form, why in EXPECTED.items()), how]
    return Table(
        "time of a token, as a power of the context", ("", "power"), rows, notes, left=(0, 1)
    )


def _megabytes(num_bytes: float) -> str:
    scaled = num_bytes / 1e6
    return f"{scaled:,.{0 if scaled >= 100 else 1 if scaled >= 1 else 3}f}MB"
