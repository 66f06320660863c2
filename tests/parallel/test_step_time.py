"""The published figures of the full run from first principles, and how far the schedule explains the published step.

Tolerances are those of the published digits, or of the distance that the text of `plan` states.
"""

from collections import Counter

import pytest

from minidsv3.config import ModelConfig
from minidsv3.cost import training_flops
from minidsv3.parallel import step_time
from minidsv3.parallel.layout import Layout
from minidsv3.parallel.plan import REPORT
from minidsv3.parallel.schedule import Overlapped, dualpipe, one_f_one_b
from minidsv3.parallel.simulate import bubble, simulate
from minidsv3.parallel.step_time import (PUBLISHED, TABLE_4, chunk_flops, estimate, from_table_4, from_trace, links,
                                         optimiser_seconds, rates, stage_work)


def small(**changes) -> Layout:
    sizes = dict(config=ModelConfig.preset("nano"), gpus=4, pp=2, ep=2, micro_batches=8, sequence=256)
    return Layout(**{**sizes, **changes})


# ---- what a published step of 19.926 s amounts to -------------------------------------------------------------------


def test_the_published_step():
    """15,360 sequences of 4,096 tokens; 250.46 GFLOP a token, 281.2 if attention were not causal."""
    got = rates(REPORT, PUBLISHED.step_seconds)
    assert REPORT.tokens == 15360 * 4096
    assert got.tokens_per_day == pytest.approx(PUBLISHED.tokens_per_day, rel=1e-6)
    assert round(got.hours_per_trillion) == 180_176 and round(got.days_per_trillion, 3) == 3.666
    assert (round(got.tflops, 1), round(got.tflops_not_causal, 1)) == (386.1, 433.5)
    assert (round(got.mfu, 3), round(got.mfu_not_causal, 3)) == (0.390, 0.438)
    assert round(training_flops(REPORT.config).main / 1e9, 2) == 250.46


def test_published_and_derived_differ_by_less_than_half_a_percent():
    got = rates(REPORT, PUBLISHED.step_seconds)
    for name, published in vars(PUBLISHED).items():
        assert getattr(got, name) == pytest.approx(published, rel=0.01 if name == "days_per_trillion" else 0.005), name


def test_pre_training_of_the_report_is_14_8_times_180_k_hours():
    assert 14.8 * PUBLISHED.hours_per_trillion == pytest.approx(2_664_000)


@pytest.mark.parametrize("wrong", [dict(sequence=2048), dict(gpus=1024), dict(micro_batches=118)])
def test_the_published_step_is_of_that_layout_alone(wrong):
    """Mutation: a field of the layout that `rates` ignored would leave the figures as they are."""
    fields = dict(config=REPORT.config, gpus=2048, pp=16, ep=64, micro_batches=120, sequence=4096)
    got, want = (rates(Layout(**{**fields, **change}), PUBLISHED.step_seconds) for change in (wrong, {}))
    assert got.tokens_per_day != want.tokens_per_day


# ---- exchange -------------------------------------------------------------------------------------------------------


def test_rows_and_bytes_of_the_report_s_exchange():
    """3.47 copies cross with a limit of 4 nodes; a row is 7,168 codes with 56 scales one way and BF16 the other."""
    got = links(REPORT)
    assert got.between_rows == pytest.approx(3.47, abs=0.01)
    assert got.between_bytes == got.between_rows * 4096 * (7168 + 56 * 4 + 2 * 7168)
    assert got.seconds == got.between_seconds == got.between_bytes / 50e9
    assert got.inside_seconds == got.inside_bytes / 160e9
    assert links(REPORT, "bf16").between_bytes == got.between_rows * 4096 * 4 * 7168


def test_inside_one_node_only_nvlink_is_used():
    got = links(small())
    assert got.between_rows == got.between_seconds == 0 and 0 < got.inside_rows < 1
    assert links(small(ep=1)).seconds == 0


# ---- seconds of a chunk ---------------------------------------------------------------------------------------------


