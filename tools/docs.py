"""Writes the generated pages of docs/ from the course's tables: the glossary, and the way from the report to the code.

    python tools/docs.py
"""

from pathlib import Path

from minidsv3.course.glossary import GLOSSARY
from minidsv3.course.report import REPORT
from minidsv3.course.symbols import CLASHES, symbols

ROOT = Path(__file__).parents[1]
GENERATED = "<!-- Written by tools/docs.py (make docs): change the table there is, not this page. -->"


def glossary() -> str:
    """Terms in English and Chinese, the letters of the report, and those letters that mean two things."""
    terms = [[f"**{term.english}**", term.chinese, term.sentence, term.section] for term in GLOSSARY]
    clashes = [[letter, meaning] for letter, meaning in CLASHES.items()]
    return page("Glossary · 术语表", "Terms of the course, with their section of the report (arXiv 2412.19437).",
                table(["term", "中文", "in one sentence", "section"], terms),
                "## Symbols", symbols()._repr_markdown_(),
                "## Letters with more than one meaning", table(["letter", "means"], clashes))


def report_to_course() -> str:
    """Every part of the report that is built: where, and which test proves it."""
    rows = [[row.report, row.idea, link(source_of(row.code), row.code),
             link(f"tests/{row.test.partition('::')[0]}", row.test.partition("::")[2])] for row in REPORT]
    return page("From the report to the code", "Sections, equations and tables are those of arXiv 2412.19437.",
                table(["report", "idea", "code", "test"], rows))


def source_of(code: str) -> str:
    """The file of a dotted name under minidsv3; a kernel's is named, or has the operation's name."""
    module, name, *_ = code.split(".")
    if module == "kernels":
        return f"kernels/{name.removesuffix('_reference')}.py"
    return f"minidsv3/parallel/{name}.py" if module == "parallel" else f"minidsv3/{module}.py"


def link(path: str, text: str) -> str:
    return f"[`{text}`](../{path})"


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def page(title: str, *parts: str) -> str:
    return "\n\n".join([f"# {title}", GENERATED, *parts]) + "\n"


PAGES = {"docs/glossary.md": glossary, "docs/report_to_course.md": report_to_course}


if __name__ == "__main__":
    for path, write in PAGES.items():
        (ROOT / path).write_text(write(), encoding="utf-8")
        print(path)
