"""The config decides which parts a model has, in one file and once."""

import ast
from pathlib import Path

import jax
import pytest
from flax import nnx

import flax_gpt
import torch_gpt

FOLDERS = {"flax": Path(flax_gpt.__file__).parent, "torch": Path(torch_gpt.__file__).parent}
CHOICES = "positions norm qk_norm embedding_norm activation gated tied_head window".split()


@pytest.mark.parametrize("side", FOLDERS)
def test_one_file_reads_the_choices_of_a_config(side):
    for path in FOLDERS[side].rglob("*.py"):
        if path.name not in ("build.py", "config.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and node.attr in CHOICES:
                    owner = ast.unparse(node.value)
                    assert owner != "config" and not owner.endswith(".config"), (path, node.lineno)


def test_a_part_that_a_model_does_not_have_is_the_identity(gpt):
    plain, identity = gpt.model(num_layers=1), gpt.package.layers.identity
    block = plain.blocks[0]
    absent = plain.embedding_norm, block.attention.query_norm, block.attention.key_norm
    assert all(part is identity for part in (*absent, block.mlp.gate))
    full = gpt.model(num_layers=1, embedding_norm=True, qk_norm="head", gated=True)
    block = full.blocks[0]
    present = full.embedding_norm, block.attention.query_norm, block.attention.key_norm
    assert all(part is not identity for part in (*present, block.mlp.gate))


def test_equal_configs_share_a_compiled_program(twins):
    flax, _ = twins
    changes = dict(positions="rotary", head_dim=6, gated=True, activation="silu", window=5)
    graphs = [nnx.split(flax.model(seed=seed, **changes))[0] for seed in (1, 2)]
    assert graphs[0] == graphs[1] and hash(graphs[0]) == hash(graphs[1])
    traced = []

    def run(graph, leaves):
        traced.append(1)
        return leaves

    compiled = jax.jit(run, static_argnums=0)
    for graph in graphs:
        compiled(graph, 1.0)
    assert len(traced) == 1
