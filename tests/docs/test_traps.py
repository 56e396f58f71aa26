"""The table of docs/traps.md, row by row: what each framework really does, unasked."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from flax.training.dynamic_scale import DynamicScale
from torch.nn import functional as F

PAGE = (Path(__file__).parents[2] / "docs" / "traps.md").read_text()


def norm_epsilon():
    """LayerNorm epsilon"""
    assert nnx.LayerNorm(3, rngs=nnx.Rngs(0)).epsilon == 1e-6
    assert torch.nn.LayerNorm(3).eps == 1e-5


def norm_variance():
    """LayerNorm variance"""
    x = np.float32(1000.0) + np.linspace(-1, 1, 8, dtype=np.float32)[None]
    truth = (x.astype(np.float64) - x.mean(dtype=np.float64)) / x.std(dtype=np.float64)
    fast = np.asarray(nnx.LayerNorm(8, epsilon=1e-12, rngs=nnx.Rngs(0))(jnp.asarray(x)))
    two_pass = torch.nn.LayerNorm(8, eps=1e-12)(torch.from_numpy(x)).detach().numpy()
    assert np.abs(fast - truth).max() > 100 * np.abs(two_pass - truth).max()


def gelu():
    """GELU"""
    x = np.linspace(-3, 3, 101, dtype=np.float32)
    tanh = F.gelu(torch.from_numpy(x), approximate="tanh").numpy()
    exact = F.gelu(torch.from_numpy(x)).numpy()
    assert np.abs(np.asarray(jax.nn.gelu(jnp.asarray(x))) - tanh).max() < 1e-6
    assert np.abs(exact - tanh).max() > 1e-4


def linear_layout():
    """Linear weight"""
    assert nnx.Linear(3, 5, rngs=nnx.Rngs(0)).kernel[...].shape == (3, 5)
    assert torch.nn.Linear(3, 5).weight.shape == (5, 3)


def weight_decay():
    """AdamW weight decay"""
    update, _ = optax.adamw(1.0).update(0.0, optax.adamw(1.0).init(0.0), 1.0)
    assert float(update) == pytest.approx(-1e-4)
    assert torch.optim.AdamW([torch.ones(1)]).defaults["weight_decay"] == 1e-2


def clip_epsilon():
    """Gradient clipping"""
    gradient = np.array([3.0, 4.0], np.float32)
    clip = optax.clip_by_global_norm(1.0)
    ours, _ = clip.update(jnp.asarray(gradient), clip.init(None))
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.from_numpy(gradient.copy())
    torch.nn.utils.clip_grad_norm_([parameter], 1.0)
    norms = np.linalg.norm(ours), np.linalg.norm(parameter.grad.numpy())
    assert norms[0] == pytest.approx(1.0, abs=6e-8) and 1e-7 < norms[0] - norms[1] < 1e-6


def norm_of_many():
    """Norm of 38 million float32 on a CPU"""
    numbers = np.random.default_rng(0).standard_normal(1 << 22, np.float32)
    exact = np.linalg.norm(numbers.astype(np.float64))
    ours = jnp.linalg.norm(jnp.asarray(numbers))
    theirs = torch.linalg.vector_norm(torch.from_numpy(numbers))
    # A ninth of the table's, which is off by 2.7e-3.
    assert abs(float(ours) / exact - 1) < 1e-6 < 2e-5 < 1 - theirs.item() / exact


def bias_correction():
    """AdamW bias correction"""
    gradient = np.array([1e-3], np.float32)
    adam = optax.scale_by_adam(b2=0.999)
    ours, _ = adam.update(jnp.asarray(gradient), adam.init(jnp.asarray(gradient)))
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.from_numpy(gradient)
    torch.optim.AdamW([parameter], lr=1.0, betas=(0.9, 0.999)).step()
    exact = 1e-3 / (1e-3 + 1e-8)
    assert abs(float(ours[0]) - exact) > 5e-6 > 1e-6 > abs(-parameter.item() - exact)


def epsilon_place():
    """RMSprop epsilon"""
    gradient = np.array([1e-4], np.float32)
    rmsprop = optax.rmsprop(1.0, decay=0.5, eps=1e-4)
    ours, _ = rmsprop.update(jnp.asarray(gradient), rmsprop.init(jnp.asarray(gradient)))
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.from_numpy(gradient)
    torch.optim.RMSprop([parameter], lr=1.0, alpha=0.5, eps=1e-4).step()
    assert float(ours[0]) == pytest.approx(-1e-4 / np.sqrt(0.5e-8 + 1e-4), rel=1e-5)
    assert parameter.item() == pytest.approx(-1e-4 / (np.sqrt(0.5e-8) + 1e-4), rel=1e-5)


def absent_gradient():
    """Weight that the loss does not use"""
    adamw = optax.adamw(1.0, weight_decay=0.1)
    used = jax.grad(lambda weights: weights["used"])({"used": 1.0, "unused": 1.0})
    weights = {"used": jnp.ones(()), "unused": jnp.ones(())}
    updates, _ = adamw.update(used, adamw.init(weights), weights)
    assert float(updates["unused"]) == pytest.approx(-0.1)
    parameters = [torch.nn.Parameter(torch.ones(())) for _ in range(2)]
    parameters[0].backward()
    torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.1).step()
    assert parameters[0].item() != 1.0 and parameters[1].item() == 1.0


def first_warmup_rate():
    """First update of a warm-up"""
    sgd = optax.sgd(optax.warmup_constant_schedule(0.0, 1.0, warmup_steps=4))
    update, _ = sgd.update(jnp.ones(()), sgd.init(jnp.zeros(())))
    assert float(update) == 0.0
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.ones(1)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=4)
    optimizer.step()
    assert parameter.item() == pytest.approx(-1 / 3)


def schedule_count():
    """What a schedule counts"""
    sgd, rates = optax.sgd(lambda count: 1.0 + count), []
    state = sgd.init(jnp.zeros(()))
    for _ in range(2):
        update, state = sgd.update(jnp.ones(()), state)
        rates.append(-float(update))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda count: 1.0 + count)
    with pytest.warns(UserWarning, match="skipping the first value of the learning rate"):
        scheduler.step()
    assert rates == [1.0, 2.0] and optimizer.param_groups[0]["lr"] == 2.0


def accumulated_gradients():
    """Accumulated gradients"""
    steps = optax.MultiSteps(optax.sgd(1.0), every_k_schedule=2)
    state, weight = steps.init(jnp.zeros(())), torch.nn.Parameter(torch.zeros(()))
    for gradient in (1.0, 3.0):
        update, state = steps.update(jnp.asarray(gradient), state)
        (gradient * weight).backward()
    assert float(update) == -2.0 and weight.grad.item() == 4.0


def loss_scale_growth():
    """Loss scale doubles"""
    stock, scaler = DynamicScale(), torch.amp.GradScaler("cpu")
    assert stock.growth_interval == scaler.get_growth_interval() == 2000
    stock, scaler = DynamicScale(growth_interval=3), torch.amp.GradScaler("cpu", growth_interval=3)
    parameter, scales = torch.nn.Parameter(torch.zeros(1)), []
    optimizer = torch.optim.SGD([parameter])
    for _ in range(4):
        stock, *_ = stock.value_and_grad(lambda x: x)(1.0)
        scaler.scale(parameter.sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append((float(stock.scale) / 65536, scaler.get_scale() / 65536))
    assert scales == [(1, 1), (1, 1), (1, 2), (2, 2)]


def narrow_softmax():
    """Softmax of bfloat16"""
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(4, 512), scale=3.0)).bfloat16()
    truth = torch.softmax(x.double(), -1).numpy()
    stock = jax.nn.softmax(jnp.asarray(x.float().numpy(), jnp.bfloat16))
    theirs = torch.softmax(x, -1).double().numpy()
    gaps = [np.abs(y / truth - 1.0).max() for y in (np.asarray(stock, np.float64), theirs)]
    assert gaps[0] > 0.02 and gaps[1] < 2**-8


def ignored_label():
    """Label -100"""
    logits, labels = np.zeros((2, 3), np.float32), np.array([1, -100])
    losses = optax.softmax_cross_entropy_with_integer_labels(
        jnp.asarray(logits), jnp.asarray(labels)
    )
    assert np.isnan(np.asarray(losses)).tolist() == [False, True]
    assert torch.isfinite(F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels)))


def unknown_id():
    """Id outside the embedding"""
    table = nnx.Embed(3, 2, rngs=nnx.Rngs(0))
    assert np.isnan(np.asarray(table(jnp.array([7])))).all()
    assert np.array_equal(np.asarray(table(jnp.array([-1]))), np.asarray(table(jnp.array([2]))))
    with pytest.raises(IndexError):
        torch.nn.Embedding(3, 2)(torch.tensor([7]))


def past_the_end():
    """Write past a buffer's end"""
    written = jax.lax.dynamic_update_slice(jnp.zeros(4), jnp.ones(2), (3,))
    assert np.asarray(written).tolist() == [0, 0, 1, 1], "clamped, over what was there"
    with pytest.raises(IndexError):
        torch.zeros(4).index_copy_(0, torch.tensor([3, 4]), torch.ones(2))


