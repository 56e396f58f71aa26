"""The choice of kernels by measurement, on pretended machines, and that each computes the same."""

import numpy as np
import pytest

# Time of each kernel over the plain layer's, for one row: of a machine where torch's product of one
# row uses one core, and of one where it already takes all of the bandwidth.
ONE_CORE = {"mv": 0.98, "split": 0.5, "in_out": 0.7, "packed": 0.8, "joined": 0.99, "out_in": 0.8}
ALL_CORES = {"mv": 0.88, "split": 1.8, "in_out": 0.9, "packed": 1.2, "joined": 1.0, "out_in": 1.3}
ALIKE = {"mv": 0.98, "split": 0.99, "in_out": 1.1, "packed": 1.2, "joined": 0.975, "out_in": 0.98}
TOKENS = np.random.default_rng(0).integers(0, 61, (3, 11))


class Machine:
    """A clock that moves by what a pretended machine takes for each call."""

    def __init__(self, gpt, monkeypatch, ratios, spikes=False):
        self.now, self.num_calls, self.random = 0.0, 0, np.random.default_rng(0)
        packing = gpt.package.decoding.packing
        calls_of = packing._calls

        def calls(kinds):
            return {key: self.wrapped(key[1], call) for key, call in calls_of(kinds).items()}

        self.ratios, self.spikes = {"plain": 1.0} | ratios, spikes
        monkeypatch.setattr(packing, "_calls", calls)
        monkeypatch.setattr(packing, "_measured", {})
        monkeypatch.setattr(packing, "_SMALL_BYTES", 0, raising=False)

    def wrapped(self, name, call):
        def timed():
            call()
            self.num_calls += 1
            # Something else runs now and then.
            slow = 9.0 if self.spikes and self.random.random() < 0.3 else 1.0
            self.now += 1e-6 * slow * self.ratios[name]

        return timed

    def clock(self):
        return self.now


def chosen(gpt, machine, model, rows=1):
    return {x.kernel for x in gpt.package.choose_kernels(model, rows, clock=machine.clock)}


@pytest.mark.parametrize("spikes", [False, True])
def test_each_machine_gets_its_own_kernels(gpt, monkeypatch, spikes):
    model = gpt.model(dtype="float32", num_layers=1)
    slow = Machine(gpt, monkeypatch, ONE_CORE, spikes)
    assert chosen(gpt, slow, model) == ({"split"} if gpt.name == "torch" else {"out_in", "in_out"})
    fast = Machine(gpt, monkeypatch, ALL_CORES, spikes)
    assert chosen(gpt, fast, model) == ({"mv"} if gpt.name == "torch" else {"plain", "in_out"})


def test_a_tie_keeps_the_plain_layer(gpt, monkeypatch):
    model = gpt.model(dtype="float32", num_layers=1)
    machine = Machine(gpt, monkeypatch, ALIKE)
    assert chosen(gpt, machine, model) == {"plain"}


def test_what_was_timed_is_not_timed_again_and_its_ratios_are_kept(gpt, monkeypatch):
    model = gpt.model(dtype="float32", num_layers=1)
    machine = Machine(gpt, monkeypatch, ONE_CORE)
    first = gpt.package.choose_kernels(model, 1, clock=machine.clock)
    num_calls = machine.num_calls
    deeper = gpt.model(dtype="float32", num_layers=2)
    assert gpt.package.choose_kernels(deeper, 1, clock=machine.clock) == first
    assert machine.num_calls == num_calls
    for choice in first:
        expected = {name: pytest.approx(machine.ratios[name]) for name in choice.ratios}
        assert choice.ratios == expected and choice.ratios["plain"] == 1.0
    assert gpt.package.Decoder(model, 1).kernels == first


def test_slow_products_get_few_rounds(gpt):
    kernels, product = gpt.package.decoding.kernels, gpt.package.Product(1, (1,), 1, "float32")
    now = [0.0]

    def call():
        now[0] += 1.0

    seconds = kernels.time_in_turns({(product, "plain"): call}, lambda: now[0])
    assert len(seconds[product, "plain"]) == 5


@pytest.mark.parametrize("rows", [1, 3])
def test_every_kernel_computes_what_the_model_does(gpt, rows):
    model = gpt.model(num_kv_heads=1, num_layers=1)
    tokens = TOKENS[:rows]
    expected = gpt.numpy(model(gpt.ints(tokens))[0])[:, 6:]
    for kernel in gpt.package.KERNELS:
        decoder = gpt.package.Decoder(model, rows, kernels=kernel)
        assert {x.kernel for x in decoder.kernels} <= {kernel, "plain"}
        logits, cache = decoder.prefill(gpt.ints(tokens[:, :7]))
        found = [gpt.numpy(logits)]
        for t in range(7, 11):
            logits, cache = decoder.advance(gpt.ints(tokens[:, t]), cache)
            found.append(gpt.numpy(logits))
        np.testing.assert_allclose(np.stack(found, 1), expected, rtol=0, atol=1e-12)


def test_a_kernel_that_does_not_exist_is_refused(gpt):
    with pytest.raises(ValueError, match=r"Decoder: kernel 'fast'\. There are plain,"):
        gpt.package.Decoder(gpt.model(), 1, kernels="fast")
