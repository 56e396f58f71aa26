"""The twins are still twins: one outline, one set of words, and names that tell the shapes."""

import ast
import functools
import io
import re
import sys
import tempfile
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch

import flax_gpt
import torch_gpt
from flax_gpt.decoding import decoder as flax_decoder
from torch_gpt.decoding import decoder as torch_decoder
from torch_gpt.decoding import kernels as torch_kernels

FOLDERS = {"flax": Path(flax_gpt.__file__).parent, "torch": Path(torch_gpt.__file__).parent}


def files_of(side: str) -> list[str]:
    """Every file of one twin, by its path inside the package."""
    return sorted(
        path.relative_to(FOLDERS[side]).as_posix() for path in FOLDERS[side].rglob("*.py")
    )


FILES = files_of("flax")

OPTIMIZER, STEP = "training/optimizer.py", "training/step.py"
PACKING, DECODER = "decoding/packing.py", "decoding/decoder.py"
KERNELS = "decoding/kernels.py"

# What the twins may differ in, besides `__call__` and `forward`, and why. A class or function goes
# with everything in it.
ONE_SIDED = {
    ("flax", OPTIMIZER, "CLIP_EPSILON"): "torch's own clip has it inside",
    (
        "flax",
        OPTIMIZER,
        "scale_by_adam",
    ): "optax's own is off in float32, torch's is exact",
    (
        "flax",
        OPTIMIZER,
        "LossScale",
    ): "optax has none, and flax's grows one step too late",
    ("torch", OPTIMIZER, "loss_scale"): "makes torch's own scaler",
    (
        "flax",
        STEP,
        "TrainState.model",
    ): "jax keeps weights outside the model; merged here",
    ("flax", STEP, "TrainState.graphdef"): "the model without its weights",
    ("flax", STEP, "TrainState.parameters"): "the weights without their model",
    ("torch", STEP, "TrainState.model"): "a torch model holds its weights",
    (
        "torch",
        PACKING,
        "PackedAttention",
    ): "starts few operations; XLA makes one program",
    (
        "torch",
        KERNELS,
        "Kernel",
    ): "torch reads copies in several orders, and one row in its own way",
    ("flax", KERNELS, "Kernel"): "jax has two orders",
    ("torch", "metadata.py", "AttentionMetadata.padded"): "torch writes slices where it can",
    ("torch", "metadata.py", "AttentionMetadata.longest"): "torch reads lengths on the host",
    ("torch", "metadata.py", "AttentionMetadata.all_valid"): "and then knows this",
    ("torch", "metadata.py", "AttentionMetadata.all_seen"): "and this",
    ("torch", "metadata.py", "AttentionMetadata.written_tokens"): "jax drops what has no slot",
    ("torch", "model.py", "copied"): "nnx splits and merges",
    ("flax", DECODER, "Decoder.run"): "only jax compiles what else is decoded",
    ("flax", DECODER, "Decoder.program"): "and has programs to look into",
}
OTHER_PARAMETERS = {
    (
        OPTIMIZER,
        "adamw",
    ): "torch's optimizer holds the parameters that it will change",
    (OPTIMIZER, "clip_gradients"): "torch keeps gradients in the model",
    (
        STEP,
        "train_step.share_of_mean",
    ): "jax differentiates a function of the weights",
}
OTHER_DOCSTRINGS = {
    (OPTIMIZER, "adamw"): "flax says why it does not use optax.adamw",
    (OPTIMIZER, "clip_gradients"): "torch scales in place",
    ("decoding/generate.py", "_loop"): "torch loops over a decoder's steps",
    (
        STEP,
        "_parts",
    ): "jax scans over stacked parts, torch goes through a list of them",
}
OTHER_ERRORS = {
    ("layers.py", "parameter_dtype"): "only jax turns float64 into float32 on the quiet",
}


@functools.cache
def source(side: str, file: str) -> str:
    """The text of one file of one twin."""
    return (FOLDERS[side] / file).read_text()


