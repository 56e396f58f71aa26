"""Bugs in the two embedding tables: how they start, how they are read, how they are joined."""

from parity.faults.edit import Bug, Edit

BUGS = (
    Bug(
        id="position-std-one",
        title="The position table is drawn with standard deviation 1",
        symptom="The first loss looks right, but the fresh model can hardly tell tokens apart.",
        why=(
            "Token embeddings start at 0.02, so a table at 1 is fifty times louder, and after "
            "the first norm hardly anything of the token is left. It is what PyTorch's embedding "
            "does when nobody initializes it. The model first has to learn to look past it."
        ),
        seen="karpathy/minGPT#62",
        flax=(
            Edit(
                "model.py",
                "embedding(config, config.context_length, subkeys[1])",
                "embedding(dataclasses.replace(config, init_std=1.0), config.context_length, "
                "subkeys[1])",
            ),
        ),
        torch=(
            Edit(
                "model.py",
                "embedding(config, config.context_length, subkeys[1])",
                "embedding(dataclasses.replace(config, init_std=1.0), config.context_length, "
                "subkeys[1])",
            ),
        ),
        caught_by=("position-sensitivity",),
    ),
    Bug(
        id="position-zeros",
        title="The position table starts at zeros",
        symptom="A fresh model gives a repeated token equal logits everywhere; no loss shows it.",
        why=(
            "With zeros the first model is a bag of words that knows order only through the causal "
            "mask. Unlike zeros in a hidden layer it does get gradients, and it recovers. That is "
            "why it stays in the code: the only trace is at the very start."
        ),
        seen="karpathy/build-nanogpt#18",
        flax=(
            Edit(
                "model.py",
                "embedding(config, config.context_length, subkeys[1])",
                "embedding(config, config.context_length, None)",
            ),
        ),
        torch=(
            Edit(
                "model.py",
                "embedding(config, config.context_length, subkeys[1])",
                "embedding(config, config.context_length, None)",
            ),
        ),
        caught_by=("position-sensitivity",),
    ),
    Bug(
        id="position-frozen",
        title="The position table gets no gradient",
        symptom="Training works, slightly worse than it should, and one table never changes.",
        why=(
            "A detach that was meant for something else, or a copy of fixed sinusoids left from "
            "another model, cuts the table off. Random positions tell tokens apart well enough, so "
            "no curve looks broken. Only a look at the gradients shows a parameter without one."
        ),
        seen="a common trap",
        flax=(
            Edit(
                "model.py",
                "self.position_embedding(placement.positions_BT)",
                "jax.lax.stop_gradient(\n"
                "            self.position_embedding(placement.positions_BT)\n"
                "        )",
            ),
        ),
        torch=(
            Edit(
                "model.py",
                "self.position_embedding(placement.positions_BT)",
                "self.position_embedding(placement.positions_BT).detach()",
            ),
        ),
        caught_by=("gradient-coverage",),
    ),
    Bug(
        id="position-by-row",
        title="Positions count batch rows instead of time steps",
        symptom="All tokens of a row share one position, and a row's result depends on its place.",
        why=(
            "The size of axis 0 was taken where that of axis 1 was meant. Within a row there is no "
            "order left beyond what the causal mask gives. A row moved to another place in the "
            "batch gets other logits, and a batch larger than the context fails."
        ),
        seen="a common trap",
        flax=(
            Edit(
                "model.py",
                "self.position_embedding(placement.positions_BT)",
                "self.position_embedding(jnp.arange(batch_size)[:, None])",
            ),
        ),
        torch=(
            Edit(
                "model.py",
                "self.position_embedding(placement.positions_BT)",
                "self.position_embedding(torch.arange(batch_size, device=tokens_BT.device)"
                "[:, None])",
            ),
        ),
        caught_by=("batch-independence", "position-sensitivity"),
    ),
    Bug(
        id="position-one-row",
        title="The position table has one row, broadcast to every position",
        symptom="Training runs without an error, and the model mixes up the order of its words.",
        why=(
            "A table of shape (1, D) adds to (B, T, D) without complaint, and then every token "
            "stands at the same position. It acts as a bias. The parameter is far too small, which "
            "only somebody who reads the shapes notices."
        ),
        seen="a common trap",
        flax=(
            Edit(
                "model.py",
                "embedding(config, config.context_length, subkeys[1])",
                "embedding(config, 1, subkeys[1])",
            ),
            Edit(
                "model.py",
                "self.position_embedding(placement.positions_BT)",
                "self.position_embedding.embedding[...][None]",
            ),
        ),
        torch=(
            Edit(
                "model.py",
                "embedding(config, config.context_length, subkeys[1])",
                "embedding(config, 1, subkeys[1])",
            ),
            Edit(
                "model.py",
                "self.position_embedding(placement.positions_BT)",
                "self.position_embedding.weight[None]",
            ),
        ),
        caught_by=("position-sensitivity",),
    ),
    Bug(
        id="position-not-added",
        title="Position embeddings are not added",
        symptom="The model treats text as a bag of words, and its table of positions never moves.",
        why=(
            "The table exists and is saved with the model, but the forward pass leaves it out. "
            "Attention without positions is blind to order except for what the causal mask tells. "
            "A short training looks as good as any; what needs to know where, never comes."
        ),
        seen="a common trap",
        flax=(Edit("model.py", " + self.position_embedding(placement.positions_BT)", ""),),
        torch=(Edit("model.py", " + self.position_embedding(placement.positions_BT)", ""),),
        caught_by=("position-sensitivity", "gradient-coverage"),
    ),
    Bug(
        id="position-multiplied",
        title="Position embeddings are multiplied instead of added",
        symptom="Learning starts slowly: the stream begins some seventy times too small.",
        why=(
            "The product of two numbers near 0.02 is near 0.0004, and its variance is far below "
            "the epsilon of the norm. Both tables get gradients scaled by the other. Everything "
            "still depends on both, so a test of sensitivity alone finds nothing."
        ),
        seen="a common trap",
        flax=(
            Edit(
                "model.py",
                " + self.position_embedding(placement.positions_BT)",
                " * self.position_embedding(placement.positions_BT)",
            ),
        ),
        torch=(
            Edit(
                "model.py",
                " + self.position_embedding(placement.positions_BT)",
                " * self.position_embedding(placement.positions_BT)",
            ),
        ),
        caught_by=("parity",),
    ),
    Bug(
        id="position-off-by-one",
        title="Positions count from 1",
        symptom="All is well until a sequence fills the context: NaN in jax, IndexError in torch.",
        why=(
            "The first row of the table is never read, and the last position asks for a row behind "
            "its end. A model trained this way is as good as any on shorter text. With weights "
            "from elsewhere every token is one position off."
        ),
        seen="a common trap",
        flax=(
            Edit(
                "model.py",
                "self.position_embedding(placement.positions_BT)",
                "self.position_embedding(placement.positions_BT + 1)",
            ),
        ),
        torch=(
            Edit(
                "model.py",
                "self.position_embedding(placement.positions_BT)",
                "self.position_embedding(placement.positions_BT + 1)",
            ),
        ),
        caught_by=("boundary-lengths", "gradient-coverage"),
    ),
    Bug(
        id="position-wraps",
        title="Positions wrap around at half of the context",
        symptom="Short prompts are fine; beyond half of the context the model loses its place.",
        why=(
            "A modulus left from a window or a smaller model gives two tokens the same position. "
            "No length raises an error, and tests on short sequences pass. Half of the table never "
            "gets a gradient."
        ),
        seen="a common trap",
        flax=(
            Edit(
                "model.py",
                "self.position_embedding(placement.positions_BT)",
                "self.position_embedding(\n"
                "            placement.positions_BT % (self.config.context_length // 2)\n"
                "        )",
            ),
        ),
        torch=(
            Edit(
                "model.py",
                "self.position_embedding(placement.positions_BT)",
                "self.position_embedding(\n"
                "            placement.positions_BT % (self.config.context_length // 2)\n"
                "        )",
            ),
        ),
        caught_by=("gradient-coverage",),
    ),
    Bug(
        id="embedding-std-one",
        title="Token embeddings of standard deviation 1 under a tied head",
        symptom="The first loss is far above ln V, and the first steps only bring it down.",
        why=(
            "The head multiplies a normed stream of length sqrt(D) by rows of length sqrt(D), so "
            "logits spread like sqrt(D), and the token's own logit is near D. A uniform guess "
            "costs ln V; this one is confident and wrong."
        ),
        seen="huggingface/transformers#26441",
        flax=(
            Edit(
                "model.py",
                "embedding(config, config.vocab_size, subkeys[0])",
                "embedding(dataclasses.replace(config, init_std=1.0), config.vocab_size, "
                "subkeys[0])",
            ),
        ),
        torch=(
            Edit(
                "model.py",
                "embedding(config, config.vocab_size, subkeys[0])",
                "embedding(dataclasses.replace(config, init_std=1.0), config.vocab_size, "
                "subkeys[0])",
            ),
        ),
        caught_by=("initial-loss",),
    ),
)
