"""Every view of the course, made by the cells of its notebook, without a browser: each control moves the drawing."""

import contextlib
import importlib
import inspect
from collections.abc import Callable, Iterator
from pkgutil import iter_modules

import ipywidgets
import pytest
from drawn_text import misplaced
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_output
from notebooks import FOLDER
from view_cells import code_cells, needed, shown_name, views_of, widget_classes

from minidsv3 import views
from minidsv3.views import svg
from minidsv3.views.explore import View, choice, explore, log_slider, slider

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
VIEWS = {f"{path.stem}-{view.name}": view for path in NOTEBOOKS for view in views_of(path)}


@pytest.fixture(scope="module", params=VIEWS.values(), ids=VIEWS)
def view(request) -> object:
    """What the cells of a notebook leave in its view's variable."""
    left = {}
    with contextlib.chdir(FOLDER):
        for cell in request.param.cells:
            exec(cell.source, left)
    return left[request.param.name]


def neighbours(control: ipywidgets.Widget) -> list:
    """The values one step away from the one that the control has."""
    if isinstance(control, ipywidgets.Text):
        return [control.value + "x"]
    if isinstance(control, ipywidgets.Checkbox):
        return [not control.value]
    if values := listed(control):
        at = values.index(control.value)
        return values[max(at - 1, 0):at] + values[at + 1:at + 2]
    steps = (control.value - control.step, control.value + control.step)
    return [value for value in steps if control.min <= value <= control.max]


def ends(control: ipywidgets.Widget) -> list:
    """The first and the last value of a control that has them."""
    if values := listed(control):
        return [values[0], values[-1]]
    return [control.min, control.max] if hasattr(control, "min") else []


def listed(control: ipywidgets.Widget) -> list:
    """The values of a drop-down list or of a slider over a list, which have them alone or as (label, value)."""
    return [option[1] if isinstance(option, tuple) else option for option in getattr(control, "options", ())]


def drawings(view: View, values: Callable[[ipywidgets.Widget], list]) -> Iterator[tuple[str, str]]:
    """One control at a time moved from where the view opens: what was moved, and the drawing then."""
    start = view.state
    for name, control in view.controls.items():
        for value in values(control):
            control.value = value
            yield f"{name} from {start[name]!r} to {value!r}", view.drawing.value
            view.set(**start)


def moves_without_effect(view: View) -> list[str]:
    """Moves of one control by one step that leave the drawing as it was."""
    drawn = view.drawing.value
    return [move for move, drawing in drawings(view, neighbours) if drawing == drawn]


def other_boxes(cells: list[NotebookNode]) -> list[str]:
    """Boxes of widgets among stored outputs that are no View: nothing would test them."""
    return [name for cell in cells for name in widget_classes(cell) if name != View.__name__]


def factories() -> list[str]:
    """Names of the functions of `minidsv3.views` that say they return a View."""
    modules = [importlib.import_module(f"{views.__name__}.{module.name}") for module in iter_modules(views.__path__)]
    found = {name for module in modules for name, function in vars(module).items()
             if inspect.isfunction(function) and function.__annotations__.get("return") in (View, View.__name__)}
    return sorted(found - {explore.__name__})


def test_each_control_moves_the_drawing(view):
    assert isinstance(view, View) and view.controls
    assert not moves_without_effect(view)


def test_words_stay_in_the_drawing_and_apart(view):
    """Where the view opens, with each control at either end, and with all of them there."""
    start = view.state
    assert not misplaced(view.drawing.value)
    assert not [(move, faults) for move, drawing in drawings(view, ends) if (faults := misplaced(drawing))]
    for end in (0, -1):
        view.set(**{name: ends(control)[end] for name, control in view.controls.items() if ends(control)})
        assert not misplaced(view.drawing.value)
        view.set(**start)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_each_notebook_has_a_view_and_no_other_box(path):
    assert views_of(path)
    assert not other_boxes(code_cells(path))


def test_each_view_is_in_a_notebook():
    sources = "\n".join(cell.source for view in VIEWS.values() for cell in view.cells)
    assert factories() and not [name for name in factories() if f"{name}(" not in sources]


# ---- the tests can fail ---------------------------------------------------------------------------------------------

def half_deaf(**controls: ipywidgets.Widget) -> View:
    """A view that draws `a` and never `b`."""
    return explore(lambda state: f"<p>{state['a']}</p>", dict, **controls)


@pytest.mark.parametrize("b, moves", [
    (slider("b", 3, 0, 9), ["b from 3 to 2", "b from 3 to 4"]),
    (slider("b", 0, 0, 9), ["b from 0 to 1"]),
    (log_slider("b", 10.0, 1, 2), ["b from 10.0 to 11.2"]),
    (choice("b", "x", ["x", "y"]), ["b from 'x' to 'y'"]),
    (ipywidgets.Checkbox(False, description="b"), ["b from False to True"]),
    (ipywidgets.Text("t", description="b"), ["b from 't' to 'tx'"])], ids=lambda value: type(value).__name__)
def test_a_control_without_effect_is_seen(b, moves):
    assert moves_without_effect(half_deaf(a=slider("a", 1, 0, 9), b=b)) == moves


@pytest.mark.parametrize("parts, faults", [
    ([svg.text(10, 30, "ten letter"), svg.text(110, 30, "apart"), svg.text(10, 46, "below")], []),
    ([svg.text(10, 30, "ten letter"), svg.text(68, 30, "near")], ["'ten letter' lies on 'near'"]),
    ([svg.text(10, 30, "ten letter"), svg.text(50, 40, "below", 16, "middle")], ["'ten letter' lies on 'below'"]),
    ([svg.text(880, 30, "outside")], ["'outside' leaves the drawing"]),
    ([svg.text(899, 30, "inside", anchor="end"), svg.text(9, 30, "outside", 14, "end")],
     ["'outside' leaves the drawing"]),
    ([svg.text(10, 99, "inside"), svg.text(10, 8, "outside")], ["'outside' leaves the drawing"])])
def test_misplaced_words_are_seen(parts, faults):
    assert misplaced("<p>Words.</p>" + svg.page("words", 100, parts)) == faults


def shows(plain_text: str, source: str = "dial") -> NotebookNode:
    return new_code_cell(source, outputs=[new_output("execute_result", data={"text/plain": plain_text})])


def test_boxes_that_are_no_view_are_seen():
    assert other_boxes([shows("VBox(children=(IntSlider("), shows("View(children=(Dropdown("), shows("3")]) == ["VBox"]


def test_a_view_needs_the_cells_that_define_its_names():
    sources = ["import a", "b = a.f()", "guess = None", "b = 5", "def g(x):\n    guess = x\n    return b + guess",
               "c = a.slow()", "view = g(1)\nview"]
    kept = needed([new_code_cell(source) for source in sources], 6)
    assert [cell.source for cell in kept] == [sources[i] for i in (3, 4, 6)]


def test_a_view_without_a_name_is_refused():
    assert shown_name("dial = f()\ndial") == "dial"
    with pytest.raises(ValueError, match="must end with the view's name"):
        shown_name("f()")
