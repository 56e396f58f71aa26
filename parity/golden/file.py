"""A golden as one safetensors file: all that one model computed, all floats in float64."""

import dataclasses
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from parity.frameworks.batch import Argument, Batch, Outputs
from parity.frameworks.capture import leaves_of
from parity.frameworks.leaves import Leaves, cast, cast_array
from parity.frameworks.purity import Purity
from parity.system.files import write_file

KIND, SCHEMA = "parity golden", 2
# The only entry of the file's metadata: of several, safetensors does not keep the order.
_ABOUT = "about"
# Fields of a golden that are no arrays.
_PLAIN = "framework", "model", "versions", "seed", "learning_rate"


@dataclasses.dataclass(frozen=True)
class State:
    """Parameters and moments after an optimizer step, by leaf, and the optimizer's count."""

    after: Leaves
    first: Leaves
    second: Leaves
    count: int | None


@dataclasses.dataclass(frozen=True)
class Golden:
    """What one model computed.

    Attributes:
        framework: flax or torch.
        model: its name in the report.
        versions: of the packages that computed it.
        seed: of weights and inputs.
        learning_rate: the largest of the optimizer, in units of which single updates are judged.
        weights: under test.
        probes: named inputs; gradients are taken on the first.
        outputs: by probe, leaf by leaf.
        loss: on the first probe.
        gradients: of that loss, by leaf.
        batches: one for each step of training.
        losses: (steps,) before each update.
        states: after each of the first steps.
        final: weights after the last step.
        purity: proof that forward and gradient were computed in float64.
    """

    framework: str
    model: str
    versions: Mapping[str, str]
    seed: int
    learning_rate: float
    weights: Leaves
    probes: Mapping[str, Batch]
    outputs: Mapping[str, Outputs]
    loss: float
    gradients: Leaves
    batches: tuple[Batch, ...]
    losses: np.ndarray
    states: tuple[State, ...]
    final: Leaves
    purity: Mapping[str, Purity]

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all; equal goldens are equal bytes.

        Raises:
            ValueError: for results that are not finite, against which nothing can be checked.
            OSError: when the folder or the disk does not take it.
        """
        tensors = cast(self._tensors(), "float64")
        judged = [x for x in tensors if not x.startswith(("weights/", "final/", "step/"))]
        if bad := [name for name in judged if not np.isfinite(tensors[name]).all()]:
            raise ValueError(
                f"golden {path}: {', '.join(bad)} not finite. Nothing can be checked against "
                "that. Mend the model or its inputs."
            )
        # safetensors writes memory as it lies, whatever the strides say.
        tensors = {name: np.array(tensor, order="C") for name, tensor in tensors.items()}
        write_file(path, save(tensors, metadata={_ABOUT: json.dumps(self._about())}))

    def _about(self) -> dict[str, Any]:
        return {
            **{"kind": KIND, "schema": SCHEMA},
            **{field: getattr(self, field) for field in _PLAIN},
            "probes": {name: _described(batch) for name, batch in self.probes.items()},
            "outputs": {
                name: {path: array.dtype.kind for path, array in outputs.items()}
                for name, outputs in self.outputs.items()
            },
            "batches": [_described(batch) for batch in self.batches],
            "states": len(self.states),
            "weights": list(self.weights),
            "gradients": list(self.gradients),
            "moments": list(self.states[0].first),
            "purity": {name: dataclasses.asdict(found) for name, found in self.purity.items()},
        }

    def _tensors(self) -> Leaves:
        named = {"weights": self.weights, "gradient": self.gradients, "final": self.final}
        for number, (name, batch) in enumerate(self.probes.items()):
            named[f"probe/{number}/input"] = _arrays(batch)
            outputs = self.outputs[name].items()
            named[f"probe/{number}/output"] = {path: _as_reals(x) for path, x in outputs}
        for number, batch in enumerate(self.batches):
            named[f"batch/{number}/input"] = _arrays(batch)
        for number, state in enumerate(self.states):
            for kind in ("after", "first", "second"):
                named[f"step/{number}/{kind}"] = getattr(state, kind)
        found = {
            f"{group}/{name}".removesuffix("/"): x  # an output that is one array has no path
            for group in named
            for name, x in named[group].items()
        }
        counts = np.array([-1 if x.count is None else x.count for x in self.states])
        return found | {"loss": np.array(self.loss), "losses": self.losses, "counts": counts}


def read(path: Path) -> Golden:
    """Return the golden in a file of `Golden.write`.

    Raises:
        ValueError: for a file that is missing, truncated, of another kind or schema, or without
            all of its tensors in their shapes; in one line.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            about = json.loads((file.metadata() or {}).get(_ABOUT, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError as error:
        raise ValueError(
            f"golden {path}: no such file. A golden is what `parity record` wrote. Name one."
        ) from error
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"golden {path}: cannot be read ({reason}). The file is truncated, damaged or no "
            "safetensors file. Record it again."
        ) from error
    if not isinstance(about, dict) or about.get("kind") != KIND:
        raise ValueError(
            f"golden {path}: written by something else. A golden is what `parity record` wrote. "
            "Name one."
        )
    if about.get("schema") != SCHEMA:
        raise ValueError(
            f"golden {path}: schema {about.get('schema')}, and this program reads {SCHEMA}. "
            "Record it again with this version."
        )
    try:
        return _golden(path, about, _Tensors(tensors))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"golden {path}: damaged metadata ({error}). Record it again.") from error


