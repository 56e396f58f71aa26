"""Other systems with the same weights, where they are installed: transformers and CTranslate2.

Both are timed from inside, through a streamer or a callback that receives each token, so that
reading the prompt is separated from writing although a single call does both. Each library runs in
a process of its own; the weights reach it as a file.
"""

import contextlib
import importlib.util
import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

import flax_gpt
from parity.bench.decoders.protocol import DecodeTask, TimedTokens
from parity.bench.decoders.worker import RemoteDecoder, Worker
from parity.bench.machine import Unavailable, wait_for_torch
from parity.frameworks.leaves import Leaves
from parity.frameworks.torch.leaves import load_torch, torch_leaves
from parity.twins.flax import FlaxTwin
from parity.weights.tables import HF_GPT2
from parity.weights.weight_map import resolve

if TYPE_CHECKING:
    from ctranslate2 import GenerationStepResult
    from transformers.cache_utils import StaticLayer

_END = "<end>"
# Added to the logit of a token that must never be chosen. Not -inf, which makes NaN of a zero.
_NEVER = -1e30


class Peers:
    """All peers, with a worker per library that starts when it is first wanted. For a `with`.

    Args:
        twin: whose weights they get.
    """

    def __init__(self, twin: FlaxTwin):
        self._twin, self._stack = twin, contextlib.ExitStack()
        self._workers: dict[str, Worker] = {}
        self._weights: Path | None = None

    def __enter__(self) -> "Peers":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def worker(self, name: str) -> Worker:
        """Return the process of a peer.

        Raises:
            Unavailable: if its library is not installed.
        """
        library = name.split()[0]
        if importlib.util.find_spec(library) is None:
            raise Unavailable(f"{library} is not installed; pip install 'parity-gpt[bench]'")
        if library not in self._workers:
            self._workers[library] = self._stack.enter_context(Worker(library))
        return self._workers[library]

    def make(self, name: str, task: DecodeTask) -> RemoteDecoder:
        """Return a new peer.

        Raises:
            Unavailable: if it cannot decode the task.
        """
        if self._weights is None:
            folder = self._stack.enter_context(tempfile.TemporaryDirectory())
            self._weights = Path(folder) / "weights.safetensors"
            save_file(self._twin.leaves(), self._weights)
        if name == "ctranslate2":
            return self.worker(name).make(CTranslate2, task, self._weights)
        return self.worker(name).make(Transformers, task, self._weights, name.endswith("static"))

    def clear(self) -> None:
        """Drop the decoders that were made."""
        for worker in self._workers.values():
            worker.clear()


def _leaves(weights: Path, context: int) -> Leaves:
    """Load the weights, with only the positions needed: tables of peers grow with these."""
    leaves = load_file(weights)
    name = "position_embedding.embedding"
    return leaves | {name: np.ascontiguousarray(leaves[name][: context + 1])}


