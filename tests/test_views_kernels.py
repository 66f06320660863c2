"""Chapter 05's view and pictures without a browser: numbers by counting, the package's order, rules of drawings."""

import time
from itertools import combinations

import pytest
import torch
from pictures import check_picture
from test_views import check_rules

from minidsv3.kernels.backend import INTERPRETED, tl, triton
from minidsv3.kernels.fp8_gemm import place
from minidsv3.kernels.registry import OPERATIONS
from minidsv3.views import kernels, roofline, style
from minidsv3.views import tile_stepper as stepper

START = stepper.stepper_state()
STATES = {
    "row by row": START, "grouped": START | {"order": "groups of 4 rows"},
    "last": START | {"row": 31, "column": 63, "step": 15, "processors": 64}, "first": START | {"row": 0, "column": 0,
                                                                                              "step": 0},
    "small tiles": START | {"tile_m": 32, "tile_n": 32, "row": 31, "column": 63, "processors": 64, "step": 15},
    "small tiles, grouped": START | {"tile_m": 32, "tile_n": 32, "order": "groups of 8 rows", "processors": 64},
    "large tiles": START | {"tile_m": 256, "tile_n": 256, "order": "groups of 8 rows", "processors": 64},
    "wide tiles": START | {"tile_m": 64, "tile_n": 256, "processors": 4},
}


# ---- numbers --------------------------------------------------------------------------------------------------------

def test_a_step_by_hand():
    facts = stepper.tile_stepper_facts(START)
    assert facts["step_bytes"] == 2 * 128 * 128 + 4 * (128 + 1)
    assert facts["step_flops"] == 2 * 128 ** 3 and facts["flops_a_byte"] == 126
    assert facts["asked_bytes"] == 128 * 2 * 128 * 2048 and facts["least_bytes"] == (1024 + 2048) * 2048
    assert facts["accumulator_bytes"] == 65_536 and facts["programs"] == 128 and facts["program"] == 3 * 16 + 5


def test_a_wave_as_a_stripe_and_as_a_square():
    """16 programs at once: 1 + 16 bands as a row, 4 + 4 as a square; eight waves of them."""
    facts = {name: stepper.tile_stepper_facts(STATES[name]) for name in ("row by row", "grouped")}
    assert facts["row by row"]["memory_bytes"] == 8 * 17 * 128 * 2048
    assert facts["grouped"]["memory_bytes"] == 8 * 8 * 128 * 2048


def counted_by_programs(state: dict) -> int:
    """Bytes from memory, program by program: what no program of the same wave has read before is read."""
    grid, tiles = stepper.grid_of(state), {}
    for row in range(grid.rows):
        for column in range(grid.columns):
            tiles[grid.number(row, column)] = row, column
    total, wave = 0, set()
    for program in range(len(tiles)):
        if program % state["processors"] == 0:
            wave = set()
        row, column = tiles[program]
        for band, size in ((("A", row), state["tile_m"]), (("B", column), state["tile_n"])):
            total += 0 if band in wave else size * stepper.K
            wave.add(band)
    return total


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_bytes_from_memory_are_those_of_a_walk_through_all_programs(state):
    assert stepper.memory_bytes(state) == counted_by_programs(state)
    facts = stepper.tile_stepper_facts(state)
    assert facts["least_bytes"] <= facts["memory_bytes"] <= facts["asked_bytes"]


@pytest.mark.parametrize("group", stepper.ORDERS.values())
@pytest.mark.parametrize("rows, columns", [(8, 16), (6, 5), (1, 4)])
def test_tiles_and_numbers_are_inverses(rows, columns, group):
    grid = stepper.Grid(rows, columns, group)
    assert [grid.number(*tile) for tile in grid.tiles(0, rows * columns + 3)] == list(range(rows * columns))


@triton.jit
def _places(ROW, COLUMN, rows, columns, BAND: tl.constexpr):
    t = tl.program_id(0)
    i, j = place(t, rows, columns, BAND)
    tl.store(ROW + t, i)
    tl.store(COLUMN + t, j)


