"""Views without a browser: numbers against the cost sheet, and the rules that every drawing keeps."""

import re
import struct
import time
import xml.etree.ElementTree as ElementTree
from itertools import combinations, count

import pytest
from pictures import check_picture

from minidsv3 import cost
from minidsv3.config import ModelConfig
from minidsv3.views import model_map as maps
from minidsv3.views import overview, price_dial, style, svg
from minidsv3.views.explore import explore, log_slider, slider

FULL, NANO = ModelConfig.preset("full"), ModelConfig.preset("nano")
STATES = {
    "full": price_dial.dial_state("full"),
    "experts x 2": price_dial.dial_state("full", experts=512),
    "top-k x 2": price_dial.dial_state("full", top_k=16),
    "nano": price_dial.dial_state("nano"),
}


# ---- style ----------------------------------------------------------------------------------------------------------

def test_contrast_of_black_and_white():
    assert style.contrast("#000000", "#FFFFFF") == pytest.approx(21)
    assert style.contrast("#777777", "#FFFFFF") < 4.5 < style.contrast("#767676", "#FFFFFF")


@pytest.mark.parametrize("fills", [style.PARTS, style.PASSES, style.CACHE], ids=["parts", "passes", "cache"])
def test_fills_used_together_differ_without_colour(fills):
    for (first, a), (second, b) in combinations(fills.items(), 2):
        assert a.mark != b.mark or abs(style.luminance(a.colour) - style.luminance(b.colour)) > 0.15, (first, second)


def test_parts_would_not_differ_in_grey_alone():
    """Mutation: without their marks the parts of a model could not be told apart in print."""
    greys = [style.luminance(fill.colour) for fill in style.PARTS.values()]
    assert any(abs(a - b) <= 0.15 for a, b in combinations(greys, 2))


@pytest.mark.parametrize("number, words", [
    (671_026_419_200, "671 B"), (37_552_282_624, "37.6 B"), (999_960, "1.00 M"), (12_149_008, "12.1 M"),
    (70_272, "70.3 K"), (836, "836"), (0, "0"), (1.327e12, "1.33 T")])
def test_human_numbers(number, words):
    assert style.human(number) == words


def test_human_numbers_with_more_digits():
    assert style.human(187_107_328, digits=4) == "187.1 M"


# ---- the map --------------------------------------------------------------------------------------------------------

def size_of(png: bytes) -> tuple[int, int]:
    return struct.unpack(">II", png[16:24])


def test_map_prints_what_cost_counts():
    texts = {name: " ".join(box.lines) for name, box in maps.boxes(FULL).items()}
    assert "stored 11.4 B active 11.4 B" in texts["mla"]
    assert "stored 656 B active 23.0 B" in texts["experts"]
    assert "256 x 7,168" in texts["router"]
    assert "stored 11.6 B, active 688 M" in texts["mtp"]
    assert "latent 64 + rope key 16" in maps.strip(NANO)["cache"][1]


def test_map_has_one_layout():
    """Same size, and each text in the same place, whatever is marked or ticked."""
    plain, marked = maps.model_map(FULL), maps.model_map(FULL, "mla", ("router",))
    assert size_of(plain.png()) == size_of(marked.png()) == (1200, 640)

    def positions(picture):
        return {(text.get_text(), text.get_position()) for text in picture.axes[0].texts if text.get_text()}

    assert positions(marked) - positions(plain) == {entry for entry in positions(marked) if entry[0] == "you are here"}
    assert positions(plain) <= positions(marked)


@pytest.mark.parametrize("config", [FULL, ModelConfig.preset("mini"), NANO, NANO.replace(num_nextn_predict_layers=0)])
def test_map_texts_stay_inside_their_boxes(config):
    picture = maps.model_map(config)
    picture.png()
    renderer = picture.canvas.get_renderer()
    extents = {(text.get_text(), text.get_position()[0]): text.get_window_extent(renderer)
               for text in picture.axes[0].texts}
    for name, box in maps.boxes(config).items():
        left, bottom, width, height = box.place
        for words in box.lines:
            extent = extents[words, left + width / 2]
            assert left <= extent.x0 and extent.x1 <= left + width, (name, words)
            assert bottom <= extent.y0 and extent.y1 <= bottom + height, (name, words)


def test_map_names_the_box_it_does_not_have():
    with pytest.raises(ValueError, match="'attention' is not on the map"):
        maps.model_map(FULL, "attention")


# ---- the price dial -------------------------------------------------------------------------------------------------

