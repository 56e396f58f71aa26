"""Outputs appear whole or not at all; links, pipes and devices stay what they are."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from parity.system.files import check_writable, write_file


def test_a_file_is_replaced_whole_or_left_as_it_was(tmp_path):
    path = tmp_path / "report.json"
    write_file(path, "old")
    path.chmod(0o600)
    with pytest.raises(TypeError):
        write_file(path, None)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    write_file(path, "new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o600  # the rights it had
    with pytest.raises(FileNotFoundError):
        write_file(tmp_path / "no" / "report.json", "x")


@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_is_followed_and_stays(tmp_path, is_there):
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "target.json", tmp_path / "link.json"
    link.symlink_to("elsewhere/target.json")
    if is_there:
        target.write_text("old")
    check_writable(link)
    write_file(link, "new")
    assert link.is_symlink() and target.read_text() == "new" and not target.is_symlink()


def test_a_pipe_reaches_its_reader(tmp_path):
    pipe, found = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: found.append(pipe.read_text()))
    reader.start()
    check_writable(pipe)
    write_file(pipe, "through")
    reader.join(timeout=10)
    assert found == ["through"] and pipe.is_fifo()


def test_a_device_is_written_and_not_replaced():
    before = os.stat(os.devnull).st_rdev
    check_writable(Path(os.devnull))
    write_file(Path(os.devnull), "x" * 10)
    assert os.stat(os.devnull).st_rdev == before


@pytest.mark.parametrize("to_file", [True, False])
def test_standard_output_by_its_path_keeps_what_was_printed(tmp_path, to_file):
    code = (
        "from pathlib import Path; from parity.system.files import write_file\n"
        "print('before'); write_file(Path('/dev/stdout'), 'text\\n'); print('after')"
    )
    command, out = [sys.executable, "-c", code], tmp_path / "out.txt"
    if to_file:
        # Appended to, as a shell's >> opens it: the position is the file's end.
        with out.open("a") as stdout:
            subprocess.run(command, stdout=stdout, check=True)
        found = out.read_text()
    else:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert found == "before\ntext\nafter\n"
    assert os.path.islink("/dev/stdout")


def test_a_full_disk_is_reported_with_the_name_of_the_file():
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        write_file(Path("/dev/full"), "x")


def test_nothing_is_left_of_a_file_that_did_not_fit(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    path = tmp_path / "report.json"
    with pytest.raises(OSError, match=r"report\.json"):
        write_file(path, "x")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="that is a folder"):
        check_writable(tmp_path)
    with pytest.raises(ValueError, match="no folder"):
        check_writable(tmp_path / "no" / "report.json")
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "no" / "report.json")
    with pytest.raises(ValueError, match="no folder"):
        check_writable(dangling)
    check_writable(tmp_path / "new.json")
    monkeypatch.setattr(os, "access", lambda *_: False)  # as for anybody but root
    with pytest.raises(ValueError, match="no right to write"):
        check_writable(tmp_path / "new.json")