def embedding_dtype():
    """Embedding compute dtype"""
    with jax.enable_x64(True):
        table = nnx.Embed(3, 2, rngs=nnx.Rngs(0), param_dtype=jnp.float32)
        table.embedding.set_value(jnp.full((3, 2), 0.1, jnp.float64))
        assert table(jnp.array([0])).dtype == jnp.float32
    assert torch.nn.Embedding(3, 2).double()(torch.tensor([0])).dtype == torch.float64


def library_attention():
    """Library attention in float64"""
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(1, 5, 2, 4)) for _ in range(3))
    scores = np.einsum("btkh,bskh->bkts", q, k) / 2.0
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    truth = np.einsum("bkts,bskh->btkh", weights, v)
    with jax.enable_x64(True):
        stock = np.asarray(jax.nn.dot_product_attention(*map(jnp.asarray, (q, k, v))))
    heads_first = [torch.from_numpy(x).transpose(1, 2) for x in (q, k, v)]
    fused = F.scaled_dot_product_attention(*heads_first).transpose(1, 2).numpy()
    assert np.abs(stock - truth).max() > 1e-9 and np.abs(fused - truth).max() < 1e-14


def masked_row():
    """Row that sees nothing"""
    x = np.arange(8, dtype=np.float32).reshape(1, 4, 1, 2)
    none = np.zeros((1, 1, 4, 4), bool)
    stock = jax.nn.dot_product_attention(*[jnp.asarray(x)] * 3, mask=jnp.asarray(none))
    assert np.allclose(np.asarray(stock), x.mean(axis=1, keepdims=True))
    heads_first = torch.from_numpy(x).transpose(1, 2)
    fused = F.scaled_dot_product_attention(*[heads_first] * 3, attn_mask=torch.from_numpy(none))
    assert torch.count_nonzero(fused) == 0


