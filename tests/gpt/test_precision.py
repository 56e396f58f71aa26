"""16-bit computation on float32 weights: as good in one twin as in the other, by float64."""

import functools
import re

import jax
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flax_gpt.training import optimizer as flax_optimizer
from torch_gpt.training import optimizer as torch_optimizer

B, T = 4, 11
NUM_BATCHES = 16
ROUNDOFF = {"bfloat16": 2.0**-9, "float16": 2.0**-12}  # half the gap between 1 and the next number
NARROW = list(ROUNDOFF)


@pytest.fixture
def gpt(gpt):
    """Each twin in turn, without 64-bit types in jax, as in use."""
    with jax.enable_x64(False):
        yield gpt


@pytest.fixture
def twins(twins):
    """Both twins at once, likewise."""
    with jax.enable_x64(False):
        yield twins


def batch(gpt, seed=0):
    """Rows of ids."""
    return gpt.package.Batch(gpt.ints(np.random.default_rng(seed).integers(0, 61, (B, T))))


def start(gpt, compute_dtype, **changes):
    """A state with float32 weights before its first step."""
    config = gpt.config(dtype="float32", num_layers=1, init_std=0.3)
    model = gpt.package.GPT(config, gpt.random.key(1))
    train_config = gpt.package.TrainConfig(compute_dtype=compute_dtype, **changes)
    return gpt.package.TrainState.create(model, train_config)


def step(gpt, data, state):
    """One training step."""
    with torch.enable_grad():
        return gpt.package.train_step(data, state)


@functools.cache
def first_steps(gpt, compute_dtype, exact=False):
    """Loss and gradient norm of a first step on each of some batches.

    `exact` computes in float64 with the numbers that the float32 weights have; in torch only.
    """
    found = []
    for seed in range(NUM_BATCHES):
        state = start(gpt, compute_dtype)
        if exact:
            state.model.double()
        result, _ = step(gpt, batch(gpt, seed), state)
        found.append((float(result.loss.mean), float(result.gradient_norm)))
    return np.array(found)


def errors(twins, compute_dtype):
    """The relative error of loss and norm, root mean square over the batches, by twin."""
    exact = first_steps(twins[1], None, exact=True)
    found = [first_steps(gpt, compute_dtype) / exact - 1.0 for gpt in twins]
    return np.sqrt(np.mean(np.square(found), axis=1))


@pytest.mark.parametrize("dtype", NARROW)
def test_16_bits_err_by_their_own_roundoff_and_no_more_in_one_twin_than_in_the_other(twins, dtype):
    found = errors(twins, dtype)
    assert (found.max(axis=0) <= 4 * found.min(axis=0)).all()
    # Not less than that either: it was not float32 that computed.
    for loss, norm in found / ROUNDOFF[dtype]:
        assert 0.05 < loss < 1.0 and 0.2 < norm < 4.0


def test_float16_is_the_finer_of_the_two(twins):
    ratio = errors(twins, "bfloat16") / errors(twins, "float16")
    assert ((3 < ratio) & (ratio < 24)).all()  # three bits are a factor of 8


