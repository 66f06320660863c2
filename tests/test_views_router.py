"""Chapter 02's pictures and explorer: choices against the package, the rules of every view, moves that matter."""

import copy
import json
import random
import re
from itertools import combinations

import pytest
import torch
from pictures import check_picture
from test_views import _seconds, check_rules

from minidsv3 import ModelConfig, Transformer
from minidsv3.balance import update_biases
from minidsv3.data import Batch, Document, encode, train_tokenizer
from minidsv3.kernels import route
from minidsv3.moe import Router
from minidsv3.views import router as draw
from minidsv3.views import routing_explorer as explorer
from minidsv3.views import style

WORDS = ["def", " get", "(", "self", ",", " key", "):\n", "   ", " return", " self", ".", "items", "[", "key", "]\n"]


def made(seed: int = 0) -> dict:
    """Snapshots of the stored shape, from random numbers; the last ones lean to a few experts."""
    source = random.Random(seed)
    texts = {"code": WORDS, "prose": [" <b> & \u4e2d", "\t", "a" * 30, " x"], "comment": ["#", " \u201cy\u201d"]}
    stored = {"texts": texts,
              "methods": ["none", "sequence", "bias"], "steps": [0, 5, 20, 80, 160], "load_tokens": 2048,
              "scores": {}, "bias": {}, "load": {}}
    for method in stored["methods"]:
        for name in ("scores", "bias", "load"):
            stored[name][method] = {}
        for step in map(str, stored["steps"]):
            lean = [[source.gauss(500, 60) for _ in range(16)] for _ in range(5)]

            def score(middle: float) -> int:
                return min(max(round(source.gauss(middle, 90)), 0), 1000)

            stored["scores"][method][step] = {
                text: [[[score(middle) for middle in layer] for _ in tokens] for layer in lean]
                for text, tokens in texts.items()}
            stored["bias"][method][step] = [[source.randint(-120, 120) * (method == "bias") for _ in range(16)]
                                            for _ in range(5)]
            stored["load"][method][step] = [[source.randint(50, 900) for _ in range(16)] for _ in range(5)]
    return stored


STORED, EMPTY = made(), explorer.LiveRun()
STATES = {name: explorer.start_state(STORED, **changes) for name, changes in {
    "start": {}, "prose": {"text": "prose", "cursor": 0}, "moved": {"shift": -300, "expert": 2},
    "updated": {"updates": 60, "gamma": 0.1, "method": "none", "layer": 5}, "untrained": {"moment": 0},
    "far cursor": {"text": "comment", "cursor": 19}}.items()}


# ---- decisions ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_choices_are_the_package_s(state):
    seen = explorer.look(state, STORED, EMPTY)
    reading = explorer.stored_reading(STORED, state["text"], state["method"], state["moment"])
    scores = reading.scores[state["layer"] - 1]
    want = route(scores.logit(), seen.after.bias, n_group=4, topk_group=2, top_k=4, scaling_factor=2.5)
    assert torch.allclose(seen.after.routing.weights.sum(-1), torch.full((len(scores),), 2.5, dtype=torch.float64))
    same = (seen.after.routing.experts.sort().values == want.experts.sort().values).all(-1)
    assert same.float().mean() > 0.8            # thousandths tie now and then, and then the lower index wins
    groups = seen.after.routing.experts // 4
    assert seen.after.kept.sum(-1).eq(2).all() and seen.after.kept.gather(1, groups).all()


def test_equal_thousandths_go_to_the_lower_index():
    """On every machine: the rounding of a logarithm must not decide."""
    decision = explorer.decide(torch.full((1, 16), 0.5, dtype=torch.float64), torch.zeros(16, dtype=torch.float64))
    assert decision.routing.experts[0].sort().values.tolist() == [0, 1, 2, 3]
    assert decision.kept[0].tolist() == [True, True, False, False]


def test_updates_are_the_package_s():
    """One update of the view is one of balance.update_biases on the load of the text."""
    state = STATES["start"] | {"updates": 1, "gamma": 0.013}
    seen = explorer.look(state, STORED, EMPTY)
    router = Router(ModelConfig.preset("nano")).double()
    router.e_score_correction_bias.copy_(seen.before.bias)
    update_biases(router, seen.before.routing.load[None], 0.013)
    assert torch.allclose(seen.after.bias, router.e_score_correction_bias, rtol=0, atol=1e-12)


