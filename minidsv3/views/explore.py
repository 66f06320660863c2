"""The one wrapper of all interactive views: controls above, a drawing made from their values below.

A view is two pure functions: `render(state) -> str` (a sentence and an SVG) and `facts(state) -> dict` of plain
numbers. Everything they show can be tested without a browser, and the cell after a view moves its controls in code.
"""

from collections.abc import Callable
from html import escape

import ipywidgets

LABEL = {"description_width": "220px"}
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
            self.controls[name].value = value
            if self.controls[name].value != value:
                raise ValueError(f"{name} cannot be {value!r}; the control went to {self.controls[name].value!r}")
        return self

    def facts(self) -> dict:
        """The numbers behind the drawing."""
        return self._facts(self.state)

    def table(self) -> str:
        """The same numbers as an HTML table, for reading aloud or copying."""
        rows = "".join(f"<tr><th scope='row'>{escape(name)}</th><td>{escape(f'{value:,}')}</td></tr>"
                       for name, value in self.facts().items())
        return f"<table>{rows}</table>"

    def _draw(self, _change=None) -> None:
        self.drawing.value = self._render(self.state)


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


def log_slider(description: str, value: float, low: float, high: float) -> ipywidgets.FloatLogSlider:
    """A slider over powers of ten, from 10^low to 10^high."""
    return ipywidgets.FloatLogSlider(value, min=low, max=high, step=0.05, readout_format=".4g",
                                     description=description, style=LABEL, layout=WIDE)


def choice(description: str, value: str, options: list[str]) -> ipywidgets.Dropdown:
    return ipywidgets.Dropdown(options=options, value=value, description=description, style=LABEL, layout=WIDE)
