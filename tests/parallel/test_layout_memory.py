"""Layouts are refused or add up to the model; bytes follow the shapes, the published counts and hand calculations."""

import pytest

from minidsv3.config import ModelConfig
from minidsv3.cost import parameters
from minidsv3.parallel import layout as layouts
from minidsv3.parallel import memory as bytes_of
from minidsv3.parallel.layout import Layout
from minidsv3.parallel.memory import kept_by_layer, memory, peak
from minidsv3.parallel.schedule import ORDERS
from minidsv3.parallel.simulate import simulate

FULL = ModelConfig.preset("full")
GB = 1e9


def layout(preset: str = "full", **changes) -> Layout:
    """The report's layout, or a small one on 4 GPUs."""
    sizes = {"full": dict(gpus=2048, pp=16, ep=64, micro_batches=120),
             "mini": dict(gpus=16, pp=4, ep=4, micro_batches=16), "nano": dict(gpus=4, pp=2, ep=2, micro_batches=8)}
    return Layout(**{"config": ModelConfig.preset(preset), **sizes[preset], **changes})


# ---- who holds what -------------------------------------------------------------------------------------------------


def test_the_report_s_layout():
    got = layout()
    assert (got.dp, got.edp, got.tokens) == (128, 2, 15360 * 4096)
    assert [len(piece.layers) for piece in got.pieces] == [3] + [4] * 14 + [2]
    assert [piece.stage for piece in got.held(3)] == [3, 12]
    assert [piece.stage for piece in layout(pp=8, schedule="dualpipev").held(3)] == [3, 12]
    assert [piece.stage for piece in layout(schedule="1f1b").held(3)] == [3]


def held_by_all(got: Layout) -> int:
    """Values on all pipeline ranks, each expert once."""
    return sum(weight.size * weight.copies * (got.ep if weight.part == "routed" else 1)
               for rank in range(got.pp) for weight in got.weights(rank))


@pytest.mark.parametrize("preset", ["full", "mini", "nano"])
@pytest.mark.parametrize("schedule", ORDERS)
def test_all_ranks_hold_the_model_and_the_copies(preset, schedule):
    got = layout(preset, schedule=schedule)
    assert held_by_all(got) - sum(values for _, values in got.copies) == parameters(got.config).total


def test_all_ranks_hold_the_published_number():
    got = layout()
    assert held_by_all(got) == 2 * (671_026_419_200 + 11_610_068_224)
    assert got.copies == [("stages that two mirrored ranks hold", 671_026_419_200 + 11_610_068_224)]
    assert layout(schedule="1f1b").copies == [("the embedding, at the last stage, where MTP reads it", 926_679_040)]
    assert layout(pp=8, schedule="dualpipev").copies == []


@pytest.mark.parametrize("preset, changes, words", [
    ("full", dict(pp=15), "2048 GPUs do not divide into pp = 15"),
    ("full", dict(ep=48), "ep is 48; it must divide gpus / pp = 128"),
    ("full", dict(gpus=16 * 96, ep=96), "ep is 96; it must divide the 256 routed experts"),
    ("full", dict(micro_batches=0), "micro_batches is 0"),
    ("full", dict(micro_batches=30), "it needs at least 32"),
    ("full", dict(gpus=15 * 128, pp=15), "15 ranks; it needs an even number"),
    ("full", dict(schedule="gpipe"), "schedule is 'gpipe'"),
    ("full", dict(pp=64, gpus=64 * 64, micro_batches=128), "61 layers cannot be cut into 64 stages"),
    ("nano", dict(pp=4, ep=1, schedule="dualpipev"), "6 layers cannot be cut into 8 stages"),
    ("full", dict(config=FULL.replace(n_routed_experts=72), gpus=16 * 9, ep=9), "ep is 9; it must stand on 2 nodes"),
    ("nano", dict(sequence=2.5), "sequence is 2.5")])
def test_wrong_layouts_are_refused(preset, changes, words):
    with pytest.raises(ValueError, match=words):
        layout(preset, **changes)


# ---- bytes ----------------------------------------------------------------------------------------------------------


def test_parameters_of_an_inner_rank():
    """Eight MoE layers with 4 of 256 experts each: 3.273 B values, 1.409 B of them experts."""
    got = memory(layout(), 1)
    layer = 187_107_328 + 4 * 44_040_192 + 44_040_192 + 256 * 7168 + 256 + 2 * 7168
    assert (got.parameters, got.experts) == (8 * layer, 8 * 4 * 44_040_192)
    assert got.gradients == 4 * (got.parameters - 8 * 256)
    assert round(got.parameters / GB, 3) == 3.273 and round(got.gradients / GB, 1) == 13.1
    assert memory(layout(), 1, "bf16").weights == 2 * got.parameters + 2 * 8 * 256      # biases stay FP32


