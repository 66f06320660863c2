"""Chapter 04's explorer and pictures: numbers against the package, what the view teaches, the rules of drawings."""

import math
import re
from itertools import combinations

import pytest
import torch
from drawn_text import misplaced
from pictures import check_picture
from test_views import _seconds, check_rules

from minidsv3.formats import E4M3, E5M2, fake_quantize, round_to
from minidsv3.views import format_explorer as explorer
from minidsv3.views import fp8 as draw
from minidsv3.views import fp8_training as training

STATES = {name: explorer.start_state(**changes) for name, changes in {
    "start": {}, "int8": {"format": "INT8"}, "e5m2 in tiles": {"format": "E5M2", "granularity": "1 x 128"},
    "e5m6": {"format": "E5M6", "outlier": 1e6}, "rows differ": {"outlier": 1.0, "spread": 5},
    "blocks": {"granularity": "128 x 128", "spread": 3, "scales": "powers of two"},
    "too small": {"outlier": 1.0, "shift": -14}, "too large": {"outlier": 1.0, "shift": 14},
    "int8, too large": {"format": "INT8", "outlier": 1.0, "shift": 14}}.items()}


def facts(**changes) -> dict:
    return explorer.explorer_facts(explorer.start_state(**changes))


def thousandths(**changes) -> int:
    return facts(**changes)["error in thousandths"]


# ---- numbers --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("state", [state for state in STATES.values() if not state["shift"]])
def test_the_error_is_that_of_what_comes_back(state):
    x, format = explorer.matrix(state), explorer.FORMATS[state["format"]]
    wrong = fake_quantize(x, format, explorer.GRANULARITY[state["granularity"]],
                          explorer.SCALES[state["scales"]]) - x
    x = x.clone()
    x[explorer.OUTLIER] = wrong[explorer.OUTLIER] = 0
    want = (wrong.norm(dim=1) / x.norm(dim=1)).mean().item()
    assert explorer.error(state) == pytest.approx(want, rel=1e-4)


def test_what_is_lost_and_what_is_too_large_by_counting():
    state = explorer.start_state(outlier=1.0, shift=-3)
    x = explorer.matrix(state)
    places = x / (x.abs().max() / 448 / 8)
    found = explorer.explorer_facts(state)
    assert found["saturated of 10,000"] == round(1e4 * (places.abs() > 448.5).float().mean().item()) > 1000
    small = explorer.start_state(outlier=1.0, shift=14)
    places = x / (x.abs().max() / 448 * 2 ** 14)
    lost = (round_to(places, E4M3) == 0) & (x != 0)
    assert explorer.explorer_facts(small)["lost of 10,000"] == round(1e4 * lost.float().mean().item()) > 1000
    assert found["numbers of the format"] == 126 and facts(format="INT8")["numbers of the format"] == 127


def test_scales_and_bits():
    assert [facts(granularity=name)["scales"] for name in explorer.GRANULARITY] == [1, 256, 4, 512]
    assert facts(format="E5M6")["bits a value"] == 12 and facts()["bits a value"] == 8


def test_what_the_view_teaches():
    """A scale moves nothing in E4M3; an outlier of 1,000 ruins int8 alone; only rows of their own help rows of
    different size; E5M2 is twice as coarse."""
    assert thousandths(outlier=1.0, shift=0) == thousandths(outlier=1.0, shift=5) == 26
    assert thousandths(outlier=1.0, shift=-3) > 500
    assert thousandths(outlier=1000.0) == 26 and thousandths(outlier=1000.0, format="INT8") > 900
    assert thousandths(outlier=1e5) > 100 > 30 > thousandths(outlier=1e5, granularity="1 x 128")
    differing = {name: thousandths(outlier=1.0, spread=4, granularity=name) for name in explorer.GRANULARITY}
    assert min(differing["one scale for all"], differing["128 x 128"]) > 300
    assert differing["one a row"] == differing["1 x 128"] == 26
    assert thousandths(format="E5M2", outlier=1.0) == pytest.approx(2 * thousandths(outlier=1.0), rel=0.05)


def test_a_control_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="size is no control of the format explorer"):
        explorer.start_state(size=3)


# ---- the drawing ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_explorer_keeps_the_rules(state):
    html = explorer.render_explorer(state)
    check_rules(html)
    assert not misplaced(html)
    assert explorer.render_explorer(dict(state)) == html
    assert min(_seconds(lambda: explorer.render_explorer(state)) for _ in range(5)) < 0.05


def test_explorer_states_differ():
    drawn = [explorer.render_explorer(state) for state in STATES.values()]
    assert all(one != other for one, other in combinations(drawn, 2))


def test_the_sentence_says_what_is_seen():
    html = explorer.render_explorer(explorer.start_state())
    assert "an outlier of 1,000. The others come back with an error of 2.6 %" in html
    assert "rows whose sizes differ by a factor of e^3" in explorer.render_explorer(explorer.start_state(spread=3))
    assert "all scales times 2^-2" in explorer.render_explorer(explorer.start_state(shift=-2))


def test_every_number_of_the_format_is_a_stroke():
    html = explorer.render_explorer(explorer.start_state(outlier=1.0))
    strokes = [float(x) for x in re.findall(rf'x1="([\d.]+)" y1="{explorer.BASE + 4}.0" .*?stroke-width="0.9"', html)]
    assert len(strokes) == 126
    assert max(strokes) == pytest.approx(explorer.at(math.log2(448)), abs=0.06)


# ---- pictures -------------------------------------------------------------------------------------------------------

