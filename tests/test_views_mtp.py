"""Chapter 03's pictures and its view: numbers against `cost`, accepted drafts as fixed, the rules of every view."""

import re

import pytest
from pictures import check_picture
from test_views import _seconds, check_rules

from minidsv3 import ModelConfig, cost
from minidsv3.views import draft_and_verify as view
from minidsv3.views import mtp as draw
from minidsv3.views import style

FULL, NANO = ModelConfig.preset("full"), ModelConfig.preset("nano")
STATES = {name: view.decode_state(**changes) for name, changes in {
    "start": {}, "nano": {"cost": 36, "acceptance": 60}, "nothing accepted": {"acceptance": 0, "step": 12},
    "everything accepted": {"acceptance": 100, "depth": 3, "cost": 0},
    "largest": {"acceptance": 0, "cost": 50, "depth": 3, "batch": 3, "step": 12},
    "three rows": {"acceptance": 60, "batch": 3, "step": 8}}.items()}


# ---- the view -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_speeds_are_those_of_cost(state):
    facts, p = view.decode_facts(state), state["acceptance"] / 100
    assert facts["speed"] == round(100 * cost.speculative_speed(p, state["cost"] / 100, state["depth"]))
    assert facts["tokens_a_pass"] == round(100 * cost.tokens_per_pass(p, state["depth"]))
    for size, config in (("full", FULL), ("nano", NANO)):
        assert facts[f"speed_{size}"] == round(100 * cost.speculative_speed(p, cost.draft_cost(config), state["depth"]))
    assert all(isinstance(value, (int, tuple)) for value in facts.values())


def test_what_the_view_teaches():
    assert view.decode_facts(view.decode_state())["speed_full"] == 177
    assert view.decode_facts(view.decode_state(acceptance=36))["speed_nano"] == 100
    one, three = (view.decode_facts(view.decode_state(acceptance=60, batch=batch)) for batch in (1, 3))
    assert one["speed"] == three["speed"] and three["speed_drawn"] < one["speed_drawn"]


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_each_row_writes_its_tokens(state):
    for passes in view.decode(state):
        assert sum(each.new for each in passes) == passes[-1].written == view.TOKENS
        for each in passes:
            assert all(each.drafts[:-1]) and len(each.drafts) <= state["depth"]
            assert each.new <= 1 + sum(each.drafts)
    facts = view.decode_facts(state)
    assert facts["passes"] == len(view.decode(state)[0]) <= view.TOKENS
    assert facts["written_at_step"] == tuple(passes[min(state["step"], len(passes)) - 1].written
                                             for passes in view.decode(state))


def test_plain_decoding_is_the_limit_without_acceptance():
    facts = view.decode_facts(STATES["nothing accepted"] | {"cost": 0})
    assert (facts["passes"], facts["accepted"], facts["speed"], facts["speed_drawn"]) == (12, 0, 100, 100)


def test_the_sequence_is_fixed_and_about_as_often_accepted_as_said():
    assert view.decode(STATES["nano"]) == view.decode(dict(STATES["nano"]))
    for acceptance in range(0, 101, 10):
        drafts = [view.chance(row, number, 0) < acceptance / 100 for row in range(3) for number in range(8)]
        assert abs(sum(drafts) / len(drafts) - acceptance / 100) <= 0.1
    low, high = (view.decode_facts(view.decode_state(acceptance=acceptance))["passes"] for acceptance in (40, 80))
    assert high < low


def test_view_refuses_a_slider_it_does_not_have():
    with pytest.raises(ValueError, match="speed is no slider"):
        view.decode_state(speed=2)
    with pytest.raises(ValueError, match="depth cannot be 9"):
        view.draft_and_verify().set(depth=9)


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_view_keeps_the_rules(state):
    drawn = view.render_draft_and_verify(state)
    check_rules(drawn)
    assert drawn == view.render_draft_and_verify(dict(state))
    assert min(_seconds(lambda: view.render_draft_and_verify(state)) for _ in range(5)) < 0.05


def test_every_text_lies_on_the_page():
    for state in STATES.values():
        for x, size, anchor, words in re.findall(
                r'<text x="(.+?)" .*?font-size="(\d+)" text-anchor="(\w+)".*?>(.*?)</text>',
                view.render_draft_and_verify(state)):
            width = 0.54 * int(size) * len(words)
            left = float(x) - {"start": 0, "middle": width / 2, "end": width}[anchor]
            assert -1 <= left and left + width <= 901, words


def test_states_differ_and_the_sentence_follows_the_step():
    drawn = [view.render_draft_and_verify(state) for state in STATES.values()]
    assert len(set(drawn)) == len(drawn)
    assert "After pass 3 of 7, 6 tokens are written; plain decoding has 3 by then." in drawn[0]
    moved = view.render_draft_and_verify(STATES["start"] | {"step": 4})
    assert "After pass 4 of 7, 8 tokens are written; plain decoding has 4 by then." in moved


def test_main_pass_and_module_differ_without_colour():
    fills = (view.MAIN, view.MODULE, view.IDLE)
    assert len({fill.mark for fill in fills}) == 3
    assert all(style.contrast(style.ink(fill.colour), fill.colour) >= 4.5 for fill in fills)


# ---- pictures -------------------------------------------------------------------------------------------------------

LINE = ["return", " self", ".", "items", "[", "key", "]\n"]
NAMES = {"mtp": "module", "bigram": "table"}
PICTURES = {
    "ladder": lambda: draw.ladder(5), "shift": lambda: draw.shift(LINE),
    "rows": lambda: draw.two_rows(LINE, [3], 0.044),
    "curves": lambda: draw.loss_curves({"main": [3.0, 2.0], "module": [3.5, 1.0]}, {"floor": 1.3}, 5),
    "readings": lambda: draw.readings({"as trained": 1.4, "swapped": 6.0}, 3.9),
    "drafters": lambda: draw.drafters({"code": {"mtp": [0.6, 0.7], "bigram": [0.4, 0.3]}}, NAMES, "accepted"),
    "speed": lambda: draw.expected_and_measured({"batch 1": {"expected": 1.2, "measured": 0.9}}),
    "states": lambda: view.draft_and_verify_states(STATES),
}


@pytest.mark.parametrize("make", PICTURES.values(), ids=PICTURES)
def test_pictures_keep_the_rules(make):
    check_picture(make)


def test_ladder_has_one_prediction_fewer_than_inputs():
    texts = [text.get_text() for text in draw.ladder(5).axes[0].texts]
    assert texts.count("MTP") == 4 and texts.count("none") == 1
    assert any("4 predictions, and still\ndivided by 5" in words for words in texts)


def test_two_rows_write_the_same_words():
    texts = [text.get_text() for text in draw.two_rows(LINE, [3], 0.0).axes[0].texts]
    added = [words[2:].split("  ") for words in texts if words.startswith("+ ")]
    want = [draw.visible(word) for word in LINE[1:]]
    assert [word for words in added[:6] for word in words] == want == [word for words in added[6:] for word in words]
    assert len(added) == 6 + 4 and texts.count("\u2713 accepted") == 2 and texts.count("\u2717 refused") == 1


def test_the_shift_has_a_limit():
    with pytest.raises(ValueError, match="10 tokens"):
        draw.shift(["a"] * 10)
