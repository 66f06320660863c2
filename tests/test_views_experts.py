"""Chapter 06's pictures and explorer: counts against the package, the rules of every view, moves that matter."""

import re
from itertools import combinations

import pytest
import torch
from pictures import check_picture
from test_views import _seconds, check_rules

from minidsv3.parallel import placement, traffic
from minidsv3.parallel.traffic import Cluster
from minidsv3.views import dispatch_explorer as explorer
from minidsv3.views import experts as draw
from minidsv3.views import style

STATES = {name: explorer.start_state(**changes) for name, changes in {
    "start": {}, "small": {"nodes": 2, "gpus": 2, "experts": 64, "top_k": 16, "limit": 8},
    "copies": {"placement": "EPLB anywhere", "spare": 4, "skew": 100}, "in order": {"placement": "in order"},
    "by expert": {"way": "by expert", "payload": "bf16"}, "tight": {"limit": 1, "experts": 64, "top_k": 16}}.items()}


# ---- what is counted ------------------------------------------------------------------------------------------------


def test_the_start_is_v3_s_layer():
    """3.47 copies of 7,392 bytes over 50 GB/s: 0.51 us a token."""
    even = explorer.look(explorer.start_state(skew=0))
    assert even.copies("by node") == pytest.approx(3.47, abs=0.03)
    assert even.copies("by expert") == pytest.approx(7.0, abs=0.05)
    assert even.row_bytes == 7392 and even.microseconds("by node", "between")[0] == pytest.approx(0.513, abs=0.005)
    assert even.microseconds("by expert", "between")[0] == pytest.approx(1.035, abs=0.008)


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_counts_are_those_of_every_choice(state):
    """Each choice once, to a slot of its expert; rows and loads counted again from there."""
    seen = explorer.look(state)
    chosen = explorer._choices(state["experts"], state["nodes"], seen.limit, seen.top_k, state["skew"])
    load = chosen.flatten().bincount(minlength=state["experts"])[None].double()
    placed = explorer.place(load, state, seen.cluster)
    slots = explorer.serving(chosen, placed)
    assert torch.equal(placed.phy2log[0][slots], chosen)
    per_gpu = slots // (placed.phy2log.shape[1] // seen.cluster.size)
    served = per_gpu.flatten().bincount(minlength=seen.cluster.size).double()
    assert (served - seen.load).abs().max() < placed.phy2log.shape[1] / seen.cluster.size       # at most one a slot
    home = torch.arange(explorer.TOKENS) % seen.cluster.size
    want = traffic.by_node(home, per_gpu, seen.cluster)
    assert torch.equal(seen.rows["by node"].between, want.between)
    assert seen.fullest == pytest.approx(placement.imbalance(load, placed, seen.cluster.size).item())


def test_what_the_cluster_does_not_have_is_cut_and_said():
    seen = explorer.look(STATES["small"])
    assert (seen.limit, seen.top_k) == (2, 16)
    assert "nodes a token may use cut to 2" in explorer.render(STATES["small"])
    tight = explorer.look(STATES["tight"])
    assert (tight.limit, tight.top_k) == (1, 8) and "experts a token takes cut to 8" in explorer.render(STATES["tight"])


def test_merging_makes_the_limit_pay():
    free, limited = (explorer.facts_of(explorer.start_state(skew=0, limit=limit)) for limit in (8, 4))
    key = "rows to other nodes, 100 tokens, "
    assert abs(free[key + "by expert"] - limited[key + "by expert"]) <= 3
    assert free[key + "by node"] - limited[key + "by node"] > 110


def test_torn_groups_undo_the_limit():
    """EPLB anywhere evens the load better and puts a group's experts on many nodes."""
    inside, anywhere = (explorer.facts_of(explorer.start_state(placement=name, spare=1))
                        for name in ("EPLB inside nodes", "EPLB anywhere"))
    assert anywhere["fullest GPU, % of the mean"] < inside["fullest GPU, % of the mean"]
    key = "rows to other nodes, 100 tokens, by node"
    assert anywhere[key] - inside[key] > 100


def test_no_placement_of_single_experts_beats_the_largest():
    facts = explorer.facts_of(explorer.start_state(skew=75, placement="EPLB anywhere"))
    assert facts["fullest GPU, % of the mean"] > facts["largest expert, % of a GPU's mean"] > 300
    copies = explorer.facts_of(explorer.start_state(skew=75, placement="EPLB anywhere", spare=1))
    assert copies["fullest GPU, % of the mean"] < 105