@functools.cache
def definitions(side: str, file: str) -> dict[str, ast.AST]:
    """Everything that a file defines, by dotted name and in order; `forward` goes as `__call__`."""

    def walk(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.AST]]:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                name = prefix + ("__call__" if node.name == "forward" else node.name)
                yield name, node
                yield from walk(node.body, f"{name}.")
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                yield prefix + node.target.id, node
            elif (
                isinstance(node, ast.Assign)
                and isinstance(node.targets[0], ast.Name | ast.Tuple)
                and not prefix
            ):
                for target in getattr(node.targets[0], "elts", node.targets):
                    yield target.id, node

    return dict(walk(ast.parse(source(side, file)).body, ""))


def is_public(name: str) -> bool:
    """Neither it nor what it is in is private; special methods are public."""
    return not any(re.match(r"_(?!_)", part) for part in name.split("."))


def public(side: str, file: str) -> dict[str, ast.AST]:
    """What a reader of both files expects to meet in both."""
    found = definitions(side, file)
    # A function's own functions are its private matter.
    inside = [f"{name}." for name, node in found.items() if isinstance(node, ast.FunctionDef)]
    return {
        name: node
        for name, node in found.items()
        if is_public(name) and not name.startswith(tuple(inside)) and not licensed(side, file, name)
    }


def licensed(side: str, file: str, name: str) -> bool:
    """Whether it, or what it is in, may be missing in the other twin."""
    parts = name.split(".")
    return any((side, file, ".".join(parts[: n + 1])) in ONE_SIDED for n in range(len(parts)))


def shared(file: str) -> list[tuple[str, ast.AST, ast.AST]]:
    """Definitions in both twins, private ones too."""
    flax, torch = definitions("flax", file), definitions("torch", file)
    return [
        (name, flax[name], torch[name])
        for name in flax
        if name in torch and not licensed("torch", file, name)
    ]


def signature(node: ast.FunctionDef) -> list[tuple[str, str]]:
    """Parameters with their defaults, in order."""
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
    pairs = [
        *zip(positional, defaults, strict=True),
        *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True),
    ]
    return [(a.arg, "" if d is None else ast.unparse(d)) for a, d in pairs]


def plain(text: str | None) -> str | None:
    """Words with the names of the twins and of the call taken out."""
    if text is None:
        return None
    return (
        text.replace("torch_gpt", "TWIN")
        .replace("flax_gpt", "TWIN")
        .replace("`forward`", "`__call__`")
    )


def test_the_twins_have_the_same_files():
    assert len(FILES) >= 10
    assert FILES == files_of("torch")


@pytest.mark.parametrize("file", FILES)
def test_the_same_things_are_defined_in_the_same_order(file):
    flax, torch = (
        [(name, type(node)) for name, node in public(side, file).items()] for side in FOLDERS
    )
    assert flax == torch


@pytest.mark.parametrize("file", FILES)
def test_functions_have_the_same_parameters_and_defaults(file):
    for name, ours, theirs in shared(file):
        if isinstance(ours, ast.FunctionDef) and is_public(name):
            same = signature(ours) == signature(theirs)
            assert same != ((file, name) in OTHER_PARAMETERS), name


@pytest.mark.parametrize("file", FILES)
def test_docstrings_are_the_same_words(file):
    modules = [ast.parse(source(side, file)) for side in FOLDERS]
    pairs = [("the module", *modules), *shared(file)]
    for name, ours, theirs in pairs:
        if isinstance(ours, ast.Module | ast.ClassDef | ast.FunctionDef):
            one, two = (plain(ast.get_docstring(node)) for node in (ours, theirs))
            assert (one == two) != ((file, name) in OTHER_DOCSTRINGS), (name, one, two)


@pytest.mark.parametrize("file", FILES)
def test_errors_have_the_same_texts(file):
    for name, ours, theirs in shared(file):
        if isinstance(ours, ast.FunctionDef):
            one, two = (
                [ast.unparse(x.exc) for x in ast.walk(node) if isinstance(x, ast.Raise) and x.exc]
                for node in (ours, theirs)
            )
            assert (one == two) != ((file, name) in OTHER_ERRORS), name