class Products(TorchDispatchMode):
    """Notes the dtypes that matrix products give in torch, backward pass included."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in ("mm", "bmm", "addmm"):
            self.dtypes.append(str(found.dtype).removeprefix("torch."))
        return found


@pytest.mark.parametrize("dtype", NARROW)
def test_every_matrix_product_is_computed_in_16_bits(gpt, dtype):
    state, data = start(gpt, dtype), batch(gpt)
    if gpt.name == "flax":
        program = str(jax.make_jaxpr(gpt.package.train_step)(data, state))
        names = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
        found = [names[x] for x in re.findall(r":(\w+)\[[\d,]*\] = dot_general", program)]
    else:
        with Products() as products:
            step(gpt, data, state)
        found = products.dtypes
    # Six linear layers, two products of attention, one head: each forward, and twice backward.
    assert found == [dtype] * 27


def weights(gpt, state):
    """Copies of the weights, one leaf after the other."""
    flax = gpt.name == "flax"
    found = jax.tree.leaves(state.parameters) if flax else state.model.parameters()
    return [gpt.numpy(x).copy() for x in found]


def moments(gpt, state):
    """Copies of both moments, one leaf after the other."""
    if gpt.name == "flax":
        found = jax.tree.leaves((state.optimizer[0].mu, state.optimizer[0].nu))
    else:
        states = state.optimizer.state.values()
        found = [x[name] for x in states for name in ("exp_avg", "exp_avg_sq")]
    return [gpt.numpy(x).copy() for x in found]


@pytest.mark.parametrize("dtype", NARROW)
def test_weights_moments_and_loss_stay_float32_and_the_model_learns(gpt, dtype):
    state, data, losses = start(gpt, dtype), batch(gpt), []
    num_weights = len(weights(gpt, state))
    for _ in range(30):
        result, state = step(gpt, data, state)
        losses.append(float(result.loss.mean))
        assert bool(result.applied)
    arrays = weights(gpt, state) + moments(gpt, state)
    assert {x.dtype.name for x in arrays} == {"float32"} and len(arrays) == 3 * num_weights
    for x in (result.loss.total, result.gradient_norm):
        assert str(x.dtype).removeprefix("torch.") == "float32"
    assert losses[-1] < losses[0] - 1.0


# --- the loss scale ---


def scale_of(gpt, state):
    """The present loss scale; None where there is none."""
    scale = state.loss_scale
    if scale is None:
        return None
    return float(scale.scale) if gpt.name == "flax" else scale.get_scale()


def test_only_float16_has_a_loss_scale_and_it_starts_at_65536(gpt):
    found = [scale_of(gpt, start(gpt, dtype)) for dtype in (None, "bfloat16", "float16")]
    assert found == [None, None, 65536.0]


@pytest.fixture
def scaled(monkeypatch):
    """Makes states whose scale starts somewhere else and doubles after three good steps."""

    def make(gpt, initial):
        for module in (flax_optimizer, torch_optimizer):
            monkeypatch.setattr(module, "GROWTH_INTERVAL", 3)
            monkeypatch.setattr(module, "INITIAL_SCALE", initial)
        # jax reads the interval when it compiles; no other test has this rate.
        return start(gpt, "float16", learning_rate=1.1e-5)

    return make


def test_the_scale_halves_on_overflow_and_grows_again_at_the_same_steps_in_both_twins(
    twins, scaled
):
    trajectories = []
    for gpt in twins:
        state, found = scaled(gpt, 2.0**22), []
        for _ in range(12):
            result, state = step(gpt, batch(gpt), state)
            found.append((np.log2(scale_of(gpt, state)), bool(result.applied)))
            assert np.isfinite(float(result.gradient_norm)) == bool(result.applied)
            assert np.isfinite(float(result.loss.mean))
        trajectories.append(found)
    assert trajectories[0] == trajectories[1]
    # Gradients of this batch overflow from about 2**18.3 on.
    exponents, applied = zip(*trajectories[0], strict=True)
    assert exponents == (21, 20, 19, 18, 18, 18, 19, 18, 18, 18, 19, 18)
    assert applied == (False,) * 4 + (True,) * 3 + (False,) + (True,) * 3 + (False,)


def test_a_step_that_overflows_leaves_weights_and_moments_and_the_next_one_applies(gpt, scaled):
    state = scaled(gpt, 2.0**18)
    for _ in range(3):
        result, state = step(gpt, batch(gpt), state)
        assert bool(result.applied)
    before = weights(gpt, state) + moments(gpt, state)
    result, state = step(gpt, batch(gpt), state)
    assert not bool(result.applied) and int(state.step) == 4
    after = weights(gpt, state) + moments(gpt, state)
    for x, y in zip(after, before, strict=True):
        np.testing.assert_array_equal(x, y, strict=True)
    result, state = step(gpt, batch(gpt), state)
    assert bool(result.applied)
    moved = zip(weights(gpt, state), before, strict=False)
    assert all((x != y).any() for x, y in moved)


def test_the_scale_keeps_small_gradients_and_changes_no_others(gpt, scaled):
    norms = []
    for exponent in (-24, 10, 16):
        result, _ = step(gpt, batch(gpt), scaled(gpt, 2.0**exponent))
        norms.append(float(result.gradient_norm))
    assert norms[0] == 0.0  # float16 has nothing so small
    assert norms[1] == pytest.approx(norms[2], rel=1e-5) and norms[2] > 1.0
