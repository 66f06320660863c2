"""The table of symbols is true: every name exists, every size is that of nano and of the 671 B model."""

import re
from dataclasses import replace

import pytest
import torch

from minidsv3 import ModelConfig, Transformer, course, formats
from minidsv3.attention import LatentCache
from minidsv3.course.symbols import SYMBOLS, Symbol
from minidsv3.kernels import Routing, e5m6, quantize
from minidsv3.optim import Recipe
from minidsv3.parallel import simulate, stage


@pytest.fixture(scope="module", params=["full", "nano"])
def preset(request):
    with torch.device("meta"):
        return request.param, Transformer(ModelConfig.preset(request.param)), Recipe.preset(request.param)


def fault(row: Symbol, preset: tuple) -> str | None:
    name, model, recipe = preset
    found, said = row.find(model, recipe), getattr(row, name)
    found = tuple(found.shape) if isinstance(found, torch.Tensor) else found
    return None if found == said else f"{row.report} is {found} in {name}, not {said}"


@pytest.mark.parametrize("row", SYMBOLS, ids=lambda row: row.report)
def test_size(row, preset):
    assert fault(row, preset) is None


@pytest.mark.parametrize("row", SYMBOLS, ids=lambda row: row.report)
def test_a_wrong_size_is_seen(row, preset):
    wrong = row.full[:-1] + (row.full[-1] + 1,) if isinstance(row.full, tuple) else row.full + 1
    assert fault(replace(row, full=wrong, nano=wrong), preset)


@pytest.mark.parametrize("row", SYMBOLS, ids=lambda row: row.report)
def test_name_exists(row, preset):
    """The name in backticks is a module, a buffer, a field or a method of what the row is about."""
    name = re.search(r"`([\w.]+)`", row.code)[1]
    owners = {"LatentCache": LatentCache, "Routing": Routing, "Recipe": Recipe, "quantize": quantize, "e5m6": e5m6,
              "formats": formats, "simulate": simulate, "stage": stage}
    owner, _, attribute = name.partition(".")
    if owner in owners:
        assert hasattr(owners[owner], attribute)
    elif name != "x":
        stored = any(f".{name}" in key for key in preset[1].state_dict())
        assert stored or hasattr(preset[1].config, name)


def test_rows_of_a_chapter():
    shown = course.symbols("03")._repr_markdown_()
    assert "`eh_proj`" in shown and "7168 x 14336" in shown and "W^UK" not in shown
    assert len(course.symbols().rows) == len(SYMBOLS) == len({row.report for row in SYMBOLS})
    with pytest.raises(ValueError, match="chapters are 00, 01, 02, 03"):
        course.symbols("99")
