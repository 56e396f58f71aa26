"""The check catches planted faults and says where they are; a clean pair raises no alarm."""

import dataclasses

import pytest

from parity.check import check
from parity.compare import Verdict
from parity.rules import TWINS, Layout, Rule, Rules


@dataclasses.dataclass(frozen=True)
class Fault:
    """One wrong place in one twin, the level that must see it, and where it must point.

    A step of None is some step: which, depends on the text, and Pythons differ in theirs.
    """

    id: str
    package: str
    file: str
    right: str
    wrong: str
    level: str
    where: str
    step: int | None = 0


T, F = "torch_gpt", "flax_gpt"

FORWARD = [
    Fault("norm epsilon 1e-6", T, "model.py",
          "eps=config.norm_epsilon", "eps=1e-6", "logits", "blocks.0.norm_1"),
    Fault("norm epsilon 1e-6", F, "model.py",
          "epsilon=config.norm_epsilon", "epsilon=1e-6", "logits", "blocks.0.norm_1"),
    Fault("norm without a scale", F, "model.py",
          "use_fast_variance=False", "use_fast_variance=False, use_scale=False",
          "weights", "the weight map"),
    Fault("exact GELU", T, "model.py",
          'approximate="tanh"', 'approximate="none"', "logits", "blocks.0.mlp"),
    Fault("exact GELU", F, "model.py",
          "approximate=True", "approximate=False", "logits", "blocks.0.mlp"),
    Fault("output bias dropped", T, "model.py",
          "y_BTD = self.out(mixed_BTKH.reshape(B, T, D))",
          "y_BTD = self.out(mixed_BTKH.reshape(B, T, D)) - self.out.bias",
          "logits", "blocks.0.attention"),
    Fault("MLP bias dropped", F, "model.py",
          "self.up(x_BTD)", "(self.up(x_BTD) - self.up.bias[...][None, None])",
          "logits", "blocks.0.mlp"),
    Fault("keys and values swapped", T, "model.py",
          "k_BTKH = self.key(x_BTD)", "k_BTKH = self.value(x_BTD)",
          "logits", "blocks.0.attention"),
    Fault("query where the key was meant", F, "model.py",
          "k_BTKH = self.key(x_BTD)", "k_BTKH = self.query(x_BTD)",
          "logits", "blocks.0.attention"),
    Fault("scale by the model width", T, "model.py",
          "q_BTKH.shape[-1] ** -0.5", "D**-0.5", "logits", "blocks.0.attention"),
    Fault("softmax over queries", T, "model.py",
          "torch.softmax(scores_BKTS, dim=-1)", "torch.softmax(scores_BKTS, dim=-2)",
          "logits", "blocks.0.attention"),
    Fault("position off by one", T, "positions.py",
          "torch.where(real_BT, slots_BT, 0)",
          "torch.where(real_BT, (slots_BT + 1) % num_slots, 0)", "logits", "GPT"),
    Fault("position off by one", F, "positions.py",
          "jnp.where(real_BT, slots_BT, 0)", "jnp.where(real_BT, (slots_BT + 1) % num_slots, 0)",
          "logits", "GPT"),
    Fault("mask off by one, sees the future", T, "positions.py",
          "torch.minimum(steps_1T + 1, counts_B1)", "torch.minimum(steps_1T + 2, counts_B1)",
          "logits", "blocks.0.attention"),
    Fault("mask off by one, blind to itself", F, "positions.py",
          "jnp.minimum(steps_1T + 1, counts_B1)", "jnp.minimum(steps_1T, counts_B1)",
          "logits", "blocks.0.attention"),
    Fault("residual adds the sublayer's input", T, "model.py",
          "x_BTD = x_BTD + y_BTD", "x_BTD = self.norm_1(x_BTD) + y_BTD", "logits", "blocks.0"),
    Fault("final norm forgotten", F, "model.py",
          "return self.norm(x_BTD), cache", "return x_BTD, cache", "logits", "GPT"),
    Fault("float32 softmax", T, "model.py",
          "torch.softmax(scores_BKTS, dim=-1)",
          "torch.softmax(scores_BKTS.float(), dim=-1).to(v_BTKH.dtype)",
          "logits", "blocks.0.attention"),
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
          "labels_BT[:, 1:]", "labels_BT[:, :-1]", "gradients", "loss"),
    Fault("mean over positions, not tokens", F, "loss.py",
          "return self.total / self.num_tokens.astype(self.total.dtype)",
          "return self.total / 100.0", "gradients", "loss"),
]  # fmt: skip

