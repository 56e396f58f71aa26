"""A catalogue is read into dataclasses, and what is wrong in it is named."""

import re

import pytest

from parity.faults.catalogue import read_catalogue
from parity.faults.edit import Edit, Mutation

TEXT = """
[[mutation]]
id = "one"
title = '''
wrapped
text'''

[[mutation.flax]]
file = "decoding/generate.py"
old = '''
    first
        second
'''
new = ''
"""


def written(tmp_path, text):
    path = tmp_path / "some.toml"
    path.write_text(text)
    return path


def test_the_text_of_an_edit_is_exact_and_prose_may_be_wrapped(tmp_path):
    (found,) = read_catalogue(written(tmp_path, TEXT), Mutation)
    edit = Edit("decoding/generate.py", "    first\n        second\n", "")
    assert found == Mutation(id="one", title="wrapped text", flax=(edit,))
    assert found.frameworks == ("flax",)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("title", "name", "some.toml, mutation 1, one: unknown key 'name', no key 'title'."),
        ("old =", "right =", "some.toml, mutation 1, one: unknown key 'right', no key 'old'."),
        ("[[mutation]]", "[[bug]]", "some.toml: tables bug, mutation. A catalogue has one kind."),
    ],
)
def test_what_is_wrong_is_named_with_its_file_and_entry(tmp_path, old, new, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_catalogue(written(tmp_path, TEXT.replace(old, new)), Mutation)
