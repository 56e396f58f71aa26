"""The rules of known pairs: the twins, their classifiers, and transformers' GPT-2."""

import dataclasses

from parity.weights.layouts import Layout
from parity.weights.rules import Rule, Rules

_LINEAR = Layout.TRANSPOSED

TWINS = Rules(
    (
        Rule("*_embedding.weight", "*_embedding.embedding"),
        Rule("embedding_norm.weight", "embedding_norm.scale", optional=True),
        Rule("embedding_norm.bias", "embedding_norm.bias", optional=True),
        Rule("blocks.*.norm_*.weight", "blocks.*.norm_*.scale", optional=True),
        Rule("blocks.*.norm_*.bias", "blocks.*.norm_*.bias", optional=True),
        Rule("blocks.*.after_*.weight", "blocks.*.after_*.scale", optional=True),
        Rule("blocks.*.after_*.bias", "blocks.*.after_*.bias", optional=True),
        Rule("blocks.*.attention.scores.weight", "blocks.*.attention.scores.weight", optional=True),
        Rule("blocks.*.attention.query.weight", "blocks.*.attention.query.kernel", _LINEAR),
        Rule("blocks.*.attention.key.weight", "blocks.*.attention.key.kernel", _LINEAR),
        Rule("blocks.*.attention.value.weight", "blocks.*.attention.value.kernel", _LINEAR),
        Rule("blocks.*.attention.out.weight", "blocks.*.attention.out.kernel", _LINEAR),
        Rule("blocks.*.attention.*.bias", "blocks.*.attention.*.bias", optional=True),
        Rule("blocks.*.attention.*_norm.weight", "blocks.*.attention.*_norm.scale", optional=True),
        Rule("blocks.*.mlp.*.weight", "blocks.*.mlp.*.kernel", _LINEAR, optional=True),
        Rule("blocks.*.mlp.*.bias", "blocks.*.mlp.*.bias", optional=True),
        *(
            Rule(f"{x}.weight", f"{x}.kernel", _LINEAR, optional=True)
            for x in ("blocks.*.mlp.*.*", "blocks.*.mlp.shared.*.*")
        ),
        *(
            Rule(f"{x}.bias", f"{x}.bias", optional=True)
            for x in ("blocks.*.mlp.*.*", "blocks.*.mlp.shared.*.*")
        ),
        *(
            Rule(f"blocks.*.mlp.experts.{name}", f"blocks.*.mlp.experts.{name}", optional=True)
            for name in ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
        ),
        Rule("blocks.*.mlp.router.preference", "blocks.*.mlp.router.preference", optional=True),
        Rule("norm.weight", "norm.scale"),
        Rule("norm.bias", "norm.bias", optional=True),
        Rule("head.weight", "head.kernel", _LINEAR, optional=True),
    )
)

# The twins' classifiers: the GPT, and a linear head on it.
CLASSIFIERS = Rules(
    (
        *(
            dataclasses.replace(rule, torch=f"gpt.{rule.torch}", flax=f"gpt.{rule.flax}")
            for rule in TWINS.rules
        ),
        Rule("head.weight", "head.kernel", _LINEAR),
        Rule("head.bias", "head.bias"),
    )
)

# transformers' GPT2LMHeadModel, whose Conv1D keeps (in, out) and fuses query, key and value.
HF_GPT2 = Rules(
    (
        Rule("transformer.wte.weight", "token_embedding.embedding"),
        Rule("transformer.wpe.weight", "position_embedding.embedding"),
        Rule("transformer.h.*.ln_*.weight", "blocks.*.norm_*.scale"),
        Rule("transformer.h.*.ln_*.bias", "blocks.*.norm_*.bias"),
        Rule("transformer.h.*.attn.c_attn.weight", "blocks.*.attention.{query,key,value}.kernel"),
        Rule("transformer.h.*.attn.c_attn.bias", "blocks.*.attention.{query,key,value}.bias"),
        Rule("transformer.h.*.attn.c_proj.weight", "blocks.*.attention.out.kernel"),
        Rule("transformer.h.*.attn.c_proj.bias", "blocks.*.attention.out.bias"),
        Rule("transformer.h.*.mlp.c_fc.weight", "blocks.*.mlp.up.kernel"),
        Rule("transformer.h.*.mlp.c_fc.bias", "blocks.*.mlp.up.bias"),
        Rule("transformer.h.*.mlp.c_proj.weight", "blocks.*.mlp.down.kernel"),
        Rule("transformer.h.*.mlp.c_proj.bias", "blocks.*.mlp.down.bias"),
        Rule("transformer.ln_f.weight", "norm.scale"),
        Rule("transformer.ln_f.bias", "norm.bias"),
    ),
    ties=(("lm_head.weight", "transformer.wte.weight"),),
    ignored=("transformer.h.*.attn.bias", "transformer.h.*.attn.masked_bias"),
)
