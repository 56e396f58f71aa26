"""An optimizer is read off from what it did: every way of doing it otherwise gets its name."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parity.check.causes.optimizer import Step, difference, read, shares

SHAPES = {
    "embedding.embedding": (11, 5),
    "blocks.0.up.kernel": (5, 7),
    "blocks.0.up.bias": (7,),
    "blocks.1.up.kernel": (5, 7),
    "blocks.1.up.bias": (7,),
    "norm.scale": (5,),
}
KERNELS = tuple(name for name in SHAPES if name.endswith("kernel"))
NAMES = "one", "other"


@dataclasses.dataclass(frozen=True)
class AdamW:
    """AdamW written out, with a switch for each thing that ports get wrong."""

    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    inside: bool = False
    corrects_first: bool = True
    corrects_second: bool = True
    epsilon_early: bool = False
    rates: tuple[float, ...] = (5e-4, 1e-3, 1e-3, 7.75e-4)
    decay: float = 0.1
    decayed: tuple[str, ...] = KERNELS
    scaled: bool = True
    coupled: bool = False
    clip_norm: float = 0.5
    clip_epsilon: float = 1e-6
    factor: float = 1.0
    zeroes: bool = True
    remembers: bool = True
    shows_moments: bool = True

    def run(self, seed: int) -> list[Step]:
        """Four steps from weights of a seed, by gradients that depend on the weights."""
        rng = np.random.default_rng(seed)
        p = {x: rng.normal(0.0, 0.3, shape) for x, shape in SHAPES.items()}
        zeros = {x: np.zeros(shape) for x, shape in SHAPES.items()}
        m, v, held, steps = zeros, zeros, zeros, []
        for t, rate in enumerate(self.rates):
            size = rng.uniform(0.5, 2.0)
            raw = {x: size * (0.3 * p[x] + rng.normal(0.0, 0.3, p[x].shape)) for x in p}
            raw["blocks.1.up.bias"] *= 1e-18
            g = {x: self.factor * raw[x] + held[x] for x in p}
            norm = np.sqrt(sum(np.sum(x * x) for x in g.values()))
            g = {x: g[x] * min(1.0, self.clip_norm / (norm + self.clip_epsilon)) for x in p}
            held = zeros if self.zeroes else g
            if self.coupled:
                g = {x: g[x] + self.decay * p[x] * (x in self.decayed) for x in p}
            if not self.remembers:
                m, v, count = zeros, zeros, 1
            else:
                count = t + 1
            m = {x: self.beta1 * m[x] + (1 - self.beta1) * g[x] for x in p}
            v = {x: self.beta2 * v[x] + (1 - self.beta2) * g[x] ** 2 for x in p}
            after = {x: p[x] + self.update(x, p[x], m[x], v[x], rate, count) for x in p}
            shown = (m, v) if self.shows_moments else (zeros, zeros)
            # The gradient is taken a second time, and null leaves have nothing but its rounding.
            again = {x: g + 1e-16 * rng.normal(size=g.shape) for x, g in raw.items()}
            steps.append(Step.sampled(p, after, *shown, again))
            p = after
        return steps

    def update(self, name, p, m, v, rate, count):
        m = m / (1 - self.beta1**count if self.corrects_first else 1.0)
        correction = 1 - self.beta2**count if self.corrects_second else 1.0
        if self.inside:
            below = np.sqrt(v / correction + self.epsilon)
        elif self.epsilon_early:
            below = (np.sqrt(v) + self.epsilon) / np.sqrt(correction)
        else:
            below = np.sqrt(v / correction) + self.epsilon
        decay = self.decay * (name in self.decayed and not self.coupled)
        return -rate * m / below - (rate if self.scaled else 1e-3) * decay * p


def cause(one: AdamW, other: AdamW, seed: int) -> str | None:
    """What is said of two optimizers that ran from different weights."""
    return difference(read(one.run(seed)), read(other.run(seed + 1000)), NAMES)


ALTERNATIVES = {
    "beta1": (dict(beta1=0.8), "beta1 is 0.9 in one and 0.8 in other"),
    "beta2": (dict(beta2=0.999), "beta2 is 0.95 in one and 0.999 in other"),
    "betas swapped": (
        dict(beta1=0.95, beta2=0.9),
        "beta1 is 0.9 in one and 0.95 in other; beta2 is 0.95 in one and 0.9 in other",
    ),
    "epsilon": (dict(epsilon=1e-6), "epsilon is 1e-08 in one and 1e-06 in other"),
    "no epsilon": (dict(epsilon=0.0), "epsilon is 1e-08 in one and 0 in other"),
    "epsilon inside": (
        dict(inside=True), "epsilon is inside the root in other and outside it in one",
    ),
    "epsilon early": (
        dict(epsilon_early=True),
        "epsilon meets the second moment in other before its bias is corrected",
    ),
    "no first correction": (
        dict(corrects_first=False), "other does not correct the bias of the first moment",
    ),
    "no second correction": (
        dict(corrects_second=False, epsilon_early=False),
        "epsilon meets the second moment in other before its bias is corrected; "
        "other does not correct the bias of the second moment",
    ),
    "no correction": (
        dict(corrects_first=False, corrects_second=False),
        "epsilon meets the second moment in other before its bias is corrected; "
        "other does not correct the bias of either moment",
    ),
    "rate": (dict(rates=(5e-3, 1e-2, 1e-2, 7.75e-3)), "the rate of other is 10 times that of one"),
    "one ahead": (
        dict(rates=(1e-3, 1e-3, 7.75e-4, 3e-4)),
        "the schedule of other is one update ahead of that of one",
    ),
    "one behind": (
        dict(rates=(0.0, 5e-4, 1e-3, 1e-3)),
        "the schedule of one is one update ahead of that of other",
    ),
    "first update lost": (
        dict(rates=(0.0, 5e-4, 1e-3, 7.75e-4)), "the first update of other has a rate of zero",
    ),
    "another shape": (
        dict(rates=(5e-4, 1e-3, 1e-3, 7e-4)),
        "the rate of update 4 is 0.000775 in one and 0.0007 in other",
    ),
    "decay": (
        dict(decay=0.01),
        "weight decay of blocks.*.up.kernel is 0.1 in one and 0.01 in other",
    ),
    "no decay": (dict(decay=0.0), "weights decay by 0.1 in one and not in other"),
    "mask": (
        dict(decayed=tuple(SHAPES)),
        "embedding.embedding, blocks.*.up.bias, norm.scale decay in other and not in one",
    ),
    "unscaled decay": (
        dict(scaled=False), "weight decay of other is not multiplied by the rate",
    ),
    "L2": (
        dict(coupled=True),
        "weight decay is L2, in the gradient, in other and decoupled from it in one",
    ),
    "clip norm": (dict(clip_norm=0.4), "the clip norm is 0.5 in one and 0.4 in other"),
    "clip epsilon": (
        dict(clip_epsilon=0.0), "the clip epsilon is 1e-06 in one and 0 in other",
    ),
    "not clipped": (
        dict(clip_norm=np.inf), "gradients are clipped to a norm of 0.5 in one alone",
    ),
    "scaled": (
        dict(clip_norm=np.inf, factor=0.5),
        "gradients are clipped to a norm of 0.5 in one alone; "
        "what gradients are multiplied by is 1 in one and 0.5 in other",
    ),
    "not set to zero": (
        dict(zeroes=False), "other does not set gradients to zero between steps",
    ),
    "forgets": (dict(remembers=False), "other throws its moments away after each step"),
    "shows none": (dict(shows_moments=False), "other throws its moments away after each step"),
    "still": (dict(rates=(0.0,) * 4, scaled=True), "other changes no weight"),
}  # fmt: skip


@pytest.mark.parametrize("name", ALTERNATIVES)
@pytest.mark.parametrize("seed", range(3))
def test_each_alternative_is_named(name, seed):
    changes, words = ALTERNATIVES[name]
    assert cause(AdamW(), AdamW(**changes), seed) == words


@given(
    st.integers(0, 10**6),
    st.floats(0.5, 0.98),
    st.floats(0.9, 0.999),
    st.sampled_from([0.0, 1e-10, 1e-8, 1e-6]),
    st.sampled_from([0.0, 0.01, 0.3]),
    st.sampled_from([0.3, 1.0, np.inf]),
    st.booleans(),
    st.booleans(),
)
def test_the_same_optimizer_shows_no_difference_from_any_weights(
    seed, beta1, beta2, epsilon, decay, clip_norm, inside, coupled
):
    made = AdamW(
        beta1, beta2, epsilon, decay=decay, clip_norm=clip_norm, inside=inside, coupled=coupled
    )
    assert cause(made, made, seed) is None


@given(st.integers(0, 10**6), st.floats(0.5, 0.98), st.floats(0.9, 0.999), st.floats(0.01, 0.3))
def test_constants_are_read_back_within_their_errors(seed, beta1, beta2, decay):
    reading = read(AdamW(beta1, beta2, decay=decay).run(seed))
    gradient, update = reading.gradient, reading.update
    true = [
        (reading.betas[0], beta1), (reading.betas[1], beta2), (update.epsilon, 1e-8),
        (gradient.clip_norm, 0.5), (gradient.clip_epsilon, 1e-6),
        *zip(update.rates, AdamW.rates, strict=True),
        *((update.decay[x], decay * (x in KERNELS)) for x in SHAPES),
    ]  # fmt: skip
    for number, value in true:
        assert abs(number.value - value) <= number.error + 1e-15 * abs(value)
        assert number.error < (1e-4 * value or 1e-8)


def foreign(steps, seed=0):
    """The same steps with gradients that are not those that went in."""
    rng = np.random.default_rng(seed)
    return [
        dataclasses.replace(
            s, gradient={x: g * rng.uniform(0.9, 1.1, g.shape) for x, g in s.gradient.items()}
        )
        for s in steps
    ]


def test_a_gradient_that_is_not_the_loss_s_is_told_where_one_side_has_it_alone():
    clean, other = AdamW().run(0), foreign(AdamW().run(1))
    words = "the gradient that reaches other's optimizer is not that of its loss"
    assert difference(read(clean), read(other), NAMES) == words
    # As under dropout, which hides the gradient of both: nothing is said of it, the rest is read.
    assert difference(read(foreign(clean)), read(other), NAMES) is None
    changed = foreign(AdamW(beta2=0.999).run(1))
    words = "beta2 is 0.95 in one and 0.999 in other"
    assert difference(read(foreign(clean)), read(changed), NAMES) == words


@pytest.mark.parametrize(
    "weights, words",
    [
        ((0.0, 1.0), "that of part 2 of 2 of the batch alone"),
        ((0.5, 0.5), "that of the mean over 2 parts of the batch of the mean loss of each"),
        ((0.3, 0.7), "another mixture of those of 2 parts of the batch than that of its loss"),
    ],
)
def test_the_parts_of_a_batch_that_went_in_are_named(weights, words, rng):
    parts = [{x: rng.normal(size=shape) for x, shape in SHAPES.items()} for _ in weights]
    mixture = {x: sum(w * part[x] for w, part in zip(weights, parts, strict=True)) for x in SHAPES}
    first = {x: 0.03 * g.ravel() for x, g in mixture.items()}
    mixed = shares(first, parts)
    np.testing.assert_allclose([part.value for part in mixed], weights, atol=1e-12)
    reading = dataclasses.replace(read(foreign(AdamW().run(1))), shares=mixed)
    said = f"the gradient that reaches other's optimizer is {words}"
    assert difference(read(AdamW().run(0)), reading, NAMES) == said
    assert shares({x: rng.normal(size=m.size) for x, m in first.items()}, parts) is None


def signed(steps):
    """The same steps by another rule, signs of the first moment, which no form of Adam explains."""
    return [
        dataclasses.replace(
            s, after={x: s.before[x] - 1e-3 * np.sign(s.first[x]) for x in s.before}
        )
        for s in steps
    ]


def test_an_update_that_nothing_explains_is_left_unread():
    reading = read(signed(AdamW().run(0)))
    assert reading.update is None and reading.betas and reading.gradient
    assert difference(reading, read(AdamW().run(1)), NAMES) is None


def test_moments_that_nothing_explains_are_left_unread():
    steps = AdamW().run(0)
    steps[2].second["norm.scale"][0] *= 1.0 + 1e-9
    reading = read(steps)
    assert reading.betas is None and reading.gradient is None and reading.update is None
    for other in (AdamW(beta2=0.9).run(1), foreign(AdamW().run(1))):
        assert difference(reading, read(other), NAMES) is None


def test_a_run_that_is_not_finite_is_left_unread():
    steps = AdamW().run(0)
    steps[1].first["norm.scale"][0] = np.nan
    assert difference(read(steps), read(AdamW(beta2=0.9).run(1)), NAMES) is None
