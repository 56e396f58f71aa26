"""Other systems with the same weights: transformers and CTranslate2, where they are installed.

Both are timed from inside: one passes each token to a streamer, the other to a callback, so that
reading the prompt and writing behind it come apart although a single call does both. Each library
has a process of its own, so what it needs travels as a file and plain values.
"""

import contextlib
import dataclasses
import importlib.util
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file

import flax_gpt
from parity.bench.aside import Aside, Room
from parity.bench.contenders import Cell, Turn
from parity.bench.steps import Unavailable
from parity.frameworks.flax.leaves import flax_leaves
from parity.frameworks.leaves import Leaves
from parity.frameworks.torch.leaves import load_torch, torch_leaves
from parity.weights.tables import HF_GPT2
from parity.weights.weight_map import resolve

LIBRARIES = "transformers", "ctranslate2"

_END = "<end>"
# Added to the logit of a token that must never be chosen. Not -inf, which makes NaN of a zero.
_NEVER = -1e30


@dataclasses.dataclass(frozen=True)
class Task:
    """What a peer is to do.

    Attributes:
        weights: a file of the flax twin's leaves.
        config: of the model.
        prompt_BT: token ids.
        context: tokens of a row when a full turn ends.
        device: where torch runs.
    """

    weights: Path
    config: flax_gpt.GPTConfig
    prompt_BT: np.ndarray
    context: int
    device: torch.device

    def leaves(self) -> Leaves:
        """The weights, with as many positions as are needed: tables of peers grow with these."""
        leaves = load_file(self.weights)
        name = "position_embedding.embedding"
        return leaves | {name: np.ascontiguousarray(leaves[name][: self.context + 1])}


class Peers:
    """All peers, a process for each library, which starts when it is first wanted. For a `with`.

    Args:
        model: the flax twin, whose weights they get.
    """

    def __init__(self, model: nnx.Module):
        self._model = model
        self._stack = contextlib.ExitStack()
        self._rooms: dict[str, Room] = {}
        self._weights: Path | None = None

    def __enter__(self) -> "Peers":
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def room(self, name: str) -> Room:
        """The process of a peer.

        Raises:
            Unavailable: when its library is not installed.
        """
        library = name.split()[0]
        if importlib.util.find_spec(library) is None:
            raise Unavailable(f"{library} is not installed; pip install 'parity-gpt[bench]'")
        if library not in self._rooms:
            self._rooms[library] = self._stack.enter_context(Room(library))
        return self._rooms[library]

    def make(self, name: str, cell: Cell) -> Aside:
        """A peer by its name.

        Raises:
            Unavailable: when it cannot do what is asked.
        """
        room = self.room(name)
        if self._weights is None:
            folder = self._stack.enter_context(tempfile.TemporaryDirectory())
            self._weights = Path(folder) / "weights.safetensors"
            save_file(flax_leaves(self._model), self._weights)
        task = Task(self._weights, cell.config, cell.prompt_BT, cell.context, cell.devices.torch)
        if name == "ctranslate2":
            return room.make(CTranslate2, task)
        return room.make(Transformers, task, name.endswith("static"))

    def clear(self) -> None:
        """Ends what was made."""
        for room in self._rooms.values():
            room.clear()