class _Tensors:
    """Tensors of a file by name, each to be read once, and the problems found."""

    def __init__(self, found: Leaves):
        self._found, self._left = found, dict(found)
        self.problems: list[str] = []

    def get(self, name: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
        """Return a tensor, or note a problem and return an empty one if its shape is another."""
        if name not in self._left:
            self.problems.append(f"{name} is missing")
            return np.zeros(0)
        tensor = self._left.pop(name)
        if shape is not None and tensor.shape != shape:
            self.problems.append(f"{name} is {list(tensor.shape)}, not {list(shape)}")
            return np.zeros(0)
        return tensor

    def outputs(self, group: str, kinds: dict[str, str]) -> Outputs:
        """Return an output, whose leaves have these kinds of numbers."""
        found = {path: self.get(f"{group}/{path}".removesuffix("/")) for path in kinds}
        as_complex = {path: x for path, x in found.items() if kinds[path] == "c" and x.size}
        return found | {path: x.view(np.complex128)[..., 0] for path, x in as_complex.items()}

    def leaves(self, group: str, names: list[str]) -> Leaves:
        """Return the tensors of a group, each in the shape of the weights of its name."""
        shapes = {name: x.shape for name, x in self._found.items()}
        return {name: self.get(f"{group}/{name}", shapes.get(f"weights/{name}")) for name in names}

    def batch(self, group: str, described: list[Any]) -> Batch:
        """Return the arguments of a group."""

        def argument(described: Any) -> Argument:
            kind, value = described
            if kind == "array":
                return self.get(f"{group}/input/{value}")
            if kind == "dict":
                return {name: argument(x) for name, x in value.items()}
            if kind == "fixed":
                return value
            return {"list": list, "tuple": tuple}[kind](map(argument, value))

        inputs, keywords = described
        positions, names = argument(inputs), argument(keywords)
        assert isinstance(positions, tuple) and isinstance(names, dict), "as `_described` writes"
        return Batch(positions, keywords=names)

    def require_all(self, path: Path) -> None:
        """Refuse a file with problems, or with tensors that were not read."""
        problems = self.problems + [f"{name} is unknown" for name in self._left]
        if problems:
            more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise ValueError(
                f"golden {path}: {'; '.join(problems[:5])}{more}. A golden has the tensors that "
                "its metadata lists. Record it again."
            )


def _golden(path: Path, about: dict[str, Any], tensors: _Tensors) -> Golden:
    probes = list(enumerate(about["probes"].items()))
    counts = tensors.get("counts", (about["states"],))
    weights = tensors.leaves("weights", about["weights"])
    states = []
    for number in range(about["states"]):
        after = tensors.leaves(f"step/{number}/after", about["weights"])
        first, second = (
            tensors.leaves(f"step/{number}/{kind}", about["moments"])
            for kind in ("first", "second")
        )
        count = int(counts[number]) if counts.size else 0
        states.append(State(after, first, second, None if count < 0 else count))
    golden = Golden(
        **{field: about[field] for field in _PLAIN},
        weights=weights,
        probes={name: tensors.batch(f"probe/{n}", inputs) for n, (name, inputs) in probes},
        outputs={
            name: tensors.outputs(f"probe/{n}/output", about["outputs"][name])
            for n, (name, _) in probes
        },
        loss=float(np.sum(tensors.get("loss", ()))),
        gradients=tensors.leaves("gradient", about["gradients"]),
        batches=tuple(tensors.batch(f"batch/{n}", x) for n, x in enumerate(about["batches"])),
        losses=tensors.get("losses", (len(about["batches"]),)),
        states=tuple(states),
        final=tensors.leaves("final", about["weights"]),
        purity={name: Purity(**found) for name, found in about["purity"].items()},
    )
    tensors.require_all(path)
    return golden


def _as_reals(array: np.ndarray) -> np.ndarray:
    """Return complex numbers as pairs of float64, which a file can hold, and others as they are."""
    if array.dtype.kind != "c":
        return array
    return np.stack([array.real, array.imag], -1).astype(np.float64)


def _arrays(batch: Batch) -> Leaves:
    """Return the arrays among the arguments of a call, by number."""
    arrays = [x for x in leaves_of((batch.inputs, batch.keywords)) if isinstance(x, np.ndarray)]
    return {str(place): cast_array(x, "float64") for place, x in enumerate(arrays)}


def _described(batch: Batch) -> list[object]:
    """Describe the arguments of a call, with the numbers of `_arrays` in place of arrays."""
    numbers = itertools.count()

    def described(value: Argument) -> list[object]:
        if isinstance(value, np.ndarray):
            return ["array", next(numbers)]
        if isinstance(value, Mapping):  # in the order of `leaves_of`
            return ["dict", {name: described(value[name]) for name in sorted(value, key=str)}]
        if isinstance(value, tuple | list):
            return ["tuple" if isinstance(value, tuple) else "list", list(map(described, value))]
        return ["fixed", value]

    return [described(batch.inputs), described(batch.keywords)]
