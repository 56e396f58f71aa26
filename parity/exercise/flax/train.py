"""Learn one sentence by heart: `python train.py`.

Dimension key: B batch, T tokens, V vocabulary.
"""

import math

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from generate import generate
from model import GPT, Config

SENTENCE = "a model that cannot learn one sentence by heart has a bug, so start with one sentence."
ROWS = 2
VOCABULARY = sorted(set(SENTENCE))
MOMENTUM = 0.9


def encode(text: str) -> list[int]:
    """Return a token for every character."""
    return [VOCABULARY.index(character) for character in text]


def decode(tokens: list[int]) -> str:
    """Undo `encode`."""
    return "".join(VOCABULARY[token] for token in tokens)


def next_token_loss(logits_BTV: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    """Return the mean negative log-likelihood of each token given those before it in its row.

    Args:
        logits_BTV: scores of the tokens.
        tokens_BT: the tokens that it read.
    """
    scores_BTV, targets_BT = logits_BTV[:, :-1], tokens_BT[:, 1:]
    return optax.softmax_cross_entropy_with_integer_labels(scores_BTV, targets_BT).mean()


def train(model: GPT, tokens_BT: jax.Array, num_steps: int, learning_rate: float) -> list[float]:
    """Train on one batch by gradient descent with momentum; updates the weights of the model.

    Returns:
        The loss before each step.
    """
    optimizer = optax.sgd(learning_rate, momentum=MOMENTUM)
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def loss_and_gradients(parameters: nnx.State) -> tuple[jax.Array, nnx.State]:
        def loss_of(parameters: nnx.State) -> jax.Array:
            return next_token_loss(nnx.merge(graph, parameters, rest)(tokens_BT), tokens_BT)

        return jax.value_and_grad(loss_of)(parameters)

    momentum = optimizer.init(parameters)
    losses = []
    for _ in range(num_steps):
        loss, gradients = loss_and_gradients(parameters)
        updates, momentum = optimizer.update(gradients, momentum)
        parameters = optax.apply_updates(parameters, updates)
        losses.append(loss.item())
    nnx.update(model, parameters)
    return losses


def main() -> None:
    """Train, and print losses and the text that the model then generates."""
    tokens_BT = jnp.array(encode(SENTENCE), jnp.int32).reshape(ROWS, -1)
    config = Config(vocab_size=len(VOCABULARY), context_length=tokens_BT.shape[1])
    model = GPT(config, seed=0)
    losses = train(model, tokens_BT, num_steps=200, learning_rate=0.1)
    print(f"a guess would cost ln {len(VOCABULARY)} = {math.log(len(VOCABULARY)):.3f}")
    for step in range(0, len(losses), 20):
        print(f"step {step:3}  loss {losses[step]:.4f}")
    print(f"last      loss {losses[-1]:.4f}")
    start = 8
    for row in generate(model, tokens_BT[:, :start], tokens_BT.shape[1] - start).tolist():
        print(f"{decode(row[:start])!r} -> {decode(row[start:])!r}")


if __name__ == "__main__":
    main()
