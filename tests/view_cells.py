"""The views of a stored notebook, and the few cells that each of them needs: found in the cells, not listed here."""

import ast
import re
import symtable
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import nbformat
from nbformat import NotebookNode

WIDGET = re.compile(r"(\w+)\(children=")            # how a box of widgets is stored as plain text


class ViewCells(NamedTuple):
    """`cells` end with the one that shows the view; `name` is the variable that holds it."""

    name: str
    cells: list[NotebookNode]


def views_of(path: Path) -> list[ViewCells]:
    """Every view of a stored notebook, in order."""
    cells = code_cells(path)
    return [ViewCells(shown_name(cell.source), needed(cells, at))
            for at, cell in enumerate(cells) if widget_classes(cell)]


def code_cells(path: Path) -> list[NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def widget_classes(cell: NotebookNode) -> list[str]:
    """The classes of the boxes that a cell showed when it was stored."""
    texts = [output.data.get("text/plain", "") for output in cell.outputs if "data" in output]
    return [found[1] for text in texts if (found := WIDGET.match(text))]


def shown_name(source: str) -> str:
    """The variable on the last line. Raises ValueError if the cell shows something without a name."""
    shown = ast.parse(source).body[-1]
    if not (isinstance(shown, ast.Expr) and isinstance(shown.value, ast.Name)):
        raise ValueError(f"a cell that shows a view must end with the view's name, for the cells after it:\n{source}")
    return shown.value.id


def needed(cells: list[NotebookNode], last: int) -> list[NotebookNode]:
    """Cell `last` and those before it that define a name which it needs, itself or through another needed cell."""
    kept, wanted = [], set()
    for cell in reversed(cells[:last + 1]):
        defined, used = names(cell.source)
        if not kept or defined & wanted:
            kept.insert(0, cell)
            wanted = wanted - defined | used
    return kept


def names(source: str) -> tuple[set[str], set[str]]:
    """What a cell defines, and what it or a function in it takes from outside."""
    top = symtable.symtable(source, "cell", "exec")
    defined = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    used = {symbol.get_name() for scope in scopes(top) for symbol in scope.get_symbols()
            if symbol.is_referenced() and (scope is top or symbol.is_global())}
    return defined, used


def scopes(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    yield table
    for child in table.get_children():
        yield from scopes(child)