def test_facts_are_whole_numbers_about_the_drawing():
    facts = explorer.facts_of(STATES["start"], STORED, EMPTY)
    html = explorer.render(STATES["start"], STORED, EMPTY)
    assert f"goes to experts {', '.join(map(str, sorted(facts['chosen'])))} (" in html
    assert f"expert {facts['runner-up']} lost it by {facts['lost by'] / 1000:.3f}" in html
    assert sum(facts["weights"]) == pytest.approx(2500, abs=3) and len(facts["groups kept"]) == 2
    assert facts["tokens changed"] == 0 and facts["tokens"] == len(WORDS)
    flat = [part for value in facts.values() for part in (value if isinstance(value, tuple) else (value,))]
    assert all(type(part) is int for part in flat)


def test_a_bias_moves_membership_and_no_ratio():
    before = explorer.facts_of(STATES["start"], STORED, EMPTY)
    taken = before["chosen"][0]
    after = explorer.facts_of(STATES["start"] | {"expert": taken, "shift": -300}, STORED, EMPTY)
    stays = sorted({*before["chosen"]} & {*after["chosen"]})
    assert taken not in after["chosen"] and len(stays) >= 2
    ratios = [weights[stays[0]] / weights[stays[1]]
              for weights in (dict(zip(facts["chosen"], facts["weights"])) for facts in (before, after))]
    assert ratios[0] == pytest.approx(ratios[1], rel=0.01)


def test_updates_even_the_text_out_and_large_steps_do_not():
    start = STATES["start"] | {"method": "none", "updates": 60}
    facts = {gamma: explorer.facts_of(start | {"gamma": gamma}, STORED, EMPTY) for gamma in (0.0001, 0.01)}
    assert facts[0.01]["fullest here"] - facts[0.01]["emptiest here"] < (
        facts[0.0001]["fullest here"] - facts[0.0001]["emptiest here"])


# ---- the drawing ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_explorer_keeps_the_rules(state):
    html = explorer.render(state, STORED, EMPTY)
    check_rules(html)
    assert explorer.render(dict(state), STORED, EMPTY) == html
    assert min(_seconds(lambda: explorer.render(state, STORED, EMPTY)) for _ in range(5)) < 0.05


def test_explorer_states_differ():
    drawn = [explorer.render(state, STORED, EMPTY) for state in STATES.values()]
    assert all(one != other for one, other in combinations(drawn, 2))


def test_tokens_are_escaped_and_blanks_are_signs():
    html = explorer.render(STATES["prose"], STORED, EMPTY)
    assert "\u2423&lt;b&gt;\u2423&amp;\u2423\u4e2d" in html and "<b>" not in html
    assert ">\u21e5</text>" in html and ">aaaaaaaa\u2026</text>" in html
    assert explorer.shown("]\n") == "]\u23ce" and explorer.shown("\x00") == "\u27e80\u27e9"


def test_what_is_chosen_shows_without_colour():
    """Bold numbers: as many as tokens x 4, whatever the shades."""
    html = explorer.render(STATES["start"], STORED, EMPTY)
    bold = re.findall(r'<text font-size="12" text-anchor="middle" fill="#\w+" font-weight="bold">(.*?)</text>', html)
    assert sum(part.count("<tspan") for part in bold) == 4 * len(WORDS)


def test_numbers_on_shades_have_contrast():
    assert all(style.contrast(style.ink(shade), shade) >= 4.5 for shade in explorer.SHADES)
    assert style.contrast(explorer.DROPPED, style.WHITE) >= 4.5
    assert style.contrast(explorer.VERMILION_DARK, style.WHITE) >= 4.5


def test_snapshots_without_a_method_are_refused(tmp_path):
    path = tmp_path / "snapshots.json"
    path.write_text(json.dumps(copy.deepcopy(STORED) | {"methods": ["none"]}))
    with pytest.raises(ValueError, match="no snapshots of bias, sequence"):
        explorer.load_snapshots(path)


# ---- typed text -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def live():
    tokenizer = train_tokenizer([Document("a.py", "return self.items[key]\n" * 40)], 280)
    run = explorer.LiveRun()
    for step in (0, 30):
        torch.manual_seed(step)
        model = Transformer(ModelConfig.preset("nano", vocab_size=280, hidden_size=32, intermediate_size=16,
                                               moe_intermediate_size=8, num_nextn_predict_layers=0))
        tokens = torch.randint(280, (2, 9))
        run.keep(step, model, tokenizer, Batch(tokens, tokens))
    return run, tokenizer, model


