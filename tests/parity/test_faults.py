"""The check catches planted faults and says where they are; a clean pair raises no alarm."""

import dataclasses

import pytest

from parity.check import check
from parity.compare import Verdict
from parity.levels.optimizer import HORIZON
from parity.rules import TWINS, Layout, Rules


@dataclasses.dataclass(frozen=True)
class Fault:
    """One wrong place in one twin, the level that must see it, and where it must point.

    A step of None is some step: which, depends on the text, and Pythons differ in theirs. The cause
    is what the report must say, to the letter; None where it must not guess.
    """

    id: str
    package: str
    file: str
    right: str
    wrong: str
    level: str
    where: str
    step: int | None = 0
    changes: tuple[tuple[str, object], ...] = ()
    cause: str | None = None


T, F = "torch_gpt", "flax_gpt"

FORWARD = [
    Fault("norm epsilon 1e-6", T, "layers.py",
          "eps=config.norm_epsilon", "eps=1e-6", "logits", "blocks.0.norm_1",
          cause="eps=1e-05 (layer_norm"),
    Fault("norm epsilon 1e-6", F, "layers.py",
          "epsilon=config.norm_epsilon", "epsilon=1e-6", "logits", "blocks.0.norm_1",
          cause="eps=1e-06 (layer_norm"),
    Fault("norm without a scale", F, "layers.py",
          "use_fast_variance=False", "use_fast_variance=False, use_scale=False",
          "weights", "the weight map"),
    Fault("exact GELU", T, "layers.py",
          'approximate="tanh" if', 'approximate="none" if', "logits", "blocks.0.mlp",
          cause="gelu with tanh (gelu"),
    Fault("exact GELU", F, "layers.py",
          'approximate=config.activation == "gelu_tanh"', "approximate=False",
          "logits", "blocks.0.mlp",
          cause="exact gelu (gelu"),
    Fault("output bias dropped", T, "model.py",
          "y_BTD = self.out(torch.swapaxes(mixed_BNTH, 1, 2).reshape(B, T, -1))",
          "y_BTD = self.out(torch.swapaxes(mixed_BNTH, 1, 2).reshape(B, T, -1)) - self.out.bias",
          "logits", "blocks.0.attention",
          cause="x in place of x - y (sub"),
    Fault("MLP bias dropped", F, "model.py",
          "self.up(x_BTD)", "(self.up(x_BTD) - self.up.bias[...][None, None])",
          "logits", "blocks.0.mlp",
          cause="up.bias left out"),
    Fault("keys and values swapped", T, "model.py",
          "k_BTKH = self.key(x_BTD)", "k_BTKH = self.value(x_BTD)",
          "logits", "blocks.0.attention",
          cause="key in place of value"),
    Fault("query where the key was meant", F, "model.py",
          "k_BTKH = self.key(x_BTD)", "k_BTKH = self.query(x_BTD)",
          "logits", "blocks.0.attention",
          cause="query in place of key too"),
    Fault("scale by the model width", T, "attention.py",
          "q_BKQTH.shape[-1] ** -0.5", "(q_BKQTH.shape[1] * q_BKQTH.shape[-1]) ** -0.5",
          "logits", "blocks.0.attention",
          cause="a scale of 5**-0.5 (mul"),
    Fault("softmax over queries", T, "attention.py",
          "torch.softmax(scores_BKQTS, dim=-1)", "torch.softmax(scores_BKQTS, dim=-2)",
          "logits", "blocks.0.attention",
          cause="softmax over axis -1 (softmax"),
    Fault("position off by one", T, "positions.py",
          "torch.where(real_BT, slots_BT, 0)",
          "torch.where(real_BT, (slots_BT + 1) % num_slots, 0)", "logits", "GPT",
          cause="the result -1 (add"),
    Fault("position off by one", F, "positions.py",
          "jnp.where(real_BT, slots_BT, 0)", "jnp.where(real_BT, (slots_BT + 1) % num_slots, 0)",
          "logits", "GPT",
          cause="the result +1 (add"),
    Fault("mask off by one, sees the future", T, "positions.py",
          "torch.clamp(steps_BT + 1, min=0)", "torch.clamp(steps_BT + 2, min=0)",
          "logits", "blocks.0.attention",
          cause="the result -1 (add"),
    Fault("mask off by one, blind to itself", F, "positions.py",
          "jnp.maximum(steps_BT + 1, 0)", "jnp.maximum(steps_BT, 0)",
          "logits", "blocks.0.attention",
          cause="the result -1 (add"),
    Fault("residual adds the sublayer's input", T, "model.py",
          "x_BTD = x_BTD + y_BTD", "x_BTD = self.norm_1(x_BTD) + y_BTD", "logits", "blocks.0",
          cause="norm_1 left out"),
    Fault("final norm forgotten", F, "model.py",
          "return self.norm(x_BTD), cache", "return x_BTD, cache", "logits", "GPT",
          cause="no norm (layer_norm"),
    Fault("float32 softmax", T, "attention.py",
          "torch.softmax(scores_BKQTS, dim=-1)",
          "torch.softmax(scores_BKQTS.float(), dim=-1)",
          "logits", "blocks.0.attention",
          cause="no cast to float32 (float"),
]  # fmt: skip

