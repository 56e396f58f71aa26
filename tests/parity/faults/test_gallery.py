"""The gallery is sound as data: every place exists, every copy compiles, every story is told."""

import re

import pytest

from parity.doctor import DETECTORS
from parity.faults.bug import BUGS, GALLERY
from parity.faults.edit import FRAMEWORKS, mutated_text, package_folder

PLANTS = [(bug, framework) for bug in BUGS for framework in bug.frameworks]


def source(framework, file):
    """The text of a twin's file."""
    return (package_folder(f"{framework}_gpt") / file).read_text(encoding="utf-8")


def plant_id(plant):
    bug, framework = plant
    return f"{bug.id}, {framework}"


def sentences(text):
    """Count them: a point, and a space or the end after it."""
    return len(re.findall(r"[.?!](?=\s|$)", text))


@pytest.mark.parametrize("plant", PLANTS, ids=plant_id)
def test_every_place_is_in_its_file_once(plant):
    bug, framework = plant
    for edit in bug.edits(framework):
        assert edit.new != edit.old
        text = source(framework, edit.file)
        assert mutated_text(edit.file, text, [edit]) != text


@pytest.mark.parametrize("plant", PLANTS, ids=plant_id)
def test_every_copy_compiles_with_all_its_edits(plant):
    bug, framework = plant
    for file in {edit.file for edit in bug.edits(framework)}:
        text = mutated_text(file, source(framework, file), bug.edits(framework))
        compile(text, file, "exec")


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.id)
def test_every_bug_tells_its_story(bug):
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", bug.id)
    assert 0 < len(bug.title) <= 70 and sentences(bug.title) == 0
    assert 0 < len(bug.symptom) <= 100 and bug.symptom.endswith(".")
    assert 2 <= sentences(bug.why) <= 4 and bug.why.endswith(".")
    assert bug.seen == "a common trap" or re.search(r"\w+/[\w-]+#\d+|met in", bug.seen)
    assert not any("\n" in text or "  " in text for text in (bug.title, bug.symptom, bug.why))


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.id)
def test_a_bug_that_one_framework_cannot_have_says_why(bug):
    assert bug.frameworks
    assert bool(bug.absent) == (len(bug.frameworks) < len(FRAMEWORKS))


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.id)
def test_a_bug_names_detectors_that_there_are(bug):
    assert bug.caught_by and set(bug.caught_by) <= {detector.name for detector in DETECTORS}
    assert len(set(bug.caught_by)) == len(bug.caught_by)


def test_ids_are_unique():
    assert len({bug.id for bug in BUGS}) == len(BUGS)


def test_categories_come_in_the_order_of_the_program():
    assert list(GALLERY) == [
        "alignment", "masks", "positions", "blocks", "optimization", "cache"
    ]  # fmt: skip
    assert BUGS == tuple(bug for bugs in GALLERY.values() for bug in bugs)


def test_nearly_all_bugs_are_in_both_frameworks():
    both = [bug for bug in BUGS if len(bug.frameworks) == len(FRAMEWORKS)]
    assert len(both) >= 45 and len(BUGS) - len(both) <= 2
