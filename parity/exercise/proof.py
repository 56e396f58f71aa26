"""The proof of the exercise: a Flax and a PyTorch starter, both repaired, are one function.

Both folders are loaded into one process of the sandbox, where `parity check` compares them like any
other pair. The report comes back as JSON.
"""

import contextlib
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import torch

import parity
from parity.check.check import check
from parity.exercise import sandbox
from parity.exercise.inside import driver, in_flax, in_torch
from parity.exercise.inside.probes import Array, Model, Starter, Values, logits_of
from parity.exercise.plants import files
from parity.exercise.starter import read_exercise
from parity.frameworks.batch import Batch
from parity.frameworks.flax.leaves import flax_leaves
from parity.frameworks.leaves import Leaves
from parity.frameworks.protocols import Calls, Decoder, Moments, Trainer
from parity.frameworks.spec import ModelSpec
from parity.frameworks.torch.leaves import torch_leaves
from parity.pair.pair import Pair
from parity.report import Divergence, Level, Report
from parity.report.record import Record, Verdict
from parity.weights.tables import TWINS

STEPS = 100
# Small enough that rounding does not grow: the check's weights are larger than initial ones.
LEARNING_RATE = 0.02
SECONDS = 600.0

_LEVELS = "weights", "logits", "gradients", "trajectory"
_WITH_CACHE = *_LEVELS, "cache", "tokens"
_PROMPT, _NEW, _PIECE = 8, 24, 8
_LARGEST_REPORT = 16 << 20


def check_two(folders: Sequence[Path]) -> dict[str, Path]:
    """Sort exercise folders by framework.

    Args:
        folders: one or two.

    Returns:
        The folders by framework.

    Raises:
        ValueError: one is no exercise, or two are of the same framework.
    """
    found = [(read_exercise(folder).framework, Path(folder)) for folder in folders]
    if len(dict(found)) < len(found):
        raise ValueError(
            f"grade: {folders[0]} and {folders[1]} are both {found[0][0]}. Two folders are "
            "compared across frameworks. Give one of flax and one of torch."
        )
    return dict(found)


def prove(flax_folder: Path | str, torch_folder: Path | str) -> Report:
    """Check two starters against each other, in float64.

    Bugs that both have are no difference: grade them first.

    Args:
        flax_folder: of the Flax starter.
        torch_folder: of the PyTorch starter.

    Returns:
        The report of a check of weights, logits, gradients and the loss curve; of cache and tokens
        too where both have part 2.

    Raises:
        ValueError: one of the two cannot be loaded.
    """
    with sandbox.workspace(Path(flax_folder), Path(torch_folder)) as (folder, copies):
        job, result = folder / "job.json", folder / "report.json"
        paths = {"flax": str(copies[0]), "torch": str(copies[1]), "result": str(result)}
        job.write_text(json.dumps(paths), encoding="utf-8")
        root = str(Path(parity.__file__).parents[1])
        code = (
            f"import sys; sys.path.insert(0, {root!r})\n"
            "from parity.exercise.proof import main\n"
            f"main({str(job)!r})\n"
        )
        ending = sandbox.run(code, folder, SECONDS)
        if ending or not result.is_file() or result.stat().st_size > _LARGEST_REPORT:
            raise ValueError(
                f"prove: {ending or 'no report was written'}. Both folders are imported. Run "
                "`python train.py` in each."
            )
        return _report(json.loads(result.read_text(encoding="utf-8")))


def main(job_file: str) -> None:
    """Check two starters, in the sandbox."""
    driver.limit(sandbox.LIMITS)
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    jax.config.update("jax_disable_most_optimizations", True)  # compiles twice as fast
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    made = pair(_imported(Path(job["flax"])), _imported(Path(job["torch"])))
    levels = _LEVELS if made.prompts is None else _WITH_CACHE
    report = check(made, levels=levels, dtypes=("float64",), steps=STEPS)
    Path(job["result"]).write_text(report.to_json(), encoding="utf-8")


def pair(flax_starter: Starter, torch_starter: Starter) -> Pair:
    """Make the pair of two starters, of the size and with the sentence of the exercise."""
    right = driver.loaded(files("torch"))
    tokens = np.array(right.train.encode(right.train.SENTENCE), np.int32)
    tokens = tokens.reshape(right.train.ROWS, -1)
    width = tokens.shape[1]
    sizes = dict(context_length=width, embed_dim=32, num_layers=2, num_heads=4, mlp_dim=96)
    sizes["vocab_size"] = len(right.train.VOCABULARY)
    cached = _has_cache(flax_starter, in_flax, sizes) and _has_cache(torch_starter, in_torch, sizes)
    return Pair(
        flax=_spec("the Flax starter", flax_starter, in_flax, flax_leaves, sizes, cached),
        torch=_spec("the PyTorch starter", torch_starter, in_torch, torch_leaves, sizes, cached),
        rules=TWINS,
        probes={
            "the sentence": Batch((tokens,)),
            "context - 1": Batch((tokens[:1, 1:],)),
            "one token": Batch((tokens[:, :1],)),
        },
        training_batch=lambda step: Batch((tokens,)),
        learning_rate=LEARNING_RATE,
        prompts=(tokens[:, :_PROMPT], np.array([_PROMPT, 1], np.int32)) if cached else None,
        new_tokens=_NEW,
        sequences=(tokens[:1], np.array([width], np.int32)) if cached else None,
        config=sizes,
    )


