"""Models of transformers: nothing is found in healthy ones, and what was planted in the others.

Dimension key: B batch, T tokens, S cache slots, D embed dim.
"""

import math

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention, GPT2Block
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.pytorch_utils import Conv1D

from parity.doctor import DETECTORS, as_model, examine
from parity.doctor.offers import CanDecode, CanGenerate
from parity.report.record import Verdict

GPT2, Llama = transformers.GPT2LMHeadModel, transformers.LlamaForCausalLM

# A model that was never given a text has no ids that begin or end one.
_NO_IDS = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)


@pytest.fixture(autouse=True, scope="module")
def quiet():
    """transformers warns of odd models, which are what is wanted here."""
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    yield
    transformers.utils.logging.set_verbosity(before)


def gpt2(seed=0, attention="sdpa", **sizes):
    """Fresh weights; sizes that all differ."""
    torch.manual_seed(seed)
    defaults = dict(vocab_size=97, n_positions=29, n_embd=40, n_layer=3, n_head=5, n_inner=56)
    config = transformers.GPT2Config(**(defaults | _NO_IDS | sizes))
    config._attn_implementation = attention
    return GPT2(config)


def llama(seed=0, attention="sdpa", **sizes):
    """Fresh weights; two heads of keys and values serve six of queries."""
    torch.manual_seed(seed)
    defaults = dict(
        vocab_size=89, max_position_embeddings=31, hidden_size=48, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=2, intermediate_size=56,
    )  # fmt: skip
    config = transformers.LlamaConfig(**(defaults | _NO_IDS | sizes))
    config._attn_implementation = attention
    return Llama(config)


def diagnosed(model, *names, seed=0):
    """What is said of a model by the detectors that are named, or by all."""
    model = as_model(model, "planted", seed=seed)
    asked = [x for x in DETECTORS if not names or x.name in names]
    assert not names or len(asked) == len(names)
    return examine(model, detectors=asked, stop_early=False)


@pytest.mark.parametrize(
    ("make", "sizes"),
    [
        (gpt2, dict(seed=1)),
        (gpt2, dict(seed=2, attention="eager", tie_word_embeddings=False)),
        (gpt2, dict(n_layer=1, n_head=1, n_embd=37)),
        (gpt2, dict(vocab_size=13, n_positions=10)),
        (llama, dict(seed=1)),
        (llama, dict(seed=2, attention="eager", tie_word_embeddings=True)),
        (llama, dict(num_key_value_heads=1, head_dim=16)),
        (llama, dict(num_key_value_heads=6, max_position_embeddings=64)),
    ],
    ids=lambda x: x.__name__ if callable(x) else ", ".join(x),
)
def test_a_healthy_model_raises_no_alarm(make, sizes):
    diagnosis = diagnosed(make(**sizes), seed=sizes.get("seed", 0))
    assert diagnosis.fired == ()
    unasked = [x.detector.name for x in diagnosis.answers if x.finding.verdict is Verdict.ABSTAIN]
    assert unasked == ["update-equals-reference", "recompilation", "parity"]


def test_what_a_model_says_of_generation_is_no_part_of_a_question():
    model = llama()
    model.generation_config.update(
        do_sample=True, temperature=0.6, repetition_penalty=1.5, eos_token_id=list(range(40))
    )
    assert diagnosed(model, "sampling", "determinism").fired == ()
    assert model.generation_config.repetition_penalty == 1.5


def test_half_precision_is_examined_in_float32():
    names = "determinism", "batch-independence", "nan-origin", "sampling", "overfit-one-batch"
    assert diagnosed(gpt2().bfloat16(), *names).fired == ()


def test_attention_that_cannot_be_shown_is_not_judged():
    class Fused(LlamaAttention):
        def forward(self, *args, **more):
            return super().forward(*args, **more)[0], None

    diagnosis = diagnosed(planted(llama(), LlamaAttention, Fused), "attention-rows")
    assert "no attention weights" in diagnosis.answers[0].finding.sentence