def test_typed_text_goes_through_the_model(live):
    run, tokenizer, model = live
    typed = "return \u4e2d"
    reading = run.read(typed, 1.0)
    record = []
    with torch.no_grad():
        model(torch.tensor([encode(tokenizer, typed)]), record=record)
    assert torch.equal(reading.scores, torch.stack([routing.logits.double().sigmoid() for routing in record]))
    assert "".join(reading.tokens[-3:]) == "\u27e8E4\u27e9\u27e8B8\u27e9\u27e8AD\u27e9"
    assert reading.trained.endswith("30 steps") and run.read(typed, 0.0).trained.endswith(" 0 steps")
    assert reading.load.sum(-1).tolist() == [2 * 8 * 4] * 5
    html = explorer.render(explorer.start_state(STORED, typed=typed), STORED, run)
    check_rules(html)
    assert "\u27e8E4\u27e9" in html


def test_long_text_is_cut_to_what_fits(live):
    assert len(live[0].read("self.items " * 50, 1.0).tokens) == explorer.MOST_TOKENS


def test_without_a_model_typed_text_says_so():
    state = explorer.start_state(STORED, typed="x")
    html = explorer.render(state, STORED, EMPTY)
    check_rules(html)
    assert "No model is trained in this kernel yet" in html
    assert explorer.facts_of(state, STORED, EMPTY) == {"tokens": 0}


def test_the_view_moves_in_code(live):
    view = explorer.routing_explorer(STORED, live[0])
    drawn = view.drawing.value
    assert view.state == explorer.start_state(STORED)
    assert view.set(method="none", layer=2).drawing.value != drawn
    assert view.set(typed="self").facts()["tokens"] == len(encode(live[1], "self"))
    assert "<th scope='row'>chosen</th>" in view.table()


# ---- pictures -------------------------------------------------------------------------------------------------------

SOURCE = random.Random(3)
SCORES, BIASES = [SOURCE.random() for _ in range(16)], [SOURCE.gauss(0, 0.1) for _ in range(16)]
PICTURES = {
    "one token": lambda: draw.one_token(SCORES, BIASES, 4, 2, 4, 2.5),
    "over steps": lambda: draw.over_steps({"a": {"x": [[2, 1, 0.5]], "y": [[2, 2, 2], [1, 1, 1]]}}, [0, 5, 10], 0.1),
    "bias paths": lambda: draw.bias_paths({"a": ([0, 1], [[0, 0], [0.1, 0.2]]), "b": ([0, 1], [[0, 0], [0, -0.2]])}),
    "loss terms": lambda: draw.loss_terms({"flat": ([2, 2, 0, 0], [0.25] * 4),
                                           "sure": ([2, 2, 0, 0], [0.5, 0.5, 0, 0])}),
    "tables": lambda: draw.load_tables({"none": [[1, 9], [5, 5]], "bias": [[5, 5], [4, 6]]}, ["code", "prose"]),
    "slopes": lambda: draw.slopes({"a": {"x": [1.0, 2.0], "y": [1.5, 1.9]}}, "nats"),
    "differences": lambda: draw.slopes({"a": {"x": [1.0, 2.0], "y": [1.5, 1.9]}}, "nats", from_start=True),
    "explorer": lambda: explorer.explorer_states({"start": {"moment": 0}, "end": {}}, STORED),
}


@pytest.mark.parametrize("make", PICTURES.values(), ids=PICTURES)
def test_pictures_keep_the_rules(make):
    check_picture(make)


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_one_token_chooses_as_the_package():
    panels = PICTURES["one token"]().axes
    scores, bias = torch.tensor(SCORES, dtype=torch.float64), torch.tensor(BIASES, dtype=torch.float64)
    routing = route(scores.logit()[None], bias, n_group=4, topk_group=2, top_k=4, scaling_factor=2.5)
    want = {f"\u25cf{100 * weight:.0f}" for weight in routing.weights[0].tolist()}
    assert {words for words in texts(panels[4])} == want
    assert sum(words.startswith("\u25cf") for words in texts(panels[3])) == 4
    assert sum("kept" in words for words in texts(panels[2])) == 2


def test_slopes_count_what_falls():
    title = PICTURES["slopes"]().axes[0].get_title()
    assert "1 of 2 fall" in title
    lines = [line.get_ydata().tolist() for line in PICTURES["differences"]().axes[0].lines]
    assert [line[0] for line in lines] == [0, 0] and lines[0][1] == pytest.approx(0.5)


def test_slopes_need_as_many_values_on_both_sides():
    with pytest.raises(ValueError):
        draw.slopes({"a": {"x": [1.0], "y": [1.5, 1.9]}}, "nats")


def test_tables_divide_each_row_by_its_mean():
    assert texts(PICTURES["tables"]().axes[0]) == ["0.2", "1.8", "1.0", "1.0"]
