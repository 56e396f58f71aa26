"""A PyTorch language model as a patient. Read beside parity/doctor/flax_patient.py.

Dimension key: B batch, T tokens, D embed dim, V vocab.
"""

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from parity.doctor.patient import Patient, Score
from parity.doctor.sizes import find_position_table, find_sizes, logits_of
from parity.frameworks.leaves import Leaves
from parity.frameworks.torch.leaves import from_numpy, load_torch, to_numpy, torch_leaves


def torch_patient(
    module: nn.Module,
    *,
    name: str = "",
    vocab_size: int | None = None,
    context_length: int | None = None,
    forward: Callable[..., torch.Tensor] | None = None,
    takes_counts: bool = False,
    objective: Callable[..., torch.Tensor] | None = None,
    loss: Callable[..., Any] | None = None,
    ignore_index: int | None = None,
    seed: int = 0,
    **offers: Callable[[nn.Module], Any],
) -> Patient:
    """What can be asked of any torch module that gives logits for tokens, and what it offers more.

    Args:
        module: left as it is; the patient works on a copy in evaluation mode.
        name: for the report; the class when empty.
        vocab_size: V; looked for in the module's config and first embedding when None.
        context_length: longest sequence; looked for in the module's config when None.
        forward: (module, tokens_BT, counts_B or None) to logits (B, T, V); a call with the tokens
            when None.
        takes_counts: whether `forward` knows padding on the right.
        objective: (module, tokens_BT, counts_B) to the loss it is trained with; the cross entropy
            of the next token when None.
        loss: (logits_BTV, labels_BT, counts_B) to a mean, or to a total and a number of tokens;
            labels are the tokens themselves, since the shift is the loss's own affair.
        ignore_index: a label that the loss does not score.
        seed: of the probes.
        offers: more fields of `Patient`, each as a function of the module that makes it.

    Raises:
        ValueError: when sizes are not to be found, or the output is not logits.
    """
    options = dict(
        name=name or type(module).__name__, vocab_size=vocab_size, context_length=context_length,
        forward=forward, takes_counts=takes_counts, objective=objective, loss=loss,
        ignore_index=ignore_index, seed=seed, **offers,
    )  # fmt: skip
    embeddings = {
        f"{path}.weight": part.num_embeddings
        for path, part in module.named_modules()
        if isinstance(part, nn.Embedding)
    }
    vocab_size, context_length = find_sizes(module, vocab_size, context_length, embeddings)
    module = copy.deepcopy(module).eval()
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    floats = [p.dtype for p in module.parameters() if p.is_floating_point()]
    dtype = str(floats[0] if floats else torch.float32).removeprefix("torch.")
    call = forward or (lambda model, tokens, counts: model(tokens))

    def array(x: np.ndarray | None) -> torch.Tensor | None:
        return None if x is None else torch.from_numpy(np.asarray(x)).long().to(device)

    def score_tokens(model: nn.Module, tokens: torch.Tensor, counts: Any) -> torch.Tensor:
        return logits_of(call(model, tokens, counts), tokens.shape, vocab_size)

    def trusted(model: nn.Module, tokens: torch.Tensor, counts: Any = None) -> torch.Tensor:
        return next_token_cross_entropy(score_tokens(model, tokens, counts), tokens, counts)

    def mean_of_own_loss(model: nn.Module, tokens: torch.Tensor, counts: Any) -> torch.Tensor:
        found = loss(score_tokens(model, tokens, counts), tokens, counts)
        return found[0] / found[1] if isinstance(found, tuple) else found

    learn = objective or (mean_of_own_loss if loss else trusted)

    @torch.no_grad()
    def logits(tokens_BT: np.ndarray, counts_B: np.ndarray | None = None) -> np.ndarray:
        return to_numpy(score_tokens(module, array(tokens_BT), array(counts_B)))

    def with_weights(leaves: Mapping[str, np.ndarray]) -> Patient:
        changed = copy.deepcopy(module)
        load_torch(changed, leaves)
        return torch_patient(changed, **options)

    def cast(dtype: str) -> Patient:
        return torch_patient(copy.deepcopy(module).to(getattr(torch, dtype)), **options)

    def gradients(
        tokens_BT: np.ndarray, counts_B: np.ndarray | None = None
    ) -> dict[str, np.ndarray | None]:
        named = dict(module.named_parameters())
        value = trusted(module, array(tokens_BT), array(counts_B))
        trained = {key: p for key, p in named.items() if p.requires_grad}
        if not value.requires_grad:
            return dict.fromkeys(named)
        found = torch.autograd.grad(value, list(trained.values()), allow_unused=True)
        given = dict(zip(trained, found, strict=True))
        return {key: None if given.get(key) is None else to_numpy(given[key]) for key in named}

    def reach(tokens_T: np.ndarray) -> np.ndarray | None:
        return _reach(functools.partial(score_tokens, module), module, array(tokens_T))

    def score(
        logits_BTV: np.ndarray, labels_BT: np.ndarray, counts_B: np.ndarray | None = None
    ) -> Score:
        scores = from_numpy(logits_BTV).to(device)
        found = loss(scores, array(labels_BT), array(counts_B))
        if isinstance(found, tuple):
            total, number = (float(x) for x in found)
            return Score(total / number if number else float("nan"), int(number))
        return Score(float(found))

    def dropout_losses(tokens_BT: np.ndarray) -> tuple[float, float]:
        training = copy.deepcopy(module).train()
        with torch.no_grad():
            first, second = (float(trusted(training, array(tokens_BT))) for _ in range(2))
        return first, second

    drops = any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in module.modules())
    built_in: dict[str, Any] = dict(
        trainer=lambda rate: PlainTorchTrainer(copy.deepcopy(module), learn, array, rate),
        dropout_losses=dropout_losses if drops else None,
        cast=cast,
    )
    made = {field: make(module) for field, make in offers.items()}
    return Patient(
        name=options["name"], framework="torch", vocab_size=vocab_size,
        context_length=context_length, dtype=dtype, logits=logits,
        num_params=sum(p.numel() for p in module.parameters()),
        weights=lambda: torch_leaves(module), with_weights=with_weights,
        takes_counts=takes_counts, reach=reach, gradients=gradients,
        position_table=find_position_table(dict(module.named_parameters()), embeddings, vocab_size),
        score=score if loss else None, ignore_index=ignore_index, seed=seed,
        **(built_in | made),
    )  # fmt: skip