BACKWARD = [
    Fault("tied gradient lost", T, "model.py",
          "x_BTD, self.token_embedding.weight)", "x_BTD, self.token_embedding.weight.detach())",
          "gradients", "token_embedding"),
    Fault("tied gradient lost", F, "model.py",
          "self.token_embedding.embedding[...])",
          "jax.lax.stop_gradient(self.token_embedding.embedding[...]))",
          "gradients", "token_embedding"),
    Fault("label shift forgotten", T, "loss.py",
          "return labels_BT[:, 1:]", "return labels_BT[:, :-1]", "gradients", "loss"),
    Fault("mean over positions, not tokens", F, "loss.py",
          "return self.total / self.num_tokens.astype(self.total.dtype)",
          "return self.total / 100.0", "gradients", "loss"),
    Fault("padding scored", T, "loss.py",
          "labels_BT = torch.where(steps_1T < counts_B[:, None], labels_BT, IGNORE_INDEX)",
          "pass", "gradients", "loss"),
    Fault("ignored labels scored", F, "loss.py",
          "scored = targets != IGNORE_INDEX", "scored = targets == targets", "gradients", "loss"),
    Fault("smoothing over the other classes alone", F, "loss.py",
          "label_smoothing * jnp.mean(logits, axis=-1)",
          "label_smoothing * (jnp.sum(logits, axis=-1) - found) / (logits.shape[-1] - 1)",
          "gradients", "loss"),
]  # fmt: skip

