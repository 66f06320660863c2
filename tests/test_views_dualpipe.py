"""Chapter 07's pictures and explorer: pieces fill their spans, numbers are the simulator's, the rules of every view."""

import random
import re
import xml.etree.ElementTree as ElementTree
from itertools import combinations

import pytest
from drawn_text import TAG, misplaced
from test_views import _seconds, check_rules

from minidsv3.parallel.schedule import Overlapped, dualpipe, dualpipev, one_f_one_b, zb1p
from minidsv3.parallel.simulate import simulate
from minidsv3.views import dualpipe as draw
from minidsv3.views import schedule_explorer as explorer

STATES = {name: explorer.START | changes for name, changes in {
    "start": {}, "a V": {"schedule": "DualPipeV", "cursor": 77, "overlap": False},
    "formula": {"formula": True, "exchange": 0, "forward": 20}, "refused": {"micro_batches": 4},
    "small": {"schedule": "ZB1P", "ranks": 2, "micro_batches": 4, "formula": True}, "at the end": {"cursor": 100},
    "short": {"schedule": "1F1B", "cursor": 0, "forward": 2, "input": 2, "weight": 2, "exchange": 30}}.items()}
DRAWN = [name for name in STATES if name != "refused"]


# ---- pieces ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("make", [one_f_one_b, zb1p, dualpipe, dualpipev])
@pytest.mark.parametrize("options", [{}, {"communication": 0.5}, {"communication": 0.5, "overlapped": 4.5},
                                     {"communication": 0.5, "overlapped": 5.25}])
def test_pieces_fill_their_spans(make, options):
    """Without gaps, in both halves of an overlapped block, and the exchange is drawn where the simulator exposes it."""
    durations = {"forward": 1.5, "backward_input": 2.0, "backward_weight": 1.0} | options
    timeline = simulate(make(4, 10), **durations)
    for spans, exposed in zip(timeline.spans, timeline.exposed):
        purple = 0.0
        for span in spans:
            drawn = draw.pieces(span, **durations)
            area = sum((piece.end - piece.start) * (piece.top - piece.bottom) for piece in drawn)
            assert area == pytest.approx(span.end - span.start, abs=1e-9)
            assert drawn[0].start == span.start and drawn[-1].end == pytest.approx(span.end, abs=1e-9)
            purple += sum(piece.end - piece.start for piece in drawn if piece.kind == "X")
        assert purple == pytest.approx(exposed, abs=1e-9)


def test_labels_are_written_once_a_part():
    for span in simulate(dualpipe(4, 8)).spans[1]:
        labels = [piece.label for piece in draw.pieces(span) if piece.label]
        assert labels == [f"{part.direction}{part.micro_batch}" for part in span.action.parts]


# ---- pictures -------------------------------------------------------------------------------------------------------

def test_timelines_say_their_totals():
    rows = {"1F1B": (one_f_one_b(8, 20), {}), "DualPipe": (dualpipe(8, 20), {"overlapped": 3})}
    picture = draw.timelines(rows, {"without": {}, "with": {"communication": 1}})
    assert "1F1B without 81; 1F1B with 135; DualPipe without 66; DualPipe with 87" in picture.alt
    words = [text.get_text() for axes in picture.axes for text in axes.texts]
    assert words == ["81", "135", "66", "87"]
    assert picture.png() == draw.timelines(rows, {"without": {}, "with": {"communication": 1}}).png()


def test_numbers_are_left_out_where_they_do_not_fit():
    def numbered(micro_batches: int) -> int:
        picture = draw.timelines({"1F1B": (one_f_one_b(4, micro_batches), {})}, {"": {}}, numbers=True)
        return sum(re.fullmatch(r"a\d+", text.get_text()) is not None for text in picture.axes[0].texts)
    assert numbered(8) == 2 * 4 * 8 and numbered(40) == 0


