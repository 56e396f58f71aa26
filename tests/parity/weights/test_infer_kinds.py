"""The map is found for weights of every kind, without a file, and a wrong one is not taken."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch.nn import functional

from parity import check_pair
from parity.check.experiment import PairExperiment
from parity.check.modules import pair_of
from parity.frameworks.flax.leaves import flax_leaves
from parity.frameworks.torch.leaves import torch_leaves
from parity.weights.infer import OpenRules, infer_rules
from parity.weights.layouts import Layout
from parity.weights.rules import Rule, Rules
from parity.weights.weight_map import resolve

WIDTH, HEADS, SIZE = 12, 3, 4


@pytest.fixture(autouse=True)
def as_strangers_write():
    with jax.numpy_rank_promotion("allow"):
        yield


def drawn(*shape):
    """Return a parameter of flax."""
    return nnx.Param(jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), "float32"))


def found(net, port, inputs, rules="auto"):
    """Return the rules of a pair, which resolve, and the gap of outputs that they leave."""
    pair = pair_of(net, port, inputs, rules=rules)
    resolve(pair.rules, torch_leaves(net), flax_leaves(port))
    assert Rules.parse(pair.rules.to_toml()) == pair.rules
    return pair.rules, PairExperiment(pair).gap(pair.rules)


class Attention(torch.nn.Module):
    def __init__(self, fused=False):
        super().__init__()
        self.fused = fused
        if fused:
            self.in_proj = torch.nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        else:
            self.query = torch.nn.Linear(WIDTH, WIDTH, bias=False)
            self.key = torch.nn.Linear(WIDTH, WIDTH, bias=False)
            self.value = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        self.out_proj = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        parts = self.in_proj(x).chunk(3, -1) if self.fused else (
            self.query(x), self.key(x), self.value(x))  # fmt: skip
        q, k, v = (y.unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for y in parts)
        y = functional.scaled_dot_product_attention(q, k, v)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class Einsum(nnx.Module):
    """Attention by hand, whose weights have an axis of heads or of all three projections."""

    def __init__(self, kind, scale=SIZE**-0.5):
        self.kind, self.scale = kind, scale
        if kind == "apart":  # heads in front of the width
            self.wv, self.wk, self.wq = (drawn(HEADS, WIDTH, SIZE) for _ in range(3))
        elif kind == "stacked":
            self.qkv = drawn(3, WIDTH, HEADS, SIZE)
        else:
            self.wq, self.kv = drawn(WIDTH, HEADS, SIZE), drawn(2, HEADS, WIDTH, SIZE)
        self.wo, self.b = drawn(HEADS, SIZE, WIDTH), drawn(WIDTH)

    def __call__(self, x):
        if self.kind == "apart":
            q, k, v = (jnp.einsum("btd,ndh->bnth", x, w[...]) for w in (self.wq, self.wk, self.wv))
        elif self.kind == "stacked":
            q, k, v = jnp.einsum("btd,kdnh->kbnth", x, self.qkv[...])
        else:
            q = jnp.einsum("btd,dnh->bnth", x, self.wq[...])
            k, v = jnp.einsum("btd,kndh->kbnth", x, self.kv[...])
        p = jax.nn.softmax(jnp.einsum("bnth,bnsh->bnts", q, k) * self.scale, -1)
        return jnp.einsum("bnts,bnsh,nhd->btd", p, v, self.wo[...]) + self.b[...]


@pytest.mark.parametrize("kind, fused", [
    ("apart", False), ("apart", True), ("stacked", False), ("stacked", True), ("two", False),
])  # fmt: skip
def test_heads_are_found_apart_stacked_and_fused(kind, fused, rng):
    rules, gap = found(Attention(fused), Einsum(kind), rng.normal(size=(2, 5, WIDTH)))
    assert gap < 1e-12 and not rules.notes


def test_a_fault_elsewhere_leaves_the_map_that_names_say(rng):
    x = rng.normal(size=(2, 5, WIDTH))
    right, _ = found(Attention(), Einsum("apart"), x)
    rules, gap = found(Attention(), Einsum("apart", scale=1.0), x)
    assert rules == right and gap > 1e-3


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up = torch.nn.LayerNorm(6), torch.nn.Linear(6, 6)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(6, 6, bias=False) for _ in range(3))

    def forward(self, x):
        y = torch.tanh(self.up(self.norm(x)))
        return x + sum(torch.sin(expert(y)) * (i + 1) for i, expert in enumerate(self.experts))


class Blocks(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks, self.head = (
            torch.nn.ModuleList(Block() for _ in range(4)),
            torch.nn.Linear(6, 2),
        )

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Stack(nnx.Module):
    """All blocks in one array for each leaf, and all experts in one of their axes."""

    def __init__(self):
        self.scale, self.shift, self.b = drawn(4, 6), drawn(4, 6), drawn(4, 6)
        self.w, self.experts = drawn(4, 6, 6), drawn(4, 3, 6, 6)
        self.head = nnx.Linear(6, 2, rngs=nnx.Rngs(0))

    def __call__(self, x):
        def block(x, leaves):
            scale, shift, w, b, experts = leaves
            y = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
            y = jnp.tanh((y * scale + shift) @ w + b)
            parts = jnp.sin(jnp.einsum("bi,eio->ebo", y, experts))
            return x + jnp.einsum("ebo,e->bo", parts, jnp.arange(1, 4, dtype=x.dtype)), None

        leaves = (v[...] for v in (self.scale, self.shift, self.w, self.b, self.experts))
        return self.head(jax.lax.scan(block, x, tuple(leaves))[0])


def test_layers_and_experts_are_found_in_the_axes_of_one_array(rng):
    rules, gap = found(Blocks(), Stack(), rng.normal(size=(5, 6)))
    assert gap < 1e-12
    assert Rule("blocks.[n].up.weight", "w", "b a -> [n] a b") in rules.rules
    assert any(x.torch == "blocks.[n].experts.[m].weight" for x in rules.rules)


class Reader(torch.nn.Module):
    """Tokens and absolute positions, read by a convolution over patches."""

    def __init__(self):
        super().__init__()
        self.patches = torch.nn.Conv2d(3, WIDTH, 2, 2)
        self.pos_embed = torch.nn.Parameter(torch.randn(1, 9, WIDTH))
        self.gamma = torch.nn.Parameter(torch.randn(WIDTH))
        self.mixer = torch.nn.Conv1d(WIDTH, WIDTH, 1)
        self.norm = torch.nn.GroupNorm(3, WIDTH)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2) + self.pos_embed
        x = self.norm(self.mixer(x.transpose(1, 2))).transpose(1, 2)
        return x * self.gamma


class Patches(nnx.Module):
    def __init__(self, table):
        rngs = nnx.Rngs(0)
        self.proj = nnx.Linear(12, WIDTH, rngs=rngs)
        self.positions = nnx.Embed(9, WIDTH, rngs=rngs) if table == "layer" else drawn(9, WIDTH)
        self.mix = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.groups = nnx.GroupNorm(WIDTH, num_groups=3, epsilon=1e-5, rngs=rngs)
        self.layer_scale = drawn(1, 1, WIDTH)

    def __call__(self, x):
        b, c, h, w = x.shape
        x = x.reshape(b, c, h // 2, 2, w // 2, 2).transpose(0, 2, 4, 3, 5, 1)
        x = self.proj(x.reshape(b, -1, 4 * c))
        is_layer = isinstance(self.positions, nnx.Embed)
        x = x + (self.positions(jnp.arange(9)) if is_layer else self.positions[...])
        return self.groups(self.mix(x)) * self.layer_scale[...]


@pytest.mark.parametrize("table", ["layer", "array"])
def test_patches_positions_and_scales_are_found_in_other_shapes(table, rng):
    rules, gap = found(Reader(), Patches(table), rng.normal(size=(2, 3, 6, 6)))
    assert gap < 1e-12 and not rules.notes
    layouts = {rule.flax: rule.layout for rule in rules.rules}
    assert (
        layouts["proj.kernel"] == "d c a b -> (a b c) d" and layouts["mix.kernel"] == "b a 1 -> a b"
    )


class Cell(nnx.Module):
    """An LSTM by hand, each gate apart."""

    def __init__(self, rngs):
        self.lstm = nnx.LSTMCell(5, 6, rngs=rngs)

    def __call__(self, x):
        carry = jnp.zeros((len(x), 6), x.dtype), jnp.zeros((len(x), 6), x.dtype)
        outputs = []
        for step in range(x.shape[1]):
            carry, y = self.lstm(carry, x[:, step])
            outputs.append(y)
        return jnp.stack(outputs, 1)


def test_the_gates_of_a_recurrent_layer_are_found_in_the_layers_of_a_cell(rng):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = torch.nn.LSTM(5, 6, batch_first=True, bias=False)

        def forward(self, x):
            return self.lstm(x)[0]

    class Port(Cell):
        def __init__(self, rngs):
            super().__init__(rngs)
            for name in ("hi", "hf", "hg", "ho"):
                setattr(self.lstm, name, nnx.Linear(6, 6, use_bias=False, rngs=rngs))

    rules, gap = found(Net(), Port(nnx.Rngs(0)), rng.normal(size=(2, 4, 5)))
    assert gap < 1e-12
    assert "lstm.{ii,if_,ig,io}.kernel" in [rule.flax for rule in rules.rules]


class Deep(torch.nn.Module):
    """Layers of one shape, some with a bias."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Sequential(
            torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4)
        )
        self.body = torch.nn.ModuleDict({"left": torch.nn.Linear(4, 4, bias=False)})
        self.matrix = torch.nn.Parameter(torch.randn(4, 4))
        self.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0, 4.0]))

    def forward(self, x):
        return torch.sin(self.body["left"](self.stem(x))) @ self.matrix.T * self.scale