OPTIMIZER = [
    Fault("beta2", T, "optimizer.py", "config.beta2", "0.999", "optimizer", "", 1,
          cause="beta2 is 0.95 in flax_gpt and 0.999 in torch_gpt"),
    Fault("betas swapped", T, "optimizer.py",
          "(config.beta1, config.beta2)", "(config.beta2, config.beta1)", "optimizer", "", 1,
          cause="beta1 is 0.9 in flax_gpt and 0.95 in torch_gpt; beta2 is 0.95 in "
          "flax_gpt and 0.9 in torch_gpt"),
    Fault("epsilon", F, "optimizer.py", "config.epsilon", "1e-6", "optimizer", "", 1,
          cause="epsilon is 1e-06 in flax_gpt and 1e-08 in torch_gpt"),
    Fault("epsilon inside the root", F, "optimizer.py",
          "(jnp.sqrt(v_hat) + epsilon)", "jnp.sqrt(v_hat + epsilon)", "optimizer", "", 1,
          cause="epsilon is inside the root in flax_gpt and outside it in torch_gpt"),
    Fault("no bias correction", F, "optimizer.py",
          "m_hat = m / -jnp.expm1(steps * math.log(beta1))", "m_hat = m", "optimizer", "", 1,
          cause="flax_gpt does not correct the bias of the first moment"),
    Fault("L2 instead of decoupled decay", T, "optimizer.py",
          "torch.optim.AdamW(\n", "torch.optim.Adam(\n", "optimizer", "", 1,
          cause="weight decay is L2, in the gradient, in torch_gpt and decoupled from it "
          "in flax_gpt"),
    Fault("no decay", F, "optimizer.py",
          "config.weight_decay, mask", "0.0, mask", "optimizer", "", 1,
          cause="weights decay by 0.1 in torch_gpt and not in flax_gpt"),
    Fault("decay on everything", T, "optimizer.py",
          "dict(params=others, weight_decay=0.0)", "dict(params=others)", "optimizer", "", 1,
          cause="token_embedding.embedding, position_embedding.embedding, "
          "blocks.*.norm_1.scale and 11 other kinds of leaves decay in torch_gpt "
          "and not in flax_gpt"),
    Fault("clipping without torch's epsilon", F, "optimizer.py",
          "(norm + CLIP_EPSILON)", "norm", "optimizer", "", 1,
          cause="the clip epsilon is 0 in flax_gpt and 1e-06 in torch_gpt"),
    Fault("not clipped", T, "optimizer.py",
          "clip_norm = math.inf if config.clip_norm is None else config.clip_norm",
          "clip_norm = math.inf", "optimizer", "", 1,
          cause="gradients are clipped to a norm of 0.5 in flax_gpt alone"),
    Fault("schedule one update ahead", T, "train.py",
          "num_updates(state.optimizer))", "num_updates(state.optimizer) + 1)",
          "optimizer", "", 1,
          cause="the schedule of torch_gpt is one update ahead of that of flax_gpt"),
    Fault("first update lost to a rate of zero", F, "optimizer.py",
          "(count + 1.0)", "(count + 0.0)", "optimizer", "", 1,
          cause="the first update of flax_gpt has a rate of zero"),
    Fault("cosine over one step less", F, "optimizer.py",
          "span = config.total_steps - config.warmup_steps",
          "span = config.total_steps - config.warmup_steps - 1", "optimizer", "", 4,
          cause="the rate of update 4 is 0.00055 in flax_gpt and 0.000775 in torch_gpt"),
    Fault("linear instead of cosine", T, "optimizer.py",
          'if config.schedule == "cosine":', "if False:", "optimizer", "", 4,
          cause="the rate of update 4 is 0.000775 in flax_gpt and 0.0007 in torch_gpt"),
]  # fmt: skip

LOOP = [
    Fault("no zero_grad", T, "train.py",
          "    state.optimizer.zero_grad()\n", "", "optimizer", "", 2,
          cause="torch_gpt does not set gradients to zero between steps"),
    Fault("moments thrown away", F, "train.py",
          "optimizer=optimizer,", "optimizer=state.optimizer,", "optimizer", "", 1,
          cause="flax_gpt throws its moments away after each step"),
    Fault("mean of means", T, "train.py",
          "share = loss.total / num_scored.to(loss.total.dtype)",
          "share = loss.mean / config.accumulation_steps", "optimizer", "", 1,
          cause="the gradient that reaches torch_gpt's optimizer is that of the mean over "
          "2 parts of the batch of the mean loss of each"),
    Fault("only the last part's gradient", T, "train.py",
          "        share.backward()\n",
          "        state.optimizer.zero_grad()\n        share.backward()\n",
          "optimizer", "", 1,
          cause="the gradient that reaches torch_gpt's optimizer is that of part 2 of 2 "
          "of the batch alone"),
    Fault("smoothing off in training", F, "train.py",
          "state.task.targets(part), config.label_smoothing)", "state.task.targets(part))",
          "optimizer", "the training loss", 1,
          cause="the gradient that reaches flax_gpt's optimizer is not that of its loss"),
]  # fmt: skip

LATE = [
    Fault("fifth update skipped", T, "train.py",
          "    if applied:\n", "    if applied and state.step != 4:\n",
          "trajectory", "the loss curve", 6),
]  # fmt: skip