def test_an_examination_leaves_a_model_and_the_random_numbers_as_they_were():
    model = gpt2().train()
    model.transformer.h[1].requires_grad_(False)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    diagnosed(model, "attention-rows", "sampling", "nan-origin", "cached-equals-uncached")
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all(m.training and not m._forward_hooks for m in model.modules())
    assert [name for name, x in model.named_parameters() if not x.requires_grad] == [
        f"transformer.h.1.{name}" for name, _ in model.transformer.h[1].named_parameters()
    ]
    assert model.config._attn_implementation == "sdpa"
    random = torch.random.get_rng_state()
    diagnosed(model, "sampling")
    assert torch.equal(torch.random.get_rng_state(), random)


def test_a_loss_that_is_given_takes_the_place_of_the_models_own():
    def loss(logits_BTV, labels_BT, counts_B):
        return cross_entropy(logits_BTV, labels_BT)

    model = as_model(llama(), "own", loss=loss)
    assert isinstance(model, CanDecode) and isinstance(model, CanGenerate)
    assert model.ignore_index is None
    asked = [x for x in DETECTORS if x.name == "token-accounting"]
    assert examine(model, detectors=asked).fired == ("token-accounting",)


def test_a_model_with_an_encoder_is_refused():
    config = transformers.T5Config(
        vocab_size=97, d_model=40, num_layers=1, num_heads=5, d_kv=8, d_ff=56
    )
    with pytest.raises(ValueError, match="T5ForConditionalGeneration has an encoder, which"):
        as_model(transformers.T5ForConditionalGeneration(config), "t5", context_length=31)


# A fault is a class that goes in front of the class of the modules it is planted in: a deep copy,
# which every question makes, keeps classes, but no hooks or closures that know a module.


def planted(model, part, fault, which=slice(None)):
    """The model with `fault` in front of the modules of the class `part`."""
    modules = [m for m in model.modules() if isinstance(m, part)][which]
    assert modules
    for module in modules:
        module.__class__ = (
            fault if issubclass(fault, part) else type(fault.__name__, (fault, type(module)), {})
        )
    return model


class Masked:
    """Attention with a mask of its own: query t sees the slots up to t + further."""

    further, hidden = 0, -math.inf

    def forward(self, hidden_states, past_key_values=None, attention_mask=None, **more):
        past = past_key_values.get_seq_length(self.layer_idx) if past_key_values else 0
        T = hidden_states.shape[1]
        hidden_TS = torch.ones(T, past + T).triu(1 + past + self.further).bool()
        mask_TS = hidden_states.new_zeros(T, past + T).masked_fill(hidden_TS, self.hidden)
        more["attention_mask"] = mask_TS[None, None]
        return super().forward(hidden_states, past_key_values=past_key_values, **more)


class WeaklyMasked(Masked):
    """A mask that scores of 10,000 get past."""

    hidden = -1e4


class Unmasked(Masked):
    further = 1000


class SeesTheNext(Masked):
    further = 1


class Zeros:
    """A table or layer whose output is not used."""

    def forward(self, *inputs):
        return 0.0 * super().forward(*inputs)


class Identity:
    """A layer that is left out."""

    def forward(self, inputs):
        return inputs


class Unrotated:
    """Rotary positions, all of them 0."""

    def forward(self, x, position_ids):
        return super().forward(x, torch.zeros_like(position_ids))


class AlwaysDrops:
    """Functional dropout without `training=self.training`."""

    def forward(self, inputs):
        return F.dropout(super().forward(inputs), 0.1)


class RestartsPositions:
    """Every piece of a sequence begins at position 0."""

    def forward(self, input_ids=None, position_ids=None, **more):
        position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        return super().forward(input_ids, position_ids=position_ids, **more)


class NoFirstResidual:
    """A block of GPT-2 whose first half replaces the stream."""

    def forward(self, hidden_states, past_key_values, attention_mask, *_, **more):
        stream = self.attn(self.ln_1(hidden_states), past_key_values, attention_mask)[0]
        return stream + self.mlp(self.ln_2(stream))


class NoResidual:
    """A block that gives what it should add."""

    def forward(self, hidden_states, *args, **more):
        return super().forward(hidden_states, *args, **more) - hidden_states