def test_dial_at_full_size_is_the_cost_sheet():
    facts = price_dial.price_dial_facts(STATES["full"])
    assert facts["stored"] == 671_026_404_352
    assert facts["active"] == 37_552_282_624
    assert facts["flops_per_token"] == cost.training_flops(FULL).main
    assert facts["dollars"] == pytest.approx(2 * facts["hours"], abs=2)
    assert all(isinstance(value, int) for value in facts.values())


def test_what_the_dial_teaches():
    full, experts, top_k = (price_dial.price_dial_facts(STATES[name]) for name in ("full", "experts x 2", "top-k x 2"))
    assert experts["stored"] > 1.9 * full["stored"] and experts["dollars"] < 1.01 * full["dollars"]
    assert top_k["stored"] == full["stored"] and top_k["dollars"] > 1.4 * full["dollars"]


def test_shares_are_those_of_the_chapter():
    stored = price_dial.shares(cost.parameters(FULL))
    active = price_dial.shares(cost.active_parameters(FULL))
    assert sum(stored.values()) == pytest.approx(1) and sum(active.values()) == pytest.approx(1)
    assert [f"{stored['routed experts']:.1%}", f"{active['routed experts']:.1%}"] == ["97.4%", "54.4%"]
    assert [f"{stored['attention']:.1%}", f"{active['attention']:.1%}"] == ["1.7%", "30.4%"]


def test_dial_refuses_a_slider_it_does_not_have():
    with pytest.raises(ValueError, match="heads is no slider"):
        price_dial.dial_state("full", heads=3)


def check_rules(html: str) -> None:
    """The rules for every view: a sentence, then one SVG that a screen reader and a dark theme can live with."""
    sentence, drawing = re.fullmatch(r"<p>(.+?)</p>(<svg.*</svg>)", html, re.S).groups()
    assert sentence.endswith(".")
    root = ElementTree.fromstring(drawing)
    tag = "{http://www.w3.org/2000/svg}"
    assert root.get("role") == "img" and root.get("viewBox").startswith("0 0 900 ")
    assert root[0].tag == tag + "title" and root[0].text
    assert root[1].tag == tag + "rect" and root[1].get("fill") == "#FFFFFF"
    for element in root.iter():
        assert element.get("id") is None and element.get("tabindex") is None
        assert element.tag not in {tag + name for name in ("a", "script", "pattern", "foreignObject")}
    sizes = [float(element.get("font-size")) for element in root.iter(tag + "text")]
    assert sizes and min(sizes) >= svg.SMALLEST_TEXT
    assert "-0.0" not in html and "nan" not in drawing.lower().replace("nano", "")
    assert len(html.encode()) < 60_000


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_dial_keeps_the_rules(state):
    check_rules(price_dial.render_price_dial(state))
    assert price_dial.render_price_dial(state) == price_dial.render_price_dial(dict(state))
    fastest = min(_seconds(lambda: price_dial.render_price_dial(state)) for _ in range(5))
    assert fastest < 0.05


def _seconds(work) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


@pytest.mark.parametrize("spoil", [
    lambda html: html.replace('role="img"', ""), lambda html: html.replace('font-size="13"', 'font-size="9"'),
    lambda html: html.replace("<rect", '<rect id="a"', 1), lambda html: html.replace("<p>", "<p hidden>"),
    lambda html: html.replace("900", "700"), lambda html: html + " " * 60_000])
def test_the_rules_can_be_broken(spoil):
    """Mutations of a good drawing: each must be refused."""
    with pytest.raises((AssertionError, AttributeError)):
        check_rules(spoil(price_dial.render_price_dial(STATES["full"])))


def test_svg_escapes_text_and_refuses_small_print():
    assert "&lt;b&gt; &amp; &quot;" in svg.text(0, 0, '<b> & "')
    with pytest.raises(ValueError, match="too small"):
        svg.text(0, 0, "words", size=11)


@pytest.mark.parametrize("mark", ["|", "-", ".", "/", "\\", "x"])
def test_hatches_stay_inside_their_rectangle(mark):
    drawn = svg.rectangle(10, 20, 50, 30, style.Fill(style.WHITE, mark))
    lines = re.findall(r'x1="(.+?)" y1="(.+?)" x2="(.+?)" y2="(.+?)"', drawn)
    assert len(lines) >= 3
    for x1, y1, x2, y2 in lines:
        assert 10 <= min(float(x1), float(x2)) and max(float(x1), float(x2)) <= 60
        assert 20 <= min(float(y1), float(y2)) and max(float(y1), float(y2)) <= 50


