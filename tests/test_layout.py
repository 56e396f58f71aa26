"""The house: what lies where, how large it is, and what can be installed without the rest."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = "flax_gpt", "torch_gpt", "parity"


def sources(*packages: str) -> list[Path]:
    """The Python files of packages."""
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def names(requirements: list[str]) -> set[str]:
    """The names of packages, without versions."""
    return {re.match(r"[\w-]+", requirement)[0] for requirement in requirements}


def test_parity_has_three_loose_modules_and_rooms():
    loose = {path.name for path in (ROOT / "parity").glob("*.py")}
    assert loose == {"__init__.py", "__main__.py", "pytest_plugin.py"}


def test_a_test_of_parity_lies_where_the_tested_room_lies():
    folders = {path.parent for path in (ROOT / "tests" / "parity").rglob("test_*.py")}
    rooms = {folder.relative_to(ROOT / "tests") for folder in folders}
    assert not [room for room in rooms if not (ROOT / room).is_dir()]


def test_the_extras_of_a_plain_install_are_parts_of_it_and_the_rest_is_what_every_part_needs():
    extras = PROJECT["optional-dependencies"]
    parts = [x for extra in ("flax", "torch", "plots", "checkpoints") for x in extras[extra]]
    assert set(parts) < set(PROJECT["dependencies"])
    needed = names(PROJECT["dependencies"]) - names(parts)
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    line = re.search(r"--no-deps -e \.\npip install -c constraints\.txt (.*) torch\n", guide)[1]
    assert set(line.split()) == needed
    workflow = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    assert all(name in workflow for name in needed)