class NoSecondResidual:
    """A block of Llama whose second half replaces the stream."""

    def forward(self, hidden_states, **more):
        more.pop("use_cache")
        stream = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **more)[0]
        return self.mlp(self.post_attention_layernorm(stream))


class QueryForKey:
    """GPT-2's one matrix for three: the keys are the queries."""

    def forward(self, inputs):
        query, _, value = super().forward(inputs).chunk(3, dim=-1)
        return torch.cat([query, query, value], dim=-1)


class QueriesForKeys:
    """Llama's matrix of keys is there, and that of queries takes its place."""

    def forward(self, *args, **more):
        keys, self.k_proj = self.k_proj, self.q_proj
        try:
            return super().forward(*args, **more)
        finally:
            self.k_proj = keys


class ForgetsOrder:
    """A cache that does not follow its rows."""

    def forward(self, *args, **more):
        output = super().forward(*args, **more)
        if output.past_key_values is not None:
            output.past_key_values.__class__ = Unordered
        return output


class Unordered(transformers.DynamicCache):
    def reorder_cache(self, beam_idx):
        pass


class KeepsGraph:
    def forward(self, *args, **more):
        with torch.enable_grad():
            return super().forward(*args, **more)


class Detached:
    def forward(self, *inputs):
        return super().forward(*inputs).detach()


def cross_entropy(logits, labels, **more):
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), **more)


def loss_without_shift(logits, labels, **_):
    return cross_entropy(logits, labels)


def loss_shifted_twice(logits, labels, **_):
    return cross_entropy(logits[:, :-2], labels[:, 2:])


def loss_with_padding(logits, labels, **_):
    return cross_entropy(logits[:, :-1], labels[:, 1:].clamp(min=0))


def loss_over_rows(logits, labels, **_):
    return cross_entropy(logits.flatten(0, 1)[None, :-1], labels.flatten()[None, 1:])


def with_loss(make, loss):
    model = make()
    model.loss_function = loss
    return model


def drawn_large():
    """A tied head reads the tokens of a table with deviation 1."""
    model = gpt2()
    nn.init.normal_(model.transformer.wte.weight)
    return model


def scaled_by_width(model):
    for module in model.modules():
        if isinstance(module, GPT2Attention | LlamaAttention):
            module.scaling = module.config.hidden_size**-0.5
    return model


def frozen(model, name):
    model.get_parameter(name).requires_grad_(False)
    return model