@pytest.mark.parametrize("file", FILES)
def test_what_cannot_be_mirrored_is_explained_by_the_same_comment(file):
    flax, torch = (explanations(source(side, file)) for side in FOLDERS)
    assert flax == torch


def test_some_things_cannot_be_mirrored():
    assert sum(len(explanations(source("flax", file))) for file in FILES) >= 5


def explanations(text: str) -> list[str]:
    """The comments that begin with `twin:`, each with the comment lines right behind it."""
    found, last = [], None
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            words, line = token.string.removeprefix("# "), token.start[0]
            if words.startswith("twin:"):
                found.append(words)
                last = line
            elif last is not None and line == last + 1:
                found[-1] += " " + words
                last = line
    return found


def test_every_licence_is_in_use():
    for side, file, name in ONE_SIDED:
        other = "torch" if side == "flax" else "flax"
        assert name in definitions(side, file)
        both = name in definitions(other, file)
        assert both == ((other, file, name) in ONE_SIDED), name
    for file, name in OTHER_PARAMETERS | OTHER_DOCSTRINGS | OTHER_ERRORS:
        assert name in definitions("flax", file) and name in definitions("torch", file)


def test_the_public_names_are_the_same():
    assert flax_gpt.__all__ == torch_gpt.__all__
    assert all(hasattr(package, x) for package in (flax_gpt, torch_gpt) for x in flax_gpt.__all__)


# --- shapes in names ---

SUFFIX = re.compile(r"_(?!1$)([1BTSDNKQHEFVGRCPIOXU]+)$")  # norm_1 is a number, not an axis


def letters(name: str) -> str | None:
    """The axes that a name promises; None for a name without a suffix."""
    found = SUFFIX.search(name)
    return found.group(1) if found else None


def einsums(side: str) -> Iterator[tuple[str, list[ast.expr], str | None]]:
    """The spec and the operands of every einsum, and the name its result is given."""
    for file in FILES:
        for node in ast.walk(ast.parse(source(side, file))):
            if isinstance(node, ast.Assign | ast.Return):
                for call in ast.walk(node):
                    if isinstance(call, ast.Call) and ast.unparse(call.func).endswith(".einsum"):
                        target = node.targets[0].id if isinstance(node, ast.Assign) else None
                        yield ast.literal_eval(call.args[0]), call.args[1:], target


@pytest.mark.parametrize("side", FOLDERS)
def test_an_einsum_says_what_the_names_of_its_operands_say(side):
    checked = 0
    for spec, operands, target in einsums(side):
        inputs, output = spec.split("->")
        for axes, operand in zip(inputs.split(","), operands, strict=True):
            if isinstance(operand, ast.Name):
                assert letters(operand.id) == axes, (spec, operand.id)
                checked += 1
        if target is not None and letters(target) is not None:
            assert letters(target) == output, (spec, target)
            checked += 1
    assert checked >= 1


def test_the_twins_write_the_same_einsums():
    specs = [[spec for spec, _, _ in einsums(side)] for side in FOLDERS]
    specs[0].remove("BKTH,BKSH->BKTS")  # attention.py: another operation in torch, see there
    # kernels.py: other operations in torch
    for spec in ("BTI,IO->BTO", "BTI,OI->BTO", "OI,BTI->OBT"):
        specs[0].remove(spec)
    assert specs[0] == specs[1] and len(specs[0]) >= 1


# Sizes that all differ, so that no axis can stand in for another; T and S are what a call makes
# them. The MLP has a width that no other test uses: jax runs no Python for a shape that it knows.
SIZES = dict(B=2, N=12, K=3, Q=4, H=10, E=5, D=15, F=31, V=61, C=8, X=23, U=14)
T, S, G, R = 7, 19, 9, 6