class PlainTorchTrainer:
    """A plain AdamW, for models that bring no training step of their own."""

    def __init__(self, module: nn.Module, objective: Callable, array: Callable, rate: float):
        self._module, self._objective, self._array = module, objective, array
        parameters = [p for p in module.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)

    def step(self, tokens_BT: np.ndarray, counts_B: np.ndarray | None = None) -> float:
        """One update; the loss before it."""
        self._optimizer.zero_grad()
        value = self._objective(self._module, self._array(tokens_BT), self._array(counts_B))
        if value.requires_grad:
            value.backward()
            self._optimizer.step()
        return float(value.detach())

    def parameters(self) -> Leaves:
        """The present weights."""
        return torch_leaves(self._module)


def next_token_cross_entropy(
    logits_BTV: torch.Tensor, tokens_BT: torch.Tensor, counts_B: torch.Tensor | None
) -> torch.Tensor:
    """The mean over real targets, by the framework's own function."""
    targets_BT = tokens_BT[:, 1:]
    if counts_B is not None:
        steps_T = torch.arange(1, tokens_BT.shape[1], device=tokens_BT.device)
        targets_BT = torch.where(steps_T[None] < counts_B[:, None], targets_BT, -100)
    return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), targets_BT.flatten())


def _reach(
    scores: Callable[[torch.Tensor, None], torch.Tensor], module: nn.Module, tokens_T: torch.Tensor
) -> np.ndarray | None:
    """By adding zeros to what the token embedding gives, and differentiating by them."""
    T = tokens_T.shape[0]
    tokens_TT = tokens_T.expand(T, T)
    zeros: list[torch.Tensor] = []

    def watch(_, inputs: tuple, output: torch.Tensor) -> torch.Tensor | None:
        if inputs and inputs[0].shape == tokens_TT.shape and torch.equal(inputs[0], tokens_TT):
            zeros.append(torch.zeros_like(output, requires_grad=True))
            return output + zeros[-1]
        return None

    embeddings = [m for m in module.modules() if isinstance(m, nn.Embedding)]
    handles = [m.register_forward_hook(watch) for m in embeddings]
    try:
        logits_TTV = scores(tokens_TT, None)
    finally:
        for handle in handles:
            handle.remove()
    if not zeros:
        return None
    direction_V = np.random.default_rng(0).normal(size=logits_TTV.shape[-1])
    direction_V = torch.from_numpy(direction_V).to(logits_TTV)
    # Row t of a batch of copies asks for position t, so one backward pass answers for them all.
    rows = torch.arange(T, device=tokens_T.device)
    asked = (logits_TTV[rows, rows] * direction_V).sum()
    found = torch.autograd.grad(asked, zeros, allow_unused=True)
    return sum(to_numpy(x.norm(dim=-1)) for x in found if x is not None)
