"""Tiny models that are checked beside any pair of twins, so that every part of them is.

Together they have each kind of positions, norm, activation and gate, a window and none, heads
grouped and not, logits tied and not, every bias and none of it, scaled and capped scores, sizes
that no number of cores divides, and a row that is longer than the first read of a cache.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax_gpt.config import GPTConfig, Rotary
from parity.frameworks.plan import Limits, Way

# Few shapes of weights among all of them, because jax compiles what makes each of these.
_SIZES: dict[str, Any] = dict(
    vocab_size=11, context_length=24, embed_dim=9, num_layers=1, num_heads=3, mlp_dim=7
)

_WHOLE = Way("GPT")
_STEP = Way("decode_step")
_PACKED, _PLAIN = Way("Decoder.advance", packed=True), Way("Decoder.advance")
_CHUNKS = Way("prefill", chunk=3)
_DECODER = Way("Decoder.prefill", packed=True)
_DECODER_CHUNKS = Way("Decoder.prefill", packed=True, chunk=2)
_EVERY_WAY = (
    _WHOLE, Way("definition"), Way("prefill"), _CHUNKS, _STEP, _PACKED, _PLAIN, _DECODER,
    _DECODER_CHUNKS,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Companion:
    """A tiny model, and what plans of its caches are drawn from.

    Attributes:
        config: its sizes and parts.
        flax: of flax_gpt, for which each way, batch size and capacity is a program to compile; so
            the companions share the ways out.
        torch: of torch_gpt, which takes all ways.
    """

    config: GPTConfig
    flax: Limits
    torch: Limits


def _companion(ways: tuple[Way, ...], changes: dict[str, Any], **limits: Any) -> Companion:
    config = GPTConfig(**(_SIZES | changes))
    sizes = config.vocab_size, config.context_length
    given: dict[str, Any] = {"capacities": sizes[1:], "width": 9} | limits
    flax = Limits(*sizes, ways, counted=True, donates=True, **given)
    rows = tuple(sorted({1, 2, *flax.rows}))
    capacities = tuple(sorted({*flax.capacities, config.context_length - 5, config.context_length}))
    torch = dataclasses.replace(
        flax,
        ways=_EVERY_WAY,
        rows=rows,
        capacities=capacities,
        invariant=True,
        counted=False,
        donates=False,
        plans=flax.plans * 2,
    )
    return Companion(config, flax, torch)


COMPANIONS: Mapping[str, Companion] = {
    "learned positions": _companion(
        (_WHOLE, _PACKED),
        dict(num_layers=2, num_full_layers=1, window=5, activation="silu"),
        capacities=(8, 24), width=4,
    ),
    "rotary positions": _companion(
        (Way("definition"), _PACKED),
        dict(
            positions="rotary", num_heads=4, num_kv_heads=2, head_dim=6,
            rotary=Rotary(fraction=0.7, scaling="llama3", factor=4.0, original_length=9),
            norm="rms", activation="silu_clamped", gated=True, tied_head=False,
            attention_scale=0.3, logit_scale=0.7, residual_scale=0.6,
            qkv_bias=False, out_bias=False, mlp_bias=False,
        ),
    ),
    "dynamic rotary positions": _companion(
        (_CHUNKS, _PLAIN),
        dict(
            positions="rotary", num_heads=2, num_kv_heads=1, head_dim=12, qk_norm="head",
            rotary=Rotary(scaling="dynamic", factor=2.0, original_length=7),
            norm="rms_plus_one", norm_place="after", activation="gelu", gated=True, tied_head=False,
            out_bias=False, mlp_bias=False,
        ),
    ),
    "ALiBi positions": _companion(
        (_DECODER_CHUNKS, _PACKED),
        dict(
            positions="alibi", num_heads=6, num_kv_heads=3, head_dim=4, embedding_norm=True,
            activation="gelu_bloom", residual="parallel",
        ),
        rows=(1,),
    ),
    "T5 positions": _companion(
        (_DECODER, _PACKED),
        dict(
            context_length=275, positions="t5", t5_buckets=8, t5_max_distance=40,
            num_heads=2, head_dim=12, norm="layer_no_bias", activation="relu_squared",
            norm_place="both", sinks=True, embedding_scale=1.7,
            qkv_bias=False, tied_head=False,
        ),
        first=262, operations=4, plans=4,
    ),
    "no positions": _companion(
        (Way("prefill"), _STEP),
        dict(
            positions="none", num_heads=6, num_kv_heads=3, head_dim=4, window=6, norm="rms",
            activation="relu", residual="parallel_one_norm", score_cap=3.0,
            logit_cap=5.0, qk_norm="width", out_bias=False,
        ),
        invariant=True,
    ),
}  # fmt: skip
