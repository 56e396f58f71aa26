"""Every bug of the gallery changes what its twin does, and the detectors it names see it."""

import dataclasses
import re
from pathlib import Path

import pytest

from parity.doctor import DETECTORS, examine, twin_model
from parity.doctor.twins import CONFIG
from parity.faults import BUGS, GALLERY, find, mutated
from parity.faults.edit import twin
from parity.faults.matrix import NAMES, Matrix, Row, draw, measure
from parity.report.record import Verdict

ROOT = Path(__file__).parents[3]
_DETECTORS = {detector.name: detector for detector in DETECTORS}
# In torch, where a question takes a tenth of a second, every bug; in flax the first of each kind
# that each question is the most telling one for. `parity bugs matrix` asks everything in both, and
# its table is held to the gallery below.
_IN_TORCH = [pytest.param("torch", bug, id=f"torch, {bug.id}") for bug in BUGS if bug.torch]
_IN_FLAX = {
    (category, bug.caught_by[0]): pytest.param("flax", bug, id=f"flax, {bug.id}")
    for category, bugs in GALLERY.items()
    for bug in reversed(bugs)
    if bug.flax
}


@pytest.mark.parametrize(("framework", "bug"), [*_IN_TORCH, *_IN_FLAX.values()])
def test_a_planted_bug_is_seen_by_the_detectors_it_names(framework, bug):
    names = bug.caught_by if framework == "torch" else bug.caught_by[:1]
    with mutated(f"{framework}_gpt", bug.edits(framework)) as package:
        healthy = twin(framework) if "parity" in names else None
        model = twin_model(framework, package, healthy=healthy)
        for name in names:
            finding = _DETECTORS[name](model)
            assert finding.verdict is Verdict.FAIL, f"{name}: {finding.sentence}"


@pytest.mark.parametrize(
    ("framework", "seed"), [*(("torch", seed) for seed in range(20)), ("flax", 0)]
)
def test_a_healthy_twin_raises_no_alarm(framework, seed):
    healthy = twin(framework) if seed % 5 == 0 else None
    model = twin_model(framework, twin(framework), seed=seed, healthy=healthy)
    found = examine(model, stop_early=False)
    assert found.fired == (), [x.finding.sentence for x in found.answers]


@pytest.mark.parametrize(
    "changes",
    [
        dict(num_layers=1, num_heads=1, embed_dim=16, dropout=0.0),
        dict(vocab_size=61, context_length=37, embed_dim=45, num_heads=5, mlp_dim=50),
        dict(num_layers=5, context_length=11, vocab_size=11),
        dict(dtype="float32"),
    ],
    ids=str,
)
def test_a_healthy_twin_of_another_shape_raises_no_alarm(changes):
    config = dataclasses.replace(CONFIG, **changes)
    model = twin_model("torch", twin("torch"), config, healthy=twin("torch"))
    found = examine(model, stop_early=False)
    assert found.fired == (), [x.finding.sentence for x in found.answers]


def test_nine_of_ten_bugs_are_seen_without_a_reference():
    alone = [bug for bug in BUGS if set(bug.caught_by) - {"parity"}]
    assert len(alone) >= 0.9 * len(BUGS)


def test_a_measured_matrix_tells_bugs_from_healthy_models(tmp_path):
    found = measure(list(find(["mask-zero", "no-shift"])), ["torch"], range(1))
    assert [row.bug for row in found.rows] == ["no-shift", "mask-zero", None]
    assert found.exit_code == 0 and not found.false_alarms and not found.missed
    assert "best-lag" in found.fired("no-shift")["torch"]
    assert "causality" in found.fired("mask-zero")["torch"]
    assert "| mask-zero |" in found.to_markdown() and "2 times seen" in found.summary
    draw(found, tmp_path / "matrix.png")
    assert (tmp_path / "matrix.png").read_bytes().startswith(b"\x89PNG")


def test_a_miss_and_a_false_alarm_are_counted_and_change_the_exit_code():
    def row(bug, fired):
        return Row("torch", bug, 0, fired, NAMES, dict.fromkeys(fired, "seen"))

    healthy, seen = row(None, ()), row("no-shift", ("best-lag",))
    assert Matrix((seen, healthy)).exit_code == 0
    assert Matrix((row("no-shift", ()), healthy)).missed
    assert Matrix((row("no-shift", ()), healthy)).exit_code == 1
    assert Matrix((seen, row(None, ("causality",)))).exit_code == 1
    only = Matrix((row("no-shift", ("parity",)), healthy))
    assert only.needing_a_reference and "0 of them without" in only.summary


def test_an_unknown_bug_gets_a_suggestion():
    with pytest.raises(ValueError, match="Did you mean no-shift"):
        list(find(["no-shft"]))


def test_the_table_in_the_docs_has_every_bug_and_the_detectors_it_names():
    text = (ROOT / "docs/faults/matrix.md").read_text()
    marked: dict[str, set[str]] = {}
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = [[x.strip() for x in line.split("|")[1:-1]] for line in block.splitlines()]
        heading, _, *lines = rows
        for bug, *marks in lines:
            marked[bug] = {name for name, mark in zip(heading[1:], marks, strict=True) if mark}
    assert list(marked) == [bug.id for bug in BUGS]
    for bug in BUGS:
        assert set(bug.caught_by) <= marked[bug.id], bug.id
    (summary,) = re.findall(r"^\d+ bugs, .*$", text, re.MULTILINE)
    assert "0 false alarms in 40 healthy models" in summary
    assert all(summary in (ROOT / "docs" / page).read_text() for page in ("doctor.md", "faults.md"))
