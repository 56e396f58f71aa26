"""Text in, token batches out."""

import numpy as np
import pytest

from parity.pair.text import Corpus, decode


def test_every_python_carries_a_text_to_test_on(corpus):
    assert len(corpus.ids) > 100_000 and 50 < len(corpus.vocabulary) <= 128
    assert "while" in decode(corpus.vocabulary, corpus.ids) and list(corpus.vocabulary) == sorted(
        corpus.vocabulary
    )


def test_ids_and_text_are_two_forms_of_one_thing(tmp_path):
    text = "zażółć gęślą jaźń\n" * 100
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    corpus = Corpus.load(path)
    assert decode(corpus.vocabulary, corpus.ids) == text and corpus.source == str(path)


def test_windows_are_passages_and_the_same_for_the_same_seed():
    corpus = Corpus.from_text("".join(chr(200 + i % 997) for i in range(1500)), "counting")
    windows = corpus.windows(20, 600, 1, 2)
    assert windows.shape == (20, 600) and windows.dtype == np.int32
    steps = np.diff(windows.astype(int)) % 997
    assert np.all((steps == 1) | (windows[:, 1:] == corpus.ids[0])), "only the end wraps around"
    assert np.array_equal(windows, corpus.windows(20, 600, 1, 2))
    assert not np.array_equal(windows, corpus.windows(20, 600, 1, 3))


def test_bad_files_are_refused_in_one_line(tmp_path):
    short, binary = tmp_path / "short.txt", tmp_path / "binary"
    short.write_text("too short")
    binary.write_bytes(b"abc\xff" * 1000)
    with pytest.raises(ValueError, match=r"9 characters, 6 different ones\. A check needs 1,000"):
        Corpus.load(short)
    with pytest.raises(ValueError, match=r"byte 3 is not UTF-8\. Give a UTF-8 text file"):
        Corpus.load(binary)
    with pytest.raises(ValueError, match=r"missing\.txt: No such file or directory"):
        Corpus.load(tmp_path / "missing.txt")
    with pytest.raises(ValueError, match="Is a directory"):
        Corpus.load(tmp_path)
    with pytest.raises(ValueError, match="1 different ones"):
        Corpus.from_text("a" * 2000, "monotone")
