"""Chapter 01's view and pictures without a browser: numbers against cost sheet and package, and rules of drawings."""

import json
import time
from itertools import combinations
from pathlib import Path

import pytest
import torch
from pictures import check_picture
from test_views import check_rules

from minidsv3 import ModelConfig, cost
from minidsv3.attention import MLA
from minidsv3.views import cache_calculator as calculator
from minidsv3.views import mla, style

FULL, NANO = ModelConfig.preset("full"), ModelConfig.preset("nano")
START = calculator.calculator_state("full")
STATES = {
    "full": START, "256 tokens at once": START | {"queries": 256}, "8 heads": START | {"heads": 8},
    "nano": calculator.calculator_state("nano"), "one head": START | {"heads": 1, "layers": 1, "context": 128},
    "largest": START | {"layers": 128, "heads": 256, "batch": 1024, "queries": 4096, "rank": 1024, "rope": 128},
    "short": calculator.calculator_state("nano", context=128, queries=4096), "never crosses": START | {"rank": 64},
}


# ---- numbers --------------------------------------------------------------------------------------------------------

def test_bytes_are_the_cost_sheet():
    for name in ("full", "mini", "nano"):
        state = calculator.calculator_state(name)
        facts = calculator.cache_calculator_facts(state)
        assert facts["MLA bytes"] == cost.kv_cache_bytes(ModelConfig.preset(name), state["context"])
    assert calculator.cached_numbers(FULL) == {"MHA": 40_960, "GQA": 2048, "MLA": 576, "MQA": 256}


def test_facts_at_full_size():
    facts = calculator.cache_calculator_facts(START)
    assert [facts[f"{name} FLOP a byte"] for name in calculator.SCHEMES] == [1, 16, 242, 128]
    assert facts["MHA bytes"] == 61 * 131_072 * 81_920 and facts["crossing"] == 170.4
    crossings = [calculator.cache_calculator_facts(START | {"context": n})["crossing"] for n in (128, 4096)]
    assert crossings == [73.1, 163.8]
    one = calculator.bracket_flops(FULL, 1, 4096)
    assert one["expanded"] / one["absorbed"] == pytest.approx(117.3, abs=0.05)


