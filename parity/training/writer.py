"""Text from a run, by either twin or by both, which must write the same."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from flax_gpt import GREEDY, Sampling
from parity.check import bounds, ties
from parity.check.metrics import max_abs
from parity.pair.text import decode, encode
from parity.report.record import Verdict
from parity.system.devices import Devices, pinned_precision
from parity.training.run import Run
from parity.twins.both import build_twins
from parity.twins.names import FRAMEWORKS
from parity.twins.state import leaves_under
from parity.twins.torch import flax_named


@dataclasses.dataclass(frozen=True)
class Written:
    """What the twins wrote after a prompt.

    Attributes:
        texts: by framework, without the prompt.
        verdict: PASS for equal texts, TIE where they diverge at a margin that rounding explains.
        smallest_margin: by which a token's score beat the second best.
        smallest_at: the token where it did, from 1.
        note: where the texts diverge; "" where they do not.
    """

    texts: dict[str, str]
    verdict: Verdict
    smallest_margin: float
    smallest_at: int
    note: str = ""


class Writer:
    """The newest weights of a run in each twin.

    Both twins get the same bits: those of flax where flax was trained, else those of torch.

    Args:
        run: with a checkpoint.
        devices: where the twins are.
        frameworks: the twins that write.

    Attributes:
        vocabulary: characters, each by its id.
        twins: by framework.

    Raises:
        ValueError: for a run without a checkpoint.
    """

    def __init__(self, run: Run, devices: Devices, frameworks: Sequence[str] = FRAMEWORKS):
        found = run.load()
        if found is None:
            raise ValueError(
                f"run {run.path}: no checkpoint in it. There is nothing to write with. Train first."
            )
        _, states = found
        source = next(name for name in FRAMEWORKS if name in states)
        leaves = leaves_under("parameters.", states[source])
        if source == "torch":
            leaves = flax_named(leaves)
        self.vocabulary, self._dtype = run.config.vocabulary, run.config.model.dtype
        self.twins = build_twins(run.config.model, devices, leaves.items, frameworks)

    def write(
        self,
        prompt: str,
        num_tokens: int,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        use_cache: bool = True,
    ) -> Written:
        """Continue a prompt.

        Args:
            prompt: of characters that the run knows.
            num_tokens: to write.
            sampling: how each token is chosen.
            seed: of the draws.
            use_cache: False computes every token from the whole text.

        Returns:
            The texts and whether they are equal.

        Raises:
            ValueError: for characters that the run does not know, or more tokens than the context
                holds.
        """
        tokens = encode(self.vocabulary, prompt)[None, :]
        settings, rows, margins = dataclasses.asdict(sampling), {}, {}
        with pinned_precision():
            for name, twin in self.twins.items():
                found = twin.write(
                    tokens, num_tokens, use_cache=use_cache, sampling=settings, seed=seed
                )
                rows[name], margins[name] = found.tokens_BG[0], found.margins_BG[0]
            verdict, note = self._compare(tokens[0], rows, margins, sampling.temperature)
        texts = {name: decode(self.vocabulary, row) for name, row in rows.items()}
        reference = next(iter(margins.values()))
        smallest = int(np.argmin(reference))
        return Written(texts, verdict, float(reference[smallest]), smallest + 1, note)

    def _compare(
        self,
        prompt: np.ndarray,
        rows: dict[str, np.ndarray],
        margins: dict[str, np.ndarray],
        temperature: float,
    ) -> tuple[Verdict, str]:
        """Return whether two texts are the same, and if not, whether rounding explains it."""
        if len(rows) < 2 or np.array_equal(rows["flax"], rows["torch"]):
            return Verdict.PASS, ""
        place = int(np.flatnonzero(rows["flax"] != rows["torch"])[0])
        sequence = np.concatenate([prompt, rows["flax"][:place]])[None, :]
        error = max_abs(*(twin.logits(sequence)[0, -1] for twin in self.twins.values()))
        margin = float(max(margins["flax"][place], margins["torch"][place]))
        verdict = ties.verdict_of_flip(
            margin, error, bounds.LOGITS.get(self._dtype, bounds.OUTPUT_FLOAT32), temperature
        )
        return verdict, (
            f"the texts diverge at token {place + 1}, margin {margin:.1e}, logits {error:.1e} apart"
        )
