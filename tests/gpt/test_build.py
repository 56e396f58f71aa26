"""The config is read where a model is built, and the way of one cached step stays short."""

import ast
from pathlib import Path

import pytest

import flax_gpt
import torch_gpt

FOLDERS = {"flax": Path(flax_gpt.__file__).parent, "torch": Path(torch_gpt.__file__).parent}

# What a step through the cache runs after the checks of its arguments; `forward` goes as
# `__call__`.
STEP = {
    "cache.py": ["LayerCache.append", "host_values"],
    "metadata.py": [
        "AttentionMetadata.valid_ids", "AttentionMetadata.within", "attention_metadata",
    ],
    "attention.py": [
        "attend", "attention_weights", "weighted_values", "zero_unattended", "_columns", "_scores",
        "_products",
    ],
    "model.py": [
        "Attention.__call__", "Attention.project", "MLP.__call__", "Block.__call__", "GPT.__call__",
        "GPT.hidden", "GPT.embed", "GPT.unembed",
    ],
    "decode.py": ["decode_step"],
}  # fmt: skip
CHOICES = "positions norm qk_norm embedding_norm activation gated tied_head window".split()


def functions(path: Path) -> dict[str, ast.FunctionDef]:
    """Every function of a file, by dotted name."""
    found = {}

    def walk(body, prefix):
        for node in body:
            if isinstance(node, ast.FunctionDef):
                found[prefix + ("__call__" if node.name == "forward" else node.name)] = node
            elif isinstance(node, ast.ClassDef):
                walk(node.body, f"{node.name}.")

    walk(ast.parse(path.read_text()).body, "")
    return found


def num_code_lines(path: Path, node: ast.FunctionDef) -> int:
    """Lines of a function but for docstrings, comments and blank ones."""
    words = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.FunctionDef) and ast.get_docstring(inner):
            words |= set(range(inner.body[0].lineno, inner.body[0].end_lineno + 1))
    lines = path.read_text().splitlines()
    numbers = range(node.lineno, node.end_lineno + 1)
    return sum(
        n not in words and not lines[n - 1].strip().startswith("#") and bool(lines[n - 1].strip())
        for n in numbers
    )


@pytest.mark.parametrize("side", FOLDERS)
def test_one_cached_step_is_220_lines_in_five_files(side):
    total = 0
    for file, names in STEP.items():
        path = FOLDERS[side] / file
        total += sum(num_code_lines(path, functions(path)[name]) for name in names)
    assert total <= 220


@pytest.mark.parametrize("side", FOLDERS)
def test_the_model_fits_on_a_page(side):
    hidden = functions(FOLDERS[side] / "model.py")["GPT.hidden"]
    assert hidden.end_lineno - hidden.lineno + 1 <= 20


@pytest.mark.parametrize("side", FOLDERS)
def test_no_forward_pass_reads_the_config(side):
    for path in FOLDERS[side].rglob("*.py"):
        for name, node in functions(path).items():
            for inner in ast.walk(node):
                if isinstance(inner, ast.Attribute) and inner.attr in CHOICES:
                    owner = ast.unparse(inner.value)
                    reads = owner == "config" or owner.endswith(".config")
                    assert not reads or path.name in ("build.py", "config.py"), (path, name)
                if name.endswith("__call__") and isinstance(inner, ast.Attribute):
                    assert inner.attr != "config", (path, name)


@pytest.mark.parametrize("side", FOLDERS)
def test_no_function_has_more_than_eight_parameters(side):
    for path in FOLDERS[side].rglob("*.py"):
        for name, node in functions(path).items():
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            assert len([x for x in arguments if x.arg not in ("self", "cls")]) <= 8, (path, name)


def test_a_part_that_a_model_does_not_have_is_the_identity(gpt):
    plain, identity = gpt.model(num_layers=1), gpt.package.layers.identity
    block = plain.blocks[0]
    absent = plain.embedding_norm, block.attention.query_norm, block.attention.key_norm
    assert all(part is identity for part in (*absent, block.mlp.gate))
    full = gpt.model(num_layers=1, embedding_norm=True, qk_norm=True, gated=True)
    block = full.blocks[0]
    present = full.embedding_norm, block.attention.query_norm, block.attention.key_norm
    assert all(part is not identity for part in (*present, block.mlp.gate))


def test_equal_configs_share_a_compiled_program(twins):
    import jax
    from flax import nnx

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
