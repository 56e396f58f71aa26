"""The README is true: its code runs, its output is what it prints, its numbers come out again."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import torch_gpt

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_every_python_block_runs_and_prints_what_it_says(number):
    code, printed = PYTHON[number]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == printed


def test_the_first_commands_are_the_ones_that_ci_runs():
    commands = re.search(r"```sh\n(.*?)```", README, re.DOTALL)[1].splitlines()
    ci = (ROOT / ".ci" / "run").read_text()
    assert len(commands) == 2
    for step in ("python3 -m venv .venv", "-c constraints.txt -e '.[test]'", ".venv/bin/pytest"):
        assert step in commands[1] and step in ci
    assert ".venv/bin/parity check" in commands[0] and ".venv/bin/parity check" in ci


def test_every_file_that_is_linked_exists_and_nothing_is_left_to_fill_in():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links and all((ROOT / link).is_file() for link in links if "://" not in link)
    assert "@@" not in README and "TODO" not in README


def test_every_file_of_the_twins_is_in_the_reading_list():
    listed = set(re.findall(r"^\| `(\w+\.py)` \|", README, re.MULTILINE))
    for package in ("flax_gpt", "torch_gpt"):
        assert listed == {path.name for path in (ROOT / package).glob("*.py")} - {"__init__.py"}


def numbers_of_a_check() -> str:
    """The table that `parity check` writes; of the check before these tests where there was one."""
    if "PARITY_NUMBERS" in os.environ:
        return (ROOT / os.environ["PARITY_NUMBERS"]).read_text()
    as_users_have_it = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-m", "parity", "check", "--markdown", "-"],
        cwd=ROOT, capture_output=True, text=True, timeout=600, env=as_users_have_it,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_table_of_numbers_comes_out_again():
    found = numbers_of_a_check()
    table = re.search(r"<!-- numbers -->\n(.*?)\n\n", README, re.DOTALL)[1]
    ours, theirs = table.splitlines(), found.splitlines()
    assert len(ours) == len(theirs)
    for line, measured in zip(ours, theirs, strict=True):
        # The texts of different Pythons differ, so counts may; all else must be the same words.
        assert re.sub(NUMBER, "#", line) == re.sub(NUMBER, "#", measured)
        numbers = zip(re.findall(NUMBER, line), re.findall(NUMBER, measured), strict=True)
        for said, found in numbers:
            said, found = (float(x.replace(",", "")) for x in (said, found))
            assert said == found or 0.1 <= said / found <= 10, (line, measured)


NUMBER = r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e-\d+)?(?!\w)"


def test_the_bytes_of_a_token_are_those_of_the_caches():
    table = re.search(r"<!-- memory -->\n(.*?)\n\n", README, re.DOTALL)[1].splitlines()[2:]
    gpt2 = dict(num_layers=12, num_heads=12, head_dim=64, dtype="float32")
    llama = dict(num_layers=32, num_heads=32, head_dim=128, dtype="bfloat16")
    for line, shape, heads in zip(table, (gpt2, llama), ((12, 4, 1), (32, 8, 1)), strict=True):
        said = [int(cell.replace(",", "")) for cell in line.strip("| ").split(" | ")[1:]]
        for kv_heads, num_bytes in zip(heads, said, strict=True):
            sizes = dict(vocab_size=2, context_length=2, embed_dim=8, mlp_dim=2)
            config = torch_gpt.GPTConfig(**sizes, **shape, num_kv_heads=kv_heads)
            assert torch_gpt.KVCache.empty(config, 3, 2).num_bytes.allocated == 3 * 2 * num_bytes
