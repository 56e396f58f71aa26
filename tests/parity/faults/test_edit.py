"""A copy of a package with edits in it: what it shares, what it changes, and what is refused."""

import importlib
import sys

import pytest

from parity.faults.edit import Edit, mutated, twin

NESTED = {
    "__init__.py": (
        "from nested_gpt.decoding import generate\nfrom nested_gpt.model import forward\n"
    ),
    "random.py": "def draw():\n    return 1\n",
    "model.py": "from nested_gpt import random\n\ndef forward():\n    return 10 * random.draw()\n",
    "decoding/__init__.py": "from .generate import generate\n",
    "decoding/sampling.py": "def pick(x):\n    return x + 1\n",
    "decoding/generate.py": (
        "from nested_gpt.decoding.sampling import pick\nfrom ..model import forward\n\n"
        "def generate():\n    return pick(forward())\n"
    ),
    "training/__init__.py": "",
    "training/loss.py": "def loss():\n    return 3\n",
    "training/step.py": (
        "import nested_gpt.training.loss\n\n"
        "def step():\n    return nested_gpt.training.loss.loss()\n"
    ),
}


@pytest.fixture
def nested(tmp_path, monkeypatch):
    """The name of a package with packages in it, which can be imported."""
    for file, text in NESTED.items():
        path = tmp_path / "nested_gpt" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield "nested_gpt"
    for name in [name for name in sys.modules if name.startswith("nested_gpt")]:
        del sys.modules[name]


def module(package, name):
    return importlib.import_module(f"{package.__name__}.{name}")


def test_an_edit_in_a_subpackage_reaches_what_imports_it_and_nothing_else(nested):
    healthy = importlib.import_module(nested)
    with mutated(nested, [Edit("decoding/sampling.py", "x + 1", "x + 2")]) as package:
        assert (package.generate(), healthy.generate()) == (12, 11)
        assert package.forward is healthy.forward
        assert module(package, "decoding.generate") is not module(healthy, "decoding.generate")
        for name in ("random", "model", "training", "training.loss", "training.step"):
            assert module(package, name) is module(healthy, name)


def test_a_shared_module_of_a_copied_subpackage_is_found_there(nested):
    healthy = importlib.import_module(nested)
    with mutated(nested, [Edit("decoding/generate.py", "pick(forward())", "0")]) as package:
        assert package.generate() == 0
        assert package.decoding.sampling is module(healthy, "decoding.sampling")
        # A function of the same name as its module is not covered by it.
        assert package.decoding.generate is package.generate


def test_an_edit_reaches_into_subpackages_through_relative_and_whole_imports(nested):
    with mutated(nested, [Edit("random.py", "return 1", "return 2")]) as package:
        assert (package.forward(), package.generate()) == (20, 21)
    with mutated(nested, [Edit("training/loss.py", "return 3", "return 4")]) as package:
        assert module(package, "training.step").step() == 4
        assert package.generate is importlib.import_module(nested).generate


def test_a_copy_is_gone_afterwards():
    edit = Edit("training/optimizer.py", "fused=False", "fused=False, foreach=False")
    with mutated("torch_gpt", [edit]) as package:
        name = package.__name__
        assert package.train_step is not twin("torch").train_step and name in sys.modules
        assert package.GPT is twin("torch").GPT  # the edit does not affect it
    assert not [module for module in sys.modules if module.startswith(name)]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Edit("sampling.py", "x", "y"), "no file sampling.py in nested_gpt"),
        (Edit("decoding/sampling.py", "x + 3", "y"), "'x \\+ 3' is in decoding/sampling.py 0 tim"),
        (Edit("decoding/generate.py", "pick", "y"), "is in decoding/generate.py 2 times"),
    ],
)
def test_an_edit_that_has_no_one_place_is_refused(nested, edit, message):
    before = set(sys.modules)
    with pytest.raises(ValueError, match=message), mutated(nested, [edit]):
        pass
    assert set(sys.modules) == before