class Transformers:
    """`generate` of transformers' GPT2LMHeadModel, eager, with one of its caches.

    Args:
        task: what is decoded.
        static: whether its cache has a fixed size, all of which every token reads.

    Raises:
        Unavailable: for a version that its weights do not fill.
    """

    framework = "transformers"
    form = "cached"
    reads = True

    def __init__(self, task: Task, static: bool):
        from transformers import (
            DynamicCache,
            GenerationConfig,
            GPT2Config,
            GPT2LMHeadModel,
            StaticCache,
        )

        config = task.config
        self.name = "transformers static" if static else "transformers"
        self.ran = (
            f"GPT2LMHeadModel.generate, eager, {'StaticCache' if static else 'DynamicCache'}, "
            "from one streamed token to the last"
        )
        self._static, self._device = static, task.device
        theirs = GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=task.context + 1,
            n_embd=config.embed_dim,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            n_inner=config.mlp_dim,
            activation_function="gelu_new",
            layer_norm_epsilon=config.norm_epsilon,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
        with torch.device("meta"):  # nothing is drawn that would be written over
            self._model = GPT2LMHeadModel(theirs).to(getattr(torch, config.dtype)).eval()
        self._model.to_empty(device="cpu").tie_weights()
        for weight in self._model.parameters():
            torch.nn.init.zeros_(weight)  # left as it is, memory may hold what nobody can compare
        _transplant(task.leaves(), self._model)
        self._model.to(self._device)
        self.extra_bytes = sum(x.nbytes for x in self._model.parameters())
        self._model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
        self._prompt_BT = torch.from_numpy(task.prompt_BT).long().to(self._device)
        self._mask_BT = torch.ones_like(self._prompt_BT)
        self._new_cache = (
            (lambda: StaticCache(config=theirs, max_cache_len=task.context))
            if static
            else (lambda: DynamicCache(config=theirs))
        )
        self._cache = None

    def prefill(self) -> None:
        """Reads the prompt and chooses one token."""
        self._cache = self._new_cache()
        self._generate(1)
        self._wait()

    def turn(self, num_steps: int) -> Turn:
        """The cache is cut back to the prompt but for its last token, with which `generate` goes
        on; the clock starts when it passes on the token behind it."""
        self._cut_back()
        self._wait()
        clock = self._generate(num_steps + 1)
        return Turn(np.stack(clock.tokens, axis=1), clock.times[-1] - clock.times[0])

    def _generate(self, num_tokens: int) -> "_Clock":
        clock = _Clock()
        with torch.no_grad():
            self._model.generate(
                self._prompt_BT,
                attention_mask=self._mask_BT,
                past_key_values=self._cache,
                max_new_tokens=num_tokens,
                streamer=clock,
            )
        return clock

    def _cut_back(self) -> None:
        held = self._prompt_BT.shape[1] - 1
        if self._static:
            for layer in self._cache.layers:
                layer.cumulative_length.fill_(held)
        else:
            self._cache.crop(held - self._cache.get_seq_length())

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class _Clock:
    """What transformers calls a streamer: told the prompt, then each token of all rows."""

    def __init__(self):
        self.tokens: list[np.ndarray] = []
        self.times: list[float] = []
        self._prompt = True

    def put(self, tokens: torch.Tensor) -> None:
        """Notes when a token came, which is on the host by then."""
        if self._prompt:
            self._prompt = False
            return
        self.times.append(time.perf_counter())
        self.tokens.append(tokens.numpy().copy())

    def end(self) -> None:
        """Nothing is left to do."""


