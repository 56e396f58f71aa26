"""Learn one sentence by heart: `python train.py`.

Dimension key: B batch, T tokens, V vocabulary.
"""

import math

import torch
from torch.nn import functional as F

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


def next_token_loss(logits_BTV: torch.Tensor, tokens_BT: torch.Tensor) -> torch.Tensor:
    """Return the mean negative log-likelihood of each token given those before it in its row.

    Args:
        logits_BTV: scores of the tokens.
        tokens_BT: the tokens that it read.
    """
    scores_BTV, targets_BT = logits_BTV[:, :-1], tokens_BT[:, 1:]
    return F.cross_entropy(scores_BTV.flatten(0, 1), targets_BT.flatten())


def train(model: GPT, tokens_BT: torch.Tensor, num_steps: int, learning_rate: float) -> list[float]:
    """Train on one batch by gradient descent with momentum; updates the weights of the model.

    Returns:
        The loss before each step.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=MOMENTUM)
    losses = []
    for _ in range(num_steps):
        loss = next_token_loss(model(tokens_BT), tokens_BT)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    """Train, and print losses and the text that the model then generates."""
    tokens_BT = torch.tensor(encode(SENTENCE)).reshape(ROWS, -1)
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
