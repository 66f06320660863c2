"""Generated pages are current, and what they point to exists."""

import ast
from pkgutil import resolve_name

import docs
import pytest

from minidsv3.course.glossary import GLOSSARY
from minidsv3.course.report import REPORT, Row


@pytest.mark.parametrize("path", docs.PAGES)
def test_page_is_current(path):
    assert (docs.ROOT / path).read_text(encoding="utf-8") == docs.PAGES[path](), "run `make docs`"


def faults(row: Row) -> list[str]:
    """Sentences on what a row names and the repository does not have."""
    found = []
    try:
        resolve_name(f"minidsv3.{row.code}")
    except (ImportError, AttributeError):
        found.append(f"there is no {row.code}")
    if not (docs.ROOT / docs.source_of(row.code)).is_file():
        found.append(f"there is no {docs.source_of(row.code)}")
    file, _, test = row.test.partition("::")
    path = docs.ROOT / "tests" / file
    if not path.is_file() or test not in functions(path.read_text(encoding="utf-8")):
        found.append(f"there is no test {row.test}")
    return found


def functions(source: str) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", REPORT, ids=lambda row: row.code)
def test_row_points_to_code_and_test(row):
    assert not faults(row)


@pytest.mark.parametrize("wrong", [{"code": "mtp.NoSuchModule"}, {"test": "test_docs.py::test_no_such_test"},
                                   {"test": "test_none.py::test_page_is_current"}])
def test_a_row_that_points_nowhere_is_seen(wrong):
    assert faults(REPORT[0]._replace(**wrong))


def test_glossary_is_sorted_and_complete():
    names = [term.english.lower() for term in GLOSSARY]
    assert names == sorted(names) and len(set(names)) == len(names)
    assert all(term.chinese and term.sentence.endswith(".") and "|" not in term.sentence for term in GLOSSARY)