def test_the_block_s_numbers_are_the_trace_s():
    assert round(100 * draw.HIDDEN / draw.EXCHANGED, 1) == 96.3
    assert draw.BUSY + draw.EXCHANGED - draw.HIDDEN == pytest.approx(draw.SPAN, abs=1)
    words = [text.get_text() for axes in draw.block_order().axes for text in axes.texts]
    assert [word.split("\n")[0] for word in words[:6]] == ["attn", "MLP", "MLP", "MLP", "attn", "attn"]
    assert sum("combine" in word or "dispatch" in word for word in words) == 4


# ---- the explorer ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_explorer_keeps_the_rules(state):
    html = explorer.render(state)
    check_rules(html)
    assert not misplaced(html) and explorer.render(dict(state)) == html
    assert min(_seconds(lambda: explorer.render(state)) for _ in range(5)) < 0.05


def test_explorer_states_differ():
    drawn = [explorer.render(state) for state in STATES.values()]
    assert all(one != other for one, other in combinations(drawn, 2))


def test_facts_are_the_simulator_s():
    facts = explorer.facts_of(STATES["start"])
    timeline = simulate(dualpipe(8, 20), overlapped=3, communication=1)
    assert facts["makespan"] == 870 and facts["by formula"] == 870
    assert facts["idle"] == tuple(round(10 * time) for time in timeline.idle)
    assert facts["most in flight"] == (9,) * 8 and facts["unhidden exchange"][:2] == (220, 200)
    assert explorer.facts_of(STATES["formula"])["makespan"] == 920
    assert explorer.facts_of(STATES["formula"])["by formula"] == 890
    assert explorer.facts_of(STATES["refused"]) == {
        "refused": "DualPipe got 4 micro-batches for 8 ranks; it needs at least 16"}


@pytest.mark.parametrize("make", [zb1p, dualpipe, dualpipev])
def test_moments_add_up(make):
    """At any time: work so far and idle so far are the time, chunks in flight never exceed the most there are."""
    timeline, draw_times = simulate(make(4, 10), 1, 1.5, 0.5), random.Random(0)
    for spans, most in zip(timeline.spans, timeline.in_flight):
        for now in [draw_times.uniform(0, timeline.makespan) for _ in range(60)]:
            at = explorer.moment(spans, now)
            busy = sum(max(min(span.end, now) - span.start, 0) for span in spans)
            assert at.idle + busy == pytest.approx(now, abs=1e-9) and 0 <= at.held <= most
            running = [str(span.action) for span in spans if span.start <= now < span.end]
            assert at.action in (running or ["waits", "has not begun", "is done"])
        assert explorer.moment(spans, timeline.makespan) == (
            "is done", 0, pytest.approx(timeline.makespan - sum(s.end - s.start for s in spans)))


@pytest.mark.parametrize("name", DRAWN)
def test_every_rank_is_named_in_words_and_beside_its_lane(name):
    html, facts = explorer.render(STATES[name]), explorer.facts_of(STATES[name])
    words = [element.text for element in ElementTree.fromstring(html[html.index("<svg"):]).iter(f"{TAG}text")]
    for rank, action in enumerate(facts["actions"]):
        assert f"rank {rank} {action.replace('&', '&amp;')}" in html.split("<svg")[0]
    assert [word for word in words if word in facts["actions"]] == list(facts["actions"])


def test_blocks_have_frames():
    html = explorer.render(STATES["start"])
    frames = re.findall(r'<path d="([^"]*)" fill="none" stroke="#000000" stroke-width="1.2"/>', html)
    blocks = sum(isinstance(action, Overlapped) for order in dualpipe(8, 20) for action in order)
    assert len(frames) == 1 and frames[0].count("z") == blocks == 82


def test_overlap_hides_no_more_than_the_block_has_room_for():
    """The block grows as soon as two exchanges are longer than F + B."""
    state = explorer.START | {"exchange": 15}
    assert explorer.look(state).durations["overlapped"] == 3
    assert explorer.look(state | {"exchange": 20}).durations["overlapped"] == 4
    assert explorer.look(state | {"overlap": False}).durations["overlapped"] is None
