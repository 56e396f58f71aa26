"""Lifted models agree with the same models written in float64, and nothing is left behind."""

import threading

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.overrides import _get_current_function_mode
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.checkpoint import checkpoint

from parity.frameworks.torch.lift import Held, lifted

X = torch.linspace(-2.0, 3.0, 20, dtype=torch.float64).view(5, 4)
EPSILON = torch.finfo(torch.float32).eps


def _linear() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(4, 4).double()


def _autocast(linear, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return linear(x).float()


def _attention(q, mask):
    q = q[None, None]
    return functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)[0, 0]


def _mask(dtype):
    limit = torch.finfo(torch.float32).min
    return torch.full((5, 5), limit, dtype=dtype).triu(1)


def _angles(n):
    return torch.polar(torch.ones_like(n), n / 5).real


DOUBLE, SINGLE = torch.float64, torch.float32
# A model as it is published, and the same in float64 by hand; both get a layer and an input.
KINDS = {
    "float": (lambda f, x: f(x.float()), lambda f, x: f(x)),
    "half": (lambda f, x: f(x.half()), lambda f, x: f(x)),
    "to": (lambda f, x: f(x.to(torch.bfloat16)).to(x.dtype), lambda f, x: f(x)),
    "type": (lambda f, x: f(x).type("torch.FloatTensor"), lambda f, x: f(x)),
    "softmax": (lambda f, x: f(x).softmax(-1, dtype=SINGLE), lambda f, x: f(x).softmax(-1)),
    "sum": (lambda f, x: f(x).sum(-1, dtype=SINGLE), lambda f, x: f(x).sum(-1)),
    "arange": (
        lambda f, x: f(x) * torch.arange(4, dtype=SINGLE).div(7),
        lambda f, x: f(x) * torch.arange(4, dtype=DOUBLE).div(7),
    ),
    "full": (
        lambda f, x: f(x) + torch.full((4,), 0.1, dtype=torch.float16),
        lambda f, x: f(x) + torch.full((4,), 0.1, dtype=DOUBLE),
    ),
    "number": (
        lambda f, x: f(x) * torch.tensor(0.1) + torch.tensor([0.3], dtype=SINGLE),
        lambda f, x: f(x) * 0.1 + 0.3,
    ),
    "default type": (
        lambda f, x: f(x) * torch.linspace(0, 1, 4) / torch.zeros(4).add(0.7),
        lambda f, x: f(x) * torch.linspace(0, 1, 4, dtype=DOUBLE) / 0.7,
    ),
    "integers": (
        lambda f, x: f(x) + (torch.arange(4) / 3).sin() + torch.arange(4) ** 0.5,
        lambda f, x: f(x) + (torch.arange(4).double() / 3).sin() + torch.arange(4).double().sqrt(),
    ),
    "autocast": (_autocast, lambda f, x: f(x)),
    "complex": (
        lambda f, x: f(x) + _angles(torch.arange(4.0)).to(torch.complex64).real,
        lambda f, x: f(x) + _angles(torch.arange(4, dtype=DOUBLE)),
    ),
    "attention": (
        lambda f, x: _attention(f(x).float(), _mask(SINGLE)),
        lambda f, x: _attention(f(x), _mask(DOUBLE)),
    ),
    "rms norm by default": (
        lambda f, x: functional.rms_norm(f(1e-3 * x), (4,)),
        lambda f, x: functional.rms_norm(f(1e-3 * x), (4,), eps=EPSILON),
    ),
    "checkpoint": (
        lambda f, x: checkpoint(lambda x: f(x.half()) * torch.tensor(0.1), x, use_reentrant=False),
        lambda f, x: f(x) * 0.1,
    ),
    "vmap": (lambda f, x: torch.func.vmap(lambda row: f(row.float()))(x), lambda f, x: f(x)),
    "functional call": (
        lambda f, x: torch.func.functional_call(f, dict(f.named_parameters()), (x.float(),)),
        lambda f, x: f(x),
    ),
    "compiled": (
        lambda f, x: torch.compile(lambda y: f(y.float()).tanh(), backend="eager")(x),
        lambda f, x: f(x).tanh(),
    ),
    "written in place": (
        lambda f, x: torch.zeros(5, 4).index_copy_(0, torch.arange(5), f(x)).mul_(0.1),
        lambda f, x: f(x) * 0.1,
    ),
}