class Transformers:
    """`generate` of transformers' GPT2LMHeadModel, eager, with one of its caches.

    Args:
        task: what is decoded.
        weights: a file of the Flax twin's leaves.
        static: whether its cache has a fixed size, all of which every token reads.

    Raises:
        Unavailable: for a version of the library that the weights do not fill.
    """

    form = "cached"
    reads_prompt = True

    def __init__(self, task: DecodeTask, weights: Path, static: bool):
        from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

        config = task.config
        self.name = "transformers static" if static else "transformers"
        self.ran = (
            f"GPT2LMHeadModel.generate, eager, {'StaticCache' if static else 'DynamicCache'}, "
            "from one streamed token to the last"
        )
        self._static, self._device, self._context = static, task.device, task.context
        self._config = GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=task.context + 1,
            n_embd=config.embed_dim,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            n_inner=config.mlp_dim,
            layer_norm_epsilon=config.norm_epsilon,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
        with torch.device("meta"):  # nothing is drawn that would be written over
            self._model = GPT2LMHeadModel(self._config).to(getattr(torch, config.dtype)).eval()
        self._model.to_empty(device="cpu").tie_weights()
        for weight in self._model.parameters():
            torch.nn.init.zeros_(weight)  # left as it is, memory may hold what cannot be compared
        if buffers := [name for name, _ in self._model.named_buffers()]:
            raise Unavailable(
                f"this transformers has buffers in GPT-2 ({buffers[0]}); take 5.23 or newer"
            )
        blank, leaves = torch_leaves(self._model), _leaves(weights, task.context)
        weight_map = resolve(HF_GPT2, blank, leaves)
        kept = {name: blank[name] for name in weight_map.ignored}
        load_torch(self._model, weight_map.to_torch(leaves) | kept)
        torch.nn.Module.to(self._model, self._device)
        self.extra_weight_bytes: int | None = sum(x.nbytes for x in self._model.parameters())
        self._model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
        self._prompt_BT = torch.from_numpy(task.prompt_BT).long().to(self._device)
        self._mask_BT = torch.ones_like(self._prompt_BT)

    def prefill(self) -> None:
        """Read the prompt and choose one token."""
        from transformers import DynamicCache, StaticCache

        self._cache: StaticCache | DynamicCache
        if self._static:
            self._cache = StaticCache(config=self._config, max_cache_len=self._context)
        else:
            self._cache = DynamicCache(config=self._config)
        self._generate(1)

    def timed_steps(self, num_steps: int) -> TimedTokens:
        """Return what `generate` writes from a cache of all but the last prompt token.

        Timing starts when the first new token arrives.
        """
        from transformers import DynamicCache

        held = self._prompt_BT.shape[1] - 1
        if isinstance(self._cache, DynamicCache):
            self._cache.crop(held - self._cache.get_seq_length())
        else:
            for layer in cast("list[StaticLayer]", self._cache.layers):
                layer.cumulative_length.fill_(held)
        clock = self._generate(num_steps + 1)
        return TimedTokens(np.stack(clock.tokens, axis=1), clock.times[-1] - clock.times[0])

    def _generate(self, num_tokens: int) -> "_Clock":
        clock = _Clock()
        wait_for_torch()
        with torch.no_grad():
            options = {"attention_mask": self._mask_BT, "past_key_values": self._cache}
            options |= {"max_new_tokens": num_tokens, "streamer": clock}
            # By the stubs, no GPT-2 is a model that generates.
            self._model.generate(self._prompt_BT, **options)  # pyrefly: ignore[bad-argument-type]
        return clock


class _Clock:
    """A streamer, as transformers calls it: receives the prompt, then each token of all rows."""

    def __init__(self):
        self.tokens: list[np.ndarray] = []
        self.times: list[float] = []
        self._prompt = True

    def put(self, tokens: torch.Tensor) -> None:
        """Note when a token arrived, which is on the host by then."""
        if self._prompt:
            self._prompt = False
            return
        self.times.append(time.perf_counter())
        self.tokens.append(tokens.numpy().copy())

    def end(self) -> None:
        """Do nothing."""


class CTranslate2:
    """`generate_batch` of a CTranslate2 Generator in float32, on the CPU.

    Args:
        task: what is decoded.
        weights: a file of the Flax twin's leaves.

    Raises:
        Unavailable: for another dtype or device.
    """

    name = "ctranslate2"
    form = "cached"
    reads_prompt = True
    ran = "Generator.generate_batch, greedy, float32, from one callback to the last"

    def __init__(self, task: DecodeTask, weights: Path):
        if task.config.dtype != "float32" or task.device.type != "cpu":
            raise Unavailable("is measured in float32 on a CPU only")
        import ctranslate2

        with tempfile.TemporaryDirectory() as folder:
            _write_ctranslate2(_leaves(weights, task.context), task.config, Path(folder))
            self.extra_weight_bytes: int | None = (Path(folder) / "model.bin").stat().st_size
            self._generator = ctranslate2.Generator(
                folder, compute_type="float32", intra_threads=torch.get_num_threads()
            )
        self._rows = [[str(token) for token in row] for row in task.prompt_BT]
        # One row: the state after all tokens but the last is kept between calls. More rows would
        # have to begin with the same tokens, so they are read again.
        self._head = self._rows[0][:-1] if len(self._rows) == 1 else None

    def prefill(self) -> None:
        """Read the prompts and choose a token for each."""
        self._generate(1, self._rows, None)

    def timed_steps(self, num_steps: int) -> TimedTokens:
        """Start timing when the token after the prompt arrives."""
        if self._head is None:
            return self._generate(num_steps + 1, self._rows, None)
        self._generate(1, [self._rows[0][-1:]], self._head)
        return self._generate(num_steps + 1, [self._rows[0][-1:]], self._head)

    def _generate(
        self, num_tokens: int, rows: list[list[str]], head: list[str] | None
    ) -> TimedTokens:
        tokens: list[list[int]] = [[] for _ in rows]
        times: list[float] = []

        def note(result: "GenerationStepResult") -> bool:
            tokens[result.batch_id].append(result.token_id)
            times.append(time.perf_counter())
            return False

        self._generator.generate_batch(
            rows,
            max_length=num_tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
            static_prompt=head,
            end_token=_END,
            callback=note,
        )
        # The callback is called for each row, so the first step ends with the last row's call.
        return TimedTokens(np.array(tokens), times[-1] - times[len(rows) - 1])