@pytest.mark.skipif(not INTERPRETED, reason="runs the numbering in the interpreter")
@pytest.mark.parametrize("group", [1, 4])
def test_the_order_is_the_package_s(group):
    found = torch.empty(2, 42, dtype=torch.int32)
    _places[(42,)](*found, 6, 7, BAND=group)
    assert list(zip(*found.tolist())) == list(stepper.Grid(6, 7, group).tiles(0, 42))


def test_what_the_stepper_teaches():
    def facts(**changes):
        return stepper.tile_stepper_facts(START | changes)
    assert facts(order="groups of 4 rows")["memory_bytes"] < facts()["memory_bytes"] / 2
    assert facts(order="groups of 4 rows")["asked_bytes"] == facts()["asked_bytes"]
    assert facts(tile_m=256, tile_n=256)["flops_a_byte"] == 252
    assert facts(tile_m=256, tile_n=256)["accumulator_bytes"] == stepper.REGISTERS
    assert facts(tile_n=256)["weight_scales"] == 2 and facts(tile_n=32)["weight_scales"] == 1


# ---- the drawing ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_stepper_keeps_the_rules(state):
    drawn = stepper.render_tile_stepper(state)
    check_rules(drawn)
    assert drawn == stepper.render_tile_stepper(dict(state))
    begin = time.process_time()
    for _ in range(5):
        stepper.render_tile_stepper(state)
    assert (time.process_time() - begin) / 5 < 0.05


def test_states_look_different():
    drawn = [stepper.render_tile_stepper(state) for state in STATES.values()]
    assert all(one != other for one, other in combinations(drawn, 2))


def test_the_drawing_says_its_numbers():
    drawn = stepper.render_tile_stepper(START)
    for words in ("Program 53 of 128", "33,284 bytes", "126 FLOP a byte", "128 scales of A, x 1 of B", "5.7 times"):
        assert words in drawn
    assert "none left" in stepper.render_tile_stepper(STATES["large tiles"]) and "none left" not in drawn


def test_runs_are_stretches_of_neighbours():
    assert stepper.runs([(0, 3), (0, 1), (0, 2), (1, 0), (0, 5)]) == {0: [(1, 4), (5, 6)], 1: [(0, 1)]}


def test_fills_differ_without_colour():
    fills = (stepper.DONE, stepper.SHARED, stepper.LIVE, style.Fill(style.WHITE), style.Fill(style.VERMILION))
    for a, b in combinations(fills, 2):
        assert a.mark != b.mark or abs(style.luminance(a.colour) - style.luminance(b.colour)) > 0.15
    for a, b in combinations(kernels.PROGRAMS, 2):
        assert a.mark != b.mark


def test_stepper_moves_in_code():
    view = stepper.tile_stepper()
    assert view.state == START
    view.set(order="groups of 8 rows", tile_m=64)
    assert view.drawing.value == stepper.render_tile_stepper(view.state)
    assert f"<td>{view.facts()['memory_bytes']:,}</td>" in view.table()
    with pytest.raises(ValueError, match="tile_m cannot be 48"):
        view.set(tile_m=48)
    with pytest.raises(ValueError, match="depth is no control of the tile stepper"):
        stepper.stepper_state(depth=3)


# ---- the stored measurement -----------------------------------------------------------------------------------------

def line(operation: str, shape: str, bytes: int, flops: float | None, backward: bool = False, **ms) -> dict:
    return {"operation": operation, "shape": shape, "pass": "forward and backward" if backward else "forward",
            "bytes": bytes, "flops": flops, "ms": ms}