def _value_and_gradient(model, linear):
    output = model(linear, X)
    loss = (output * torch.arange(output.numel()).view(output.shape).double()).sum()
    return output.detach(), torch.autograd.grad(loss, linear.weight)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_lifted_model_and_its_gradient_are_those_of_the_model_in_float64(kind):
    published, by_hand = KINDS[kind]
    linear = _linear()
    with lifted() as log:
        found = _value_and_gradient(published, linear)
    for value, wanted in zip(found, _value_and_gradient(by_hand, linear), strict=True):
        assert value.dtype == DOUBLE
        assert (value - wanted).abs().max() <= 1e-14 * max(1.0, wanted.abs().max())
    assert log.num_operations > 2 and not log.impure


@pytest.mark.filterwarnings("ignore:.torch.jit.script")
def test_a_script_is_lifted():
    class Script(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = _linear()

        def forward(self, x):
            return self.linear(x.to(torch.float32)).half() + torch.tensor(0.1)

    script, linear = torch.jit.script(Script()), _linear()
    for _ in range(2):  # it is optimized after its first run
        with lifted() as log:
            value = script(X)
            gradient = torch.autograd.grad(value.sum(), script.linear.weight)[0]
        assert (value - linear(X) - 0.1).abs().max() < 1e-15
        assert torch.equal(gradient, torch.autograd.grad(linear(X).sum(), linear.weight)[0])
        assert sum(log.lifted.values()) == 2


def test_the_log_names_the_operation_and_the_line_of_the_user():
    class Norm(torch.nn.Module):
        def forward(self, x):
            return x.float().softmax(-1, dtype=torch.float16)

    with lifted() as log:
        Norm()(X)
    line = Norm.forward.__code__.co_firstlineno + 1
    where = f"at Norm.forward (test_lift.py:{line})"
    assert log.lifted == {f"float32 cast {where}": 1, f"float16 cast {where}": 1}


def test_products_of_groups_have_a_form_in_float64_and_other_operations_run_as_they_can():
    experts = torch.randn(2, 16, 8, dtype=DOUBLE, requires_grad=True)
    x, ends = torch.randn(4, 16, dtype=DOUBLE), torch.tensor([1, 4], dtype=torch.int32)
    with lifted() as log:
        y = torch._grouped_mm(x.bfloat16(), experts.bfloat16(), offs=ends)
        gradient = torch.autograd.grad(y.sum(), experts)[0]
    assert (y - torch.cat([x[:1] @ experts[0], x[1:] @ experts[1]])).abs().max() < 1e-14
    assert (gradient[1] - x[1:].sum(0)[:, None]).abs().max() < 1e-14 and not log.impure

    @torch.library.custom_op("parity_test::narrow", mutates_args=())
    def narrow(x: torch.Tensor) -> torch.Tensor:
        assert x.dtype == SINGLE
        return x / 3

    with lifted() as log:
        y = narrow(X)
    assert y.dtype == DOUBLE and torch.equal(y, (X.float() / 3).double())
    assert [name.split(" at ")[0] for name in log.impure] == ["float32 narrow"]
    with lifted() as log, pytest.raises(RuntimeError, match="cannot be multiplied"):
        X @ X
    assert not log.impure


def test_a_constant_is_what_was_written_and_is_moved_by_half_a_unit_where_that_is_unknown():
    held = {"table": torch.tensor([0.1, 5**0.5, 3.0, 0.375, float("-inf")])}
    with lifted(Held(held)) as log:
        as_held = held["table"] * 1
    assert as_held[0] == 0.1 and torch.equal(as_held.float(), held["table"])
    assert [name.split(" at ")[0] for name in log.lifted] == ["float32 constant table"]
    with lifted(Held(held, move=True)):
        moved = held["table"] * 1
    apart = (moved - as_held).abs()
    assert apart[1] == 2.0**-23 and not apart[[0, 2, 3]].any()


def test_what_is_written_into_a_constant_stays_with_its_model_alone():
    cache, held = torch.zeros(3), Held()
    with lifted(held):
        cache[1] = torch.tensor(0.1)
    with lifted(held):
        assert (cache * 1)[1] == 0.1
    assert not cache.any()


def test_nothing_is_left_behind_and_other_threads_stay_as_they_are():
    seen = []
    with pytest.raises(KeyError), lifted():
        assert torch.zeros(1).dtype == DOUBLE
        thread = threading.Thread(target=lambda: seen.append(torch.zeros(1).dtype))
        thread.start()
        thread.join()
        raise KeyError
    assert seen == [SINGLE] and torch.zeros(1).dtype == torch.tensor(0.1).dtype == SINGLE
    assert _get_current_dispatch_mode() is None and _get_current_function_mode() is None
    x = torch.ones(2, requires_grad=True)
    x.sum().backward()
    assert x.grad is not None and x.half().dtype == torch.float16
    assert np.array_equal(x.detach().numpy(), [1, 1])