def _write_ctranslate2(leaves: Leaves, config: flax_gpt.GPTConfig, folder: Path) -> None:
    """Write the weights as a folder that a Generator loads.

    Its vocabulary has one token more than the model, which would end a text. A bias on its logit
    forbids it, so that every text has the requested length.

    Raises:
        Unavailable: for a version of the library without the norm's epsilon.
    """
    from ctranslate2.specs import common_spec, transformer_spec

    gelu = common_spec.Activation.GELUTanh
    sizes = config.num_layers, config.num_heads
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(*sizes, True, gelu)
    decoder = spec.decoder
    decoder.scale_embeddings = False
    table_VD = leaves["token_embedding.embedding"]
    table_VD = np.concatenate([table_VD, np.zeros_like(table_VD[:1])])
    bias_V = np.zeros(len(table_VD), np.float32)
    bias_V[-1] = _NEVER
    _set(decoder.embeddings, weight=table_VD)
    _set(decoder.projection, weight=table_VD, bias=bias_V)
    _set(decoder.position_encodings, encodings=leaves["position_embedding.embedding"])
    _norm(decoder.layer_norm, leaves, "norm")
    for index, layer in enumerate(decoder.layer):
        block = f"blocks.{index}"
        parts = [f"{block}.attention.{part}" for part in ("query", "key", "value")]
        _norm(layer.self_attention.layer_norm, leaves, f"{block}.norm_1")
        _linear(layer.self_attention.linear[0], leaves, *parts)
        _linear(layer.self_attention.linear[1], leaves, f"{block}.attention.out")
        _norm(layer.ffn.layer_norm, leaves, f"{block}.norm_2")
        _linear(layer.ffn.linear_0, leaves, f"{block}.mlp.up")
        _linear(layer.ffn.linear_1, leaves, f"{block}.mlp.down")
    spec.register_vocabulary([*map(str, range(config.vocab_size)), _END])
    _set(spec.config, bos_token=_END, eos_token=_END, unk_token=_END)
    _set(spec.config, layer_norm_epsilon=config.norm_epsilon)
    spec.validate()
    spec.optimize(quantization="float32")
    spec.save(str(folder))
    written = json.loads((folder / "config.json").read_text())
    if written.get("layer_norm_epsilon") != config.norm_epsilon:
        raise Unavailable(f"has no option for the norm's epsilon, {config.norm_epsilon}")


def _set(spec: object, **fields: object) -> None:
    """Set fields of a layer, which are strings before they are arrays."""
    for name, value in fields.items():
        setattr(spec, name, value)


def _norm(spec: object, leaves: Leaves, name: str) -> None:
    """Copy scale and bias."""
    _set(spec, gamma=leaves[f"{name}.scale"], beta=leaves[f"{name}.bias"])


def _linear(spec: object, leaves: Leaves, *names: str) -> None:
    """Copy one of the twin's linear layers, or several side by side, as (out, in)."""
    kernel = np.concatenate([leaves[f"{name}.kernel"] for name in names], axis=1)
    bias = np.concatenate([leaves[f"{name}.bias"] for name in names])
    _set(spec, weight=np.ascontiguousarray(kernel.T), bias=bias)