# Where an axis B may have another size, such as 1 for every row, and where the code says so.
OTHER_ROWS = {
    "attention_metadata": (1, "its docstring"),
    "AttentionMetadata": (1, "its docstring"),
    "AttentionMetadata.within": (1, "it reads what attention_metadata made"),
    "AttentionMetadata.valid_ids": (1, "it reads what attention_metadata made"),
    "Attention.__call__": (1, "it reads what attention_metadata made"),
    "attend": (1, "it reads what attention_metadata made"),
    "attention_weights": (1, "it reads what attention_metadata made"),
    "zero_unattended": (1, "it reads what attention_metadata made"),
    "Rotary.rotation": (1, "it reads what attention_metadata made"),
    "Rotary.stretched_base": (1, "Rotary.rotation calls it"),
    "Rotation": (1, "Rotary.rotation makes it"),
    "distances": (1, "it reads what attention_metadata made"),
    "Alibi.prepare": (1, "it reads what attention_metadata made"),
    "T5.prepare": (1, "it reads what attention_metadata made"),
    "PackedLinear.__call__": (1, "one row is what it is for"),
    "_calls": (1, "it times steps of one row too"),
    "_call_all": (1, "_calls makes it"),
    "_vector": (1, "PackedLinear calls it"),
    "_split": (1, "PackedLinear calls it"),
    "_inputs_first": (1, "PackedLinear calls it"),
    "_rows_first": (1, "PackedLinear calls it"),
    "_outputs_first": (1, "PackedLinear calls it"),
    "_packed": (1, "PackedLinear calls it"),
    "KVCache.check_capacity": (1, "counts of None are the same number in every row"),
    "KVCache": (R, "select makes one of the rows selected"),
    "LayerCache": (R, "select makes one of the rows selected"),
}

# Whose result has one axis more than its names say, and why.
STACKED = {"_parts": "jax scans over the first axis"}


def expected_names(side: str) -> set[tuple[str, str]]:
    """Every function and class of a twin with the names in it that promise a shape."""
    names = set()

    def visit(node: ast.AST, function: str, path: str) -> None:
        if isinstance(node, ast.FunctionDef):
            function = path + ("__call__" if node.name == "forward" else node.name)
            path = f"{function}.<locals>."
        elif isinstance(node, ast.ClassDef):
            annotated = [x.target.id for x in node.body if isinstance(x, ast.AnnAssign)]
            names.update((node.name, x) for x in annotated if letters(x))
            path = f"{path}{node.name}."
        elif isinstance(node, ast.ListComp | ast.GeneratorExp):
            return  # has a frame of its own, or none at all, by version of Python
        name = node.arg if isinstance(node, ast.arg) else None
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        if function and name and letters(name):
            names.add((function, name))
        for child in ast.iter_child_nodes(node):
            visit(child, function, path)

    for file in FILES:
        visit(ast.parse(source(side, file)), "", "")
    return names


def test_every_licence_of_the_audit_is_in_use():
    names = expected_names("flax") | expected_names("torch")
    assert set(OTHER_ROWS) <= {function for function, _ in names}
    assert set(STACKED) <= set(definitions("flax", STEP))


def audited(
    side: str, run: Callable[[], None], known: dict[str, int] = SIZES
) -> tuple[set[tuple[str, str]], list[str]]:
    """Runs code and looks at the locals of every function of a twin as it returns, and into those
    and results that are a twin's own values. The sizes that are known are the same everywhere,
    others within a function.

    Returns:
        Functions and classes with names whose arrays were looked at, and what is wrong with them.
    """
    seen, problems = set(), []
    paths = {str(FOLDERS[side] / file) for file in FILES}

    def look(frame, event, result):
        if event != "return" or frame.f_code.co_filename not in paths:
            return
        function = re.sub(r"\bforward\b", "__call__", frame.f_code.co_qualname)
        check(function, frame.f_locals)
        results = [] if function in STACKED else [result]
        for value in (*results, *frame.f_locals.values()):
            if is_dataclass(value) and type(value).__module__.startswith(f"{side}_gpt."):
                check(type(value).__name__, {x.name: getattr(value, x.name) for x in fields(value)})

    def check(owner: str, arrays: dict[str, Any]) -> None:
        sizes = dict(known)
        for name, value in arrays.items():
            axes = letters(name)
            if axes is None or not hasattr(value, "shape"):
                continue
            seen.add((owner, name))
            shape = tuple(value.shape)
            if len(shape) != len(axes):
                problems.append(f"{owner}: {name} has shape {shape}")
                continue
            for axis, size in zip(axes, shape, strict=True):
                if axis == "B" and size == OTHER_ROWS.get(owner, (None,))[0]:
                    continue
                if size != (1 if axis == "1" else sizes.setdefault(axis, size)):
                    problems.append(f"{owner}: {axis} of {name} is {size}, not {sizes[axis]}")

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        run()
    finally:
        sys.setprofile(before)
    return seen, problems


