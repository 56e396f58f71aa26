"""A run is a folder: its config, a line per step, and checkpoints."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NotRequired, Self, TypedDict

from flax_gpt import GPTConfig, TrainConfig
from parity.frameworks.leaves import Leaves
from parity.pair.text import Corpus
from parity.report.json import to_json
from parity.system.files import unfinished, write_file
from parity.training.checkpoint import read_checkpoint, write_checkpoint
from parity.twins.names import FRAMEWORKS

_KEPT = 2  # checkpoints: the newest, and the one before it in case that is damaged
_FILES = "config.json", "metrics.jsonl", "curves.png"


class Row(TypedDict):
    """What a line of metrics.jsonl says of a step; by framework, but for the gap."""

    step: int
    losses: dict[str, float]
    gradient_norms: NotRequired[dict[str, float]]
    applied: NotRequired[dict[str, bool]]
    gap: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides the numbers of a run.

    Attributes:
        source: where the text came from.
        text: digest of its ids.
        vocabulary: its characters, by id.
        model: sizes of both twins.
        training: of both twins.
        rows: B of a batch.
        width: T of a batch.
        seed: of weights, batches and dropout.
        frameworks: which twins train.
        one_batch: train on the first batch alone, again and again.
    """

    source: str
    text: str
    vocabulary: str
    model: GPTConfig
    training: TrainConfig
    rows: int
    width: int
    seed: int
    frameworks: tuple[str, ...] = FRAMEWORKS
    one_batch: bool = False

    @classmethod
    def of(cls, corpus: Corpus, **fields: Any) -> Self:
        """Return the config for a text, with its other fields given by name."""
        text = hashlib.sha256(corpus.ids.tobytes()).hexdigest()
        return cls(source=corpus.source, text=text, vocabulary=corpus.vocabulary, **fields)

    @property
    def digest(self) -> str:
        """Hash of all fields but `source`: where the text lies does not matter."""
        fields = dataclasses.asdict(self) | {"source": ""}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


