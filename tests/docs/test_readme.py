"""README.md keeps its promises: its length, its commands and its numbers."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 130


def test_the_first_commands_are_the_ones_that_ci_runs():
    commands = re.search(r"```sh\n(.*?)```", README, re.DOTALL)[1].splitlines()
    ci = (ROOT / ".ci" / "run").read_text()
    assert len(commands) == 2
    for step in ("python3 -m venv .venv", "-c constraints.txt -e '.[test]'", ".venv/bin/pytest"):
        assert step in commands[1] and step in ci
    assert ".venv/bin/parity check" in commands[0] and ".venv/bin/parity check" in ci


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


def numbers(page: str) -> list[str]:
    """The lines of a page's table of numbers."""
    return re.search(r"<!-- numbers -->\n(.*?)(?:\n\n|\Z)", page, re.DOTALL)[1].splitlines()


def test_the_table_of_numbers_comes_out_again():
    ours, theirs = numbers(README), numbers_of_a_check().splitlines()
    assert len(ours) == len(theirs)
    for line, measured in zip(ours, theirs, strict=True):
        # The texts of different Pythons differ, so counts may; all else must be the same words.
        assert re.sub(NUMBER, "#", line) == re.sub(NUMBER, "#", measured)
        pairs = zip(re.findall(NUMBER, line), re.findall(NUMBER, measured), strict=True)
        for said, found in pairs:
            said, found = (float(x.replace(",", "")) for x in (said, found))
            assert said == found or 0.1 <= said / found <= 10, (line, measured)


NUMBER = r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e-\d+)?(?!\w)"


def test_the_first_page_of_the_site_has_the_same_table():
    assert numbers((ROOT / "docs" / "index.md").read_text()) == numbers(README)
