"""A causal language model of `transformers` as a patient: its own loss, cache and generation too.

Dimension key: B batch, T tokens, V vocab, G generated tokens.
"""

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from parity.doctor.patient import Decoder, Patient
from parity.doctor.torch_patient import torch_patient
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


def causal_lm_patient(
    module: nn.Module, *, loss: Callable[..., Any] | None = None, **options: Any
) -> Patient:
    """The patient of such a module.

    Args:
        module: left as it is.
        loss: (logits_BTV, labels_BT, counts_B) to a mean; the module's own when None.
        options: more of `torch_patient`.
    """

    def own_loss(logits: torch.Tensor, labels: torch.Tensor, counts: Any) -> torch.Tensor:
        labels = _without_padding(labels, counts)
        return module.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])

    def objective(model: nn.Module, tokens: torch.Tensor, counts: Any) -> torch.Tensor:
        labels = _without_padding(tokens, counts)
        return model(input_ids=tokens, attention_mask=_mask(tokens, counts), labels=labels).loss

    if loss is None:
        options["ignore_index"] = -100
    return torch_patient(
        module,
        forward=_forward,
        takes_counts=True,
        objective=objective,
        loss=loss or own_loss,
        decoder=_decoder,
        generate=lambda model: functools.partial(_generate, model),
        keeps_graph=lambda model: functools.partial(_keeps_graph, model),
        attention=_attention_of if _shows_attention(module) else _nothing,
        **options,
    )


def _ids(model: nn.Module, tokens_BT: np.ndarray) -> torch.Tensor:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return torch.from_numpy(np.asarray(tokens_BT)).long().to(device)


def _forward(model: nn.Module, tokens: torch.Tensor, counts: torch.Tensor | None) -> torch.Tensor:
    return model(input_ids=tokens, attention_mask=_mask(tokens, counts), use_cache=False).logits


def _mask(tokens: torch.Tensor, counts: torch.Tensor | None) -> torch.Tensor:
    """1 for real tokens, 0 for padding on the right."""
    if counts is None:
        return torch.ones_like(tokens)
    steps = torch.arange(tokens.shape[1], device=tokens.device)
    return (steps[None] < counts[:, None]).long()


def _without_padding(labels: torch.Tensor, counts: torch.Tensor | None) -> torch.Tensor:
    return torch.where(_mask(labels, counts) == 1, labels, -100)


def _decoder(model: nn.Module) -> Decoder:
    def empty(rows: int, capacity: int) -> Any:
        from transformers import DynamicCache

        return DynamicCache()

    @torch.no_grad()
    def read(state: Any, tokens_BT: np.ndarray, counts_B: None) -> tuple[np.ndarray, Any]:
        # The library's caches are written in place, so an older state needs a copy.
        given = model(
            input_ids=_ids(model, tokens_BT),
            past_key_values=copy.deepcopy(state),
            use_cache=True,
        )
        return to_numpy(given.logits), given.past_key_values

    def select(state: Any, rows: np.ndarray) -> Any:
        state = copy.deepcopy(state)
        state.reorder_cache(torch.from_numpy(rows))
        return state

    return Decoder(empty, read, select, bounded=False)


@torch.no_grad()
def _generate(
    model: nn.Module,
    tokens_BT: np.ndarray,
    num_tokens: int,
    *,
    counts_B: None = None,
    temperature: float = 0.0,
    seed: int = 0,
    stop_ids: tuple[int, ...] = (),
) -> np.ndarray:
    tokens = _ids(model, tokens_BT)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        written = _call_generate(model, tokens, num_tokens, temperature, stop_ids).sequences
    found = np.full((len(tokens_BT), num_tokens), -1)
    found[:, : written.shape[1] - tokens.shape[1]] = to_numpy(written[:, tokens.shape[1] :])
    for row in found:
        stops = np.flatnonzero(np.isin(row, stop_ids))
        if stops.size:
            row[stops[0] + 1 :] = -1
    return found


def _call_generate(
    model: nn.Module,
    tokens: torch.Tensor,
    num_tokens: int,
    temperature: float = 0.0,
    stop_ids: tuple[int, ...] = (),
) -> Any:
    from transformers import GenerationConfig

    # What is not said here the model's own settings say, such as a penalty for repeating tokens or
    # the ids that end a text, and none of them is asked about.
    model.generation_config = GenerationConfig()
    draws = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0)
    config = GenerationConfig(
        max_new_tokens=num_tokens,
        eos_token_id=list(stop_ids) or None,
        pad_token_id=0,
        return_dict_in_generate=True,
        **(draws if temperature else dict(do_sample=False)),
    )
    return model.generate(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), generation_config=config
    )


def _keeps_graph(model: nn.Module, tokens_BT: np.ndarray) -> bool:
    cache = _call_generate(model, _ids(model, tokens_BT), 3).past_key_values
    return any(layer.keys.requires_grad for layer in cache.layers)


def _attention_of(model: nn.Module) -> Callable[..., list[np.ndarray]]:
    return functools.partial(_attention, model)


def _nothing(model: nn.Module) -> None:
    return None


def _shows_attention(module: nn.Module) -> bool:
    """Whether attention weights can be had, and belong to the logits of the model as it is.

    Some models keep none, and some choose a mask when they are made, the wrong one for another
    kernel.
    """
    model, tokens_BT = copy.deepcopy(module).eval(), np.arange(6)[None] % 5
    load_torch(model, randomized(torch_leaves(model), 0))
    try:
        with torch.no_grad():
            own = _forward(model, _ids(model, tokens_BT), None).float()
        layers, shown = _eager(model, tokens_BT, None)
        return (
            bool(layers)
            and all(x.ndim == 4 for x in layers)
            and bool((own - shown).std() < 0.1 * own.std())
        )
    except Exception:
        return False


def _attention(
    model: nn.Module, tokens_BT: np.ndarray, counts_B: np.ndarray | None = None
) -> list[np.ndarray]:
    return [to_numpy(weights) for weights in _eager(model, tokens_BT, counts_B)[0]]


@torch.no_grad()
def _eager(
    model: nn.Module, tokens_BT: np.ndarray, counts_B: np.ndarray | None
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Attention weights, which fused kernels do not keep, and the logits that go with them."""
    model = copy.deepcopy(model).eval()
    model.set_attn_implementation("eager")
    tokens = _ids(model, tokens_BT)
    counts = None if counts_B is None else _ids(model, counts_B)
    given = model(input_ids=tokens, attention_mask=_mask(tokens, counts), output_attentions=True)
    return given.attentions, given.logits
