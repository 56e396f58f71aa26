"""Models that a user might have written: plain modules of either framework, as small as they come.

Dimension key: B batch, T tokens, S slots, N heads, H head dim, D embed dim, V vocab.
"""

import copy
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn
from torch.nn import functional as F

from parity.doctor import DETECTORS, TorchModel, as_model, examine

V, CONTEXT, D, N, LAYERS = 53, 23, 24, 3, 2


def fired(model, *names):
    """The detectors that see something wrong, of those that are named, or of all."""
    asked = [x for x in DETECTORS if not names or x.name in names]
    assert not names or len(asked) == len(names)
    return examine(model, detectors=asked, stop_early=False).fired


class Attention(nn.Module):
    """Several heads, one matrix for queries, keys and values."""

    def __init__(self):
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.drop = nn.Dropout(0.1)

    def mask(self, scores):
        hidden_TS = torch.ones(scores.shape[-2:]).triu(1 + scores.shape[-1] - scores.shape[-2])
        return scores.masked_fill(hidden_TS.bool(), -math.inf)

    def forward(self, x_BTD, past=None):
        B, T, _ = x_BTD.shape
        query, key, value = (
            x.view(B, T, N, D // N).transpose(1, 2) for x in self.in_proj(x_BTD).chunk(3, dim=-1)
        )
        if past is not None:
            key, value = (torch.cat(x, dim=2) for x in zip(past, (key, value), strict=True))
        scores = self.mask(query @ key.transpose(-1, -2) / math.sqrt(D // N))
        mixed = (self.drop(scores.softmax(dim=-1)) @ value).transpose(1, 2).reshape(B, T, D)
        return self.out_proj(mixed), (key, value)


class Block(nn.Module):
    """Norm first, in both halves."""

    norm = nn.LayerNorm

    def __init__(self):
        super().__init__()
        self.norm_1, self.norm_2 = type(self).norm(D), type(self).norm(D)
        self.attention = Attention()
        self.mlp = nn.Sequential(nn.Linear(D, 31), nn.GELU(), nn.Linear(31, D))

    def forward(self, x_BTD, past=None):
        mixed, kept = self.attention(self.norm_1(x_BTD), past)
        x_BTD = x_BTD + mixed
        return x_BTD + self.mlp(self.norm_2(x_BTD)), kept


class Net(nn.Module):
    """A GPT as many people write it; tokens in, logits out."""

    block = Block

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.tokens, self.positions = nn.Embedding(V, D), nn.Embedding(CONTEXT, D)
        self.blocks = nn.ModuleList(type(self).block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, V, bias=False)
        self.apply(self.draw)

    @staticmethod
    def draw(module):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    def places(self, tokens_BT, start=0):
        return torch.arange(start, start + tokens_BT.shape[1])

    def read(self, tokens_BT, past=None, start=0):
        """Logits, and keys and values per layer."""
        x_BTD = self.tokens(tokens_BT) + self.positions(self.places(tokens_BT, start))
        kept = []
        for number, block in enumerate(self.blocks):
            x_BTD, both = block(x_BTD, past and past[number])
            kept.append(both)
        return self.head(self.norm(x_BTD)), kept

    def forward(self, tokens_BT):
        return self.read(tokens_BT)[0]


class GivesTuple(Net):
    def forward(self, tokens_BT):
        return super().forward(tokens_BT), None


class GivesDict(Net):
    def forward(self, tokens_BT):
        return {"hidden": None, "logits": super().forward(tokens_BT)}


class GivesObject(Net):
    def forward(self, tokens_BT):
        return types.SimpleNamespace(loss=None, logits=super().forward(tokens_BT))


class Numbered(nn.Module):
    """All parts in one list, so that embeddings and head have numbers in their names as well."""

    def __init__(self):
        super().__init__()
        net = Net()
        self.parts = nn.ModuleList([net.tokens, net.positions, *net.blocks, net.norm, net.head])

    def forward(self, tokens_BT):
        tokens, positions, *blocks, norm, head = self.parts
        x_BTD = tokens(tokens_BT) + positions(torch.arange(tokens_BT.shape[1]))
        for block in blocks:
            x_BTD, _ = block(x_BTD)
        return head(norm(x_BTD))


def test_numbers_in_the_names_of_embeddings_and_head_make_no_blocks_of_them():
    model = as_model(Numbered(), "own", context_length=CONTEXT)
    assert fired(model, "residual-stream", "position-sensitivity") == ()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_plain_model_is_healthy(seed):
    assert fired(as_model(Net(seed), "own", seed=seed)) == ()


@pytest.mark.parametrize("model", [GivesTuple, GivesDict, GivesObject])
def test_so_is_one_that_gives_more_than_logits(model):
    asked = "causality-gradient", "gradient-coverage", "overfit-one-batch", "dtype-audit"
    assert fired(as_model(model(), "own"), *asked) == ()


class FlaxAttention(nnx.Module):
    """The same in Flax NNX."""

    def __init__(self, rngs):
        self.in_proj, self.out_proj = (
            nnx.Linear(D, out, kernel_init=nnx.initializers.normal(0.02), rngs=rngs)
            for out in (3 * D, D)
        )

    def mask(self, scores):
        seen_TS = jnp.tri(scores.shape[-1], dtype=bool)
        return jnp.where(seen_TS[None, None], scores, jnp.finfo(scores.dtype).min)

    def __call__(self, x_BTD):
        B, T, _ = x_BTD.shape
        query, key, value = (
            x.reshape(B, T, N, D // N) for x in jnp.split(self.in_proj(x_BTD), 3, axis=-1)
        )
        scores = jnp.einsum("BTNH,BSNH->BNTS", query, key) / math.sqrt(D // N)
        weights = nnx.softmax(self.mask(scores), axis=-1)
        mixed = jnp.einsum("BNTS,BSNH->BTNH", weights, value)
        return self.out_proj(mixed.reshape(B, T, D))


class FlaxNet(nnx.Module):
    """A GPT of one block, with a tied head."""

    attention, norm = FlaxAttention, nnx.LayerNorm

    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)
        small = dict(embedding_init=nnx.initializers.normal(0.02), rngs=rngs)
        self.tokens, self.positions = nnx.Embed(V, D, **small), nnx.Embed(CONTEXT, D, **small)
        self.mixer = type(self).attention(rngs)
        self.norms = nnx.List([type(self).norm(D, rngs=rngs) for _ in range(3)])
        self.up, self.down = nnx.Linear(D, 31, rngs=rngs), nnx.Linear(31, D, rngs=rngs)

    def places(self, tokens_BT):
        return jnp.arange(tokens_BT.shape[1])[None]

    def __call__(self, tokens_BT):
        x_BTD = self.tokens(tokens_BT) + self.positions(self.places(tokens_BT))
        x_BTD = x_BTD + self.mixer(self.norms[0](x_BTD))
        x_BTD = x_BTD + self.down(nnx.gelu(self.up(self.norms[1](x_BTD))))
        return self.tokens.attend(self.norms[2](x_BTD))


def test_a_plain_flax_model_is_healthy_when_compiled():
    found = examine(as_model(FlaxNet(), "own"), stop_early=False)
    assert found.fired == (), [x.finding.sentence for x in found.answers]


# What is planted, below, each as a class or function of its own.


class Unmasked(Attention):
    def mask(self, scores):
        return scores


class HeadsNotBack(Attention):
    """A view where a transpose was meant."""

    def forward(self, x_BTD, past=None):
        B, T, _ = x_BTD.shape
        query, key, value = (
            x.view(B, T, N, D // N).transpose(1, 2) for x in self.in_proj(x_BTD).chunk(3, dim=-1)
        )
        mixed = self.mask(query @ key.transpose(-1, -2)).softmax(dim=-1) @ value
        return self.out_proj(mixed.reshape(B, T, D)), (key, value)


class OverTime(nn.LayerNorm):
    def forward(self, x_BTD):
        x_BTD = x_BTD - x_BTD.mean(dim=1, keepdim=True)
        scale = x_BTD.square().mean(dim=1, keepdim=True) + 1e-5
        return x_BTD * scale.rsqrt() * self.weight + self.bias


class OverRows(nn.LayerNorm):
    def forward(self, x_BTD):
        x_BTD = x_BTD - x_BTD.mean(dim=0, keepdim=True)
        return x_BTD * self.weight + self.bias


def block_with(**parts):
    """A net whose blocks have other parts."""

    class Other(Block):
        norm = parts.get("norm", Block.norm)

        def __init__(self):
            super().__init__()
            self.attention = parts.get("attention", Attention)()

    return type("Other", (Net,), {"block": Other})


class RowsForPositions(Net):
    def places(self, tokens_BT, start=0):
        return torch.arange(tokens_BT.shape[0])[:, None] % CONTEXT


class Forgets(Net):
    """The last block is computed and not used."""

    def read(self, tokens_BT, past=None, start=0):
        x_BTD = self.tokens(tokens_BT) + self.positions(self.places(tokens_BT, start))
        for block in self.blocks[:-1]:
            x_BTD, _ = block(x_BTD)
        return self.head(self.norm(x_BTD)), None


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (block_with(attention=Unmasked), ["causality", "causality-gradient"]),
        (block_with(attention=HeadsNotBack), ["causality"]),
        (block_with(norm=OverTime), ["causality", "boundary-lengths"]),
        (block_with(norm=OverRows), ["batch-independence"]),
        (RowsForPositions, ["position-sensitivity", "batch-independence"]),
        (Forgets, ["gradient-coverage"]),
    ],
    ids=lambda x: x.__name__ if isinstance(x, type) else "",
)
def test_what_is_planted_in_a_plain_model_is_seen(model, names):
    assert fired(as_model(model(), "own"), *names) == tuple(names)


class FlaxUnmasked(FlaxAttention):
    def mask(self, scores):
        return scores


class FlaxRowsForPositions(FlaxNet):
    def places(self, tokens_BT):
        return (jnp.arange(tokens_BT.shape[0]) % CONTEXT)[:, None]


class FlaxOverTime(nnx.LayerNorm):
    def __call__(self, x_BTD):
        x_BTD = x_BTD - x_BTD.mean(axis=1, keepdims=True)
        return x_BTD * self.scale[...][None, None] + self.bias[...][None, None]


class FlaxWithout(FlaxNet):
    attention = FlaxUnmasked


class FlaxNormOverTime(FlaxNet):
    norm = FlaxOverTime


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (FlaxWithout, "causality"),
        (FlaxNormOverTime, "causality"),
        (FlaxRowsForPositions, "position-sensitivity"),
    ],
)
def test_what_is_planted_in_a_plain_flax_model_is_seen(model, name):
    assert fired(as_model(model(), "own"), name) == (name,)


def shifted(logits_BTV, labels_BT, counts_B):
    """A loss as it should be."""
    return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten())