DROPOUT = [
    Fault("every part has the same mask", T, "train.py",
          "random.fold_in(random.fold_in(state.key, state.step), index)",
          "random.fold_in(state.key, state.step)", "optimizer", "the training loss", 1),
    Fault("every step has the same mask", F, "train.py",
          "random.fold_in(random.fold_in(state.key, state.step), index)",
          "random.fold_in(random.fold_in(state.key, 0), index)",
          "optimizer", "the training loss", 2),
    Fault("dropout not scaled up", F, "layers.py",
          "jnp.where(kept, x / (1.0 - rate), 0.0)", "jnp.where(kept, x, 0.0)",
          "optimizer", "the training loss", 1),
    Fault("dropout of what should stay", T, "layers.py",
          "bernoulli(key.to(x.device), 1.0 - rate, x.shape)",
          "bernoulli(key.to(x.device), rate, x.shape)", "optimizer", "the training loss", 1),
]  # fmt: skip

HEADS = [
    Fault("mean over padding too", T, "classifier.py",
          "    if counts_B is None:\n", "    if True:\n", "logits", "SequenceClassifier"),
    Fault("padding classified", F, "tasks.py",
          "    if batch.counts_B is None:\n        return batch.labels\n    real_BT",
          "    if True:\n        return batch.labels\n    real_BT", "gradients", "loss"),
]  # fmt: skip

DECODE = [
    Fault("every decoded token at position 0", T, "positions.py",
          "torch.where(real_BT, slots_BT, 0)",
          "torch.where(real_BT, steps_BT.expand_as(slots_BT), 0)", "cache", "GPT"),
    Fault("one length for all rows", F, "positions.py",
          "lengths_B1 = lengths_B[:, None]",
          "lengths_B1 = jnp.full_like(lengths_B, lengths_B[0])[:, None]", "cache", "GPT"),
    Fault("values written from keys", T, "cache.py",
          "= values_BKTH[rows, :, steps]", "= keys_BKTH[rows, :, steps]",
          "cache", "blocks.0.attention"),
    Fault("written one slot late", T, "cache.py",
          "slots = placement.slots_BT[rows, steps]",
          "slots = (placement.slots_BT[rows, steps] + 1).clamp(max=keys_BKSH.shape[2] - 1)",
          "cache", "blocks.0.attention"),
    Fault("old keys are overwritten", F, "cache.py",
          "self.values_BKSH.at[rows_B1, :, slots_BT]",
          "self.values_BKSH.at[rows_B1, :, slots_BT - 1]", "cache", "blocks.0.attention"),
    Fault("lengths do not move", F, "model.py",
          "KVCache(tuple(layers), placement.ends_B, cache.exact)",
          "KVCache(tuple(layers), placement.lengths_B, cache.exact)", "cache", "GPT"),
    Fault("least likely token", T, "generation.py",
          "torch.argmax(scores_BV, dim=-1)", "torch.argmin(scores_BV, dim=-1)",
          "tokens", "torch_gpt, cached", 1),
    Fault("reference reads one token short", F, "generation.py",
          "sequences_BS.at[rows_B, lengths_B].set(tokens_B), lengths_B + 1",
          "sequences_BS.at[rows_B, lengths_B].set(tokens_B), lengths_B",
          "tokens", "flax_gpt, uncached", None),
]  # fmt: skip

ROTARY = (("positions", "rotary"), ("num_kv_heads", 2), ("head_dim", 6))
ALIBI = (("positions", "alibi"), ("num_kv_heads", 2))
T5 = (("positions", "t5"), ("window", 7))

