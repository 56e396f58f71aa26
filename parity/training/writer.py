"""Text from a run, by either twin or by both, which must write the same."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
import torch

import flax_gpt
import torch_gpt
from parity.check import bounds
from parity.check.metrics import max_abs
from parity.check.ties import verdict_of_flip
from parity.frameworks.flax.leaves import load_flax
from parity.frameworks.flax.scope import jax_scope
from parity.frameworks.torch.leaves import load_torch, to_numpy
from parity.pair.text import decode, encode
from parity.report.record import Verdict
from parity.system.devices import Devices, pinned_precision
from parity.training.run import FRAMEWORKS, Run
from parity.weights.tables import TWINS
from parity.weights.transplant import transplant


@dataclasses.dataclass(frozen=True)
class Written:
    """What the twins wrote behind a prompt.

    Attributes:
        texts: by framework, without the prompt.
        verdict: PASS for equal texts, TIE where they part at a margin that rounding explains.
        smallest_margin: by which a token's score beat the second best.
        smallest_at: the token where it did, from 1.
        note: where the texts part, in words; "" where they do not.
    """

    texts: dict[str, str]
    verdict: Verdict
    smallest_margin: float
    smallest_at: int
    note: str = ""


class Writer:
    """The newest weights of a run, in every framework asked for.

    Both twins get the same bits: those of flax where flax was trained, else those of torch.
    """

    def __init__(self, run: Run, devices: Devices, frameworks: Sequence[str] = FRAMEWORKS):
        found = run.load()
        if found is None:
            raise ValueError(
                f"run {run.path}: no checkpoint in it. There is nothing to write with. Train first."
            )
        _, states = found
        self.vocabulary, self._devices = run.config.vocabulary, devices
        self._dtype = run.config.model["dtype"]
        source = next(name for name in FRAMEWORKS if name in states)
        leaves = {
            name.removeprefix("parameters."): leaf
            for name, leaf in states[source].items()
            if name.startswith("parameters.")
        }
        with jax_scope(self._dtype, devices.flax):
            flax_model = flax_gpt.GPT(flax_gpt.GPTConfig(**run.config.model))
            torch_model = torch_gpt.GPT(torch_gpt.GPTConfig(**run.config.model))
            if source == "flax":
                load_flax(flax_model, leaves)
                transplant(flax_model, torch_model, TWINS)
            else:
                load_torch(torch_model, leaves)
                transplant(torch_model, flax_model, TWINS)
        models = {"flax": flax_model, "torch": torch_model.to(devices.torch).eval()}
        self._models = {name: models[name] for name in frameworks}

    def write(
        self,
        prompt: str,
        num_tokens: int,
        sampling: flax_gpt.Sampling = flax_gpt.GREEDY,
        seed: int = 0,
        use_cache: bool = True,
    ) -> Written:
        """Continues a prompt.

        Raises:
            ValueError: for characters that the run does not know, or more tokens than the context
                holds.
        """
        tokens = encode(self.vocabulary, prompt)[None, :]
        rows, margins = {}, {}
        with pinned_precision(), jax_scope(self._dtype, self._devices.flax):
            for name, model in self._models.items():
                package = flax_gpt if name == "flax" else torch_gpt
                found = package.generate(
                    model,
                    tokens if name == "flax" else torch.from_numpy(tokens).long(),
                    num_tokens,
                    use_cache=use_cache,
                    sampling=package.Sampling(**dataclasses.asdict(sampling)),
                    key=package.random.key(seed),
                )
                numpy = np.asarray if name == "flax" else to_numpy
                rows[name] = numpy(found.tokens_BG)[0].astype(np.int32)
                margins[name] = numpy(found.margins_BG)[0].astype(np.float64)
            verdict, note = self._compare(tokens[0], rows, margins, sampling)
        texts = {name: decode(self.vocabulary, row) for name, row in rows.items()}
        reference = next(iter(margins.values()))
        smallest = int(np.argmin(reference))
        return Written(texts, verdict, float(reference[smallest]), smallest + 1, note)

    def _compare(
        self,
        prompt: np.ndarray,
        rows: dict[str, np.ndarray],
        margins: dict[str, np.ndarray],
        sampling: flax_gpt.Sampling,
    ) -> tuple[Verdict, str]:
        """Whether two texts are one, and if not, whether rounding explains it."""
        if len(rows) < 2 or np.array_equal(rows["flax"], rows["torch"]):
            return Verdict.PASS, ""
        place = int(np.flatnonzero(rows["flax"] != rows["torch"])[0])
        sequence = np.concatenate([prompt, rows["flax"][:place]])[None, :]
        flax_logits, _ = self._models["flax"](jnp.asarray(sequence))
        with torch.no_grad():
            tensor = torch.from_numpy(sequence).long().to(self._devices.torch)
            torch_logits, _ = self._models["torch"](tensor)
        error = max_abs(np.asarray(flax_logits)[0, -1], to_numpy(torch_logits)[0, -1])
        margin = float(max(margins["flax"][place], margins["torch"][place]))
        bound = bounds.LOGITS.get(self._dtype, bounds.FLOAT32)
        note = f"the texts part at token {place + 1}, margin {margin:.1e}, logits {error:.1e} apart"
        return verdict_of_flip(margin, error, bound, sampling.temperature), note