def without_shift(logits_BTV, labels_BT, counts_B):
    return F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten())


def shifted_after_flattening(logits_BTV, labels_BT, counts_B):
    return F.cross_entropy(logits_BTV.flatten(0, 1)[:-1], labels_BT.flatten()[1:])


def flax_without_shift(logits_BTV, labels_BT, counts_B):
    return -jnp.mean(
        jnp.take_along_axis(nnx.log_softmax(logits_BTV), labels_BT[..., None], axis=-1)
    )


def test_a_loss_is_judged_by_what_it_scores():
    assert (
        fired(as_model(Net(), "own", loss=shifted), "token-accounting", "batch-independence") == ()
    )
    assert fired(as_model(Net(), "own", loss=without_shift), "token-accounting") != ()
    assert fired(as_model(FlaxNet(), "own", loss=flax_without_shift), "token-accounting") != ()
    asked = "batch-independence", "token-accounting"
    assert fired(as_model(Net(), "own", loss=shifted_after_flattening), *asked) == asked


def test_a_loss_that_counts_is_asked_for_its_count():
    def counts(logits_BTV, labels_BT, counts_B):
        return F.cross_entropy(
            logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten(), reduction="sum"
        ), labels_BT.numel()

    model = as_model(Net(), "own", loss=counts)
    (answer,) = examine(
        model, detectors=[x for x in DETECTORS if x.name == "token-accounting"]
    ).answers
    assert re.search(r"counts (\d+) tokens of (?!\1)\d+\.", answer.finding.sentence)


