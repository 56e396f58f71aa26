"""`parity bugs`: what it prints, what it writes, and how it ends."""

import json

import pytest
from typer.testing import CliRunner

from parity.cli import app
from parity.faults import BUGS, GALLERY


def bugs(*arguments):
    """What the command prints and how it ends, on a wide terminal."""
    return CliRunner().invoke(app, ["bugs", *arguments], env={"COLUMNS": "200"})


def test_the_list_has_every_bug_once_in_the_order_of_the_gallery():
    done = bugs("list")
    assert done.exit_code == 0, done.output
    words = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert [word for word in words if word in {bug.id for bug in BUGS}] == [bug.id for bug in BUGS]


def test_the_list_for_machines_tells_where_each_was_seen_and_what_finds_it():
    rows = json.loads(bugs("list", "--json", "--category", "masks").stdout)
    assert [row["id"] for row in rows] == [bug.id for bug in GALLERY["masks"]]
    assert all(row["seen"] and row["symptom"] and row["caught_by"] for row in rows)


def test_a_bug_is_shown_with_its_lines_in_both_twins():
    done = bugs("show", "no-shift")
    assert done.exit_code == 0, done.output
    assert (
        "flax_gpt/training/loss.py" in done.stdout and "torch_gpt/training/loss.py" in done.stdout
    )
    assert "-    return labels_BT[:, 1:]" in done.stdout and "best-lag" in done.stdout
    only = bugs("show", "graph-grows", "--framework", "flax").stdout
    assert "torch_gpt" not in only and "flax_gpt" in only


def test_models_are_trained_side_by_side_and_drawn(tmp_path):
    picture = tmp_path / "bugs.png"
    done = bugs("run", "offset-zero", "--steps", "20", "--plot", "--out", str(picture))
    assert done.exit_code == 0, done.output
    assert "healthy (torch)" in done.stdout and "offset-zero (torch)" in done.stdout
    assert "detectors: none fires" in done.stdout and "cached-equals-uncached" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_matrix_ends_with_0_when_every_bug_is_seen(tmp_path):
    files = {name: tmp_path / name for name in ("m.json", "m.md", "m.png")}
    done = bugs(
        "matrix", "no-shift", "--framework", "torch", "--healthy", "1",
        "--json", str(files["m.json"]), "--markdown", str(files["m.md"]),
        "--png", str(files["m.png"]),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    rows = json.loads(files["m.json"].read_text())["rows"]
    assert [row["bug"] for row in rows] == ["no-shift", None] and "best-lag" in rows[0]["fired"]
    assert "| no-shift |" in files["m.md"].read_text()
    assert files["m.png"].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("show", "no-shft"), "Did you mean no-shift"),
        (("list", "--category", "maks"), "there are alignment, masks"),
        (("run", "graph-grows", "--framework", "flax"), "--framework flax: graph-grows:"),
        (("run", "--framework", "jax"), "there are flax and torch"),
        (("run", "--data", "nothing.txt"), "no such file"),
        (("run", "no-shift", "--plot", "--out", "nowhere/bugs.png"), "no folder nowhere"),
        (("matrix", "no-shift", "--png", "nowhere/m.png"), "no folder nowhere"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else "",
)
def test_bad_input_ends_with_one_line_and_2(arguments, told):
    done = bugs(*arguments)
    assert done.exit_code == 2, done.output
    (line,) = done.stderr.splitlines()
    assert line.startswith("parity: ") and told in line
