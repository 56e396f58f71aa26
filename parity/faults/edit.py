"""Edits of a program's source: applied to its text, and imported as a copy of a twin."""

import ast
import contextlib
import dataclasses
import importlib
import importlib.util
import itertools
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import ModuleType

FRAMEWORKS = "flax", "torch"

_numbers = itertools.count()


@dataclasses.dataclass(frozen=True)
class Edit:
    """A replacement in one file.

    Attributes:
        file: path below the folder of the program, such as "decoding/generate.py".
        old: text that the file holds exactly once.
        new: text that replaces it.
    """

    file: str
    old: str
    new: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mutation:
    """A change of a program that exists in both frameworks.

    Attributes:
        id: short name, words joined by dashes.
        title: the change in one line.
        flax: edits of the Flax program.
        torch: edits of the PyTorch program.
    """

    id: str
    title: str
    flax: tuple[Edit, ...] = ()
    torch: tuple[Edit, ...] = ()

    def edits(self, framework: str) -> tuple[Edit, ...]:
        """Return the edits for one framework, flax or torch."""
        return {"flax": self.flax, "torch": self.torch}[framework]

    @property
    def frameworks(self) -> tuple[str, ...]:
        """The frameworks that it has edits for."""
        return tuple(name for name in FRAMEWORKS if self.edits(name))


def mutated_text(file: str, text: str, edits: Sequence[Edit]) -> str:
    """Apply the edits that are meant for one file, in order.

    Returns:
        The text with the edits.

    Raises:
        ValueError: an edit's old text is not in the file exactly once.
    """
    for edit in edits:
        if edit.file != file:
            continue
        if (found := text.count(edit.old)) != 1:
            raise ValueError(
                f"edit: {edit.old!r} is in {file} {found} times. An edit changes one place. Give "
                "more of its line."
            )
        text = text.replace(edit.old, edit.new)
    return text


@contextlib.contextmanager
def mutated(package: str, edits: Sequence[Edit]) -> Iterator[ModuleType]:
    """Import a copy of a package with edits in it.

    Args:
        package: the name, such as flax_gpt.
        edits: what the copy changes. Modules that they do not affect are those of the package.

    Yields:
        The copy. It can be imported by its own name until the context ends.

    Raises:
        ValueError: an edit names no file of the package, or its old text is not there exactly once.
    """
    root = package_folder(package)
    sources = {x.relative_to(root).as_posix(): x.read_text("utf-8") for x in root.rglob("*.py")}
    if unknown := {edit.file for edit in edits} - sources.keys():
        raise ValueError(
            f"edit: no file {min(unknown)} in {package}. An edit changes a file of the package. "
            "Name one by its path there."
        )
    copied = _affected(package, sources, {edit.file for edit in edits})
    shared = sorted(map(_module, sources.keys() - copied))
    name = f"{package}_copy_{next(_numbers)}"
    with tempfile.TemporaryDirectory() as folder:
        for file in copied:
            path = Path(folder, file)
            path.parent.mkdir(parents=True, exist_ok=True)
            text = mutated_text(file, sources[file], edits).replace(package, name)
            path.write_text(text, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(
            name, Path(folder, "__init__.py"), submodule_search_locations=[folder]
        )
        assert spec is not None and spec.loader is not None
        copy = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            # Unaffected modules are shared: jax has compiled their functions already.
            for module in shared:
                sys.modules[f"{name}.{module}"] = importlib.import_module(f"{package}.{module}")
            spec.loader.exec_module(copy)
            for module in shared:  # bind what a real import would have bound
                parent, _, stem = module.rpartition(".")
                owner = importlib.import_module(f"{name}.{parent}".rstrip("."))
                if not hasattr(owner, stem):
                    setattr(owner, stem, sys.modules[f"{name}.{module}"])
            yield copy
        finally:
            for loaded in [x for x in sys.modules if x == name or x.startswith(f"{name}.")]:
                del sys.modules[loaded]


def twin(framework: str) -> ModuleType:
    """Import the twin of one framework, flax or torch."""
    return importlib.import_module(f"{framework}_gpt")


def package_folder(package: str) -> Path:
    """Find the folder of a package, without importing it."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def _module(file: str) -> str:
    """Return the name of a file's module below its package; "" for the package itself."""
    return file.removesuffix(".py").removesuffix("__init__").strip("/").replace("/", ".")


def _affected(package: str, sources: Mapping[str, str], changed: set[str]) -> set[str]:
    """Return the changed files, those that import one of them, and the packages they are in."""
    files = {_module(file): file for file in sources}
    imports = {
        file: {files[module] for module in _imported(package, file, text, files)}
        for file, text in sources.items()
    }
    affected: set[str] = set()
    more = changed | {"__init__.py"}
    while not more <= affected:
        affected |= more
        more = {file for file in sources if imports[file] & affected}
        more |= {str(x / "__init__.py") for file in affected for x in PurePosixPath(file).parents}
    return affected


def _imported(package: str, file: str, text: str, modules: Collection[str]) -> Iterator[str]:
    """Yield the modules below a package that one of its files imports."""
    here = f"{package}/{file}".rpartition("/")[0].replace("/", ".")
    for node in ast.walk(ast.parse(text)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), here)
            names = [f"{source}.{alias.name}" for alias in node.names]
        for name in names:
            if f"{name}.".startswith(f"{package}."):
                module = name.removeprefix(package).removeprefix(".")
                while module not in modules:  # a name that a module defines
                    module = module.rpartition(".")[0]
                yield module