class TrainedWithoutShift(TorchModel):
    def objective(self, module, tokens_BT, counts_B=None):
        return without_shift(module(tokens_BT), tokens_BT, None)


class TrainedOnSoftmax(TorchModel):
    def objective(self, module, tokens_BT, counts_B=None):
        return shifted(module(tokens_BT).softmax(dim=-1), tokens_BT, None)


def test_an_objective_is_what_the_model_is_trained_with():
    assert fired(TrainedWithoutShift(Net()), "best-lag") == ("best-lag",)
    assert fired(TrainedOnSoftmax(Net()), "overfit-one-batch") == ("overfit-one-batch",)


class Decodes(TorchModel):
    """A net with its cache: keys and values per layer, and how many there are."""

    ragged = bounded = False
    offset = 0

    @property
    def decoder(self):
        return self

    def empty(self, num_rows, capacity):
        return None, 0

    @torch.no_grad()
    def read(self, cache, tokens_BT, counts_B=None):
        past, length = cache
        start = max(length - self.offset, 0)
        logits, kept = self.module.read(self.ids(tokens_BT), past, start)
        return logits.numpy(), (kept, length + tokens_BT.shape[1])

    def select(self, cache, rows):
        past, length = cache
        return [tuple(x[torch.from_numpy(rows)] for x in both) for both in past], length