ARCHITECTURE = [
    Fault("ALiBi dropped once there is a cache", T, "attention.py",
          "weights_BKQTS = weigh(q_BKQTH, [held], placement.mask_BTS, placement.bias_BKQTS)",
          "weights_BKQTS = weigh(q_BKQTH, [held], placement.mask_BTS)",
          "cache", "blocks.0.attention", 0, ALIBI),
    Fault("T5 bias dropped once there is a cache", F, "attention.py",
          "weigh(q_BKQTH, parts, mask_BTS, bias_BKQTS)", "weigh(q_BKQTH, parts, mask_BTS)",
          "cache", "blocks.0.attention", 0, T5),
    Fault("window one token too wide", T, "positions.py",
          "placement.positions_BT - window + 1", "placement.positions_BT - window",
          "logits", "blocks.0.attention", 0, T5,
          cause="the result +1 (sub"),
    Fault("window one token too narrow", F, "positions.py",
          "placement.positions_BT - window + 1", "placement.positions_BT - window + 2",
          "logits", "blocks.0.attention", 0, T5,
          cause="the result +1 (sub"),
    Fault("neighbours turn together", T, "rotary.py",
          "first = wide[..., :num_pairs]\n    second = wide[..., num_pairs : 2 * num_pairs]",
          "first = wide[..., : 2 * num_pairs : 2]\n    second = wide[..., 1 : 2 * num_pairs : 2]",
          "logits", "blocks.0.attention", 0, ROTARY,
          cause="halves paired in the rotation of key and query, 6 wide"),
    Fault("turns the other way", F, "rotary.py",
          "first * turn.cos_BT1E - second * turn.sin_BT1E",
          "first * turn.cos_BT1E + second * turn.sin_BT1E",
          "logits", "blocks.0.attention", 0, ROTARY,
          cause="x + y in place of x - y (sub"),
    Fault("keys are cached before they turn", T, "model.py",
          "k_BTKH = rotary.rotate(k_BTKH, placement.turn)",
          "k_BTKH = k_BTKH if layer else rotary.rotate(k_BTKH, placement.turn)",
          "cache", "blocks.0.attention", 0, ROTARY),
    Fault("cached keys turn twice", F, "model.py",
          "k_BTKH = rotary.rotate(k_BTKH, placement.turn)",
          "k_BTKH = rotary.rotate(k_BTKH, placement.turn)\n            if layer is not None:\n"
          "                k_BTKH = rotary.rotate(k_BTKH, placement.turn)",
          "cache", "blocks.0.attention", 0, ROTARY),
    Fault("kv heads tiled, not repeated", T, "model.py",
          "q_BNTH.reshape(B, self.num_kv_heads, -1, *q_BNTH.shape[2:])",
          "q_BNTH.reshape(B, -1, self.num_kv_heads, *q_BNTH.shape[2:]).swapaxes(1, 2)",
          "logits", "blocks.0.attention", 0, ROTARY,
          cause="2 groups interleaved, not one behind the other (reshape"),
    Fault("kv heads tiled, not repeated", F, "model.py",
          "q_BNTH.reshape(B, self.num_kv_heads, -1, *q_BNTH.shape[2:])",
          "q_BNTH.reshape(B, -1, self.num_kv_heads, *q_BNTH.shape[2:]).swapaxes(1, 2)",
          "logits", "blocks.0.attention", 0, ALIBI,
          cause="2 groups interleaved, not one behind the other (reshape"),
    Fault("rows share the offset of the first", T, "positions.py",
          "torch.where(real_BT, slots_BT, 0)", "torch.where(real_BT, lengths_B[0] + steps_BT, 0)",
          "cache", "blocks.0.attention", 0, ROTARY),
    Fault("rows share the offset of the first", F, "positions.py",
          "jnp.where(real_BT, slots_BT, 0)", "jnp.where(real_BT, lengths_B[0] + steps_BT, 0)",
          "cache", "blocks.0.attention", 0, ALIBI),
]  # fmt: skip

FLOAT32 = [
    Fault("scores lose digits", T, "attention.py",
          "torch.softmax(scores_BKQTS, dim=-1)",
          "torch.softmax(scores_BKQTS + 256.0 - 256.0, dim=-1)",
          "logits", "blocks.0.attention"),
]  # fmt: skip

