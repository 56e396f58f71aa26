"""A PyTorch language model under examination. Read beside parity/doctor/flax.py.

Dimension key: B batch, T tokens, V vocab.
"""

import copy
import functools
from collections.abc import Mapping
from typing import Self, Unpack

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parity.doctor.model import Array, Counts, LanguageModel, Loss, Output, Score
from parity.doctor.offers import NoGradient
from parity.doctor.probes import without_padding
from parity.doctor.sizes import (
    PROBE_BT,
    Lookups,
    Options,
    identify,
    is_recurrent,
    logits_of,
    positions_of,
)
from parity.frameworks.default_call import projection
from parity.frameworks.leaves import Leaves
from parity.frameworks.protocols import Trainer
from parity.frameworks.torch.leaves import (
    cast_torch,
    from_numpy,
    load_torch,
    to_numpy,
    torch_leaves,
)
from parity.frameworks.torch.module import TorchTrainer


class TorchModel(LanguageModel):
    """A PyTorch module that returns logits for tokens.

    A subclass says what is different about its module: how it is called (`forward`,
    `takes_counts`), what it is scored by and trained with (`loss`, `objective`), and what more it
    offers, by the methods of the protocols in parity/doctor/offers.py.

    Args:
        module: left as it is; a copy of it in evaluation mode is examined.
        options: sizes and loss, where the module does not say them.

    Raises:
        ValueError: when sizes are not to be found.
    """

    framework = "torch"

    def __init__(self, module: nn.Module, **options: Unpack[Options]):
        self.given_loss = options.get("loss")
        identify(self, module, options, self._rows(module))
        self.module = copy.deepcopy(module).eval()

    def forward(self, module: nn.Module, tokens_BT: Tensor, counts_B: Tensor | None) -> Output:
        """Return logits (B, T, V), alone, first in a tuple, or as `logits`."""
        return module(tokens_BT)

    def loss(self, logits_BTV: Tensor, labels_BT: Tensor, counts_B: Tensor | None) -> Loss:
        """Return the model's own loss, a mean or a total and a number; None if it has none."""
        return self.given_loss and self.given_loss(logits_BTV, labels_BT, counts_B)

    def objective(
        self, module: nn.Module, tokens_BT: Tensor, counts_B: Tensor | None = None
    ) -> Tensor:
        """Return the loss to train with: the model's own, else the next token's cross entropy."""
        logits_BTV = self._logits(module, tokens_BT, counts_B)
        loss = self.loss(logits_BTV, tokens_BT, counts_B)
        if loss is None:
            return next_token_cross_entropy(logits_BTV, tokens_BT, counts_B)
        return loss[0] / loss[1] if isinstance(loss, tuple) else loss

    @functools.cached_property
    def position_table(self) -> str | None:
        """Name of the leaf with a row per position, if there is one."""
        matrices = [x for x, leaf in self.module.named_parameters() if leaf.ndim >= 2]
        return positions_of(matrices, self._seen[0])

    def tables(self) -> frozenset[str]:
        """Return names of the weights of embedding layers."""
        return frozenset(self._rows(self.module))

    def trained_names(self) -> frozenset[str]:
        """Return the parameters that are trained, all where none is, and statistics, by name."""
        parameters = dict(self.module.named_parameters(remove_duplicate=False))
        trained = {name for name, p in parameters.items() if p.requires_grad}
        buffers = dict(self.module.named_buffers(remove_duplicate=False))
        statistics = {x for x in buffers if x.endswith(("running_mean", "running_var"))}
        return frozenset((trained or parameters.keys()) | statistics)

    def is_recurrent(self) -> bool:
        """Return whether layers of it read a sequence step by step, with a state."""
        return any(is_recurrent(part) for part in self.module.modules())

    @property
    def dtype(self) -> str:
        """Name of the type of its weights, or of autocast in it."""
        floats = (p.dtype for p in self.module.parameters() if p.is_floating_point())
        own = next(floats, torch.float32)
        return str(min((own, *self._seen[1]), key=_digits)).removeprefix("torch.")

    @property
    def num_params(self) -> int:
        """Number of its parameters, tied ones once."""
        return sum(p.numel() for p in self.module.parameters())

    @torch.no_grad()
    def logits(self, tokens_BT: Array, counts_B: Counts = None) -> Array:
        """Return logits (B, T, V)."""
        return to_numpy(self._logits(self.module, *self.inputs(tokens_BT, counts_B)))

    def weights(self) -> Leaves:
        """Return its leaves by name."""
        return torch_leaves(self.module)

    def with_weights(self, leaves: Mapping[str, Array]) -> Self:
        """Return the same model with other leaves; this one stays as it is."""
        module = copy.deepcopy(self.module)
        load_torch(module, leaves)
        return self.with_module(module)

    def with_module(self, module: nn.Module) -> Self:
        """Return the same model around another module, which it keeps."""
        other = copy.copy(self)
        other.module = module
        return other

    @functools.cached_property
    def _seen(self) -> tuple[Lookups, set[torch.dtype]]:
        """What each embedding layer was called with, and the types of autocast."""
        names = {part: f"{x}.weight" for x, part in self.module.named_modules()}
        lookups: Lookups = {}
        dtypes: set[torch.dtype] = set()

        def note(part: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
            if torch.is_autocast_enabled(self.device.type):
                dtypes.add(torch.get_autocast_dtype(self.device.type))
            if isinstance(part, nn.Embedding):
                ids = _ids(args, kwargs)
                lookups.setdefault(names[part], []).append(None if ids is None else to_numpy(ids))

        hooks = [x.register_forward_hook(note, with_kwargs=True) for x in self.module.modules()]
        try:
            with torch.no_grad():
                self._logits(self.module, *self.inputs(without_padding(self, PROBE_BT)))
        finally:
            for hook in hooks:
                hook.remove()
        return lookups, dtypes

    @staticmethod
    def _rows(module: nn.Module) -> dict[str, int]:
        parts = module.named_modules()
        return {f"{x}.weight": y.num_embeddings for x, y in parts if isinstance(y, nn.Embedding)}

    def cast(self, dtype: str) -> Self:
        """Return the same model in another type."""
        return self.with_module(cast_torch(self.module, dtype))

    def score(self, logits_BTV: Array, labels_BT: Array, counts_B: Counts = None) -> Score | None:
        """Return its own loss of these logits; None for a model without one."""
        loss = self.loss(from_numpy(logits_BTV).to(self.device), *self.inputs(labels_BT, counts_B))
        return None if loss is None else Score.of(loss)

    def gradients(self, tokens_BT: Array, counts_B: Counts = None) -> Leaves:
        """Return the gradient of the mean next-token loss by parameter, zeros where it has none."""
        named = dict(self.module.named_parameters())
        loss = self._cross_entropy(self.module, *self.inputs(tokens_BT, counts_B))
        if not loss.requires_grad:
            raise NoGradient
        trained = {name: p for name, p in named.items() if p.requires_grad}
        found = torch.autograd.grad(loss, [*trained.values()], allow_unused=True) if trained else ()
        known = {name: g for name, g in zip(trained, found, strict=True) if g is not None}
        return {name: to_numpy(known.get(name, torch.zeros_like(p))) for name, p in named.items()}

    def trainer(self, rate: float) -> Trainer:
        """Start a training of a copy by AdamW."""

        def loss(module: nn.Module, tokens: Tensor, *counts: Tensor) -> Tensor:
            module.eval()  # as it is examined
            value = self.objective(module, tokens.long(), *(x.long() for x in counts))
            if not value.requires_grad:
                raise NoGradient
            return value

        def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
            return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)

        return TorchTrainer(copy.deepcopy(self.module), loss, adamw)

    @torch.no_grad()
    def dropout_losses(self, tokens_BT: Array) -> tuple[float, float] | None:
        """Return the losses of two forward passes in training mode; None without dropout."""
        kind, tokens = nn.modules.dropout._DropoutNd, self.ids(tokens_BT)
        if not any(isinstance(m, kind) and m.p > 0 for m in self.module.modules()):
            return None
        module = copy.deepcopy(self.module).train()
        first, second = (float(self._cross_entropy(module, tokens)) for _ in range(2))
        return first, second

    def reach(self, tokens_T: Array) -> Array | None:
        """Return (T, T): the norm of the gradient of the logits at t by the embedding of token s.

        Zeros are added to what an embedding layer returns for the tokens, and the logits derived
        by them. None where no layer is called with the tokens themselves.
        """
        T = len(tokens_T)
        tokens_TT = self.ids(tokens_T).repeat(T, 1)
        zeros: list[Tensor] = []
        time_first: list[bool] = []

        def add_zeros(_: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
            ids = _ids(args, kwargs)
            if ids is None or output.shape[:-1] != ids.shape:
                return None
            is_row = torch.equal(ids, tokens_TT) or torch.equal(ids, tokens_TT.flatten())
            if not (is_row or torch.equal(ids, tokens_TT.T)):
                return None
            time_first.append(not is_row)
            zeros.append(torch.zeros_like(output, requires_grad=True))
            return output + zeros[-1]

        embeddings = [m for m in self.module.modules() if isinstance(m, nn.Embedding)]
        hooks = [m.register_forward_hook(add_zeros, with_kwargs=True) for m in embeddings]
        try:
            logits_TTV = self._logits(self.module, tokens_TT, None)
        finally:
            for hook in hooks:
                hook.remove()
        if not zeros:
            return None
        if not logits_TTV.requires_grad:
            raise NoGradient
        # Row t of a batch of copies asks for position t: one backward pass answers for them all.
        asked = logits_TTV.diagonal().T @ from_numpy(projection(self.vocab_size)).to(logits_TTV)
        found = torch.autograd.grad(asked.sum(), zeros, allow_unused=True)
        total_TT = np.zeros((T, T))
        for gradient, turned in zip(found, time_first, strict=True):
            if gradient is not None:
                norms = to_numpy(gradient.norm(dim=-1)).reshape(T, T)
                total_TT += norms.T if turned else norms
        return total_TT

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))

    def ids(self, array: Array) -> Tensor:
        """Return token ids or counts as a tensor on its device."""
        return torch.from_numpy(np.asarray(array)).long().to(self.device)

    def inputs(self, tokens_BT: Array, counts_B: Counts = None) -> tuple[Tensor, Tensor | None]:
        """Return token ids and counts as tensors on its device."""
        return self.ids(tokens_BT), None if counts_B is None else self.ids(counts_B)

    def _logits(self, module: nn.Module, tokens_BT: Tensor, counts_B: Tensor | None) -> Tensor:
        output = self.forward(module, tokens_BT, counts_B)
        logits_BTV = logits_of(output, tokens_BT.shape, self.vocab_size)
        return logits_BTV.contiguous()  # a loss may call `view`

    def _cross_entropy(
        self, module: nn.Module, tokens_BT: Tensor, counts_B: Tensor | None = None
    ) -> Tensor:
        logits_BTV = self._logits(module, tokens_BT, counts_B)
        return next_token_cross_entropy(logits_BTV, tokens_BT, counts_B)


def next_token_cross_entropy(
    logits_BTV: Tensor, tokens_BT: Tensor, counts_B: Tensor | None
) -> Tensor:
    """Return the mean over real targets, by the framework's own function."""
    targets_BT = tokens_BT[:, 1:]
    if counts_B is not None:
        steps_T = torch.arange(1, tokens_BT.shape[1], device=tokens_BT.device)
        targets_BT = torch.where(steps_T[None] < counts_B[:, None], targets_BT, -100)
    return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), targets_BT.flatten())


def _ids(args: tuple, kwargs: dict) -> Tensor | None:
    """Return the first tensor of integers that a layer was called with."""
    given = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
    return next((x for x in given if not x.is_floating_point()), None)


def _digits(dtype: torch.dtype) -> float:
    """Return how fine a float type is: narrow ones sort first."""
    return -torch.finfo(dtype).eps
