"""The work that a step cannot avoid: bytes of a decoding step, operations of a training step."""

import dataclasses

import flax_gpt


@dataclasses.dataclass(frozen=True)
class BytesMoved:
    """Bytes that one decoding step of all rows has to read, once each.

    Attributes:
        config: of the model.
        batch_size: rows.
        itemsize: bytes of a number.
    """

    config: flax_gpt.GPTConfig
    batch_size: int
    itemsize: int

    @property
    def weights(self) -> int:
        """The linear layers, the norms, the table as the head, and the rows that are looked up."""
        D, F = self.config.embed_dim, self.config.mlp_dim
        linear = 4 * (D * D + D) + (D * F + F) + (F * D + D)
        norms = 2 * self.config.num_layers + 1
        numbers = self.config.num_layers * linear + norms * 2 * D + self.config.vocab_size * D
        return (numbers + 2 * self.batch_size * D) * self.itemsize

    def layer_cache(self, slots: float) -> float:
        """Keys and values of `slots` per row in one layer: 2 B K S H and the itemsize."""
        config = self.config
        return 2 * self.batch_size * config.kv_heads * slots * config.head_width * self.itemsize

    def cache(self, slots: float) -> float:
        """Keys and values of `slots` per row in all layers."""
        return self.config.num_layers * self.layer_cache(slots)

    def per_step(self, slots: float) -> float:
        """Weights, and a cache with `slots` valid per row."""
        return self.weights + self.cache(slots)


def flop_per_step(config: flax_gpt.GPTConfig, batch_size: int, width: int) -> int:
    """Return the floating-point operations of the matrix products of one training step.

    6 N + 12 L K H T per token: each of N weights multiplies and adds in the forward pass and twice
    in the backward pass, and so do queries with keys and attention weights with values over T
    slots, masked or not. N counts what multiplies: the matrices of the linear layers and, once,
    the tied table as the head; not biases, norms or rows that are looked up. Chowdhery et al.,
    "PaLM", 2022, appendix B.
    """
    attention, mlp = 4 * config.embed_dim**2, 2 * config.embed_dim * config.mlp_dim
    multiplied = config.num_layers * (attention + mlp) + config.vocab_size * config.embed_dim
    scores = config.num_layers * config.num_heads * config.head_width * width
    return batch_size * width * (6 * multiplied + 12 * scores)