def test_flops_of_all_stages_are_the_model_s():
    """F and W multiply each weight once, I once and the up-projections again; attention 2 forward, 5 backward."""
    for layout in (REPORT, small()):
        config, sequence = layout.config, layout.sequence
        whole = Counter()
        for piece in layout.pieces:
            whole.update(chunk_flops(config, piece, sequence))
        flops = training_flops(config, sequence)
        layers = config.num_hidden_layers + config.num_nextn_predict_layers
        heads, latent = config.num_attention_heads, config.kv_lora_rank * (config.qk_nope_head_dim + config.v_head_dim)
        again = 2 * layers * heads * (config.q_lora_rank * config.qk_head_dim + latent)
        attention = layers * heads * (config.qk_head_dim + config.v_head_dim) * (sequence + 1) / 2
        assert sum(whole.values()) / sequence == pytest.approx(flops.total + again + attention, rel=1e-12)
        assert whole["F"] == pytest.approx(sequence * flops.total / 3, rel=1e-12)


def test_the_trace_is_met_where_it_was_taken():
    """Four MoE layers of 4,096 tokens: 35.9, 58.6, 35.1 and 129.0 ms. The layout's mean stage has 1 to 2 % more."""
    got = from_trace(REPORT)
    for mine, traced in zip(got[1:5], (0.0359, 0.0586, 0.0351, 0.1290)):
        assert traced < mine < 1.025 * traced
    assert 1.85 < from_trace(REPORT, "bf16").forward / got.forward < 2                         # attention stays


def test_table_4_over_the_order_s_counts():
    """97 to 103 blocks and 23 to 17 lone F, I and W a rank: a block takes 135 to 144 ms, the trace's 129."""
    counts = [Counter("F&B" if isinstance(action, Overlapped) else action.kind for action in order)
              for order in REPORT.orders]
    assert (min(count["F&B"] for count in counts), max(count["F&B"] for count in counts)) == (97, 103)
    assert {count["F"] + count["F&B"] for count in counts} == {120} == {
        count["I"] + count["B"] + count["F&B"] for count in counts}
    got = from_table_4(REPORT)
    assert 13.95 / 103 < got.overlapped < 13.95 / 97
    assert [round(1e3 * TABLE_4["F&B"] / blocks) for blocks in (103, 97)] == [135, 144]
    assert 1.05 < got.overlapped / 0.1290 < 1.12


def test_of_the_published_bubble_the_order_explains_1_0_to_1_4_seconds():
    """And the formula 1.3; 2.06 were measured. The rest is not explained, and not to be forced."""
    step = estimate(REPORT, from_table_4(REPORT), TABLE_4["optimiser"])
    assert 1.0 < min(step.timeline.idle) < max(step.timeline.idle) < 1.4
    assert bubble("DualPipe", 16, *step.durations[1:5]) == pytest.approx(1.345, abs=0.03)
    assert 0.6 < TABLE_4["bubble"] - max(step.timeline.idle) < 1.1
    busy = [step.timeline.makespan - idle for idle in step.timeline.idle]
    measured = sum(TABLE_4[name] for name in ("F", "I", "W", "F&B"))
    assert sum(busy) / len(busy) == pytest.approx(measured, rel=2e-3)


def test_the_trace_alone_predicts_the_step_ten_percent_short():
    step = estimate(REPORT, from_trace(REPORT), optimiser_seconds(REPORT))
    assert 0.87 < step.seconds / PUBLISHED.step_seconds < 0.93


def test_the_optimiser_by_hand():
    """Rank 0 sends most: all but the experts to 127 of 128 and to the mirrored rank, 6 bytes a value over 50 GB/s."""
    experts, rest = 528_482_304, 4_934_071_040 - 528_482_304
    assert optimiser_seconds(REPORT) == pytest.approx((rest * (1 - 1 / 256) + experts * 3 / 4) * 6 / 50e9, rel=1e-12)