TRAINING = [
    Fault("fourth step skipped", T, "train.py",
          "    state.optimizer.step()\n", "    state.step == 3 or state.optimizer.step()\n",
          "trajectory", "the loss curve", 5),
    Fault("beta2", T, "optimizer.py",
          "config.beta2", "0.999", "optimizer", "", 1),
    Fault("epsilon", F, "optimizer.py",
          "config.epsilon", "1e-6", "optimizer", "", 1),
    Fault("L2 instead of decoupled decay", T, "optimizer.py",
          "torch.optim.AdamW(\n        parameters", "torch.optim.Adam(\n        parameters",
          "optimizer", "", 1),
    Fault("no zero_grad", T, "train.py",
          "state.optimizer.zero_grad()", "pass", "optimizer", "", 2),
    Fault("no decay", F, "optimizer.py",
          "optax.add_decayed_weights(config.weight_decay)", "optax.identity()",
          "optimizer", "", 1),
]  # fmt: skip

DECODE = [
    Fault("every decoded token at position 0", T, "positions.py",
          "torch.where(real_BT, slots_BT, 0)",
          "torch.where(real_BT, steps_1T.expand_as(slots_BT), 0)", "cache", "GPT"),
    Fault("one length for all rows", F, "positions.py",
          "lengths_B1 = lengths_B[:, None]",
          "lengths_B1 = jnp.full_like(lengths_B, lengths_B[0])[:, None]", "cache", "GPT"),
    Fault("values written from keys", T, "cache.py",
          "= values_BTKH[rows, steps]", "= keys_BTKH[rows, steps]", "cache", "blocks.0.attention"),
    Fault("written one slot late", T, "cache.py",
          "slots = placement.slots_BT[rows, steps]",
          "slots = (placement.slots_BT[rows, steps] + 1).clamp(max=keys_BKSH.shape[2] - 1)",
          "cache", "blocks.0.attention"),
    Fault("old keys are overwritten", F, "cache.py",
          "self.values_BKSH.at[rows_B1, :, slots_BT]",
          "self.values_BKSH.at[rows_B1, :, slots_BT - 1]", "cache", "blocks.0.attention"),
    Fault("lengths do not move", F, "model.py", "KVCache(tuple(layers), placement.ends_B)",
          "KVCache(tuple(layers), placement.lengths_B)", "cache", "GPT"),
    Fault("least likely token", T, "decode.py",
          "torch.argmax(logits_BV, dim=-1)", "torch.argmin(logits_BV, dim=-1)",
          "tokens", "torch_gpt, cached", 1),
    Fault("reference reads one token short", F, "decode.py",
          "return read((sequences_BS.at[rows_B, lengths_B].set(tokens_B), lengths_B + 1))",
          "return read((sequences_BS.at[rows_B, lengths_B].set(tokens_B), lengths_B))",
          "tokens", "flax_gpt, uncached", None),
]  # fmt: skip

FLOAT32 = [
    Fault("scores lose digits", T, "model.py",
          "torch.softmax(scores_BKTS, dim=-1)",
          "torch.softmax(scores_BKTS + 256.0 - 256.0, dim=-1)",
          "logits", "blocks.0.attention.out"),
]  # fmt: skip

FAULTS = FORWARD + BACKWARD + TRAINING + DECODE + FLOAT32


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.package}, {fault.id}")
def test_a_planted_fault_is_caught_and_located(fault, plant, small):
    broken = plant(fault.package, fault.file, fault.right, fault.wrong)
    pair = small(**{fault.package.replace("gpt", "package"): broken})
    dtypes = ("float64", "float32") if fault in FLOAT32 else ("float64",)
    report = check(pair, dtypes=dtypes, steps=6)
    failed = [level.name for level in report.levels if level.verdict is Verdict.FAIL]
    assert failed == [fault.level], report
    assert report.exit_code == 1
    assert report.divergence.where == fault.where or not fault.where, report.divergence
    found = report.divergence.step
    assert found > 0 if fault.step is None else found == fault.step, report.divergence


@pytest.mark.parametrize("seed", range(3))
def test_a_clean_pair_raises_no_alarm(seed, small):
    report = check(small(), seed=seed, steps=6)
    assert {level.verdict for level in report.levels} <= {Verdict.PASS, Verdict.TIE}, report
    assert report.exit_code == 0 and report.divergence is None


def test_a_square_projection_left_untransposed_is_caught_by_running_it(small):
    rules = tuple(
        Rule(rule.torch, rule.flax, Layout.SAME) if ".attention." in rule.torch else rule
        for rule in TWINS.rules
    )
    report = check(dataclasses.replace(small(), rules=Rules(rules)), dtypes=("float64",))
    assert report.levels[0].verdict is Verdict.FAIL
    assert report.divergence.where == "blocks.0.attention.query.weight"
    assert {level.verdict for level in report.levels[1:]} == {Verdict.BLOCKED}


def test_only_key_biases_are_null_directions(small):
    report = check(small(), levels=["gradients"], dtypes=("float64",))
    (record,) = [r for r in report.levels[0].records if r.name == "null directions"]
    assert record.note.endswith("blocks.0.attention.key.bias, blocks.1.attention.key.bias")