class DecodesWithAnOffset(Decodes):
    offset = 1


def test_a_cache_that_is_offered_is_read_in_pieces():
    asked = "cached-equals-uncached", "boundary-lengths"
    assert fired(Decodes(Net()), *asked) == ()
    assert fired(DecodesWithAnOffset(Net()), *asked) == asked[:1]


class NoEmbeddingLayers(nn.Module):
    """Says nothing of its sizes; positions have no layer."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(V, D)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.rates = nn.Parameter(torch.linspace(0.1, 2.0, D))
        self.block, self.norm = Block(), nn.LayerNorm(D)

    def forward(self, tokens_BT):
        places_TD = torch.arange(tokens_BT.shape[1])[:, None] * self.rates
        x_BTD, _ = self.block(self.tokens(tokens_BT) + 0.02 * places_TD.sin())
        return self.norm(x_BTD) @ self.tokens.weight.T


def test_sizes_that_a_model_does_not_say_are_options():
    model = NoEmbeddingLayers()
    with pytest.raises(ValueError, match=r"does not say its context_length\..*--context-length"):
        as_model(model, "own")
    model = as_model(model, "own", context_length=19)
    assert (model.vocab_size, model.context_length) == (V, 19)
    assert fired(model) == ()


@pytest.mark.parametrize("place", ["config", "args", "params", None])
def test_sizes_are_found_where_models_keep_them(place):
    model, sizes = NoEmbeddingLayers(), dict(vocab_size=31, block_size=17)
    if place:
        setattr(model, place, sizes if place == "args" else types.SimpleNamespace(**sizes))
    else:
        model.vocab_size, model.max_seq_len = 31, 17
    model = as_model(model, "own")
    assert (model.vocab_size, model.context_length) == (31, 17)
    assert model.logits(np.zeros((2, 3), int), None).shape == (2, 3, 31)


def test_a_position_table_says_how_long_a_context_is_and_not_how_many_tokens_there_are():
    model = Net()
    model._modules = {"positions": model.positions, **model._modules}
    model = as_model(model, "own")
    assert (model.vocab_size, model.context_length) == (V, CONTEXT)
    assert model.position_table == "positions.weight"


def test_a_model_too_small_to_ask_is_refused():
    with pytest.raises(ValueError, match=r"vocabulary 53, context 9\. The questions need 5 ids"):
        as_model(Net(), "own", context_length=9)
    with pytest.raises(ValueError, match=r"vocabulary 4, context 23\."):
        as_model(Net(), "own", vocab_size=4)


class OnlyTheLast(Net):
    """nanoGPT gives all positions only when it has targets."""

    def forward(self, tokens_BT, targets_BT=None):
        logits_BTV = super().forward(tokens_BT)
        return logits_BTV if targets_BT is not None else logits_BTV[:, -1:], None


class CalledWithTargets(TorchModel):
    def forward(self, module, tokens_BT, counts_B):
        return module(tokens_BT, tokens_BT)[0]


def test_logits_of_the_last_position_alone_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"gave Tensor\[2, 1, 53\].*module\(tokens, tokens\)\[0\]"):
        as_model(OnlyTheLast(), "own")
    assert fired(CalledWithTargets(OnlyTheLast()), "causality", "best-lag") == ()


def test_half_precision_is_examined_in_float32():
    net = Net().bfloat16()
    model = as_model(net, "own", loss=shifted)
    assert model.dtype == "float32" and net.head.weight.dtype == torch.bfloat16
    assert fired(model) == ()


def test_an_examination_leaves_a_torch_model_as_it_was():
    model = Net().train()
    model.blocks[0].eval()
    model.blocks[1].mlp.requires_grad_(False)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    examine(as_model(model, "own", loss=shifted, context_length=17))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.blocks[1].mlp.parameters()] == [False] * 4
    assert all(p.requires_grad for p in model.blocks[0].parameters())
    assert all(p.grad is None for p in model.parameters())
    assert len(model._forward_hooks) == 1
    assert not any(m._forward_hooks for m in list(model.modules())[1:])


def test_an_examination_leaves_a_flax_model_as_it_was():
    model = FlaxNet()
    before, call = nnx.clone(model), nnx.Embed.__call__
    asked = "determinism", "causality-gradient", "gradient-coverage", "overfit-one-batch"
    fired(as_model(model, "own"), *asked)
    assert nnx.Embed.__call__ is call
    assert nnx.graphdef(model) == nnx.graphdef(before)
    for old, new in zip(*(jax.tree.leaves(nnx.state(x)) for x in (before, model)), strict=True):
        np.testing.assert_array_equal(old, new)