def wrong_shape():
    """Loading a wrong shape"""
    linear = nnx.Linear(3, 5, rngs=nnx.Rngs(0))
    linear.kernel.set_value(jnp.zeros((2, 2)))
    assert linear.kernel[...].shape == (2, 2)
    with pytest.raises(RuntimeError, match="size mismatch"):
        torch.nn.Linear(3, 5).load_state_dict({"weight": torch.zeros(2, 2)}, strict=False)


TRAPS = [
    norm_epsilon, norm_variance, gelu, linear_layout, weight_decay, bias_correction, epsilon_place,
    absent_gradient, first_warmup_rate, schedule_count, clip_epsilon, norm_of_many,
    accumulated_gradients,
    loss_scale_growth, ignored_label, unknown_id, past_the_end, embedding_dtype, narrow_softmax,
    library_attention, masked_row, wrong_shape,
]  # fmt: skip


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.__name__)
def test_the_frameworks_differ_as_the_page_says(trap):
    with jax.numpy_rank_promotion("allow"):
        trap()


def test_the_page_lists_exactly_these_traps():
    table = re.search(r"<!-- traps -->\n(.*?)\n\n", PAGE, re.DOTALL)[1].splitlines()[2:]
    assert [row.split("|")[1].strip() for row in table] == [trap.__doc__ for trap in TRAPS]
