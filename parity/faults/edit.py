"""A bug as data: the lines of a twin as they should be and as the bug has them, and its story."""

import ast
import contextlib
import dataclasses
import difflib
import importlib
import importlib.util
import itertools
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

FRAMEWORKS = "flax", "torch"

_numbers = itertools.count()


@dataclasses.dataclass(frozen=True)
class Edit:
    """One place of one file, and how a bug has it.

    Attributes:
        file: name of the file in its package.
        right: the text as it stands there, exactly once.
        wrong: what the bug has instead.
    """

    file: str
    right: str
    wrong: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bug:
    """One bug in both twins.

    Attributes:
        id: short name, words joined by dashes.
        title: what is wrong, in one line.
        symptom: what somebody sees who has it, in one line.
        why: why it is wrong and why it gives that symptom, in a few sentences.
        seen: where it was met in the wild: a repository and thread, a page, or a known trap.
        flax: the places in flax_gpt.
        torch: the places in torch_gpt.
        caught_by: the detectors that are known to fire, in both frameworks, the most telling first.
        absent: why one framework cannot have it, where its places are empty.
    """

    id: str
    title: str
    symptom: str
    why: str
    seen: str
    flax: tuple[Edit, ...] = ()
    torch: tuple[Edit, ...] = ()
    caught_by: tuple[str, ...] = ()
    absent: str = ""

    def edits(self, framework: str) -> tuple[Edit, ...]:
        """The places in the twin of that framework, flax or torch."""
        return {"flax": self.flax, "torch": self.torch}[framework]

    def diff(self, framework: str) -> str:
        """The lines of that twin that change, - right and + wrong, with two lines around them."""
        folder = twin_folder(framework)
        lines: list[str] = []
        for file in dict.fromkeys(edit.file for edit in self.edits(framework)):
            right = (folder / file).read_text(encoding="utf-8")
            wrong = edited(file, right, self.edits(framework))
            name = f"{folder.name}/{file}"
            lines += difflib.unified_diff(
                right.splitlines(), wrong.splitlines(), name, f"{name} with {self.id}",
                lineterm="", n=2,
            )  # fmt: skip
        return "\n".join(lines)

    @property
    def frameworks(self) -> tuple[str, ...]:
        """Those that have the bug."""
        return tuple(name for name in FRAMEWORKS if self.edits(name))


@contextlib.contextmanager
def planted(framework: str, edits: Sequence[Edit]) -> Iterator[ModuleType]:
    """Imports a copy of a twin in which some places read differently.

    Args:
        framework: flax or torch.
        edits: the places. Files that none of them reaches are those of the healthy twin.

    Raises:
        ValueError: when an edit names no file of the twin, or its text is not there exactly once.
    """
    healthy = f"{framework}_gpt"
    sources = {path.stem: path.read_text("utf-8") for path in twin_folder(framework).glob("*.py")}
    if unknown := {edit.file for edit in edits} - {f"{name}.py" for name in sources}:
        raise ValueError(
            f"bug: no file {min(unknown)} in {healthy}. A place is in a file of the twin. Name one."
        )
    copied = _affected(healthy, sources, {edit.file.removesuffix(".py") for edit in edits})
    name = f"{healthy}_copy_{next(_numbers)}"
    with tempfile.TemporaryDirectory() as folder:
        for stem in copied:
            text = edited(f"{stem}.py", sources[stem], edits).replace(healthy, name)
            (Path(folder) / f"{stem}.py").write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(
            name, Path(folder) / "__init__.py", submodule_search_locations=[folder]
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            # What no edit reaches is shared: jax has compiled it already.
            for stem in sources.keys() - copied:
                shared = importlib.import_module(f"{healthy}.{stem}")
                sys.modules[f"{name}.{stem}"] = shared
                setattr(module, stem, shared)
            spec.loader.exec_module(module)
            yield module
        finally:
            for loaded in [x for x in sys.modules if x == name or x.startswith(f"{name}.")]:
                del sys.modules[loaded]


def _affected(package: str, sources: Mapping[str, str], changed: set[str]) -> set[str]:
    """The files that change, and all that import one of them, however indirectly."""
    imports = {name: _imported(package, text) for name, text in sources.items()}
    affected = changed | {"__init__"}
    while more := {name for name in imports.keys() - affected if imports[name] & affected}:
        affected |= more
    return affected


def _imported(package: str, text: str) -> set[str]:
    """The files of a package that one of its files imports from."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module == package:
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{package}."):
            found.add(node.module.removeprefix(f"{package}."))
    return found


def twin(framework: str) -> ModuleType:
    """The healthy package of that framework."""
    return importlib.import_module(f"{framework}_gpt")


def twin_folder(framework: str) -> Path:
    """Where its files are, without importing it."""
    return Path(importlib.util.find_spec(f"{framework}_gpt").origin).parent


def edited(file: str, text: str, edits: Sequence[Edit]) -> str:
    """The text of a file with the edits that are meant for it.

    Raises:
        ValueError: when the text of an edit is not in it exactly once.
    """
    for edit in edits:
        if edit.file != file:
            continue
        found = text.count(edit.right)
        if found != 1:
            raise ValueError(
                f"bug: {edit.right!r} is in {file} {found} times. A place is one place. Give more "
                "of its line."
            )
        text = text.replace(edit.right, edit.wrong)
    return text