class Run:
    """The folder of a run.

    Attributes:
        path: the folder.
        config: of the run.
    """

    def __init__(self, path: Path, config: RunConfig):
        self.path, self.config = path, config

    @classmethod
    def start(cls, path: Path, config: RunConfig) -> Self:
        """Return the run of a new folder, or of one that holds a run of the same config.

        Raises:
            ValueError: when the folder holds another run or something else.
            OSError: when it cannot be made.
        """
        if path.exists() and not path.is_dir():
            raise ValueError(f"run {path}: that is a file. A run is a folder. Name another.")
        if (path / "config.json").exists():
            present = cls.open(path)
            if present.config.digest != config.digest:
                raise ValueError(
                    f"run {path}: holds another run ({_difference(present.config, config)}). A "
                    "run goes on with the options it was started with. Give those or another "
                    "folder."
                )
            return present
        # A process that was killed as it wrote the config leaves its beginning.
        begun = unfinished(path / "config.json")
        if path.is_dir() and any(not x.name.startswith(begun) for x in path.iterdir()):
            raise ValueError(
                f"run {path}: the folder is not empty and holds no run. A run has a folder of its "
                "own. Name another."
            )
        path.mkdir(parents=True, exist_ok=True)
        fields = {"schema": 1} | dataclasses.asdict(config)
        write_file(path / "config.json", json.dumps(fields, indent=1) + "\n")
        return cls(path, config)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Return a run that exists.

        Raises:
            ValueError: when the folder holds none, or its config cannot be read.
        """
        if not (path / "config.json").is_file():
            raise ValueError(
                f"run {path}: no config.json in it. A run is a folder that `parity train --out` "
                "made. Give one."
            )
        try:
            fields = json.loads((path / "config.json").read_text(encoding="utf-8"))
            if fields.pop("schema") != 1:
                raise ValueError("schema is not 1")
            fields["frameworks"] = tuple(fields["frameworks"])
            fields["model"] = GPTConfig(**fields["model"])
            fields["training"] = TrainConfig(**fields["training"])
            return cls(path, RunConfig(**fields))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"run {path}: config.json cannot be read ({error}). It is damaged or not a run's. "
                "Name another folder."
            ) from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training in the folder, and delete what dead ones left.

        Raises:
            ValueError: when another process is training here.
        """
        with (self.path / ".lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(
                    f"run {self.path}: another process trains in it. A run is trained by one. Wait "
                    "for it or name another folder."
                ) from error
            for begun in (".step-", *(unfinished(self.path / name) for name in _FILES)):
                for rest in self.path.glob(f"{begun}*"):
                    rest.unlink()
            yield

    def checkpoints(self) -> list[tuple[int, Path]]:
        """Return steps and files of the checkpoints, oldest first."""
        found = ((re.fullmatch(r"step-(\d+)\.safetensors", x.name), x) for x in self.path.iterdir())
        return sorted((int(match[1]), path) for match, path in found if match)

    def save(self, step: int, states: Mapping[str, Leaves]) -> Path:
        """Write a checkpoint, then delete all but the newest two."""
        path = self.path / f"step-{step:06d}.safetensors"
        write_checkpoint(path, states, {"run": self.config.digest, "step": str(step)})
        for _, old in self.checkpoints()[:-_KEPT]:
            old.unlink()
        return path

    def load(self) -> tuple[int, dict[str, Leaves]] | None:
        """Return step and states of the newest checkpoint; None where there is none.

        Raises:
            ValueError: for a checkpoint that cannot be read or belongs to another run.
        """
        found = self.checkpoints()
        if not found:
            return None
        path = found[-1][1]
        states, about = read_checkpoint(path)
        if about.get("run") != self.config.digest:
            raise ValueError(
                f"checkpoint {path}: belongs to another run. A checkpoint goes with the "
                "config.json that it was written under. Put it back there."
            )
        return int(about["step"]), states

    def metrics(self, last: int | None = None) -> list[Row]:
        """Return what was measured at each step, up to the first line that is cut off.

        Args:
            last: the last step to return; every step up to it must be there.

        Raises:
            ValueError: when a step up to `last` is missing.
        """
        path, rows = self.path / "metrics.jsonl", []
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for line in lines:
            try:
                row = json.loads(line)
                losses = {name: _number(loss) for name, loss in row["losses"].items()}
                rows.append(row | {"gap": _number(row["gap"]), "losses": losses})
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
                break
        if last is not None:
            rows = rows[:last]
            if [row.get("step") for row in rows] != list(range(1, last + 1)):
                raise ValueError(
                    f"run {self.path}: metrics.jsonl has {len(rows)} of {last} steps that can be "
                    "read. There is a line per step. Put the file back or start another run."
                )
        return rows

    def cut_metrics(self, step: int) -> None:
        """Delete what was measured after a step, because it will be measured again.

        Raises:
            ValueError: when a step up to it is missing.
        """
        write_file(self.path / "metrics.jsonl", "".join(map(as_line, self.metrics(step))))


def as_line(row: Mapping[str, object]) -> str:
    """Return a line of JSON, which has no number for what is not finite: that becomes null."""
    return to_json(row, indent=None, as_null=True)


def _number(value: float | None) -> float:
    """Return NaN for what `as_line` wrote as null."""
    return math.nan if value is None else value


def _difference(present: RunConfig, given: RunConfig) -> str:
    """Describe the first fields that differ."""

    def flat(config: RunConfig) -> dict[str, object]:
        fields = dataclasses.asdict(config)
        model, training = fields.pop("model"), fields.pop("training")
        return fields | model | training

    ours, theirs = flat(present), flat(given)
    changed = [x for x in ours if ours[x] != theirs.get(x) and x != "source"]
    return "; ".join(f"{x} {_short(ours[x])}, not {_short(theirs.get(x))}" for x in changed[:3])


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 20 else text[:12] + "..."
