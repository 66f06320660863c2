"""The one wrapper of all interactive views: controls above, a drawing made from their values below.

A view is two pure functions: `render(state) -> str` (a sentence and an SVG) and `facts(state) -> dict` of plain
numbers. Everything they show can be tested without a browser, and the cell after a view moves its controls in code.
"""

import math
from collections.abc import Callable
from html import escape

import ipywidgets
from traitlets import TraitError

LABEL = {"description_width": "250px"}
WIDE = {"width": "640px"}


class View(ipywidgets.VBox):
    """Controls with visible descriptions and the drawing they govern. Made by `explore`."""

    def __init__(self, render: Callable[[dict], str], facts: Callable[[dict], dict],
                 controls: dict[str, ipywidgets.Widget]):
        self.controls, self._render, self._facts = controls, render, facts
        self.drawing = ipywidgets.HTML()
        super().__init__([*controls.values(), self.drawing])
        for control in controls.values():
            control.observe(self._draw, names="value")
        self._draw()

    @property
    def state(self) -> dict:
        """The value of every control by name."""
        return {name: control.value for name, control in self.controls.items()}

    def set(self, **values) -> "View":
        """Move controls in code. Raises ValueError for a control that does not exist or a value out of its range."""
        for name, value in values.items():
            if name not in self.controls:
                raise ValueError(f"this view has no control {name!r}; its controls are {', '.join(self.controls)}")
            try:
                self.controls[name].value = value
            except TraitError:
                raise ValueError(f"{name} cannot be {value!r}: its control has no such step") from None
            if self.controls[name].value != value:
                raise ValueError(f"{name} cannot be {value!r}; the control went to {self.controls[name].value!r}")
        return self

    def facts(self) -> dict:
        """The numbers behind the drawing."""
        return self._facts(self.state)

    def table(self) -> str:
        """The same numbers as an HTML table, for reading aloud or copying."""
        rows = "".join(f"<tr><th scope='row'>{escape(name)}</th><td>{escape(_written(value))}</td></tr>"
                       for name, value in self.facts().items())
        return f"<table>{rows}</table>"

    def _draw(self, _change=None) -> None:
        self.drawing.value = self._render(self.state)


def _written(value: int | str | tuple) -> str:
    """A fact as words: whole numbers with commas, several of them in a row."""
    if isinstance(value, tuple):
        return ", ".join(map(_written, value))
    return value if isinstance(value, str) else f"{value:,}"


def explore(render: Callable[[dict], str], facts: Callable[[dict], dict], **controls: ipywidgets.Widget) -> View:
    """A view of `render`. `controls`: a `slider`, `log_slider` or `choice` for each key of its state.

    Raises ValueError for a control without a description.
    """
    for name, control in controls.items():
        if not control.description:
            raise ValueError(f"control {name!r} has no description; a reader must see what it moves and in which unit")
    return View(render, facts, controls)


def slider(description: str, value: int, low: int, high: int, step: int = 1) -> ipywidgets.IntSlider:
    return ipywidgets.IntSlider(value, low, high, step, description=description, style=LABEL, layout=WIDE)


def log_slider(description: str, value: float, low: float, high: float) -> ipywidgets.SelectionSlider:
    """A slider from 10^low to 10^high, twenty steps a power of ten, each rounded to three digits.

    The step nearest to `value` is `value` itself. FloatLogSlider keeps to its own grid as soon as a browser draws it,
    and the view would open with another number than the one it was given.
    """
    steps = [float(f"{10 ** (low + i / 20):.3g}") for i in range(round(20 * (high - low)) + 1)]
    nearest = min(range(len(steps)), key=lambda i: abs(math.log(steps[i] / value)))
    steps[nearest] = value
    return ipywidgets.SelectionSlider(options=[(f"{step:,.10g}", step) for step in steps], value=value,
                                      description=description, style=LABEL, layout=WIDE)


def doubling(description: str, value: int, low: int, high: int) -> ipywidgets.SelectionSlider:
    """A slider over low, 2 low, 4 low .. high; `value` is one of them."""
    steps = [low << i for i in range((high // low).bit_length())]
    return ipywidgets.SelectionSlider(options=[(f"{step:,}", step) for step in steps], value=value,
                                      description=description, style=LABEL, layout=WIDE)


def choice(description: str, value: str, options: list[str]) -> ipywidgets.Dropdown:
    return ipywidgets.Dropdown(options=options, value=value, description=description, style=LABEL, layout=WIDE)


def text_field(description: str, value: str) -> ipywidgets.Text:
    """A line of text; the drawing follows when the reader presses Enter or leaves the field."""
    return ipywidgets.Text(value=value, description=description, style=LABEL, layout=WIDE, continuous_update=False)