ONE, LAST = slice(1, 2), slice(-1, None)
CAUSAL = "causality causality-gradient attention-rows"
FAULTS = {
    "no mask, GPT-2": (lambda: planted(gpt2(), GPT2Attention, Unmasked), CAUSAL),
    "no mask, Llama": (lambda: planted(llama(), LlamaAttention, Unmasked), CAUSAL),
    "a mask of -1e4, GPT-2": (
        lambda: planted(gpt2(), GPT2Attention, WeaklyMasked), "mask-strength"
    ),
    "a mask of -1e4, Llama": (
        lambda: planted(llama(), LlamaAttention, WeaklyMasked), "mask-strength"
    ),
    "no mask in one layer": (lambda: planted(gpt2(), GPT2Attention, Unmasked, ONE), CAUSAL),
    "sees the next token, GPT-2": (lambda: planted(gpt2(), GPT2Attention, SeesTheNext), CAUSAL),
    "sees the next token, Llama": (lambda: planted(llama(), LlamaAttention, SeesTheNext), CAUSAL),
    "no shift, GPT-2": (
        lambda: with_loss(gpt2, loss_without_shift), "token-accounting best-lag"
    ),
    "no shift, Llama": (
        lambda: with_loss(llama, loss_without_shift), "token-accounting best-lag"
    ),
    "two shifts, GPT-2": (
        lambda: with_loss(gpt2, loss_shifted_twice), "token-accounting best-lag"
    ),
    "two shifts, Llama": (
        lambda: with_loss(llama, loss_shifted_twice), "token-accounting best-lag"
    ),
    "padding is scored, GPT-2": (lambda: with_loss(gpt2, loss_with_padding), "token-accounting"),
    "padding is scored, Llama": (lambda: with_loss(llama, loss_with_padding), "token-accounting"),
    "rows run into each other": (
        lambda: with_loss(gpt2, loss_over_rows), "batch-independence token-accounting"
    ),
    "tokens drawn large": (drawn_large, "initial-loss"),
    "no positions, GPT-2": (
        lambda: planted(gpt2(), nn.Embedding, Zeros, ONE),
        "position-sensitivity gradient-coverage",
    ),
    "no positions, Llama": (
        lambda: planted(llama(), LlamaRotaryEmbedding, Unrotated), "position-sensitivity"
    ),
    "dropout in evaluation, GPT-2": (lambda: planted(gpt2(), GPT2MLP, AlwaysDrops), "determinism"),
    "dropout in evaluation, Llama": (
        lambda: planted(llama(), LlamaMLP, AlwaysDrops), "determinism"
    ),
    "positions start again, GPT-2": (
        lambda: planted(gpt2(), GPT2, RestartsPositions), "cached-equals-uncached sampling"
    ),
    "positions start again, Llama": (
        lambda: planted(llama(), Llama, RestartsPositions), "cached-equals-uncached sampling"
    ),
    "rows are not reordered, GPT-2": (
        lambda: planted(gpt2(), GPT2, ForgetsOrder), "cached-equals-uncached"
    ),
    "rows are not reordered, Llama": (
        lambda: planted(llama(), Llama, ForgetsOrder), "cached-equals-uncached"
    ),
    "a half without residual": (
        lambda: planted(gpt2(), GPT2Block, NoFirstResidual, ONE), "residual-stream"
    ),
    "a block without residual": (
        lambda: planted(llama(), LlamaDecoderLayer, NoResidual, ONE), "residual-stream"
    ),
    "no final norm, GPT-2": (
        lambda: planted(gpt2(), nn.LayerNorm, Identity, LAST), "gradient-coverage"
    ),
    "no final norm, Llama": (
        lambda: planted(llama(), LlamaRMSNorm, Identity, LAST), "gradient-coverage"
    ),
    "queries for keys, Llama": (
        lambda: planted(llama(num_key_value_heads=6), LlamaAttention, QueriesForKeys, ONE),
        "gradient-coverage",
    ),
    "scale of the width, GPT-2": (lambda: scaled_by_width(gpt2()), "attention-scale"),
    "scale of the width, Llama": (
        lambda: scaled_by_width(llama(num_key_value_heads=6)), "attention-scale"
    ),
    "a frozen layer, GPT-2": (
        lambda: frozen(gpt2(), "transformer.h.1.mlp.c_proj.weight"), "gradient-coverage"
    ),
    "a frozen layer, Llama": (
        lambda: frozen(llama(), "model.layers.0.self_attn.v_proj.weight"), "gradient-coverage"
    ),
    "a layer detached": (lambda: planted(gpt2(), GPT2MLP, Detached, ONE), "gradient-coverage"),
    "queries for keys, GPT-2": (
        lambda: planted(gpt2(), Conv1D, QueryForKey, slice(1)), "gradient-coverage"
    ),
    "a half without residual, Llama": (
        lambda: planted(llama(), LlamaDecoderLayer, NoSecondResidual, ONE), "residual-stream"
    ),
    "scale of the width, grouped queries": (lambda: scaled_by_width(llama()), "attention-scale"),
    "gradients while generating": (lambda: planted(gpt2(), GPT2, KeepsGraph), "growing-graph"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_planted_is_seen(fault):
    make, names = FAULTS[fault]
    assert diagnosed(make(), *names.split()).fired == tuple(names.split())


def test_the_mask_that_faults_are_made_of_is_itself_healthy():
    names = *CAUSAL.split(), "cached-equals-uncached", "boundary-lengths"
    for make, part in ((gpt2, GPT2Attention), (llama, LlamaAttention)):
        assert diagnosed(planted(make(), part, Masked), *names).fired == ()


def test_a_model_that_is_trained_is_not_asked_for_a_fresh_loss():
    model = as_model(drawn_large(), "trained", trained=True)
    diagnosis = examine(model, detectors=DETECTORS[:1])
    assert diagnosis.fired == () and "trained" in diagnosis.answers[0].finding.sentence
