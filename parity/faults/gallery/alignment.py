"""Bugs in what is scored: which label each position must name, and which labels count."""

from parity.faults.edit import Bug, Edit

BUGS = (
    Bug(
        id="no-shift",
        title="Labels are not shifted: every position predicts itself",
        symptom="The loss falls to zero quickly, on any text, and the model repeats its input.",
        why=(
            "Attention lets position t see token t, so naming token t is copying, and a tied head "
            "makes it easier still. Nothing is learned about the next token, yet every curve looks "
            "excellent. The best lag between predictions and tokens is 0 where it should be 1."
        ),
        seen="huggingface/transformers#27517",
        flax=(Edit("loss.py", "return labels_BT[:, 1:]", "return labels_BT[:, :-1]"),),
        torch=(Edit("loss.py", "return labels_BT[:, 1:]", "return labels_BT[:, :-1]"),),
        caught_by=("best-lag", "token-accounting"),
    ),
    Bug(
        id="double-shift",
        title="Labels are shifted twice: position t predicts token t + 2",
        symptom="Training looks normal but slower, and generated text skips every other token.",
        why=(
            "The data pipeline shifts the labels and the loss shifts them again. The token after "
            "the next is harder to guess, so the loss is a little high and nothing else is odd. "
            "One scored token per row is missing, and the best lag is 2."
        ),
        seen="huggingface/transformers#47394",
        flax=(
            Edit(
                "loss.py",
                "    return labels_BT[:, 1:]",
                "    shifted_BT = jnp.pad(\n"
                "        labels_BT[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE_INDEX\n"
                "    )\n"
                "    return shifted_BT[:, 1:]",
            ),
        ),
        torch=(
            Edit(
                "loss.py",
                "    return labels_BT[:, 1:]",
                "    shifted_BT = torch.nn.functional.pad(\n"
                "        labels_BT[:, 1:], (0, 1), value=IGNORE_INDEX\n"
                "    )\n"
                "    return shifted_BT[:, 1:]",
            ),
        ),
        caught_by=("best-lag", "token-accounting"),
    ),
    Bug(
        id="shift-backwards",
        title="Labels are rolled the wrong way: position t predicts token t - 1",
        symptom="The loss falls fast towards zero, and the model repeats its last two tokens.",
        why=(
            "A roll by +1 moves the past under each position and a roll by -1 the future; the two "
            "are easy to mix up. Token t - 1 is visible to position t, so the task is copying with "
            "a delay. Only the first position, which gets the row's last token, stays hard."
        ),
        seen="a common trap",
        flax=(
            Edit(
                "loss.py",
                "return labels_BT[:, 1:]",
                "return jnp.roll(labels_BT, 1, axis=1)[:, :-1]",
            ),
        ),
        torch=(
            Edit(
                "loss.py",
                "return labels_BT[:, 1:]",
                "return torch.roll(labels_BT, 1, dims=1)[:, :-1]",
            ),
        ),
        caught_by=("best-lag", "token-accounting"),
    ),
    Bug(
        id="loss-across-rows",
        title="Labels are flattened before the shift: rows run into each other",
        symptom="The loss of a row depends on which row comes after it in the batch.",
        why=(
            "After flattening, the position behind a row's last token is the first token of the "
            "next row, about which the row says nothing. The loss counts one such token per row, "
            "so shuffling the batch changes it, and short rows suffer most."
        ),
        seen="huggingface/transformers#47394",
        flax=(
            Edit(
                "loss.py",
                "    return labels_BT[:, 1:]",
                "    shifted = jnp.pad(labels_BT.reshape(-1)[1:], (0, 1), "
                "constant_values=IGNORE_INDEX)\n"
                "    return shifted.reshape(labels_BT.shape)",
            ),
            Edit("loss.py", "cross_entropy(logits_BTV[:, :-1], ", "cross_entropy(logits_BTV, "),
            Edit("tasks.py", "key=key)[0][:, :-1]", "key=key)[0]"),
        ),
        torch=(
            Edit(
                "loss.py",
                "    return labels_BT[:, 1:]",
                "    shifted = torch.nn.functional.pad(\n"
                "        labels_BT.reshape(-1)[1:], (0, 1), value=IGNORE_INDEX\n"
                "    )\n"
                "    return shifted.reshape(labels_BT.shape)",
            ),
            Edit("loss.py", "cross_entropy(logits_BTV[:, :-1], ", "cross_entropy(logits_BTV, "),
            Edit("tasks.py", "key=key)[0][:, :-1]", "key=key)[0]"),
        ),
        caught_by=("batch-independence", "token-accounting"),
    ),
    Bug(
        id="padding-scored",
        title="Padding is scored like text",
        symptom="The loss falls as the share of padding grows, whatever the text.",
        why=(
            "Padding is the same id over and over, so the model soon predicts it perfectly and the "
            "mean falls for nothing. Gradient goes into naming padding, and a batch of short rows "
            "looks better than one of long rows. The number of scored tokens is that of all "
            "positions instead of that of real tokens."
        ),
        seen="a common trap",
        flax=(
            Edit(
                "loss.py",
                "    if counts_B is not None:\n"
                "        steps_1T = jnp.arange(labels_BT.shape[1])[None, :]\n"
                "        labels_BT = jnp.where(steps_1T < counts_B[:, None], labels_BT, "
                "IGNORE_INDEX)\n",
                "",
            ),
        ),
        torch=(
            Edit(
                "loss.py",
                "    if counts_B is not None:\n"
                "        steps_1T = torch.arange(labels_BT.shape[1], device=labels_BT.device)"
                "[None, :]\n"
                "        labels_BT = torch.where(steps_1T < counts_B[:, None], labels_BT, "
                "IGNORE_INDEX)\n",
                "",
            ),
        ),
        caught_by=("token-accounting",),
    ),
    Bug(
        id="ignored-labels-scored",
        title="Ignored labels are clipped to class 0 and scored",
        symptom="The model is drawn to token 0 wherever a label says that nothing is to be scored.",
        why=(
            "The clip keeps the lookup inside the vocabulary, but it runs before the mask is made, "
            "so no label equals the ignore index any more. Prompts and padding now teach class 0. "
            "The scored tokens outnumber the labels that were meant."
        ),
        seen="a common trap",
        flax=(
            Edit(
                "loss.py",
                "    scored = targets != IGNORE_INDEX",
                "    targets = jnp.maximum(targets, 0)\n    scored = targets != IGNORE_INDEX",
            ),
        ),
        torch=(
            Edit(
                "loss.py",
                "    scored = targets != IGNORE_INDEX",
                "    targets = targets.clamp(min=0)\n    scored = targets != IGNORE_INDEX",
            ),
        ),
        caught_by=("token-accounting",),
    ),
    Bug(
        id="mean-over-all-positions",
        title="The mean divides by all positions, scored or not",
        symptom="Loss and perplexity are too low, the more so the more labels are ignored.",
        why=(
            "The sum leaves out ignored labels but the divisor counts them. A batch that is half "
            "padding reports half its loss, and its perplexity is the square root of the true one. "
            "The gradient may be right all along, so training alone shows nothing."
        ),
        seen="a common trap",
        flax=(
            Edit(
                "loss.py",
                "jnp.sum(jnp.where(scored, losses, 0.0)), jnp.sum(scored))",
                "jnp.sum(jnp.where(scored, losses, 0.0)), jnp.asarray(scored.size))",
            ),
        ),
        torch=(
            Edit(
                "loss.py",
                "torch.sum(torch.where(scored, losses, 0.0)), torch.sum(scored))",
                "torch.sum(torch.where(scored, losses, 0.0)), torch.tensor(scored.numel()))",
            ),
        ),
        caught_by=("token-accounting",),
    ),
    Bug(
        id="softmax-before-cross-entropy",
        title="Softmax is taken before a cross entropy that takes it again",
        symptom="The loss starts at ln V and never falls far below it.",
        why=(
            "The loss expects scores and gets probabilities, which lie between 0 and 1. A second "
            "softmax over those is nearly uniform: even a perfect model cannot get below "
            "ln(e + V - 1) - 1. Gradients shrink as well, since they pass through both."
        ),
        seen="a common trap",
        flax=(
            Edit(
                "loss.py",
                "    scored = targets != IGNORE_INDEX",
                "    logits = jax.nn.softmax(logits, axis=-1)\n"
                "    scored = targets != IGNORE_INDEX",
            ),
        ),
        torch=(
            Edit(
                "loss.py",
                "    scored = targets != IGNORE_INDEX",
                "    logits = torch.softmax(logits, dim=-1)\n    scored = targets != IGNORE_INDEX",
            ),
        ),
        caught_by=("token-accounting",),
    ),
    Bug(
        id="smoothing-left-on",
        title="Evaluation smooths the labels by default",
        symptom="Validation loss stays well above what the accuracy suggests, and never reaches 0.",
        why=(
            "Smoothing is part of the objective and not of the measurement. With a share of 0.1 a "
            "model that is certain and right pays a tenth of its confidence, so better models can "
            "score worse. Perplexities are no longer comparable with anybody's."
        ),
        seen="a common trap",
        flax=(
            Edit(
                "loss.py",
                "    counts_B: jax.Array | None = None,\n    label_smoothing: float = 0.0,\n",
                "    counts_B: jax.Array | None = None,\n    label_smoothing: float = 0.1,\n",
            ),
            Edit(
                "loss.py",
                "targets: jax.Array, label_smoothing: float = 0.0",
                "targets: jax.Array, label_smoothing: float = 0.1",
            ),
        ),
        torch=(
            Edit(
                "loss.py",
                "    counts_B: torch.Tensor | None = None,\n    label_smoothing: float = 0.0,\n",
                "    counts_B: torch.Tensor | None = None,\n    label_smoothing: float = 0.1,\n",
            ),
            Edit(
                "loss.py",
                "targets: torch.Tensor, label_smoothing: float = 0.0",
                "targets: torch.Tensor, label_smoothing: float = 0.1",
            ),
        ),
        caught_by=("token-accounting",),
    ),
    Bug(
        id="end-token-ignored",
        title="The end token shares its id with padding and is never scored",
        symptom="Generation never stops on its own: the model has not once been shown an end.",
        why=(
            "Padding is found by its id instead of by the length of the row, and that id is also "
            "the end of every text. All real ends are ignored together with the padding. The loss "
            "is blind to it, since what is not scored cannot be wrong."
        ),
        seen="deepseek-ai/DeepSeek-Coder#163",
        flax=(
            Edit(
                "loss.py",
                "    return labels_BT[:, 1:]",
                "    labels_BT = jnp.where(labels_BT == 0, IGNORE_INDEX, labels_BT)\n"
                "    return labels_BT[:, 1:]",
            ),
        ),
        torch=(
            Edit(
                "loss.py",
                "    return labels_BT[:, 1:]",
                "    labels_BT = torch.where(labels_BT == 0, IGNORE_INDEX, labels_BT)\n"
                "    return labels_BT[:, 1:]",
            ),
        ),
        caught_by=("token-accounting",),
    ),
)
