"""The pages fit the repository: links lead somewhere, figures and tables are what code says."""

import importlib.util
import re
from pathlib import Path

import pytest

import torch_gpt

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md")),
    *sorted(DOCS.rglob("*.md")),
]


def named(page: Path) -> str:
    """The name of a page in a test's id."""
    return page.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", x).strip().lower()) for x in headings}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_link_leads_to_a_file_and_a_heading_of_it(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        found = page.parent / path if path else page
        assert found.is_file(), link
        assert not anchor or anchor in anchors(found), link


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_nothing_is_left_to_fill_in(page):
    assert not re.search(r"@@|\bTODO\b|\bFIXME\b|\bXXX\b", page.read_text())


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert listed == {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}


def test_every_figure_is_on_a_page():
    shown = {
        (page.parent / path).resolve()
        for page in PAGES
        for path in re.findall(r"!\[[^\]]+\]\(([^)\s]+)\)", page.read_text())
    }
    kept = {path for path in (DOCS / "figures").rglob("*") if path.suffix in {".png", ".svg"}}
    assert shown == kept


def test_the_figures_of_the_cache_are_what_their_script_draws(tmp_path):
    script = DOCS / "figures" / "draw_cache.py"
    spec = importlib.util.spec_from_file_location("draw_cache", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(tmp_path)
    drawn = sorted(tmp_path.glob("*.svg"))
    assert [path.name for path in drawn] == [
        path.name for path in sorted(script.parent.glob("cache_*.svg"))
    ]
    assert all(path.read_text() == (script.parent / path.name).read_text() for path in drawn)


def test_every_file_of_the_twins_is_in_the_reading_list():
    page = (DOCS / "architecture.md").read_text()
    listed = set(re.findall(r"^\| `([\w/]+\.py)` \|", page, re.MULTILINE))
    for package in ("flax_gpt", "torch_gpt"):
        files = {path.relative_to(ROOT / package).as_posix() for path in _sources(package)}
        assert listed == {name for name in files if not name.endswith("__init__.py")}


def test_every_room_of_parity_is_in_the_tree():
    page = (DOCS / "architecture.md").read_text()
    tree = re.search(r"```text\n(.*?)```", page, re.DOTALL)[1]
    rooms = {path.parent.name for path in (ROOT / "parity").glob("*/__init__.py")}
    assert rooms <= set(re.findall(r"^  (\w+)/", tree, re.MULTILINE))


def test_the_floors_are_those_of_the_import_contracts():
    page = (DOCS / "architecture.md").read_text()
    said = re.findall(r"```text\n(cli\n.*?)```", page, re.DOTALL)[0].split()
    project = (ROOT / "pyproject.toml").read_text()
    layers = re.search(r"^layers = \[\n(.*?)\n\]", project, re.DOTALL | re.MULTILINE)[1]
    held = re.findall(r"\w+", re.sub(r"\(\w+\)", "", layers))
    assert said == [*held, "flax_gpt", "torch_gpt"]


def test_the_pages_say_of_the_self_test_what_its_table_says():
    table = (DOCS / "self_test.md").read_text()
    (summary,) = re.findall(r"^\d+ of \d+ detected, .*$", table, re.MULTILINE)
    assert summary in (DOCS / "check.md").read_text()
    assert f"the {summary.split()[0]} planted faults" in (ROOT / "README.md").read_text()


def test_the_bytes_of_a_token_are_those_of_the_caches():
    page = (DOCS / "cache.md").read_text()
    table = re.search(r"<!-- memory -->\n(.*?)\n\n", page, re.DOTALL)[1].splitlines()[2:]
    gpt2 = dict(num_layers=12, num_heads=12, head_dim=64, dtype="float32")
    llama = dict(num_layers=32, num_heads=32, head_dim=128, dtype="bfloat16")
    for line, shape, heads in zip(table, (gpt2, llama), ((12, 4, 1), (32, 8, 1)), strict=True):
        said = [int(cell.replace(",", "")) for cell in line.strip("| ").split(" | ")[1:]]
        for kv_heads, num_bytes in zip(heads, said, strict=True):
            sizes = dict(vocab_size=2, context_length=2, embed_dim=8, mlp_dim=2)
            config = torch_gpt.GPTConfig(**sizes, **shape, num_kv_heads=kv_heads)
            assert torch_gpt.KVCache.empty(config, 3, 2).num_bytes.allocated == 3 * 2 * num_bytes


def _sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))