FAULTS = (
    FORWARD + BACKWARD + OPTIMIZER + LOOP + LATE + DROPOUT + HEADS + DECODE + ARCHITECTURE + FLOAT32
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.package}, {fault.id}")
def test_a_planted_fault_is_caught_and_located(fault, plant, small):
    broken = plant(fault.package, fault.file, fault.right, fault.wrong)
    options = {fault.package.replace("gpt", "package"): broken, "changes": dict(fault.changes)}
    if fault in DROPOUT:
        options["changes"] = {"dropout": 0.2}
    if fault in HEADS:
        options["task"] = "token-class" if fault.file == "tasks.py" else "sequence-class"
    dtypes = ("float64", "float32") if fault in FLOAT32 else ("float64",)
    # As many steps as the optimizer level spans, so that both train with one compiled program.
    steps = HORIZON + (fault in LATE)
    report = check(small(**options), dtypes=dtypes, steps=steps)
    failed = [level.name for level in report.levels if level.verdict is Verdict.FAIL]
    assert failed == [fault.level], report
    assert report.exit_code == 1
    assert report.divergence.where == fault.where or not fault.where, report.divergence
    assert ("Looks like a bug" in report.divergence.detail) == (fault in LATE)
    cause = report.divergence.cause
    assert cause is None if fault.cause is None else fault.cause in cause
    found = report.divergence.step
    assert found > 0 if fault.step is None else found == fault.step, report.divergence


@pytest.mark.parametrize("seed", range(3))
def test_a_clean_pair_raises_no_alarm(seed, small):
    report = check(small(seed=seed), seed=seed, steps=HORIZON)
    assert {level.verdict for level in report.levels} <= {Verdict.PASS, Verdict.TIE}, report
    assert report.exit_code == 0 and report.divergence is None


@pytest.mark.parametrize("changes", [ROTARY, ALIBI, T5], ids=["rotary", "alibi", "t5"])
def test_a_clean_pair_of_another_architecture_raises_no_alarm(changes, small):
    report = check(small(dict(changes)), steps=HORIZON)
    assert {level.verdict for level in report.levels} <= {Verdict.PASS, Verdict.TIE}, report


@pytest.mark.parametrize("seed", range(20))
def test_a_clean_training_raises_no_alarm(seed, small):
    levels = ["gradients", "optimizer", "trajectory"]
    report = check(small({"dropout": 0.1}, seed=seed), levels=levels, seed=seed, steps=HORIZON)
    assert [level.verdict for level in report.levels] == [Verdict.PASS] * 3, report


@pytest.mark.parametrize("task", ["token-class", "sequence-class"])
def test_a_clean_classifier_raises_no_alarm(task, small):
    report = check(small(task=task), steps=HORIZON)
    verdicts = [level.verdict for level in report.levels]
    assert verdicts == [Verdict.PASS] * 5 + [Verdict.ABSTAIN] * 2, report
    assert report.exit_code == 0


def test_a_square_projection_left_untransposed_is_caught_by_running_it(small):
    rules = tuple(
        dataclasses.replace(rule, layout=Layout.SAME) if ".attention." in rule.torch else rule
        for rule in TWINS.rules
    )
    report = check(dataclasses.replace(small(), rules=Rules(rules)), dtypes=("float64",))
    assert report.levels[0].verdict is Verdict.FAIL
    assert report.divergence.where == "blocks.0.attention.query.weight"
    assert {level.verdict for level in report.levels[1:]} == {Verdict.BLOCKED}


def test_null_directions_are_those_that_theory_names(small):
    report = check(small(), levels=["gradients"], dtypes=("float64",))
    (record,) = [r for r in report.levels[0].records if r.name == "null directions"]
    assert record.note == (
        "zero up to rounding, judged absolutely: blocks.*.attention.key.bias; "
        "the mean over axis 0 of blocks.*.attention.out.bias, blocks.*.mlp.down.bias; "
        "the mean over axis 1 of blocks.*.attention.out.kernel, blocks.*.mlp.down.kernel, "
        "position_embedding.embedding"
    )


def test_the_classes_of_an_untied_head_add_their_own_null_direction(small):
    report = check(small(task="token-class"), levels=["gradients"], dtypes=("float64",))
    (record,) = [r for r in report.levels[0].records if r.name == "null directions"]
    assert "head.bias" in record.note and "head.kernel" in record.note
    assert "gpt.token_embedding.embedding" in record.note