class Flat(nnx.Module):
    def __init__(self, rngs):
        self.fc_1, self.fc_2 = nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)
        self.out, self.w = drawn(4, 4), drawn(4, 4)
        self.factors = nnx.Variable(jnp.arange(1.0, 5.0))

    def __call__(self, x):
        x = self.fc_2(jnp.tanh(self.fc_1(x)))
        return jnp.sin(x @ self.w[...]) @ self.out[...] * self.factors[...]


def test_other_nesting_biases_in_some_and_a_square_matrix_by_hand(rng):
    rules, gap = found(Deep(), Flat(nnx.Rngs(0)), rng.normal(size=(3, 4)))
    assert gap < 1e-12
    assert Rule("matrix", "out", Layout.TRANSPOSED) in rules.rules
    assert Rule("body.left.weight", "w", Layout.TRANSPOSED) in rules.rules


class Shared(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = torch.nn.Embedding(7, 4), torch.nn.Linear(4, 7, bias=False)
        self.unused = torch.nn.Linear(3, 3)
        self.register_buffer("steps", torch.tensor([3, 1, 2]))
        self.head.weight = self.table.weight

    def forward(self, a, b):
        return self.head(self.table(a) * self.table(b))[:, self.steps]


class Apart(nnx.Module):
    def __init__(self, rngs, steps=(3, 1, 2)):
        self.a, self.b = nnx.Embed(7, 4, rngs=rngs), nnx.Embed(7, 4, rngs=rngs)
        self.generator = nnx.Linear(4, 9, rngs=rngs)
        self.steps = nnx.Variable(jnp.asarray(steps))

    def __call__(self, a, b):
        return self.a.attend(self.a(a) * self.b(b))[:, self.steps[...]]


def test_ties_of_either_side_and_what_no_output_needs(rng):
    inputs = rng.integers(0, 7, (2, 5)), rng.integers(0, 7, (2, 5))
    rules, gap = found(Shared(), Apart(nnx.Rngs(0)), inputs)
    assert gap < 1e-12 and len(rules.notes) == 5
    assert rules.ties == (("head.weight", "table.weight"),)
    assert rules.flax_ties in ((("b.embedding", "a.embedding"),), (("a.embedding", "b.embedding"),))
    assert set(rules.flax_ignored) == {"generator.kernel", "generator.bias"}
    assert set(rules.ignored) == {"unused.weight", "unused.bias"}
    assert Rule("steps", "steps") in rules.rules


def test_tables_of_integers_are_compared_as_numbers(rng):
    inputs = rng.integers(0, 7, (2, 5)), rng.integers(0, 7, (2, 5))
    settings = dict(levels=("weights", "logits"), dtypes=("float64",))
    assert check_pair(Shared(), Apart(nnx.Rngs(0)), inputs, **settings).ok
    report = check_pair(Shared(), Apart(nnx.Rngs(0), steps=(3, 2, 1)), inputs, **settings)
    assert report.divergence.where == "steps"
    assert report.divergence.cause == "2 of 3 integers of the two tables differ"


def test_lines_of_a_file_stand_and_the_rest_is_inferred(rng, tmp_path):
    path = tmp_path / "rules.toml"
    path.write_text('rest = "auto"\nmap."query.weight" = "wk"\nmap."key.weight" = "wq"\n')
    x = rng.normal(size=(2, 5, WIDTH))
    rules, gap = found(Attention(), Einsum("apart"), x, path)
    assert gap > 1e-3  # as the file says
    flax = {rule.torch: rule.flax for rule in rules.rules}
    assert flax["query.weight"] == "wk" and flax["value.weight"] == "wv"
    path.write_text('rest = "auto"\nmap."query.weight" = "b"\n')
    with pytest.raises(ValueError, match=r"query\.weight does not lie in flax b: \[12, 12\] and"):
        found(Attention(), Einsum("apart"), x, path)


def test_a_leaf_without_a_counterpart_is_asked_for_by_a_line_with_all_that_was_found(rng):
    class Wider(Einsum):
        def __init__(self):
            super().__init__("apart")
            self.wo = drawn(HEADS, SIZE, WIDTH + 1)
            self.b = drawn(WIDTH + 1)

    with pytest.raises(OpenRules) as caught:
        found(Attention(), Wider(), rng.normal(size=(2, 5, WIDTH)))
    message = str(caught.value)
    assert "flax has nothing for torch out_proj.weight [12, 12]" in message
    assert 'rest = "auto"' in message and 'torch = "query.weight"' in message
    assert {x.torch for x in caught.value.partial.rules} == {f"{x}.weight" for x in
                                                             ("query", "key", "value")}  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
def test_a_random_chain_is_found_under_random_names(seed):
    """Layers of few shapes in random order of definition, renamed: uses and shapes find them."""
    rng = np.random.default_rng(seed)
    widths = rng.choice([4, 6], 6)
    number = np.arange(len(widths) - 1)
    ours, theirs = ([f"{'abcxyz'[i]}{tag}" for i in rng.permutation(6)[:5]] for tag in ("", "q"))
    biased = rng.random(5) < 0.6

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for i in np.random.default_rng(seed).permutation(number):
                self.add_module(ours[i], torch.nn.Linear(int(widths[i]), int(widths[i + 1]),
                                                         bias=bool(biased[i])))  # fmt: skip

        def forward(self, x):
            for i in number:
                x = torch.tanh(self.get_submodule(ours[i])(x)) * (i + 1)
            return x

    class Port(nnx.Module):
        def __init__(self):
            for i in np.random.default_rng(seed + 1).permutation(number):
                shape = int(widths[i]), int(widths[i + 1])
                setattr(self, theirs[i], drawn(*shape) if i % 2 else
                        nnx.Linear(*shape, use_bias=bool(biased[i]), rngs=nnx.Rngs(0)))  # fmt: skip
                if i % 2 and biased[i]:
                    setattr(self, f"{theirs[i]}_b", drawn(int(widths[i + 1])))

        def __call__(self, x):
            for i in number:
                layer = getattr(self, theirs[i])
                if isinstance(layer, nnx.Param):
                    x = x @ layer[...]
                    x = x + getattr(self, f"{theirs[i]}_b")[...] if biased[i] else x
                else:
                    x = layer(x)
                x = jnp.tanh(x) * (i + 1)
            return x

    rules, gap = found(Net(), Port(), rng.normal(size=(3, int(widths[0]))))
    assert gap < 1e-12 and not rules.notes


class Recurrent(torch.nn.Module):
    """An LSTM both ways, then cells as wide as their inputs, whose weights are of one shape."""

    def __init__(self):
        super().__init__()
        self.rnn = torch.nn.LSTM(5, 3, batch_first=True, bidirectional=True)
        self.cell = torch.nn.LSTMCell(6, 6)

    def forward(self, x):
        y, _ = self.rnn(x)
        h = c = torch.zeros_like(y[:, 0])
        for step in y.unbind(1):
            h, c = self.cell(step, (h, c))
        return h


class RecurrentPort(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        forward, backward = (nnx.OptimizedLSTMCell(5, 3, rngs=rngs) for _ in range(2))
        self.rnn = nnx.Bidirectional(nnx.RNN(forward), nnx.RNN(backward))
        self.cell = nnx.LSTMCell(6, 6, rngs=rngs)

    def __call__(self, x):
        y = self.rnn(x)
        carry = jnp.zeros_like(y[:, 0]), jnp.zeros_like(y[:, 0])
        for step in range(y.shape[1]):
            carry, h = self.cell(carry, y[:, step])
        return h


def test_the_sum_of_two_biases_is_found_in_one(rng):
    net, port, x = Recurrent(), RecurrentPort(), rng.normal(size=(2, 4, 5))
    rules, gap = found(net, port, x)
    assert gap < 1e-12
    assert {y for x, y in rules.sums} == {
        "rnn.bias_hh_l0", "rnn.bias_hh_l0_reverse", "cell.bias_hh"}  # fmt: skip
    report = check_pair(net, port, x, rules=rules, dtypes=("float64",),
                        levels=("weights", "gradients", "optimizer"))  # fmt: skip
    _, gradients, optimizer = report.levels
    assert report.ok and gradients.verdict == "PASS"
    assert optimizer.verdict == "ABSTAIN" and "trains rnn.bias_ih_l0 and" in str(report)


class HandCell(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.x2h, self.h2h = torch.nn.Linear(4, 6), torch.nn.Linear(6, 6)


class HandCellPort(nnx.Module):
    def __init__(self):
        self.x2h = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
        self.h2h = nnx.Linear(6, 6, use_bias=False, rngs=nnx.Rngs(1))


class Gated(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = torch.nn.GRU(4, 6, batch_first=True)

    def forward(self, x):
        return self.rnn(x)[0]


class GatedPort(nnx.Module):
    def __init__(self):
        self.rnn = nnx.RNN(nnx.GRUCell(4, 6, rngs=nnx.Rngs(0)))

    def __call__(self, x):
        return self.rnn(x)


def test_a_bias_without_a_counterpart_is_asked_for_as_a_term():
    line = 'sum = [{term = "h2h.bias", original = "x2h.bias"}]'
    with pytest.raises(OpenRules) as caught:
        infer_rules(HandCell(), HandCellPort())
    assert line in str(caught.value)
    rules = infer_rules(HandCell(), HandCellPort(), given=Rules.parse(f'rest = "auto"\n{line}'))
    assert rules.sums == (("h2h.bias", "x2h.bias"),)
    with pytest.raises(OpenRules, match="reset gate; nnx"):
        infer_rules(Gated(), GatedPort())


class Tables(torch.nn.Module):
    """A codebook that is first looked up, and a table of biases with the buckets in front."""

    def __init__(self):
        super().__init__()
        self.codebook, self.bias = torch.nn.Embedding(7, 3), torch.nn.Embedding(5, 2)

    def forward(self, x, ids):
        y = self.codebook(ids)
        return y + x @ self.codebook.weight.T[:, :3], self.bias(ids % 5)


class TablesPort(nnx.Module):
    def __init__(self):
        self.codebook, self.bias = drawn(7, 3), drawn(2, 5)

    def __call__(self, x, ids):
        scores = x @ self.codebook[...].T
        return scores[:, :3] + self.codebook[...][ids], self.bias[...][:, ids % 5].T


def test_tables_are_found_whatever_reads_them_first(rng):
    inputs = rng.normal(size=(6, 3)), rng.integers(0, 7, 6)
    rules, gap = found(Tables(), TablesPort(), inputs)
    assert gap < 1e-12
    assert {x.torch: x.layout for x in rules.rules} == {
        "codebook.weight": Layout.SAME, "bias.weight": Layout.TRANSPOSED}  # fmt: skip
