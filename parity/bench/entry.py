"""The decoders of one prompt, made ready and run once before they are timed."""

import dataclasses
import functools
import time

import numpy as np

import flax_gpt
import torch_gpt
from parity.bench.agreement import Reference
from parity.bench.decoders.flax import FlaxLoop, FlaxStep, flax_naive, flax_step
from parity.bench.decoders.peers import Peers
from parity.bench.decoders.protocol import Decoder, DecodeTask
from parity.bench.decoders.torch import TorchStep, torch_in_place, torch_step
from parity.bench.decoders.twins import Uncached
from parity.bench.machine import Compilations, MemoryGrowth
from parity.bench.names import LIBRARIES
from parity.bench.result import Decoding, Tie
from parity.system.devices import Devices
from parity.twins.flax import FlaxTwin
from parity.twins.torch import TorchTwin
from parity.weights.randomize import randomized

SEED = 0  # of weights and prompts
# A round has fewer steps where it would take longer than this, in seconds.
_ROUND_S = 2.5
# The prompt is read again up to this total, in seconds, and at most this often.
PREFILLS_S, PREFILLS = 2.0, 3
_LOUD = 16.0  # times the size of other embeddings


@dataclasses.dataclass(frozen=True)
class TwinModels:
    """The twins with the same weights."""

    flax: FlaxTwin
    torch: TorchTwin

    @property
    def config(self) -> flax_gpt.GPTConfig:
        """Of either model."""
        return self.flax.config

    def task(self, rows: int, prompt_length: int, num_steps: int) -> DecodeTask:
        """Draw a prompt to continue."""
        rng = np.random.default_rng((SEED, 1))
        shape = rows, prompt_length
        prompt_BT = rng.integers(0, self.config.vocab_size, shape, dtype=np.int32)
        return DecodeTask(self.config, prompt_BT, num_steps, self.torch.device)


def twin_models(config: flax_gpt.GPTConfig, devices: Devices) -> TwinModels:
    """Return the twins with weights of which every one matters.

    Positions are made loud, or else one token would follow itself for ever, whatever the cache
    holds, and equal tokens would say little.
    """
    twin = FlaxTwin.build(config, devices.flax)
    leaves = randomized(twin.leaves(), SEED)
    table = leaves["position_embedding.embedding"]
    leaves["position_embedding.embedding"] = (table * _LOUD).astype(table.dtype)
    twin.load(leaves)
    return TwinModels(twin, TorchTwin.build(config, devices.torch, leaves=leaves.items()))


class Entry:
    """A decoder that has run once and written tokens (B, G), and what is known of it so far."""

    def __init__(self, decoder: Decoder, first: Decoding, num_steps: int, tokens_BG: np.ndarray):
        self.decoder, self.num_steps, self.tokens_BG = decoder, num_steps, tokens_BG
        self._first, self._num_compiled, self.spent_s = first, 0, 0.0
        self._rounds_s: list[float] = []
        self._ties: dict[tuple[int, int], Tie] = {}

    def compare(self, reference: Reference, tokens_BG: np.ndarray) -> None:
        """Compare tokens, and keep where they differ by a tie."""
        for tie in reference.compare(self.decoder.name, tokens_BG):
            self._ties[tie.row, tie.number] = tie

    def time_round(self, reference: Reference) -> None:
        """Take one turn, whose tokens are compared again."""
        start = time.perf_counter()
        with Compilations() as compilations:
            found = self.decoder.timed_steps(self.num_steps)
        self.spent_s += time.perf_counter() - start
        self._num_compiled += compilations.count
        self._rounds_s.append(found.seconds / self.num_steps)
        self.compare(reference, found.tokens_BG)

    def result(self) -> Decoding:
        """Return everything that is known."""
        return dataclasses.replace(
            self._first,
            steps_per_round=self.num_steps,
            rounds_s=tuple(self._rounds_s),
            tokens_compared=self.tokens_BG.size,
            ties=tuple(self._ties.values()),
            programs_compiled_after_warm_up=self._num_compiled,
        )


class Decoders:
    """The decoders of one task, made when they are asked for."""

    def __init__(self, twins: TwinModels, peers: Peers, task: DecodeTask):
        self._twins, self._peers, self._task = twins, peers, task

    @functools.cached_property
    def flax_decoder(self) -> flax_gpt.Decoder:
        """The Flax twin made ready for the task's batch size."""
        return flax_gpt.Decoder(self._twins.flax.model, self._task.batch_size)

    @functools.cached_property
    def torch_decoder(self) -> torch_gpt.Decoder:
        """The PyTorch twin made ready for the task's batch size."""
        return torch_gpt.Decoder(self._twins.torch.model, self._task.batch_size)

    @functools.cached_property
    def flax_step(self) -> FlaxStep:
        """The Flax twin's step."""
        return flax_step(self.flax_decoder, self._task)

    @functools.cached_property
    def torch_step(self) -> TorchStep:
        """The PyTorch twin's step."""
        return torch_step(self.torch_decoder, self._task)

    @functools.cached_property
    def torch_in_place(self) -> TorchStep:
        """The PyTorch twin's layers without a handle."""
        return torch_in_place(self.torch_decoder.model, self.torch_step)

    def make(self, name: str) -> Decoder:
        """Make a decoder; `Unavailable` if it cannot run here."""
        match name:
            case "flax step":
                return self.flax_step
            case "flax loop":
                return FlaxLoop(self.flax_decoder, self._task)
            case "flax uncached":
                return Uncached(self._twins.flax, self._task)
            case "flax naive":
                return flax_naive(self._twins.flax.model, self.flax_step)
            case "torch step":
                return self.torch_step
            case "torch uncached":
                return Uncached(self._twins.torch, self._task)
            case "torch in place":
                return self.torch_in_place
        return self._peers.make(name, self._task)

    def set_up(self, name: str) -> Entry:
        """Make a decoder and run it once, watching memory and compilation; raises as `make`."""
        pid = self._peers.worker(name).pid if name.split()[0] in LIBRARIES else None
        with MemoryGrowth(self._task.device, pid) as memory:
            decoder = self.make(name)
            decoder.prefill()
            # Without a cache a token is a whole prefill, so a round is as short as it can be.
            num_steps = 1 if decoder.form == "uncached" else self._task.num_steps
            with Compilations() as writing:
                warm = decoder.timed_steps(num_steps)
        compile_s = writing.seconds if name.startswith("flax") else None
        prefills_s: list[float] = []
        while decoder.reads_prompt and len(prefills_s) < PREFILLS and sum(prefills_s) < PREFILLS_S:
            start = time.perf_counter()
            decoder.prefill()
            prefills_s.append(time.perf_counter() - start)
        if decoder.form != "uncached":
            few = min(2, num_steps)
            step_s = decoder.timed_steps(few).seconds / few
            if name == "torch step" and self._task.device.type != "cpu":
                compile_s = max(0.0, warm.seconds - num_steps * step_s)
            num_steps = max(1, min(num_steps, int(_ROUND_S / step_s)))
            if num_steps < self._task.num_steps:
                decoder.timed_steps(num_steps)  # compile for this number before it is timed
        first = Decoding(
            name=name,
            ran=decoder.ran,
            form=decoder.form,
            compile_s=compile_s,
            prefills_s=tuple(prefills_s),
            memory_bytes=memory.num_bytes,
            extra_weight_bytes=decoder.extra_weight_bytes,
        )
        return Entry(decoder, first, num_steps, warm.tokens_BG)