WALKS = [[math.sin(step / (40 + i)) * 0.2 * i for step in range(600)] for i in range(8)]
POINTS = [(10.0 ** n, 2.0 + n) for n in range(4)]
PICTURES = {
    "number line": lambda: draw.number_line({"as it is": torch.randn(500).tolist(), "small": [0.0, 1e-5, 3e-3]}, E4M3),
    "number line, e5m2": lambda: draw.number_line({"as it is": torch.randn(500).tolist()}, E5M2),
    "products": draw.three_products,
    "errors": lambda: draw.error_curves({"outlier": ("size", {"E4M3": POINTS, "INT8": POINTS[1:]}),
                                         "rows": ("sigma", {"E4M3": [(1, 2.6), (2, 3.0)]})}),
    "bytes": lambda: draw.stacked_bytes({"BF16": {"a": 2.0, "b": 3.0, "c": 1.0, "d": 1.0, "e": 4.0}, "FP8": {"a": 1.0}},
                                        "KB a token"),
    "training": lambda: training.beside_bf16({"BF16": [3.0, 2.0, 1.5], "FP8": [3.0, 2.1, 1.4]},
                                             {"FP8": [0.0, 0.3, -0.2], "control": [0.0, 0.1, 0.2]}, 0.25, 1000),
    "seeds": lambda: training.one_by_one({"FP8 as in the report": WALKS[:5]}, WALKS[5:], 0.25, 1024),
    "ways": lambda: training.one_by_one({f"one scale a sum, no. {i}": [walk] for i, walk in enumerate(WALKS[:5])}
                                        | {"diverged": [WALKS[5][:20]]}, WALKS[6:7], 0.25, 16_384),
    "explorer": lambda: explorer.format_explorer_states({name: STATES[name] for name in ("start", "int8", "blocks")}),
}


@pytest.mark.parametrize("make", PICTURES.values(), ids=PICTURES)
def test_pictures_keep_the_rules(make):
    check_picture(make)


def test_what_becomes_zero_is_said():
    drawn = draw.number_line({"some": [0.0, 2.0 ** -11, 2.0 ** -10, 1.0, -1.0]}, E4M3)
    assert drawn.axes[0].get_title(loc="left") == "some: 50.0 % become 0"


def test_tiles_lie_along_the_sum():
    """128 along columns of the left operand and along rows of the right one, in all three products."""
    for _, _, (*_, left), (*_, right), _ in draw.PRODUCTS:
        assert draw.TILED[left][1] == 1.0 and draw.TILED[right][0] == 1.0


@pytest.mark.parametrize("value, words", [(8.0, "8"), (0.25, "0.25"), (2.0 ** -9, "2\u207b\u2079")])
def test_powers_are_written_short(value, words):
    assert draw.power(value) == words


# ---- training -------------------------------------------------------------------------------------------------------

def distances(*lines: list[float]) -> training.Picture:
    return training.one_by_one({f"way {i}": [line] for i, line in enumerate(lines)}, [[0.1] * 8], 0.25, 1000)


def words_of(axes) -> list[str]:
    return [text.get_text().strip() for text in axes.texts]


def test_lines_stand_over_their_tokens_and_bounds_over_the_last_half():
    (axes,) = distances([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, -0.7]).axes
    control, line, zero = axes.lines
    assert line.get_xdata()[0] == 1000 and line.get_xdata()[-1] == 8000 and line.get_ydata()[-1] == -0.7
    assert control.get_linestyle() == "--" and line.get_linestyle() == "-"
    bounds = [segment.tolist() for segment in axes.collections[0].get_segments()]
    assert bounds == [[[4000, -0.25], [8000, -0.25]], [[4000, 0.25], [8000, 0.25]]]
    assert words_of(axes) == ["+0.25 %", "\u22120.25 %"]


@pytest.mark.parametrize("line, most", [
    ([0.0] * 7 + [-0.7], 0.77), ([9.0, 9.0] + [0.7] * 6, 0.77), ([0.0] * 8, 0.375), ([0.0] * 7 + [50.0], 2.0)])
def test_the_axis_shows_what_comes_after_the_first_quarter(line, most):
    """Neither the first steps nor a run that flies away hide the others; small distances are not blown up."""
    (axes,) = distances(line).axes
    assert axes.get_ylim() == pytest.approx((-most, most))


@pytest.mark.parametrize("steps, side", [(2, "left"), (7, "right")])
def test_a_run_that_diverged_has_a_cross_where_it_ended(steps, side):
    whole, short = distances([0.2] * 8, [0.2] * steps).axes
    (cross,) = (line for line in short.lines if line.get_marker() == "X")
    (text,) = (text for text in short.texts if "diverged" in text.get_text())
    assert cross.get_xdata() == [1000 * steps] and text.get_ha() == side
    assert "diverged" not in words_of(whole) and short.get_xlim() == (1000, 8000)


def test_every_column_has_its_tokens_and_the_last_one_says_the_bounds():
    """Five panels in rows of three: the sixth is empty."""
    panels = distances(*[[0.1] * 8] * 5).axes[:5]
    assert [bool(axes.get_xlabel()) for axes in panels] == [False, False, True, True, True]
    assert [len(words_of(axes)) for axes in panels] == [0, 0, 2, 0, 0]


def test_of_a_long_line_some_points_are_drawn():
    (axes,) = training.one_by_one({"way": [[0.1] * 1832]}, [[0.1] * 1832], 0.25, 1).axes
    assert 150 <= len(axes.lines[0].get_xdata()) < 165