def _spec(
    name: str,
    modules: Starter,
    framework: ModuleType,
    leaves: Callable[[Model], Leaves],
    sizes: dict[str, int],
    cached: bool,
) -> ModelSpec:
    """Describe one starter to the check."""

    def build(dtype: str) -> Model:
        before = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, dtype))
        try:
            return modules.model.GPT(modules.model.Config(**sizes), seed=0)
        finally:
            torch.set_default_dtype(before)

    def trained(model: Model, tokens: np.ndarray, num_steps: int) -> list[float]:
        return modules.train.train(model, framework.ids(tokens), num_steps, LEARNING_RATE)

    return ModelSpec(
        name=name,
        build=build,
        forward=_logits,
        loss=lambda model, tokens: modules.train.next_token_loss(_logits(model, tokens), tokens),
        trainer=lambda model, num_steps: _Trainer(model, num_steps, trained, leaves),
        decoder=(lambda model: _Decoder(modules, model, framework)) if cached else None,
    )


def _logits(model: Model, tokens: Array, counts: Array = None) -> Array:
    """Return logits; padding is on the right, where no token looks."""
    return logits_of(model(tokens))


class _Trainer(Trainer):
    """A whole training on one batch as the steps that the check asks for."""

    def __init__(
        self,
        model: Model,
        num_steps: int,
        trained: Callable[[Model, np.ndarray, int], list[float]],
        leaves: Callable[[Model], Leaves],
    ):
        self._model, self._num_steps = model, num_steps
        self._trained, self._leaves = trained, leaves
        self._losses: Iterator[float] | None = None

    def step(self, *inputs: np.ndarray) -> float:
        """Return the loss before the next step."""
        if self._losses is None:
            self._losses = iter(self._trained(self._model, inputs[0], self._num_steps))
        return float(next(self._losses, np.nan))

    def parameters(self) -> Leaves:
        """Return the weights after the last step."""
        return self._leaves(self._model)

    def moments(self) -> Moments:
        """Return none: a starter's optimizer stays inside of its training."""
        return {}, {}, 0


class _Decoder(Decoder):
    """Reading in pieces and greedy tokens, row by row: a starter's cache has one length."""

    def __init__(self, modules: Starter, model: Model, framework: ModuleType):
        self._modules, self._model, self._framework = modules, model, framework

    def chunks(self, calls: Calls, capacity: int) -> list[np.ndarray]:
        """Return the logits of each call (tokens (1, T), counts (1,)), with one cache for all."""
        cache = self._modules.cache.KVCache.empty(self._model.config, 1)
        found = []
        for tokens, (count,) in calls:
            out, start = np.zeros((*tokens.shape, self._model.config.vocab_size)), 0
            while start < count:  # in two widths only, for jax compiles each
                stop = start + (_PIECE if count - start >= _PIECE else 1)
                logits, cache = self._model(self._framework.ids(tokens[:, start:stop]), cache)
                out[:, start:stop] = self._framework.array(logits)
                start = stop
            found.append(out)
        return found

    def generate(
        self, tokens: np.ndarray, counts: np.ndarray, max_new_tokens: int, use_cache: bool
    ) -> np.ndarray:
        """Return greedy tokens (B, G)."""
        generate = self._modules.generate
        call = generate.generate_cached if use_cache else generate.generate
        ids, array = self._framework.ids, self._framework.array
        rows = [
            array(call(self._model, ids(row[None, :count]), max_new_tokens))[0, count:]
            for row, count in zip(tokens, counts, strict=True)
        ]
        return np.stack(rows).astype(np.int32)

    def sample(self, *_: object, **__: object) -> tuple[np.ndarray, np.ndarray]:
        """Refuse, for the proof compares greedy tokens alone.

        Raises:
            ValueError: always.
        """
        raise ValueError("starter: it draws no tokens. Compare greedy ones.")


def _has_cache(modules: Starter, framework: ModuleType, sizes: dict[str, int]) -> bool:
    model = modules.model.GPT(modules.model.Config(**sizes), seed=0)
    try:
        modules.generate.generate_cached(model, framework.ids(np.zeros((1, 1), np.int32)), 1)
    except NotImplementedError:
        return False
    return True


def _imported(folder: Path) -> Starter:
    """Import a folder's files, apart from another folder's files of the same names."""
    sys.path.insert(0, str(folder))
    try:
        return Starter(**{name: importlib.import_module(name) for name in driver.NAMES})
    finally:
        sys.path.remove(str(folder))
        for name, module in list(sys.modules.items()):
            if Path(getattr(module, "__file__", None) or "/").parent == folder:
                del sys.modules[name]


def _report(document: Values) -> Report:
    """Read what `Report.to_json` wrote."""

    def number(value: object) -> object:
        with contextlib.suppress(ValueError):
            return float(value) if isinstance(value, str) else value
        return value

    def record(fields: Values) -> Record:
        wide: Values = {name: number(fields[name]) for name in ("value", "bound", "noise")}
        return Record(**(fields | wide | {"verdict": Verdict(fields["verdict"])}))

    levels = tuple(
        Level(
            level["name"],
            level["seconds"],
            tuple(record(fields) for fields in level["records"]),
            level["verdict"] == Verdict.BLOCKED,
        )
        for level in document["levels"]
    )
    divergence = document["divergence"]
    if divergence is not None:
        divergence = Divergence(**(divergence | {"value": number(divergence["value"])}))
    return Report(document["environment"], document["subject"], levels, divergence)