class CTranslate2:
    """`generate_batch` of a CTranslate2 Generator in float32, on the CPU.

    Args:
        task: what is decoded.

    Raises:
        Unavailable: for another dtype or device.
    """

    name = "ctranslate2"
    framework = "ctranslate2"
    form = "cached"
    reads = True
    ran = "Generator.generate_batch, greedy, float32, from one callback to the last"

    def __init__(self, task: Task):
        if task.config.dtype != "float32" or task.device.type != "cpu":
            raise Unavailable("is measured in float32 on a CPU alone")
        import ctranslate2

        with tempfile.TemporaryDirectory() as folder:
            _write_ctranslate2(task.leaves(), task.config, Path(folder))
            self.extra_bytes = (Path(folder) / "model.bin").stat().st_size
            self._generator = ctranslate2.Generator(
                folder, compute_type="float32", intra_threads=torch.get_num_threads()
            )
        self._rows = [[str(token) for token in row] for row in task.prompt_BT]
        # One row: the state behind all tokens but the last is kept between calls. More rows would
        # have to begin with the same tokens, so they are read again.
        self._head = self._rows[0][:-1] if len(self._rows) == 1 else None

    def prefill(self) -> None:
        """Reads the prompts and chooses a token for each."""
        self._generate(1, self._rows, None)

    def turn(self, num_steps: int) -> Turn:
        """The clock starts when the token behind the prompt is passed on."""
        if self._head is None:
            return self._generate(num_steps + 1, self._rows, None)
        self._generate(1, [self._rows[0][-1:]], self._head)
        return self._generate(num_steps + 1, [self._rows[0][-1:]], self._head)

    def _generate(self, num_tokens: int, rows: list[list[str]], head: list[str] | None) -> Turn:
        tokens: list[list[int]] = [[] for _ in rows]
        times: list[float] = []

        def note(result) -> bool:
            tokens[result.batch_id].append(result.token_id)
            times.append(time.perf_counter())
            return False

        self._generator.generate_batch(
            rows, max_length=num_tokens, sampling_topk=1, include_prompt_in_result=False,
            static_prompt=head, end_token=_END, callback=note,
        )  # fmt: skip
        # It is told of each row in turn, so the first step ends with the last row's call.
        return Turn(np.array(tokens), times[-1] - times[len(rows) - 1])


def _transplant(leaves: Leaves, target: torch.nn.Module) -> None:
    """Copies leaves into a GPT2LMHeadModel that was never filled.

    Raises:
        Unavailable: for a version with buffers, which weights do not fill.
    """
    buffers = [name for name, _ in target.named_buffers()]
    if buffers:
        raise Unavailable(
            f"this transformers has buffers in GPT-2 ({buffers[0]}); take 5.23 or newer"
        )
    theirs = torch_leaves(target)
    weight_map = resolve(HF_GPT2, theirs, leaves)
    kept = {name: theirs[name] for name in weight_map.ignored}
    load_torch(target, weight_map.to_torch(leaves) | kept)


def _write_ctranslate2(leaves: Leaves, config: flax_gpt.GPTConfig, folder: Path) -> None:
    """Weights as the folder that a Generator loads.

    Its vocabulary has one token more than the model, which ends a text and never comes: a bias in
    front of the choice forbids it, so every text is as long as was asked for.
    """
    from ctranslate2.specs import common_spec, transformer_spec

    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        config.num_layers,
        config.num_heads,
        pre_norm=True,
        activation=common_spec.Activation.GELUTanh,
    )
    decoder = spec.decoder
    decoder.scale_embeddings = False
    table_VD = leaves["token_embedding.embedding"]
    table_VD = np.concatenate([table_VD, np.zeros_like(table_VD[:1])])
    decoder.embeddings.weight = decoder.projection.weight = table_VD
    decoder.projection.bias = np.zeros(len(table_VD), np.float32)
    decoder.projection.bias[-1] = _NEVER
    decoder.position_encodings.encodings = leaves["position_embedding.embedding"]
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
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = _END
    spec.config.layer_norm_epsilon = config.norm_epsilon
    spec.validate()
    spec.optimize(quantization="float32")
    spec.save(str(folder))
    written = json.loads((folder / "config.json").read_text())
    if written.get("layer_norm_epsilon") != config.norm_epsilon:
        raise Unavailable(f"cannot be told the norm's epsilon, {config.norm_epsilon}")


def _norm(spec, leaves, name: str) -> None:
    spec.gamma, spec.beta = leaves[f"{name}.scale"], leaves[f"{name}.bias"]


def _linear(spec, leaves, *names: str) -> None:
    """One linear layer from one of the twin's or several, side by side; it wants (out, in)."""
    kernel = np.concatenate([leaves[f"{name}.kernel"] for name in names], axis=1)
    spec.weight = np.ascontiguousarray(kernel.T)
    spec.bias = np.concatenate([leaves[f"{name}.bias"] for name in names])