# ---- the wrapper ----------------------------------------------------------------------------------------------------

def test_dial_moves_in_code():
    view = price_dial.price_dial()
    before, drawn = view.facts(), view.drawing.value
    after = view.set(experts=512).facts()
    assert after["stored"] > 1.9 * before["stored"]
    assert view.drawing.value != drawn and view.drawing.value == price_dial.render_price_dial(view.state)
    assert f"<td>{after['stored']:,}</td>" in view.table()


def test_preset_moves_all_sliders():
    view = price_dial.price_dial().set(preset="nano")
    assert view.state == price_dial.dial_state("nano")
    assert view.facts() == price_dial.price_dial_facts(price_dial.dial_state("nano"))


def test_log_slider_holds_its_value_and_round_steps():
    control = log_slider("tokens", 14_800.0, 1.5, 4.5)
    labels, steps = zip(*control.options)
    assert control.value == 14_800.0 and control.label == "14,800"
    assert (labels[0], labels[10], labels[-1]) == ("31.6", "100", "31,600") and len(steps) == 61
    assert all(1.05 < after / before < 1.19 for before, after in zip(steps, steps[1:]))


def test_controls_are_visible_and_wrong_moves_are_refused():
    view = price_dial.price_dial()
    assert all(control.description for control in view.controls.values())
    with pytest.raises(ValueError, match="no control 'heads'"):
        view.set(heads=3)
    with pytest.raises(ValueError, match="experts cannot be 9000"):
        view.set(experts=9000)
    with pytest.raises(ValueError, match="billion_tokens cannot be 9.0"):
        view.set(billion_tokens=9.0)
    with pytest.raises(ValueError, match="'k' has no description"):
        explore(str, dict, k=slider("", 1, 0, 2))


# ---- pictures -------------------------------------------------------------------------------------------------------

PICTURES = {
    "map": lambda: maps.model_map(NANO),
    "stored and active": lambda: overview.stored_and_active(FULL),
    "states": lambda: price_dial.price_dial_states(STATES),
    "loss": lambda: overview.loss_curve([0, 1000, 2000], [8.3, 7.0, 6.0], 6.5, 4096, held_out=6.1),
    "load": lambda: overview.expert_load([10, 90, 40, 60], [50, 52, 49, 49], top_k=2),
    "tokens": lambda: overview.what_is_predicted(["return", " self", ".", "items", "[", "key", "]\n"]),
    "sample": lambda: overview.written_sample("def f(", "x):\n    return $x$ 中"),
}


@pytest.mark.parametrize("draw", PICTURES.values(), ids=PICTURES)
def test_pictures_keep_the_rules(draw):
    check_picture(draw)
    first = draw()
    assert b"matplotlib" not in first.png().lower()
    bundle, metadata = first._repr_mimebundle_()
    assert bundle["text/plain"] == metadata["image/png"]["alt"] == first.alt


spoiled = count()


@pytest.mark.parametrize("spoil", [
    lambda picture: picture.axes[0].texts[0].set_fontsize(8),
    lambda picture: picture.axes[0].texts[0].set_position((-200, 0)),
    lambda picture: setattr(picture, "alt", "One sentence."),
    lambda picture: picture.axes[0].text(600, 40, str(next(spoiled))),
], ids=["small", "off the page", "one sentence", "other bytes each time"])
def test_a_broken_rule_is_noticed(spoil):
    def draw():
        picture = PICTURES["map"]()
        spoil(picture)
        return picture
    with pytest.raises(AssertionError):
        check_picture(draw)


def test_text_on_map_boxes_has_contrast():
    for box in (*maps.boxes(FULL).values(), *maps.boxes(NANO).values()):
        assert style.contrast(style.BLACK, box.colour) >= 4.5, box.lines
    assert style.contrast(style.DARK, style.WHITE) >= 4.5 and style.contrast(style.BLUE, style.WHITE) >= 4.5


def test_labels_of_the_bars_do_not_overlap():
    for config in (FULL, NANO):
        picture = overview.stored_and_active(config)
        picture.png()
        extents = [text.get_window_extent() for text in picture.axes[0].texts]
        for first, second in combinations(extents, 2):
            assert not first.overlaps(second)


def test_loss_curve_needs_a_count_for_each_loss():
    with pytest.raises(ValueError, match="2 token counts for 1 losses"):
        overview.loss_curve([1, 2], [3.0], 6.0, 4096)


def test_the_row_of_tokens_has_a_limit():
    with pytest.raises(ValueError, match="13 tokens"):
        overview.what_is_predicted(["a"] * 13)