@pytest.mark.parametrize("config", [FULL, NANO, ModelConfig.preset("mini"), FULL.replace(kv_lora_rank=64)])
def test_the_cheaper_form_is_the_package_s(config):
    with torch.device("meta"):
        layer = MLA(config, 0)
    for keys in (1, 128, 1000, 4096):
        most = calculator.crossing(config, keys)
        for queries in {1, 2, keys // 2, keys, int(most), int(most) + 1} & set(range(1, keys + 1)):
            flops = calculator.bracket_flops(config, queries, keys)
            cheaper = flops["absorbed"] < flops["expanded"]
            assert cheaper == layer.absorbing_is_cheaper(queries, keys), (queries, keys)
            assert cheaper == (queries < most or most == keys), (queries, keys)     # most == keys: it always is


def test_what_the_calculator_teaches():
    def facts(**changes):
        return calculator.cache_calculator_facts(START | changes)
    full, few = facts(), facts(heads=64)
    assert few["MHA bytes"] == full["MHA bytes"] / 2 and few["MLA bytes"] == full["MLA bytes"]
    assert few["crossing"] == full["crossing"]
    assert full["absorbed FLOPs"] < full["expanded FLOPs"]
    assert facts(queries=256)["absorbed FLOPs"] > facts(queries=256)["expanded FLOPs"]


def test_more_tokens_than_the_context_are_not_asked():
    short = calculator.calculator_state("full", context=128, queries=4096)
    assert calculator.cache_calculator_facts(short) == calculator.cache_calculator_facts(short | {"queries": 128})


@pytest.mark.parametrize("number, words", [(70_272, "70.3 KB"), (9_210_691_584, "9.21 GB"), (836, "836 B"),
                                           (2.5e15, "2.50 PB"), (1000, "1.00 KB"), (81_920, "81.9 KB"), (5, "5.00 B")])
def test_bytes_in_words(number, words):
    assert calculator.in_bytes(number) == words


# ---- the drawing ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_calculator_keeps_the_rules(state):
    drawn = calculator.render_cache_calculator(state)
    check_rules(drawn)
    assert drawn == calculator.render_cache_calculator(dict(state))
    begin = time.process_time()
    for _ in range(5):
        calculator.render_cache_calculator(state)
    assert (time.process_time() - begin) / 5 < 0.05


def test_states_look_different():
    drawn = [calculator.render_cache_calculator(state) for state in STATES.values()]
    assert all(one != other for one, other in combinations(drawn, 2))


def test_the_drawing_says_its_numbers():
    drawn = calculator.render_cache_calculator(STATES["256 tokens at once"])
    for words in ("655 GB", "9.21 GB", "T* = 170.4", "T = 256", "absorbed: 571 TFLOP", "is cheaper expanded"):
        assert words in drawn
    assert "T* =" not in calculator.render_cache_calculator(STATES["never crosses"])


def test_schemes_differ_without_colour():
    for (first, a), (second, b) in combinations(calculator.SCHEMES.items(), 2):
        assert a.mark != b.mark, (first, second)


def test_calculator_moves_in_code():
    view = calculator.cache_calculator()
    assert view.state == START
    assert view.set(preset="nano").state == calculator.calculator_state("nano")
    assert view.drawing.value == calculator.render_cache_calculator(view.state)
    assert f"<td>{view.facts()['MLA bytes']:,}</td>" in view.table()
    with pytest.raises(ValueError, match="queries cannot be 3"):
        view.set(queries=3)
    with pytest.raises(ValueError, match="width is no control of the calculator"):
        calculator.calculator_state("full", width=3)


# ---- pictures -------------------------------------------------------------------------------------------------------

RESULTS = Path(__file__).parents[1] / "results"
STORED = json.loads((RESULTS / "mla_decode.json").read_text())
LOSSES = json.loads((RESULTS / "attention_variants.json").read_text())
WORDS = ["return", " self", ".", "items", "[", "key", "]", "\n"]
PICTURES = {
    "brackets": lambda: mla.brackets(FULL),
    "brackets of nano": lambda: mla.brackets(NANO, 1024),
    "kept": lambda: mla.what_is_kept(WORDS, FULL),
    "merged": lambda: mla.merged_by_distance([[[1.0, 0.0], [0.0, 1.0]], [[0.5, 0.1], [0.2, -1.0]]], (0, 3), (0.0, 0.5)),
    "times": lambda: mla.decode_times(STORED, STORED["shapes"]),
    "losses": lambda: mla.losses_by_attention(LOSSES["runs"], LOSSES["cached_values"]),
    "yarn": lambda: mla.yarn_wavelengths(FULL),
    "states": lambda: calculator.cache_calculator_states({"full": START, "nano": STATES["nano"]}),
}


@pytest.mark.parametrize("make", PICTURES.values(), ids=PICTURES)
def test_pictures_keep_the_rules(make):
    check_picture(make)


def test_brackets_print_what_the_chapter_says():
    """For one query the left bracket is 124 times cheaper, for 4,096 queries the right one 3.7 times."""
    assert mla._right(FULL, 1, 4096) / mla._left(FULL, 1, 4096) == pytest.approx(124.4, abs=0.1)
    assert mla._left(FULL, 4096, 4096) / mla._right(FULL, 4096, 4096) == pytest.approx(3.67, abs=0.01)
    texts = " ".join(text.get_text() for axes in mla.brackets(FULL).axes for text in axes.texts)
    assert all(number in texts for number in ("81,920", "4,096", "1,152", "512", "4.33 MFLOP", "4.83 GFLOP"))


def test_texts_of_the_brackets_do_not_overlap():
    picture = mla.brackets(FULL)
    picture.png()
    extents = [text.get_window_extent() for axes in picture.axes for text in (*axes.texts, *axes.get_xticklabels())]
    for first, second in combinations(extents, 2):
        assert not first.overlaps(second)


# ---- the stored measurement -----------------------------------------------------------------------------------------

def test_stored_claims_follow_from_the_stored_times():
    from mla_decode import CLAIMS
    found = {name: STORED[name] for name in STORED["shapes"]}
    assert {claim["id"]: (claim["claim"], claim["holds"]) for claim in STORED["claims"]} == {
        name: (claim, bool(holds(found))) for name, (claim, holds) in CLAIMS.items()}
    assert all((claim["processes"] > STORED["processes"] / 2) == claim["holds"] for claim in STORED["claims"])


def test_stored_verdicts_follow_from_the_stored_losses():
    from attention_variants import CLAIMS, METHODS
    from nano_runs import judge
    assert LOSSES["claims"] == judge(CLAIMS, LOSSES["runs"], list(METHODS))
    assert len(LOSSES["runs"]) == 15
    spoilt = [run | {"held_out": run["held_out"] + (run["method"] == "mla")} for run in LOSSES["runs"]]
    assert judge(CLAIMS, spoilt, list(METHODS))[0]["verdict"] == "shows the opposite"


def test_latent_is_black_on_sky():
    assert style.contrast(style.BLACK, style.SKY) >= 4.5