def test_facts_are_whole_numbers_about_the_drawing():
    state = STATES["start"]
    facts, html = explorer.facts_of(state), explorer.render(state)
    assert all(type(value) is int for value in facts.values())
    crossing = facts["rows to other nodes, 100 tokens, by node"]
    assert f"crosses to other nodes {crossing / 100:.2f} times" in html
    assert f"fullest {facts['fullest GPU, % of the mean'] / 100:.2f} times the mean" in html
    cells = re.findall(r'y="([\d.]+)" font-size="12" text-anchor="middle" fill="#\w+">(\d+)</text>', html)
    between = [int(count) for y, count in cells if y != "66.0"]         # the line above the table
    assert len(between) == 56 and sum(between) / 8 == pytest.approx(crossing, abs=4)


# ---- the drawing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_explorer_keeps_the_rules(state):
    html = explorer.render(state)
    check_rules(html)
    assert explorer.render(dict(state)) == html
    assert min(_seconds(lambda: explorer.render(state)) for _ in range(5)) < 0.05


def test_explorer_states_differ():
    drawn = [explorer.render(state) for state in STATES.values()]
    assert all(one != other for one, other in combinations(drawn, 2))


def test_the_view_moves_in_code():
    view = explorer.dispatch_explorer()
    drawn = view.drawing.value
    assert view.state == explorer.start_state()
    assert view.set(placement="in order").drawing.value != drawn
    assert "<th scope='row'>nodes a token may use</th>" in view.table()
    with pytest.raises(ValueError, match="nodes cannot be 3"):
        view.set(nodes=3)


def test_numbers_on_shades_have_contrast():
    assert all(style.contrast(style.ink(shade), shade) >= 4.5 for shade in explorer.SHADES)


# ---- pictures -------------------------------------------------------------------------------------------------------

TOKEN = dict(token="items", home=1, experts=[3, 8, 9, 11], of_a_gpu=2, cluster=Cluster(2, 4))
PICTURES = {
    "token": lambda: draw.token_on_its_way(**TOKEN),
    "tables": lambda: draw.number_tables("Rows of two ranks", {"sent": [[3, 0], [1, 5]], "received": [[3, 1], [0, 5]]},
                                         ["0", "1"], ["0", "1"], "rank"),
    "time": lambda: draw.time_of_wires({"by expert": (1.04, 0.04), "by node": (0.51, 0.3)}),
    "loads": lambda: draw.loads({"in order": [3, 1, 1, 1], "EPLB": [1.5, 1.5, 1.4, 1.6]}),
    "mesh": lambda: draw.mesh(16, 2, 8, 8, 256),
    "explorer": lambda: explorer.dispatch_states({"in order": {"placement": "in order"}, "start": {}}),
}


@pytest.mark.parametrize("make", PICTURES.values(), ids=PICTURES)
def test_pictures_keep_the_rules(make):
    check_picture(make)


def titles(picture) -> list[str]:
    return [axes.get_title() for axes in picture.axes]


def test_the_token_s_rows_are_counted():
    assert titles(PICTURES["token"]()) == ["by expert: 3 between, 0 inside", "by GPU: 2 between, 0 inside",
                                           "by node: 1 between, 1 inside"]


def test_arrows_are_the_rows():
    """An arrow for each pair of GPUs, thick between nodes; a number where several rows take one wire."""
    panels = PICTURES["token"]().axes
    arrows = [[text.arrow_patch.get_linewidth() for text in axes.texts if getattr(text, "arrow_patch", None)]
              for axes in panels]
    assert arrows == [[4, 4], [4, 4], [1.4, 4]]
    assert [sum(text.get_text() == "2" for text in axes.texts) for axes in panels] == [1, 0, 0]


def test_loads_are_over_their_mean():
    panels = PICTURES["loads"]().axes
    assert [text.get_text() for axes in panels for text in axes.texts] == ["2.00", "1.07"]
    assert [bar.get_height() for bar in panels[0].patches] == [2, 2 / 3, 2 / 3, 2 / 3]


def test_the_mesh_shows_every_expert_once():
    words = [text.get_text() for text in PICTURES["mesh"]().axes[0].texts]
    spans = [tuple(map(int, found.groups())) for word in words if (found := re.fullmatch(r"(\d+)-(\d+)", word))]
    assert [e for first, last in spans for e in range(first, last + 1)] == list(range(256))
    assert words[0].startswith("2,048 GPUs: 16 stages (pp) x 2 copies of the experts (edp) x 64 ranks (ep)")
