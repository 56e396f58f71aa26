"""The weight map as data: which torch leaf is which flax leaf, and in what layout.

A rule is one line for one kind of leaf, used in both directions. `*` stands for any part of one
name between dots; the n-th star of one side is the n-th of the other. `{a,b,c}` on the flax side
lists leaves that torch keeps fused, joined along the last axis of the flax layout.
"""

import dataclasses
import enum
import itertools
import re
from collections.abc import Collection, Iterator


class Layout(enum.StrEnum):
    """How a leaf lies in torch, seen from flax."""

    SAME = "same"
    TRANSPOSED = "transposed"  # torch linear (out, in), flax kernel (in, out)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a weight map.

    Attributes:
        torch: pattern of torch leaves.
        flax: pattern of flax leaves.
        layout: how one lies in the other.
        heads: fused leaves alternate head by head, in so many heads; 1 for one behind the other.
        optional: whether it may match nothing.
    """

    torch: str
    flax: str
    layout: Layout = Layout.SAME
    heads: int = 1
    optional: bool = False

    def __str__(self) -> str:
        return f"{self.torch} <-> {self.flax} ({self.layout})"

    def flax_names(self, torch_name: str) -> tuple[str, ...] | None:
        """The flax leaves that make up a torch leaf; None when the rule is not about it."""
        found = re.fullmatch(_regex(self.torch), torch_name)
        if found is None:
            return None
        stars = iter(found.groups())
        filled = re.sub(r"\*", lambda _: next(stars), self.flax)
        return tuple(_alternatives(filled))

    def torch_names(self, flax_names: Collection[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
        """The torch leaves that the rule makes of flax leaves, each with those it is made of."""
        first, *_ = _alternatives(self.flax)
        for name in flax_names:
            found = re.fullmatch(_regex(first), name)
            if found is not None:
                stars = iter(found.groups())
                filled = re.sub(r"\*", lambda _, stars=stars: next(stars), self.torch)
                yield filled, self.flax_names(filled)


@dataclasses.dataclass(frozen=True)
class Rules:
    """A whole weight map.

    Attributes:
        rules: one per kind of leaf.
        ties: pairs of torch names (alias, original) that are one tensor; flax has the original.
        ignored: patterns of torch leaves that are not weights, such as mask buffers.
    """

    rules: tuple[Rule, ...]
    ties: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()

    def is_ignored(self, torch_name: str) -> bool:
        """Whether a torch leaf is left out on purpose."""
        return any(re.fullmatch(_regex(pattern), torch_name) for pattern in self.ignored)


def _regex(pattern: str) -> str:
    return "".join(
        r"([^.]+)" if part == "*" else re.escape(part) for part in re.split(r"(\*)", pattern)
    )


def _alternatives(name: str) -> Iterator[str]:
    parts = re.split(r"\{([^}]*)\}", name)
    choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
    return ("".join(choice) for choice in itertools.product(*choices))


TWINS = Rules(
    (
        Rule("*_embedding.weight", "*_embedding.embedding"),
        Rule("embedding_norm.weight", "embedding_norm.scale", optional=True),
        Rule("embedding_norm.bias", "embedding_norm.bias", optional=True),
        Rule("blocks.*.norm_*.weight", "blocks.*.norm_*.scale"),
        Rule("blocks.*.norm_*.bias", "blocks.*.norm_*.bias", optional=True),
        *(
            Rule(
                f"blocks.*.attention.{name}.weight",
                f"blocks.*.attention.{name}.kernel",
                Layout.TRANSPOSED,
            )
            for name in ("query", "key", "value", "out")
        ),
        Rule("blocks.*.attention.*.bias", "blocks.*.attention.*.bias", optional=True),
        *(
            Rule(
                f"blocks.*.attention.{name}_norm.weight",
                f"blocks.*.attention.{name}_norm.scale",
                optional=True,
            )
            for name in ("query", "key")
        ),
        Rule("blocks.*.mlp.*.weight", "blocks.*.mlp.*.kernel", Layout.TRANSPOSED),
        Rule("blocks.*.mlp.*.bias", "blocks.*.mlp.*.bias", optional=True),
        Rule("norm.weight", "norm.scale"),
        Rule("norm.bias", "norm.bias", optional=True),
        Rule("head.weight", "head.kernel", Layout.TRANSPOSED, optional=True),
    )
)

# The twins' classifiers: the GPT, and a linear head on it.
CLASSIFIERS = Rules(
    (
        *(
            dataclasses.replace(rule, torch=f"gpt.{rule.torch}", flax=f"gpt.{rule.flax}")
            for rule in TWINS.rules
        ),
        Rule("head.weight", "head.kernel", Layout.TRANSPOSED),
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