def test_unequal_stages_are_seen():
    """The last stage has 2 MoE layers, the MTP module and two heads, and works 1.43 times the mean."""
    work = stage_work(REPORT)
    assert sum(work) == pytest.approx(16)
    assert [round(each, 2) for each in (work[0], work[1], work[15])] == [0.74, 0.99, 1.43]
    assert work[1:15] == pytest.approx([work[1]] * 14)


def test_unequal_stages_lengthen_the_bubble_beyond_the_published_one():
    """With times as our split's FLOPs ranks idle 1.0 to 3.0 s, and 2.06 are published: enough to be the reason, and
    no proof of it."""
    step = estimate(REPORT, from_table_4(REPORT), TABLE_4["optimiser"], stage_work(REPORT))
    assert min(step.timeline.idle) < TABLE_4["bubble"] < max(step.timeline.idle)
    even = estimate(REPORT, from_table_4(REPORT), TABLE_4["optimiser"], [1] * 16)
    assert even.timeline == estimate(REPORT, from_table_4(REPORT), TABLE_4["optimiser"]).timeline


def test_unequal_stages_by_hand():
    """1F1B on two ranks, two micro-batches, F 1 and B 2, the second stage three times as long:

        rank 0   F0 F1 . . . . . . . . B0 B0 ..              rank 1   . F0 F0 F0 B0 (6) F1 (3) B1 (6)
    """
    timeline = simulate(one_f_one_b(2, 2), stages=[1, 3])
    assert [(str(span.action), span.start, span.end) for span in timeline.spans[1]] == [
        ("Fa0", 1, 4), ("Ba0", 4, 10), ("Fa1", 10, 13), ("Ba1", 13, 19)]
    assert timeline.makespan == 21 and timeline.idle == [15, 3]
    block = simulate(dualpipe(2, 4), overlapped=2.4, stages=[1, 3]).spans[0][4]
    assert str(block.action) == "Fb1&Ba0" and block.end - block.start == pytest.approx(2.4 * (3 * 1 + 1 * 2) / 3)
    with pytest.raises(ValueError, match="stages has 1 entries; the orders work on 2 stages"):
        simulate(one_f_one_b(2, 2), stages=[1])
    with pytest.raises(ValueError, match="stages has -1"):
        simulate(one_f_one_b(2, 2), stages=[1, -1])


def test_seconds_must_be_positive():
    with pytest.raises(ValueError, match="a step of 0 seconds is none"):
        rates(REPORT, 0)


# ---- mutations ------------------------------------------------------------------------------------------------------

FOUND = chunk_flops


def without_recomputation(config, piece, sequence, precision="fp8"):
    flops = FOUND(config, piece, sequence, precision)
    return flops | {"I": flops["W"]}


def without_the_second_head(config, piece, sequence, precision="fp8"):
    flops = FOUND(config, piece, sequence, precision)
    head = 2 * piece.last * config.vocab_size * config.hidden_size * sequence
    return {phase: value - head for phase, value in flops.items()}


def lone_backwards_forgotten(action):
    return ["F&B"] if isinstance(action, Overlapped) else [action.kind.replace("B", "I")]


@pytest.mark.parametrize("name, wrong, test", [
    ("chunk_flops", without_recomputation, test_flops_of_all_stages_are_the_model_s),
    ("chunk_flops", without_the_second_head, test_flops_of_all_stages_are_the_model_s),
    ("_names", lone_backwards_forgotten, test_of_the_published_bubble_the_order_explains_1_0_to_1_4_seconds),
    ("TRACE_LAYERS", 3, test_the_trace_is_met_where_it_was_taken),
    ("TABLE_4", TABLE_4 | {"F&B": 12.0}, test_table_4_over_the_order_s_counts),
    ("NODE", 256, test_the_optimiser_by_hand)])
def test_mutations_are_seen(monkeypatch, name, wrong, test):
    monkeypatch.setattr(step_time, name, wrong)
    if name in globals():
        monkeypatch.setitem(globals(), name, wrong)
    with pytest.raises(AssertionError):
        test()
