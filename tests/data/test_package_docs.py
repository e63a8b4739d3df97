"""English from documentation strings, read in place and never imported."""

import sys

import pytest

from llm_jax.data.documents import Rejects
from llm_jax.data.sources import SourceConfig, parse_source_spec, read_documents
from llm_jax.errors import DataError

LONG = "This sentence is here to be long enough to count as prose; it has more than eighty letters."

MODULE = f'''"""First. {LONG}"""

import nothing_of_this_name

def f():
    r"""Second. {LONG}

        An indented part with a \\d in it.

    Back at the margin.
    """
    def inner():
        """Third. {LONG}"""

class C:
    """Short."""

    async def method(self):
        """Fourth. {LONG}"""

if nothing_of_this_name.FLAG:
    def g():
        """Fifth. {LONG}"""
else:
    def g():
        """Fifth. {LONG}"""
BAD_ESCAPE = "\\d"
'''


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A site-packages folder and an empty standard library."""
    files = {
        "site/alpha/__init__.py": MODULE,
        "site/alpha/tests/test_a.py": f'"""A test. {LONG}"""',
        "site/alpha/_vendor/copy.py": f'"""Vendored. {LONG}"""',
        "site/alpha/broken.py": f'"""Broken. {LONG}"""\ndef f(:',
        "site/alpha/latin.py": f'# coding: latin-1\n"""Caf\xe9. {LONG}"""',
        "site/alpha/nul.py": f'"""Nul. {LONG}"""\0',
        "site/beta.py": f'"""Beta. {LONG}"""\ndef f():\n    """First. {LONG}"""',
        "lib/os.py": f"'''Standard. {LONG}'''",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content.encode("latin-1"))
    paths = {"purelib": str(tmp_path / "site"), "platlib": str(tmp_path / "site")}
    monkeypatch.setattr("sysconfig.get_paths", lambda: paths | {"stdlib": str(tmp_path / "lib")})


def read(path="", **settings):
    source = SourceConfig(name="d", format="package-docs", path=path, **settings)
    return {d.id: d.text for d in read_documents(source, Rejects())}


def test_a_document_is_the_cleaned_docstrings_of_one_module(packages):
    assert read("alpha")["alpha"] == (
        f"First. {LONG}\n\nSecond. {LONG}\n\n    An indented part with a \\d in it.\n\n"
        f"Back at the margin.\n\nThird. {LONG}\n\nFourth. {LONG}\n\nFifth. {LONG}"
    )


def test_tests_copies_broken_files_and_repeats_are_left_out(packages):
    found = read()
    assert set(found) == {"alpha", "alpha.latin", "beta", "os"}
    assert found["alpha.latin"].startswith("Caf\xe9.")
    assert "\n".join(found.values()).count("First.") == 1  # stands in alpha and in beta


def test_the_order_is_the_same_every_time_and_packages_can_be_chosen(packages):
    assert list(read()) == list(read())
    assert set(read("beta, os")) == {"beta", "os"}
    assert len(read(max_bytes=1)) == 1
    with pytest.raises(DataError, match="no package 'alfa' is installed; did you mean 'alpha'"):
        read("alfa")


def test_installed_packages_give_real_prose_without_being_imported():
    before = set(sys.modules)
    source = parse_source_spec("package-docs:argparse,rich,turtle")
    documents = list(read_documents(source, Rejects()))
    text = "\n".join(d.text for d in documents)
    assert len(text) > 50_000
    assert "Command-line parsing library" in text
    assert not {"turtle", "rich.traceback"} & (set(sys.modules) - before)
