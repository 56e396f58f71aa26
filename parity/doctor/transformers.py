"""A causal language model of `transformers` under examination, with its own loss and cache.

Dimension key: B batch, T tokens, V vocab, G generated tokens.
"""

import copy
import inspect
from typing import Any, Self, Unpack, cast

import numpy as np
import torch
from torch import Tensor, nn

from parity.doctor.model import Array, Counts, Loss, Output
from parity.doctor.offers import Cache
from parity.doctor.probes import gap, shaken
from parity.doctor.sizes import PROBE_BT, Options
from parity.doctor.torch import TorchModel
from parity.frameworks.torch.leaves import load_torch, to_numpy, torch_leaves
from parity.weights.randomize import randomized


def is_causal_lm(module: nn.Module) -> bool:
    """Whether a module is called and generates as those of `transformers` do."""
    if not (hasattr(module, "config") and hasattr(module, "generate")):
        return False
    if getattr(module.config, "is_encoder_decoder", False):
        return False
    # A subclass may pass on what it does not name.
    named = set()
    for each in type(module).__mro__:
        if "forward" in vars(each):
            named |= set(inspect.signature(each.forward).parameters)
    return {"input_ids", "past_key_values", "labels"} <= named


class TransformersModel(TorchModel):
    """A causal language model of `transformers`.

    Args:
        module: left as it is.
        options: as of `TorchModel`; the loss is the module's own where none is given.
    """

    takes_counts = True
    ragged = bounded = False

    def __init__(self, module: nn.Module, **options: Unpack[Options]):
        super().__init__(module, **options)
        if options.get("loss") is None:
            self.ignore_index = -100
        self._shows_attention = self._attention_is_its_own()

    def forward(self, module: nn.Module, tokens_BT: Tensor, counts_B: Tensor | None) -> Output:
        """Return an output with logits (B, T, V)."""
        mask_BT = _mask(tokens_BT, counts_B)
        return module(input_ids=tokens_BT, attention_mask=mask_BT, use_cache=False)

    def loss(self, logits_BTV: Tensor, labels_BT: Tensor, counts_B: Tensor | None) -> Loss:
        """Return the loss that was given, else the module's own."""
        if self.given_loss is not None:
            return self.given_loss(logits_BTV, labels_BT, counts_B)
        module, labels_BT = cast(Any, self.module), _without_padding(labels_BT, counts_B)
        return module.loss_function(
            logits=logits_BTV, labels=labels_BT, vocab_size=logits_BTV.shape[-1]
        )

    def objective(
        self, module: nn.Module, tokens_BT: Tensor, counts_B: Tensor | None = None
    ) -> Tensor:
        """Return the loss of a call with labels."""
        mask_BT, labels_BT = _mask(tokens_BT, counts_B), _without_padding(tokens_BT, counts_B)
        return module(input_ids=tokens_BT, attention_mask=mask_BT, labels=labels_BT).loss

    def declares(self) -> str:
        """Return the name of the library's class, where one made of this config does the same.

        Then a scale, a sink or an order of layers is what the class and the config say, and not a
        slip in somebody's code.
        """
        kind, tokens_BT = type(self.module), self.ids(PROBE_BT)
        if not kind.__module__.startswith("transformers."):
            return ""
        try:
            with torch.random.fork_rng(devices=[]):
                plain = cast(Any, kind)(copy.deepcopy(self.module.config)).to(
                    next(self.module.parameters()).dtype
                )
            mine = shaken(self)
            load_torch(plain.eval(), mine.weights())
            theirs = mine.with_module(plain)
            same = [_anatomy(x.module) for x in (mine, theirs)]
            logits, expected = (x.logits(PROBE_BT) for x in (mine, theirs))
            loss, aim = (float(x.objective(x.module, tokens_BT)) for x in (mine, theirs))
        except Exception:
            return ""
        is_same = same[0] == same[1] and gap(logits, expected) < 1e-4 and abs(loss - aim) < 1e-4
        return kind.__name__ if is_same else ""

    @property
    def decoder(self) -> Self:
        """What reads tokens through the cache: the model itself."""
        return self

    def empty(self, num_rows: int, capacity: int) -> Cache:
        """Return a cache that holds nothing."""
        from transformers import DynamicCache

        # With the config, so that layers that keep a state or a window have their own kind.
        config = cast(Any, self.module.config)
        return DynamicCache(config=config.get_text_config(decoder=True))

    @torch.no_grad()
    def read(self, cache: Cache, tokens_BT: Array, counts_B: None = None) -> tuple[Array, Cache]:
        """Return logits (B, T, V) and the longer cache."""
        cache = copy.deepcopy(cache)  # the library's are written in place
        output = self.module(input_ids=self.ids(tokens_BT), past_key_values=cache, use_cache=True)
        return to_numpy(output.logits), output.past_key_values

    def select(self, cache: Cache, rows: Array) -> Cache:
        """Return the cache of these rows, in this order."""
        cache = copy.deepcopy(cache)
        cache.reorder_cache(torch.from_numpy(rows))
        return cache

    @torch.no_grad()
    def generate(
        self,
        tokens_BT: Array,
        num_tokens: int,
        *,
        counts_B: None = None,
        temperature: float = 0.0,
        seed: int = 0,
        stop_ids: tuple[int, ...] = (),
    ) -> Array:
        """Return new tokens (B, G) after each prompt, -1 after a row's stop."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            written = self._generated(tokens_BT, num_tokens, temperature, stop_ids).sequences
        found, new = np.full((len(tokens_BT), num_tokens), -1), written[:, tokens_BT.shape[1] :]
        found[:, : new.shape[1]] = to_numpy(new)
        for row in found:
            stops = np.flatnonzero(np.isin(row, stop_ids))
            if stops.size:
                row[stops[0] + 1 :] = -1
        return found

    def keeps_graph(self, tokens_BT: Array) -> bool:
        """Whether the cache after a few generated tokens keeps an autograd graph alive."""
        cache = self._generated(tokens_BT, 3).past_key_values
        return any(layer.keys.requires_grad for layer in cache.layers)

    def attention(self, tokens_BT: Array, counts_B: Counts = None) -> list[Array]:
        """Return weights (B, N, T, S) per layer; none where the model keeps none."""
        if not self._shows_attention:
            return []
        layers, _ = _eager(self.module, *self.inputs(tokens_BT, counts_B))
        return [to_numpy(weights) for weights in layers]

    def _generated(
        self,
        tokens_BT: Array,
        num_tokens: int,
        temperature: float = 0.0,
        stop_ids: tuple[int, ...] = (),
    ) -> Output:
        from transformers import GenerationConfig

        # What is not said here the model's own settings say, such as a penalty for repeating
        # tokens or the ids that end a text, and none of them is asked about.
        module = cast(Any, self.module)
        module.generation_config = GenerationConfig()
        draws = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0)
        config = GenerationConfig(
            max_new_tokens=num_tokens,
            eos_token_id=list(stop_ids) or None,
            pad_token_id=0,
            return_dict_in_generate=True,
            **(draws if temperature else dict(do_sample=False)),
        )
        tokens = self.ids(tokens_BT)
        return module.generate(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), generation_config=config
        )

    def _attention_is_its_own(self) -> bool:
        """Return whether attention weights can be had, and belong to the logits of this model.

        Some models keep none, and some choose a mask when they are made, the wrong one for another
        kernel.
        """
        module, tokens = copy.deepcopy(self.module), self.ids(np.arange(6)[None] % 5)
        load_torch(module, randomized(torch_leaves(module), 0))
        try:
            with torch.no_grad():
                own = self._logits(module, tokens, None).float()
            layers, shown = _eager(module, tokens, None)
            off = own - shown[..., : own.shape[-1]]
            ranks = {x.ndim for x in layers}
            return ranks == {4} and bool(off.std() < 0.1 * own.std())
        except Exception:
            return False


def _anatomy(module: nn.Module) -> tuple[list[type], list[bool]]:
    """Return the class of every module, and which parameters are trained."""
    return [type(x) for x in module.modules()], [x.requires_grad for x in module.parameters()]


@torch.no_grad()
def _eager(
    module: Any, tokens_BT: Tensor, counts_B: Tensor | None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return attention weights, which fused kernels do not keep, and the logits of that call."""
    module = copy.deepcopy(module)
    module.set_attn_implementation("eager")
    mask_BT = _mask(tokens_BT, counts_B)
    output = module(input_ids=tokens_BT, attention_mask=mask_BT, output_attentions=True)
    return output.attentions, output.logits


def _mask(tokens_BT: Tensor, counts_B: Tensor | None) -> Tensor:
    """Return 1 for real tokens, 0 for padding on the right."""
    if counts_B is None:
        return torch.ones_like(tokens_BT)
    steps_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    return (steps_T[None] < counts_B[:, None]).long()


def _without_padding(labels_BT: Tensor, counts_B: Tensor | None) -> Tensor:
    return torch.where(_mask(labels_BT, counts_B) == 1, labels_BT, -100)