def algebra(gpt, model) -> None:
    """What is built of caches, in calls in which all sizes differ."""
    package, tokens = gpt.package, gpt.ints(np.arange(SIZES["B"] * T).reshape(SIZES["B"], T))
    counts, key, folder = gpt.ints((7, 3)), gpt.random.key(0), tempfile.TemporaryDirectory()
    package.beam_search(model, tokens, R, G, counts, (5,))
    for draft in (package.PromptLookup(4), package.DraftModel(model, 4)):
        package.speculate(model, tokens, G, draft, counts, (5,))
        package.speculate(model, tokens, G, draft, counts, (), package.Sampling(), key)
    decoder = package.BatchInvariantDecoder(model, SIZES["B"])
    package.speculate(decoder, tokens, G, package.DraftModel(model, 4), counts)
    cache = package.KVCache.empty(model.config, SIZES["B"], S)
    cache = package.prefill(model, tokens, cache)[1]
    with folder as path:
        package.save_cache(f"{path}/cache", model, cache, tokens)
        package.load_cache(f"{path}/cache", model)


def test_every_array_has_the_axes_in_its_name(gpt):
    package = gpt.package
    assert len({*SIZES.values(), T, S, G, R}) == len(SIZES) + 4
    heads = dict(num_heads=SIZES["N"], num_kv_heads=SIZES["K"], head_dim=SIZES["H"])
    sizes = heads | dict(mlp_dim=SIZES["F"], num_layers=1)
    model = gpt.model(**sizes, dropout=0.1)
    others = [
        gpt.model(**sizes, positions="rotary", rotary=package.Rotary(scaling=scaling, factor=2.0))
        for scaling in ("llama3", "dynamic")
    ]
    others += [gpt.model(**sizes, positions=x, window=3, gated=True) for x in ("alibi", "t5")]
    others.append(gpt.model(**sizes, positions="none", norm="rms_plus_one"))
    others.append(gpt.model(**sizes, positions="rotary", sinks=True))
    experts = dict(
        num_experts=SIZES["X"], num_chosen=SIZES["U"], width=SIZES["F"], shared_width=SIZES["F"]
    )
    for router in ("softmax", "sigmoid"):
        kind = experts | dict(router=router, shared_gate=router == "softmax")
        others.append(gpt.model(**sizes, gated=True, experts=kind))
    key, counts = gpt.random.key(0), gpt.ints((7, 3))
    tokens = gpt.ints(np.random.default_rng(0).integers(0, SIZES["V"], (SIZES["B"], T)))
    state = package.TrainState.create(model, package.TrainConfig(), key)
    classifiers = {
        package.TOKEN_CLASS: package.TokenClassifier(model.config, SIZES["C"]),
        package.SEQUENCE_CLASS: package.SequenceClassifier(model.config, SIZES["C"]),
    }
    classes = {package.TOKEN_CLASS: tokens % SIZES["C"], package.SEQUENCE_CLASS: counts}
    filled = package.KVCache(package.KVCache.empty(model.config, SIZES["B"], S).layers, counts)

    def compute():
        for numbers in (None, counts):
            cache = package.KVCache.empty(model.config, SIZES["B"], S)
            _, cache = package.prefill(model, tokens, cache, numbers)
            package.decode_step(model, tokens[:, 0], cache)
            logits, _ = model(tokens, None, numbers, key)
            package.next_token_loss(logits, tokens, numbers)
            for task, classifier in classifiers.items():
                data = package.Batch(tokens, numbers, classes[task])
                package.evaluate(classifier, [data], task)
            for other in others:
                cache = package.KVCache.empty(other.config, SIZES["B"], S)
                package.decode_step(other, tokens[:, 0], cache)
                other(tokens, None, numbers)
        mlp, row = others[-1].blocks[0].mlp, gpt.floats(np.zeros((SIZES["B"], T, SIZES["D"])))
        mlp.router.margins(row)
        mlp.experts.masked(row, *mlp.router(row))
        package.train_step(package.Batch(tokens, counts), state)
        for use_cache in (True, False):
            package.generate(model, tokens, G, counts, (5,), use_cache)
            package.generate(
                package.BatchInvariantDecoder(model, SIZES["B"]), tokens, G, counts, (5,), use_cache
            )
        for size in (1, SIZES["B"]):
            decoder = package.Decoder(model, size)
            logits, cache = decoder.prefill(tokens, chunk=3)
            decoder.advance(logits.argmax(-1), cache)
            model(tokens[:, :3], cache)
        for kernel in package.KERNELS:
            for size in (1, SIZES["B"]):
                kernels = package.choose_kernels(model, size, kernel)
                packed = package.pack(model, size, kernels)
                packed.blocks[0].mlp.up(gpt.floats(np.zeros((size, 1, SIZES["D"]))))
        sampling = package.Sampling(top_k=9, top_p=0.9, min_p=0.1)
        package.generate(model, tokens, G, counts, sampling=sampling, key=key)

    def run():
        # Tracing is enough for jax: it runs all of the Python and compiles nothing.
        if gpt.name == "flax":
            with pytest.MonkeyPatch.context() as monkeypatch:
                # Inside a trace no program may have options of its own.
                plain = jax.jit(flax_decoder._run, static_argnums=(0, 1, 2, 3))
                monkeypatch.setattr(flax_gpt.decoding.decoder, "_program", lambda: plain)
                jax.eval_shape(compute)
        else:
            with torch.enable_grad():
                compute()
            torch_kernels._can_pack.__wrapped__(torch.float32)
            replay = torch_decoder._Replay(model, filled, backend="eager")
            replay(tokens[:, 0], filled)
            torch_decoder._step(
                model, tokens[:, 0], replay._lengths_B, replay._keys, replay._values
            )
        narrow = gpt.model(**sizes, dtype="float32")
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(package.decoding.packing, "_measured", {})
            monkeypatch.setattr(package.decoding.packing, "_SMALL_BYTES", 0, raising=False)
            package.choose_kernels(narrow, SIZES["B"])
        model.attention_maps(tokens, counts)
        filled.check_capacity(T, counts, model.config.context_length)
        filled.truncate(gpt.ints((4, 0))).grow(S + 1).select(gpt.ints([1] * R))
        package.right_pad(tokens, gpt.ints(np.ones((SIZES["B"], T))))

    seen, problems = audited(gpt.name, run)
    assert not problems
    # The rows of a model are beams here, and what stands on the host has no tracer.
    free = {axis: size for axis, size in SIZES.items() if axis not in "BCP"}
    others, problems = audited(gpt.name, lambda: algebra(gpt, model), free)
    assert not problems
    seen |= others
    assert seen >= expected_names(gpt.name)  # not one name was left out
    assert len(seen) > 80


def test_the_shape_audit_sees_a_wrong_name(gpt):
    _, problems = audited(
        gpt.name, lambda: gpt.package.cache._pad_slots(gpt.floats(np.zeros((2, 3, 7, 4))), 1)
    )
    assert problems == ["_pad_slots: H of x_BKSH is 4, not 10"]
    wrong, sampling = gpt.floats(np.zeros(7)), gpt.package.Sampling()
    _, problems = audited(gpt.name, lambda: gpt.package.filter_logits(wrong, sampling))
    assert set(problems) == {
        "filter_logits: logits_BV has shape (7,)",
        "filter_logits: given_BV has shape (7,)",
    }
    counts = gpt.ints((7, 3, 1))
    wrong = gpt.package.Batch(gpt.ints(np.zeros((2, 7, 1))), counts, counts)
    _, problems = audited(gpt.name, lambda: gpt.package.SEQUENCE_CLASS.targets(wrong))
    assert set(problems) == {
        "Batch: tokens_BT has shape (2, 7, 1)",
        "Batch: B of counts_B is 3, not 2",
    }
