"""Bugs between a gradient and the next weights: the step, the optimizer, the schedule, the keys."""

from parity.faults.edit import Bug, Edit

# What somebody has who writes AdamW out in torch, up to the direction of the update.
_BY_HAND = '''class AdamWByHand(torch.optim.AdamW):
    """AdamW, written out."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                state = self.state[p]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)
                state["step"] += 1
                n, m, v = int(state["step"]), state["exp_avg"], state["exp_avg_sq"]
                m.mul_(beta1).add_(p.grad, alpha=1 - beta1)
                v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                {direction}
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * direction)


def adamw('''


def _by_hand(*direction: str) -> tuple[Edit, ...]:
    """The edits of torch_gpt that put AdamW by hand in the place of torch's."""
    lines = "\n                ".join(direction)
    return (
        Edit("optimizer.py", "def adamw(", _BY_HAND.replace("{direction}", lines)),
        Edit("optimizer.py", "return torch.optim.AdamW(", "return AdamWByHand("),
    )


BUGS = (
    Bug(
        id="no-backward",
        title="Gradients are never computed",
        symptom="The loss stays where it was, up to noise, and the gradient norm is 0.",
        why=(
            "In torch every .grad stays None and the optimizer has nothing to do. In jax the sum "
            "of gradients keeps its initial zeros, and only weight decay still moves the weights. "
            "Nothing raises an error in either."
        ),
        seen="a common trap",
        flax=(
            Edit(
                "train.py",
                "        more, loss = jax.grad(share_of_mean, has_aux=True)"
                "(state.parameters, part, index)\n"
                "        return jax.tree.map(jnp.add, gradients, more), loss\n",
                "        _, loss = share_of_mean(state.parameters, part, index)\n"
                "        return gradients, loss\n",
            ),
        ),
        torch=(Edit("train.py", "        share.backward()\n", ""),),
        caught_by=("overfit-one-batch", "update-equals-reference"),
    ),
    Bug(
        id="no-step",
        title="The update is computed and not applied",
        symptom="Gradients are there and the loss is constant from the first step to the last.",
        why=(
            "In torch the call of step is missing; in jax the new parameters are dropped and the "
            "old ones go on. Every quantity that is usually logged looks alive. Only the weights "
            "stay equal, bit for bit."
        ),
        seen="a common trap",
        flax=(
            Edit(
                "train.py",
                "parameters = optax.apply_updates(state.parameters, updates)",
                "parameters = state.parameters",
            ),
        ),
        torch=(Edit("train.py", "        state.optimizer.step()\n", ""),),
        caught_by=("overfit-one-batch", "update-equals-reference"),
    ),
    Bug(
        id="no-zero-grad",
        title="Gradients of all steps add up",
        symptom="Training starts well, then follows old batches as much as the new one.",
        why=(
            "Each step adds its gradient to those before it, so the update follows a sum over all "
            "of history. It is a momentum that never forgets. Adam divides the size away, so what "
            "goes wrong is the direction."
        ),
        seen="a common trap",
        flax=(
            Edit(
                "train.py",
                "    key: jax.Array | None\n    step: jax.Array\n",
                "    key: jax.Array | None\n    step: jax.Array\n    gradients: nnx.State\n",
            ),
            Edit(
                "train.py",
                "        return cls(graphdef, config, task, parameters, optimizer, scale, key, "
                "step)\n",
                "        gradients = jax.tree.map(jnp.zeros_like, parameters)\n"
                "        return cls(\n"
                "            graphdef, config, task, parameters, optimizer, scale, key, step, "
                "gradients\n"
                "        )\n",
            ),
            Edit(
                "train.py",
                "    gradients = jax.tree.map(jnp.zeros_like, state.parameters)\n"
                "    gradients, losses = jax.lax.scan(add_part, gradients, parts)\n",
                "    gradients, losses = jax.lax.scan(add_part, state.gradients, parts)\n",
            ),
            Edit(
                "train.py",
                "        step=state.step + 1,\n",
                "        step=state.step + 1,\n        gradients=gradients,\n",
            ),
        ),
        torch=(Edit("train.py", "    state.optimizer.zero_grad()\n", ""),),
        caught_by=("update-equals-reference",),
    ),
    Bug(
        id="moments-thrown-away",
        title="The optimizer starts afresh in every step",
        symptom="Every weight moves by the full rate in every step, however small its gradient.",
        why=(
            "Without memory the first moment is the gradient and the second its square: Adam's "
            "direction is the sign of the gradient. In jax the new state is not handed on; in "
            "torch the optimizer is built inside the loop. The count stays at 0, and with it the "
            "warm-up."
        ),
        seen="a common trap",
        flax=(Edit("train.py", "optimizer=optimizer,", "optimizer=state.optimizer,"),),
        torch=(
            Edit(
                "train.py",
                "    config, scaler = state.config, state.loss_scale\n",
                "    config, scaler = state.config, state.loss_scale\n"
                "    state = dataclasses.replace(state, optimizer=adamw(config, state.model))\n",
            ),
        ),
        caught_by=("update-equals-reference",),
    ),
    Bug(
        id="decay-on-everything",
        title="Weight decay also pulls on biases, norms and embeddings",
        symptom="Training is fine; norm scales and rare embeddings shrink slowly towards zero.",
        why=(
            "Decay is meant for the matrices of linear layers. A norm's scale has its home at 1, "
            "and the embedding of a rare word gets little gradient to hold against the pull. The "
            "difference takes thousands of steps to show in a loss."
        ),
        seen="Lightning-AI/lit-llama#254",
        flax=(
            Edit(
                "optimizer.py",
                "config.weight_decay, mask=lambda tree: _decayed(config, tree))",
                "config.weight_decay)",
            ),
        ),
        torch=(
            Edit(
                "optimizer.py",
                "dict(params=others, weight_decay=0.0)",
                "dict(params=others)",
            ),
        ),
        caught_by=("update-equals-reference",),
    ),
    Bug(
        id="l2-instead-of-decoupled",
        title="Weight decay goes through Adam: L2 instead of AdamW",
        symptom="The setting of the decay hardly matters, and curves drift from the reference.",
        why=(
            "Added to the gradient, the decay is divided by the root of the second moment like "
            "everything else, so weights with large gradients are hardly decayed. AdamW decays all "
            "at one rate. In optax the order of two lines makes the difference, in torch one "
            "letter."
        ),
        seen="google-deepmind/optax#417; ai2cm/ace#661",
        flax=(
            Edit(
                "optimizer.py",
                "        scale_by_adam(config.beta1, config.beta2, config.epsilon),\n"
                "        optax.add_decayed_weights(config.weight_decay, "
                "mask=lambda tree: _decayed(config, tree)),\n",
                "        optax.add_decayed_weights(config.weight_decay, "
                "mask=lambda tree: _decayed(config, tree)),\n"
                "        scale_by_adam(config.beta1, config.beta2, config.epsilon),\n",
            ),
            Edit("optimizer.py", "return optimizer[0].count", "return optimizer[1].count"),
        ),
        torch=(Edit("optimizer.py", "return torch.optim.AdamW(", "return torch.optim.Adam("),),
        caught_by=("update-equals-reference",),
    ),
    Bug(
        id="clip-after-step",
        title="Gradients are clipped after the update that should use them",
        symptom="Loss spikes come through as if nothing were clipped; the logged norm is right.",
        why=(
            "The clipped gradient is made and then thrown away. The logged norm is the one before "
            "clipping in either order, so the log looks the same. In torch the guard against "
            "gradients that are not finite comes too late as well."
        ),
        seen="a common trap",
        flax=(
            Edit(
                "train.py",
                "    gradients, norm = clip_gradients(config, gradients)\n"
                "    applied = jnp.isfinite(norm) & (num_scored > 0)\n"
                "    updates, optimizer = adamw(config).update(gradients, state.optimizer, "
                "state.parameters)\n",
                "    updates, optimizer = adamw(config).update(gradients, state.optimizer, "
                "state.parameters)\n"
                "    gradients, norm = clip_gradients(config, gradients)\n"
                "    applied = jnp.isfinite(norm) & (num_scored > 0)\n",
            ),
        ),
        torch=(
            Edit(
                "train.py",
                "    norm = clip_gradients(config, state.model)\n"
                "    applied = torch.isfinite(norm) & (num_scored > 0)\n"
                "    if applied:\n",
                "    if num_scored > 0:\n",
            ),
            Edit(
                "train.py",
                "        state.optimizer.step()\n",
                "        state.optimizer.step()\n"
                "    norm = clip_gradients(config, state.model)\n"
                "    applied = torch.isfinite(norm) & (num_scored > 0)\n",
            ),
        ),
        caught_by=("update-equals-reference",),
    ),
    Bug(
        id="mean-of-means",
        title="Accumulated parts count the same, however many tokens they have",
        symptom="On ragged batches, accumulation gives another gradient than one big batch.",
        why=(
            "Each part takes the mean over its own tokens, and the parts are averaged. Tokens of a "
            "short part then weigh more than those of a long one. With rows of equal length there "
            "is no difference, which is how it passes tests."
        ),
        seen="huggingface/transformers#34191",
        flax=(
            Edit(
                "train.py",
                "return loss.total / num_scored.astype(loss.total.dtype) * unit, loss",
                "return loss.mean / config.accumulation_steps * unit, loss",
            ),
        ),
        torch=(
            Edit(
                "train.py",
                "share = loss.total / num_scored.to(loss.total.dtype)",
                "share = loss.mean / config.accumulation_steps",
            ),
        ),
        caught_by=("update-equals-reference",),
    ),
    Bug(
        id="no-bias-correction",
        title="Adam's moments are not corrected for their start at zero",
        symptom="The first updates are off by a factor, which fades within a few dozen steps.",
        why=(
            "After one step the moments are (1 - beta) times their true size. Uncorrected, the "
            "first update is (1 - beta1) / sqrt(1 - beta2) times the rate, here 0.45, and with "
            "a beta2 of 0.999 it is 3.2. Later the factors go to 1 and the trace is gone."
        ),
        seen="a common trap",
        flax=(
            Edit("optimizer.py", "m_hat = m / -jnp.expm1(steps * math.log(beta1))", "m_hat = m"),
            Edit("optimizer.py", "v_hat = v / -jnp.expm1(steps * math.log(beta2))", "v_hat = v"),
        ),
        torch=_by_hand('direction = m / (v.sqrt() + group["eps"])'),
        caught_by=("update-equals-reference",),
    ),
    Bug(
        id="betas-swapped",
        title="Adam's two betas are exchanged",
        symptom="The first update is exact and all later ones are off; a small test may even gain.",
        why=(
            "The mean of the gradient then remembers long and its square briefly, the opposite of "
            "what is meant. The bias correction hides it in the very first step, where any betas "
            "give the same direction. From the second step on the updates differ."
        ),
        seen="a common trap",
        flax=(
            Edit(
                "optimizer.py",
                "scale_by_adam(config.beta1, config.beta2,",
                "scale_by_adam(config.beta2, config.beta1,",
            ),
        ),
        torch=(
            Edit(
                "optimizer.py",
                "betas=(config.beta1, config.beta2)",
                "betas=(config.beta2, config.beta1)",
            ),
        ),
        caught_by=("update-equals-reference",),
    ),
    Bug(
        id="warmup-from-zero",
        title="The warm-up gives the first update a rate of zero",
        symptom="The first step changes no weight, and the warm-up is one update late.",
        why=(
            "Counting from 0 and dividing by the length of the warm-up makes the first rate 0. A "
            "gradient is computed and wasted, and it still enters the moments. In a resumed or a "
            "very short run that step counts."
        ),
        seen="a common trap",
        flax=(Edit("optimizer.py", "(count + 1.0) / max(", "count / max("),),
        torch=(Edit("optimizer.py", "(count + 1.0) / max(", "count / max("),),
        caught_by=("update-equals-reference",),
    ),
    Bug(
        id="schedule-one-ahead",
        title="The schedule is one update ahead of the optimizer",
        symptom="Every rate belongs to the next update; curves differ from step 1 on, by little.",
        why=(
            "The scheduler is moved before the update instead of after it. Each rate is off by one "
            "step of the schedule, most of all in the warm-up. A constant rate hides it entirely."
        ),
        seen="a common trap",
        flax=(
            Edit(
                "optimizer.py",
                "lambda count: learning_rate(config, count))",
                "lambda count: learning_rate(config, count + 1))",
            ),
        ),
        torch=(
            Edit("train.py", "num_updates(state.optimizer))", "num_updates(state.optimizer) + 1)"),
        ),
        caught_by=("update-equals-reference",),
    ),
    Bug(
        id="epsilon-inside-root",
        title="Adam's epsilon is added inside the root",
        symptom="Weights with small gradients hardly move, and the rest train as usual.",
        why=(
            "Inside the root, 1e-8 acts like 1e-4 outside. Gradients of mean size 1e-3 are damped "
            "a little, those of 1e-5 by a factor of ten. The rate seems too low for some layers "
            "and right for others."
        ),
        seen="a common trap",
        flax=(Edit("optimizer.py", "(jnp.sqrt(v_hat) + epsilon)", "jnp.sqrt(v_hat + epsilon)"),),
        torch=_by_hand(
            "m_hat, v_hat = m / (1 - beta1**n), v / (1 - beta2**n)",
            'direction = m_hat / (v_hat + group["eps"]).sqrt()',
        ),
        caught_by=("update-equals-reference",),
    ),
    Bug(
        id="epsilon-zero",
        title="Adam's epsilon is zero",
        symptom="The first step looks right, and from the second one on the loss is NaN.",
        why=(
            "An element whose gradients have all been exactly 0 is updated by 0 / 0. Position rows "
            "beyond the longest text are such elements, and so is the row of its last token, which "
            "has nothing to predict. The next step reads that row."
        ),
        seen="a common trap",
        flax=(
            Edit(
                "optimizer.py",
                "scale_by_adam(config.beta1, config.beta2, config.epsilon)",
                "scale_by_adam(config.beta1, config.beta2, 0.0)",
            ),
        ),
        torch=(Edit("optimizer.py", "eps=config.epsilon", "eps=0.0"),),
        caught_by=("nan-origin", "overfit-one-batch", "update-equals-reference"),
    ),
    Bug(
        id="embedding-not-optimized",
        title="The token embedding is left out of the optimizer",
        symptom="The loss falls to a plateau, and the largest table of the model never changes.",
        why=(
            "Parameters are sorted into groups by name, and one name falls through. In torch it is "
            "in no group, in optax under a mask that sets its update to zero. Its gradient exists "
            "and even counts in the clipping norm."
        ),
        seen="a common trap",
        flax=(
            Edit(
                "optimizer.py",
                "        optax.scale_by_learning_rate(lambda count: learning_rate(config, count)),"
                "\n    )\n",
                "        optax.scale_by_learning_rate(lambda count: learning_rate(config, count)),"
                "\n        optax.masked(optax.set_to_zero(), _tied),\n"
                "    )\n\n\n"
                "def _tied(parameters: Any) -> Any:\n"
                '    """True for the table that the head shares."""\n\n'
                "    def is_tied(path: tuple, _: jax.Array) -> bool:\n"
                '        return any(getattr(key, "key", None) == "token_embedding" '
                "for key in path)\n\n"
                "    return jax.tree_util.tree_map_with_path(is_tied, parameters)\n",
            ),
        ),
        torch=(
            Edit(
                "optimizer.py",
                "    others = [p for name, p in model.named_parameters() "
                "if not _decays(config, model, name)]\n",
                "    others = [\n"
                "        p\n"
                "        for name, p in model.named_parameters()\n"
                '        if not _decays(config, model, name) and "token_embedding" not in name\n'
                "    ]\n",
            ),
            Edit("train.py", "state.optimizer.zero_grad()", "state.model.zero_grad()"),
        ),
        caught_by=("update-equals-reference", "overfit-one-batch"),
    ),
    Bug(
        id="dropout-same-every-step",
        title="Dropout draws the same mask in every step",
        symptom="Dropout does not regularize: the same elements are missing in every step.",
        why=(
            "The key is used as it is instead of being folded with the step. One fixed subnetwork "
            "is trained, and the elements that were dropped first are never trained at all. At "
            "evaluation they join in with their initial weights."
        ),
        seen="a common trap",
        flax=(
            Edit(
                "train.py",
                "random.fold_in(random.fold_in(state.key, state.step), index)",
                "random.fold_in(state.key, index)",
            ),
        ),
        torch=(
            Edit(
                "train.py",
                "random.fold_in(random.fold_in(state.key, state.step), index)",
                "random.fold_in(state.key, index)",
            ),
        ),
        caught_by=("determinism",),
    ),
    Bug(
        id="gradient-ascent",
        title="The update has the wrong sign",
        symptom="The loss rises steadily from the first step on.",
        why=(
            "In optax, scale_by_schedule multiplies by the rate where scale_by_learning_rate also "
            "flips the sign; in torch a rate becomes negative by hand. Each step goes uphill, and "
            "weight decay turns into growth."
        ),
        seen="a common trap",
        flax=(
            Edit(
                "optimizer.py",
                "optax.scale_by_learning_rate(lambda",
                "optax.scale_by_schedule(lambda",
            ),
        ),
        torch=(Edit("train.py", "= learning_rate(config, num", "= -learning_rate(config, num"),),
        caught_by=("overfit-one-batch", "update-equals-reference"),
    ),
)
