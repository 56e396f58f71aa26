"""Bugs in what a token may see, and in the softmax that turns scores into weights."""

from parity.faults.edit import Bug, Edit

BUGS = (
    Bug(
        id="mask-missing",
        title="There is no mask: every token sees the whole row",
        symptom="Losses fall below what the text allows, held out too; generation is garbage.",
        why=(
            "The next token is among those that are seen, so it need not be predicted. Validation "
            "leaks in the same way and raises no alarm. At generation there is no future to look "
            "at, and what was learned is worth nothing."
        ),
        seen="a common trap",
        flax=(
            Edit(
                "attention.py",
                "    lowest = jnp.finfo(scores_BKQTS.dtype).min\n"
                "    scores_BKQTS = jnp.where(mask_BTS[:, None, None, :, :], scores_BKQTS, "
                "lowest)\n",
                "",
            ),
        ),
        torch=(
            Edit(
                "attention.py",
                "    lowest = torch.finfo(scores_BKQTS.dtype).min\n"
                "    scores_BKQTS = torch.where(mask_BTS[:, None, None, :, :], scores_BKQTS, "
                "lowest)\n",
                "",
            ),
        ),
        caught_by=("causality", "causality-gradient"),
    ),
    Bug(
        id="mask-inverted",
        title="The mask is inverted: tokens see the future and nothing else",
        symptom="Training loss is far too low, and the last position attends to everything evenly.",
        why=(
            "In one convention True means that a slot may be seen, in another that it is hidden, "
            "and the two differ between APIs of the same framework. Here each query is left with "
            "what should be hidden. The last one has nothing left, so its weights are uniform."
        ),
        seen="rasbt/LLMs-from-scratch#1061; pytorch/pytorch#170415",
        flax=(
            Edit(
                "attention.py",
                "jnp.where(mask_BTS[:, None, None, :, :], scores_BKQTS, lowest)",
                "jnp.where(mask_BTS[:, None, None, :, :], lowest, scores_BKQTS)",
            ),
        ),
        torch=(
            Edit(
                "attention.py",
                "torch.where(mask_BTS[:, None, None, :, :], scores_BKQTS, lowest)",
                "torch.where(mask_BTS[:, None, None, :, :], lowest, scores_BKQTS)",
            ),
        ),
        caught_by=("causality", "causality-gradient"),
    ),
    Bug(
        id="mask-sees-next",
        title="The mask's diagonal is one too high: token t sees token t + 1",
        symptom="The loss falls towards zero, since the answer is one step ahead and visible.",
        why=(
            "The diagonal of a triangular mask is an argument that is easily off by one, and one "
            "leaked token is all that it takes: it is the label. A test that changes a token far "
            "in the future sees nothing wrong, since the leak reaches one token per layer."
        ),
        seen="a common trap",
        flax=(
            Edit(
                "positions.py",
                "jnp.maximum(steps_BT + 1, 0)",
                "jnp.maximum(steps_BT + 2, 0)",
            ),
        ),
        torch=(
            Edit(
                "positions.py",
                "torch.clamp(steps_BT + 1, min=0)",
                "torch.clamp(steps_BT + 2, min=0)",
            ),
        ),
        caught_by=("causality", "causality-gradient", "attention-rows"),
    ),
    Bug(
        id="mask-blind-to-itself",
        title="The mask's diagonal is one too low: no token sees itself",
        symptom="Training looks fine; the first token, which sees nothing, averages the whole row.",
        why=(
            "A strict triangle hides the diagonal. Later tokens only lose their own value, which "
            "the residual stream makes up for, so training goes on. The first query is left with "
            "an empty row, and a softmax over equal scores spreads it over all slots, the future "
            "included."
        ),
        seen="a common trap",
        flax=(
            Edit(
                "positions.py",
                "jnp.maximum(steps_BT + 1, 0)",
                "jnp.maximum(steps_BT, 0)",
            ),
        ),
        torch=(
            Edit(
                "positions.py",
                "torch.clamp(steps_BT + 1, min=0)",
                "torch.clamp(steps_BT, min=0)",
            ),
        ),
        caught_by=("attention-rows", "causality"),
    ),
    Bug(
        id="mask-after-softmax",
        title="The mask is applied to the weights, after the softmax",
        symptom="Early tokens get small attention outputs, and the future still has influence.",
        why=(
            "Zeroing weights after normalization leaves rows that do not sum to one. The scores of "
            "hidden slots stay in the denominator, so the future leaks through it as a single "
            "number per row. The leak is weak enough for training to look ordinary."
        ),
        seen="a common trap",
        flax=(
            Edit(
                "attention.py",
                "    lowest = jnp.finfo(scores_BKQTS.dtype).min\n"
                "    scores_BKQTS = jnp.where(mask_BTS[:, None, None, :, :], scores_BKQTS, "
                "lowest)\n"
                "    return jax.nn.softmax(scores_BKQTS, axis=-1).astype(q_BKQTH.dtype)\n",
                "    weights_BKQTS = jax.nn.softmax(scores_BKQTS, axis=-1).astype(q_BKQTH.dtype)\n"
                "    return jnp.where(mask_BTS[:, None, None, :, :], weights_BKQTS, 0.0)\n",
            ),
        ),
        torch=(
            Edit(
                "attention.py",
                "    lowest = torch.finfo(scores_BKQTS.dtype).min\n"
                "    scores_BKQTS = torch.where(mask_BTS[:, None, None, :, :], scores_BKQTS, "
                "lowest)\n"
                "    return torch.softmax(scores_BKQTS, dim=-1).to(q_BKQTH.dtype)\n",
                "    weights_BKQTS = torch.softmax(scores_BKQTS, dim=-1).to(q_BKQTH.dtype)\n"
                "    return torch.where(mask_BTS[:, None, None, :, :], weights_BKQTS, 0.0)\n",
            ),
        ),
        caught_by=("attention-rows", "causality-gradient", "causality"),
    ),
    Bug(
        id="mask-zero",
        title="Hidden scores are set to 0 instead of the lowest number",
        symptom="Training loss is a little too good, and generation is worse than it promises.",
        why=(
            "A score of 0 is an ordinary score: with small weights it is the average one, so the "
            "future gets its full share. It comes from multiplying scores by a triangle of ones "
            "and zeros, as if they were weights already."
        ),
        seen="a common trap",
        flax=(Edit("attention.py", "lowest = jnp.finfo(scores_BKQTS.dtype).min", "lowest = 0.0"),),
        torch=(
            Edit("attention.py", "lowest = torch.finfo(scores_BKQTS.dtype).min", "lowest = 0.0"),
        ),
        caught_by=("causality", "causality-gradient", "attention-rows"),
    ),
    Bug(
        id="mask-too-weak",
        title="Hidden scores are lowered by 10, which is not enough",
        symptom="Everything looks right, and training does slightly better than it honestly could.",
        why=(
            "Ten units of score leave the future a weight of about e**-10. At initialization that "
            "is below most tolerances; during training the model learns larger scores and pulls "
            "the future back in. A gradient shows the leak at once, because it is not exactly zero."
        ),
        seen="hyunwoongko/transformer#10",
        flax=(
            Edit(
                "attention.py",
                "jnp.where(mask_BTS[:, None, None, :, :], scores_BKQTS, lowest)",
                "jnp.where(mask_BTS[:, None, None, :, :], scores_BKQTS, scores_BKQTS - 10.0)",
            ),
        ),
        torch=(
            Edit(
                "attention.py",
                "torch.where(mask_BTS[:, None, None, :, :], scores_BKQTS, lowest)",
                "torch.where(mask_BTS[:, None, None, :, :], scores_BKQTS, scores_BKQTS - 10.0)",
            ),
        ),
        caught_by=("causality-gradient", "causality"),
    ),
    Bug(
        id="mask-transposed",
        title="Queries and keys are exchanged in the mask",
        symptom="Losses fall below what the text allows; cached calls fail on mismatched shapes.",
        why=(
            "Transposing a square triangle turns the past into the future, and no shape complains "
            "as long as there are as many keys as queries. Each token sees itself and all that "
            "comes after it. With a cache the mask is no longer square, and the mistake surfaces."
        ),
        seen="a common trap",
        flax=(
            Edit(
                "attention.py",
                "jnp.where(mask_BTS[:, None, None, :, :], scores_BKQTS, lowest)",
                "jnp.where(mask_BTS.swapaxes(1, 2)[:, None, None, :, :], scores_BKQTS, lowest)",
            ),
        ),
        torch=(
            Edit(
                "attention.py",
                "torch.where(mask_BTS[:, None, None, :, :], scores_BKQTS, lowest)",
                "torch.where(mask_BTS.swapaxes(1, 2)[:, None, None, :, :], scores_BKQTS, lowest)",
            ),
        ),
        caught_by=("causality", "cached-equals-uncached", "attention-rows"),
    ),
    Bug(
        id="mask-of-first-row",
        title="The first row's mask is used for every row of the batch",
        symptom="Rows behind a shorter first row read as if they were cut to its length.",
        why=(
            "Broadcasting one row's mask over the batch is right as long as all rows are equally "
            "long, which most tests are. With ragged rows the others hide their own tokens or see "
            "another row's padding. A row's result then depends on who comes first."
        ),
        seen="a common trap",
        flax=(
            Edit(
                "attention.py",
                "jnp.where(mask_BTS[:, None, None, :, :], scores_BKQTS, lowest)",
                "jnp.where(mask_BTS[:1, None, None, :, :], scores_BKQTS, lowest)",
            ),
        ),
        torch=(
            Edit(
                "attention.py",
                "torch.where(mask_BTS[:, None, None, :, :], scores_BKQTS, lowest)",
                "torch.where(mask_BTS[:1, None, None, :, :], scores_BKQTS, lowest)",
            ),
        ),
        caught_by=("padding-invariance", "attention-rows"),
    ),
    Bug(
        id="mask-added-as-bool",
        title="A boolean mask is added to the scores",
        symptom="Losses fall below what the text allows: the mask is there and hides little.",
        why=(
            "Additive masks hold 0 and minus infinity, boolean ones True and False. Added as "
            "numbers, True raises what may be seen by 1 and False leaves the rest as it is. The "
            "future keeps more than a third of its weight."
        ),
        seen="a common trap",
        flax=(
            Edit(
                "attention.py",
                "jnp.where(mask_BTS[:, None, None, :, :], scores_BKQTS, lowest)",
                "scores_BKQTS + mask_BTS[:, None, None, :, :].astype(scores_BKQTS.dtype)",
            ),
        ),
        torch=(
            Edit(
                "attention.py",
                "torch.where(mask_BTS[:, None, None, :, :], scores_BKQTS, lowest)",
                "scores_BKQTS + mask_BTS[:, None, None, :, :].to(scores_BKQTS.dtype)",
            ),
        ),
        caught_by=("causality", "causality-gradient", "attention-rows"),
    ),
    Bug(
        id="mask-overflow-in-half",
        title="An additive mask of -1e9 overflows in float16",
        symptom="Every output is NaN in float16, and all is well in float32 and bfloat16.",
        why=(
            "The largest float16 is 65504, so -1e9 becomes minus infinity. Multiplied by 0 where a "
            "slot may be seen, it is NaN instead of 0, and one NaN in a softmax fills the row. The "
            "same lines are right in every wider type."
        ),
        seen="pytorch/pytorch#110213",
        flax=(
            Edit(
                "attention.py",
                "    scores_BKQTS = scores_BKQTS.astype(jnp.promote_types(scores_BKQTS.dtype, "
                "jnp.float32))\n",
                "",
            ),
            Edit(
                "attention.py",
                "    lowest = jnp.finfo(scores_BKQTS.dtype).min\n"
                "    scores_BKQTS = jnp.where(mask_BTS[:, None, None, :, :], scores_BKQTS, "
                "lowest)\n",
                "    hidden_BTS = 1.0 - mask_BTS.astype(scores_BKQTS.dtype)\n"
                "    lowest = jnp.asarray(-1e9, jnp.float32).astype(scores_BKQTS.dtype)\n"
                "    scores_BKQTS = scores_BKQTS + hidden_BTS[:, None, None, :, :] * lowest\n",
            ),
        ),
        torch=(
            Edit(
                "attention.py",
                "    scores_BKQTS = scores_BKQTS.to(torch.promote_types(scores_BKQTS.dtype, "
                "torch.float32))\n",
                "",
            ),
            Edit(
                "attention.py",
                "    lowest = torch.finfo(scores_BKQTS.dtype).min\n"
                "    scores_BKQTS = torch.where(mask_BTS[:, None, None, :, :], scores_BKQTS, "
                "lowest)\n",
                "    hidden_BTS = 1.0 - mask_BTS.to(scores_BKQTS.dtype)\n"
                "    lowest = torch.tensor(-1e9).to(scores_BKQTS.dtype)\n"
                "    scores_BKQTS = scores_BKQTS + hidden_BTS[:, None, None, :, :] * lowest\n",
            ),
        ),
        caught_by=("dtype-audit",),
    ),
    Bug(
        id="softmax-in-half",
        title="The softmax is written out in the model's 16-bit type",
        symptom="In bfloat16, attention weights are three times less exact than they could be.",
        why=(
            "A softmax subtracts, exponentiates and divides by a sum, and each of the three loses "
            "digits that 16 bits do not have. Computed in float32 and rounded once, the same "
            "weights are as good as the type allows. A fused softmax does that inside; one that is "
            "written out has to be told."
        ),
        seen="a common trap",
        flax=(
            Edit(
                "attention.py",
                "    scores_BKQTS = scores_BKQTS.astype(jnp.promote_types(scores_BKQTS.dtype, "
                "jnp.float32))\n",
                "",
            ),
            Edit(
                "attention.py",
                "    return jax.nn.softmax(scores_BKQTS, axis=-1).astype(q_BKQTH.dtype)\n",
                "    scores_BKQTS = scores_BKQTS - jnp.max(scores_BKQTS, axis=-1, keepdims=True)\n"
                "    weights_BKQTS = jnp.exp(scores_BKQTS)\n"
                "    return weights_BKQTS / jnp.sum(weights_BKQTS, axis=-1, keepdims=True)\n",
            ),
        ),
        torch=(
            Edit(
                "attention.py",
                "    scores_BKQTS = scores_BKQTS.to(torch.promote_types(scores_BKQTS.dtype, "
                "torch.float32))\n",
                "",
            ),
            Edit(
                "attention.py",
                "    return torch.softmax(scores_BKQTS, dim=-1).to(q_BKQTH.dtype)\n",
                "    scores_BKQTS = scores_BKQTS - torch.amax(scores_BKQTS, dim=-1, "
                "keepdim=True)\n"
                "    weights_BKQTS = torch.exp(scores_BKQTS)\n"
                "    return weights_BKQTS / torch.sum(weights_BKQTS, dim=-1, keepdim=True)\n",
            ),
        ),
        caught_by=("parity",),
    ),
    Bug(
        id="softmax-over-queries",
        title="The softmax runs over queries instead of keys",
        symptom="The model still trains, to a worse loss, and attention weights do not sum to one.",
        why=(
            "Scores have two axes of the same length, and both give numbers between 0 and 1. Over "
            "queries, a key shares itself out among those that look at it, the later ones "
            "included, so what a token gets depends on its future."
        ),
        seen="labmlai/annotated_deep_learning_paper_implementations#282",
        flax=(
            Edit(
                "attention.py",
                "jax.nn.softmax(scores_BKQTS, axis=-1)",
                "jax.nn.softmax(scores_BKQTS, axis=-2)",
            ),
        ),
        torch=(
            Edit(
                "attention.py",
                "torch.softmax(scores_BKQTS, dim=-1)",
                "torch.softmax(scores_BKQTS, dim=-2)",
            ),
        ),
        caught_by=("attention-rows", "causality", "causality-gradient"),
    ),
    Bug(
        id="softmax-without-maximum",
        title="The softmax does not subtract the maximum first",
        symptom="Training is fine for a long time; then the loss is NaN from one step to the next.",
        why=(
            "exp overflows float32 beyond a score of 88, and infinity over infinity is NaN. Fresh "
            "weights give scores near 0, so nothing shows until some head has grown sharp. A row "
            "with no visible slot is 0 over 0 from the start."
        ),
        seen="a common trap",
        flax=(
            Edit(
                "attention.py",
                "    return jax.nn.softmax(scores_BKQTS, axis=-1).astype(q_BKQTH.dtype)\n",
                "    weights_BKQTS = jnp.exp(scores_BKQTS)\n"
                "    weights_BKQTS = weights_BKQTS / jnp.sum(weights_BKQTS, axis=-1, "
                "keepdims=True)\n"
                "    return weights_BKQTS.astype(q_BKQTH.dtype)\n",
            ),
        ),
        torch=(
            Edit(
                "attention.py",
                "    return torch.softmax(scores_BKQTS, dim=-1).to(q_BKQTH.dtype)\n",
                "    weights_BKQTS = torch.exp(scores_BKQTS)\n"
                "    weights_BKQTS = weights_BKQTS / torch.sum(weights_BKQTS, dim=-1, "
                "keepdim=True)\n"
                "    return weights_BKQTS.to(q_BKQTH.dtype)\n",
            ),
        ),
        caught_by=("nan-origin",),
    ),
    Bug(
        id="heads-by-reshape",
        title="Time and heads are exchanged by a reshape instead of a transpose",
        symptom="Shapes fit and training runs, but tokens see slices of others and of the future.",
        why=(
            "A reshape keeps the order in memory and only renames axes. What is called head 0 then "
            "holds all heads of the first tokens, and what is called time mixes both. The causal "
            "mask hides the wrong numbers. Cached calls, which write by index, disagree."
        ),
        seen="reczoo/FuxiCTR#30",
        flax=(
            Edit(
                "model.py",
                "        if layer is None:\n",
                "        if layer is None:\n"
                "            k_BKTH = k_BTKH.reshape(B, self.num_heads, T, -1)\n"
                "            v_BKTH = v_BTKH.reshape(B, self.num_heads, T, -1)\n"
                "            new = LayerCache(k_BKTH, v_BKTH)\n",
            ),
        ),
        torch=(
            Edit(
                "model.py",
                "        if layer is None:\n",
                "        if layer is None:\n"
                "            k_BKTH = k_BTKH.reshape(B, self.num_heads, T, -1)\n"
                "            v_BKTH = v_BTKH.reshape(B, self.num_heads, T, -1)\n"
                "            new = LayerCache(k_BKTH, v_BKTH)\n",
            ),
        ),
        caught_by=("causality", "cached-equals-uncached"),
    ),
)