SAMPLE = {                              # made up; round numbers, so that floors can be checked by hand
    "machine": {"gpu": "a GPU"}, "command": "", "ceilings": {"copy_gb_s": 4000.0, "bf16_tflops": 500.0,
                                                            "fp8_tflops": 1000.0},
    "entries": [
        line("rms_norm", "small", 4_000_000, None, minidsv3=0.002, eager=0.02, compiled=0.001),
        line("rms_norm", "large", 400_000_000, None, minidsv3=0.125, eager=1.0),
        line("rms_norm", "large", 800_000_000, None, backward=True, minidsv3=0.4),
        line("fp8_gemm", "few tokens", 120_000_000, 1.2e10, minidsv3=0.04, cuBLASLt="ValueError: not here"),
        line("fp8_gemm", "many tokens", 250_000_000, 1e12, minidsv3=1.25, cuBLASLt=1.0),
        line("mla_attention", "causal", 500_000_000, 5e11, minidsv3=2.0, cuDNN=1.6),
        line("route", "no kernel here", 1000, None, minidsv3="RuntimeError: no", eager=1.0)]}


def test_floors_are_bytes_or_flops_whichever_takes_longer():
    norm, large, both, few, many, attention = roofline.entries(SAMPLE)
    assert [norm.floor, large.floor, both.floor] == pytest.approx([0.001, 0.1, 0.2])
    assert few.floor == pytest.approx(0.03) and many.floor == pytest.approx(1.0)
    assert attention.floor == pytest.approx(1.0)                                # FLOPs at BF16's ceiling
    assert [large.fraction, few.fraction, many.fraction] == pytest.approx([0.8, 0.75, 0.8])
    assert few.intensity == pytest.approx(100) and few.tflops == pytest.approx(300) and norm.tflops is None


def test_a_failed_contender_is_left_out():
    found = roofline.entries(SAMPLE)
    assert len(found) == 6 and found[3].best_peer is None and found[0].best_peer == "compiled"
    assert found[2].name == "rms norm, forward + backward"


def test_ridges_and_the_largest_of_each():
    assert roofline.ridge(SAMPLE) == 250 and roofline.ridge(SAMPLE, "mla_attention") == 125
    assert [(entry.operation, entry.shape) for entry in roofline.largest(roofline.entries(SAMPLE))] == [
        ("rms_norm", "large"), ("rms_norm", "large"), ("fp8_gemm", "many tokens"), ("mla_attention", "causal")]


def test_the_tokens_axis_is_the_registry_s_product():
    operation = OPERATIONS["fp8_gemm"]
    for tokens in (64, 4096):
        with torch.device("meta"):
            inputs = operation.shapes[f"{tokens} x 7168 x 16384"]()
        moved = sum(x.nbytes for x in inputs if isinstance(x, torch.Tensor)) + 2 * tokens * 7168
        assert roofline.product_intensity(tokens) == pytest.approx(operation.flops(*inputs) / moved)


# ---- pictures -------------------------------------------------------------------------------------------------------

PICTURES = {
    "blocks": lambda: kernels.blocks([i // 8 for i in range(27)], 8),
    "work": lambda: kernels.tile_work([1, 4, 16, 64, 256, 512], {"FP8": 1, "BF16": 2}, {"a GPU": 400.0}, 256),
    "pipelines": lambda: kernels.pipelines({1: [(0, 3, 3, 4), (4, 7, 7, 8)], 2: [(0, 3, 3, 4), (0, 3, 4, 5)]}),
    "states": lambda: stepper.tile_stepper_states({"rows": START, "groups": STATES["grouped"]}),
    "roofline": lambda: roofline.roofline(SAMPLE), "fractions": lambda: roofline.fractions(SAMPLE),
}


@pytest.mark.parametrize("make", PICTURES.values(), ids=PICTURES)
def test_pictures_keep_the_rules(make):
    check_picture(make, smallest=9)


@pytest.mark.parametrize("draw", PICTURES.values(), ids=PICTURES)
def test_texts_of_a_picture_do_not_overlap(draw):
    picture = draw()
    picture.png()
    for axes in picture.axes:
        extents = [text.get_window_extent() for text in axes.texts if text.get_text()]
        assert not [pair for pair in combinations(extents, 2) if pair[0].overlaps(pair[1])]