def test_the_optimiser_is_sharded_over_all_replicas():
    """2.88 GB of master weights and as much of BF16 moments: experts over edp = 2, everything else over dp = 128."""
    inner = memory(layout(), 1)
    experts, rest = inner.experts / 2, (inner.parameters - inner.experts) / 128
    assert inner.optimiser == pytest.approx(8 * (experts + rest), rel=2e-4)              # 576 rows over 128 ranks: 5
    assert round(inner.optimiser / 2 / GB, 2) == 2.88
    assert memory(layout(), 1, "bf16").optimiser == inner.optimiser / 8 * 12             # FP32 moments


def test_edge_ranks_hold_both_ends_of_the_model():
    edge = memory(layout(), 0)
    assert memory(layout(), 15) == edge
    layer = memory(layout(), 1).parameters // 8
    mtp = 2 * 7168 ** 2 + 3 * 7168
    assert edge.parameters == 3 * 583_483_392 + 3 * layer + 2 * 926_679_040 + 7168 + mtp


def test_what_a_layer_keeps_by_hand():
    """One token, an MoE layer at full size, in bytes: residual stream twice, latents, attention, experts."""
    bf16 = 2 * 7168 * 2 + 2112 * 2 + 16384 * 2 + 128 * 4 + 256 * 4 + 8 * 7168 * 2 + 9 * 2 * 2048 * 2
    fp8 = (2 * 7168 * 2 + 2112 * 2 + 16384 * 3 // 2 + 128 * 4 + 128 * 4 + 256 * 4
           + 8 * (7168 + 56 * 4) + 9 * 2 * (2048 + 16 * 4))
    assert [sum(kept.bytes(name) for kept in kept_by_layer(FULL, moe=True)) for name in ("bf16", "fp8")] == [bf16, fp8]
    dense = 2 * 7168 * 2 + 2112 * 2 + 16384 * 2 + 128 * 4 + 2 * 18432 * 2
    assert sum(kept.bytes("bf16") for kept in kept_by_layer(FULL, moe=False)) == dense


def test_fp8_is_what_makes_the_report_s_layout_fit():
    """An H800 has 80 GB. With BF16 caches the inner ranks would not fit; with FP8 and recomputation they do."""
    assert memory(layout(), 1).total < 80 * GB < memory(layout(), 1, "bf16").total


@pytest.mark.parametrize("schedule", ORDERS)
def test_chunks_in_flight_are_the_simulator_s(schedule):
    got = layout(pp=8, gpus=1024, schedule=schedule)
    assert [memory(got, rank).in_flight for rank in range(8)] == simulate(got.orders).in_flight


def test_the_peak_counts_each_stage_with_its_own_size():
    """Rank 0 of 2: Fa0 Fb0 Fa1 Bb0, then blocks of one forward and one backward. Never two of stage 1."""
    order = layout("nano").orders[0]
    assert [str(action) for action in order[:5]] == ["Fa0", "Fb0", "Fa1", "Bb0", "Fb1&Ba0"]
    assert peak(order, {0: 1, 1: 1}) == (3, 3)
    assert peak(order, {0: 10, 1: 1}) == (3, 21) and peak(order, {0: 1, 1: 10}) == (3, 12)


def skip_scales(kept, precision):
    return kept.rows * (kept.width * bytes_of.BITS[precision][kept.kind] // 8)


def whole_experts(self, rank):
    return [weight for piece in self.held(rank)
            for weight in layouts.piece_weights(self.config, piece, shared_embedding=True)]


def own_embedding(config, piece, shared_embedding):
    return PIECE_WEIGHTS(config, piece, shared_embedding=False)


PIECE_WEIGHTS = layouts.piece_weights


@pytest.mark.parametrize("place, name, wrong, test", [
    (bytes_of.Kept, "bytes", skip_scales, test_what_a_layer_keeps_by_hand),
    (Layout, "weights", whole_experts, test_parameters_of_an_inner_rank),
    (layouts, "piece_weights", own_embedding, test_edge_ranks_hold_both_ends_of_the_model),
    (layouts, "piece_weights", own_embedding, test_all_ranks_hold_the_published_number),
    (bytes_of, "MASTER", 0, test_the_optimiser_is_sharded_over_all_replicas),
    (Layout, "edp", 1, test_the_optimiser_is_sharded_over_all_replicas)])
def test_mutations_are_seen(monkeypatch, place, name, wrong, test):
    monkeypatch.setattr(place, name, wrong)
    with pytest.raises(AssertionError):
        test()


@pytest.mark.parametrize("arguments, words", [
    (dict(rank=16), "there is no pipeline rank 16; ranks count from 0 to 15"),
    (dict(rank=0, data_rank=128), "there is no data rank 128"),
    (dict(rank=0, precision="int8"), "precision is 'int8'")])
def test_wrong_questions_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        memory(layout(), **arguments)
