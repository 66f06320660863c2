"""The plan: what shapes say is what the real objects hold, to the byte; and what the command prints."""

import time

import pytest
import torch.distributed as dist
from typer.testing import CliRunner

from minidsv3.cli import app
from minidsv3.config import ModelConfig
from minidsv3.cost import parameters
from minidsv3.parallel import built as building
from minidsv3.parallel import memory as bytes_of
from minidsv3.parallel import mesh as meshes
from minidsv3.parallel.built import build
from minidsv3.parallel.layout import Layout
from minidsv3.parallel.memory import SLOTS, memory
from minidsv3.parallel.places import copied_weights
from minidsv3.parallel.plan import REPORT, kinds, plan
from minidsv3.parallel.plan_text import plan_lines
from minidsv3.parallel.schedule import ORDERS

SMALL = {"nano": dict(gpus=8, pp=2, ep=2, micro_batches=8, sequence=256),
         "mini": dict(gpus=64, pp=4, ep=8, micro_batches=16)}


def small(preset: str = "nano", **changes) -> Layout:
    return Layout(config=ModelConfig.preset(preset), **{**SMALL[preset], **changes})


# ---- shapes against objects -----------------------------------------------------------------------------------------


def compare(layout: Layout, gpu: int, precision: str = "fp8") -> None:
    """Values, experts, optimiser state, gradients and receive buffers of one GPU, computed and counted."""
    found, computed = build(layout, gpu, precision), memory(layout, gpu // layout.dp, precision, gpu % layout.dp)
    assert found.pipeline_rank == gpu // layout.dp
    assert (found.parameters, found.experts) == (computed.parameters, computed.experts)
    assert found.masters + found.moments == computed.optimiser
    assert found.gathered == computed.gradients                       # FP32, and of everything that is learned
    arriving = sum((not piece.first) + (not piece.last) for piece in layout.held(found.pipeline_rank))
    assert bool(arriving) <= found.waiting <= SLOTS * arriving


@pytest.mark.parametrize("gpu", [0, 128, 2047, 7 * 128 + 127], ids=["edge", "inner", "last", "last of its data ranks"])
def test_the_full_layout_is_what_shapes_say(gpu):
    compare(REPORT, gpu)


@pytest.mark.parametrize("precision", ["fp8", "bf16"])
@pytest.mark.parametrize("preset", SMALL)
@pytest.mark.parametrize("schedule", ORDERS)
def test_every_schedule_is_what_shapes_say(schedule, preset, precision):
    layout = small(preset, schedule=schedule)
    for gpu in (0, layout.dp, layout.gpus - 1):
        compare(layout, gpu, precision)


def test_more_copies_of_an_expert_than_experts_on_a_gpu():
    """edp 4 and one expert on each GPU: experts are cut by rows, so every copy holds a quarter of it."""
    layout = small(gpus=128, pp=2, ep=16)
    for gpu in (0, layout.dp - 1):
        compare(layout, gpu)


def test_dualpipev_of_the_full_model():
    """8 ranks with 16 stages: 764 actions at the edge, 1,234 on an inner rank that is not next to it."""
    layout = Layout(config=REPORT.config, gpus=2048, pp=8, ep=64, micro_batches=120, schedule="dualpipev")
    assert [build(layout, rank * layout.dp).actions for rank in (0, 5)] == [764, 1234]
    compare(layout, 5 * layout.dp)


def test_all_16_ranks_add_up_to_the_published_number():
    """By hub names, on the built objects: each stage stands on two ranks, everything else once, MTP's layer is 61."""
    held: dict[str, list[int]] = {}
    for rank in range(16):
        for name, values in build(REPORT, rank * REPORT.dp).tensors.items():
            held.setdefault(name, []).append(values * (REPORT.ep if ".mlp.experts." in name else 1))
    assert all(len(copies) == 2 and copies[0] == copies[1] for copies in held.values())
    mtp = sum(copies[0] for name, copies in held.items() if name.startswith("model.layers.61."))
    assert sum(copies[0] for copies in held.values()) - mtp == 671_026_419_200 == parameters(REPORT.config).main
    assert mtp == parameters(REPORT.config).mtp == 11_610_068_224
    assert REPORT.copies == [("stages that two mirrored ranks hold", 671_026_419_200 + mtp)]


@pytest.mark.parametrize("schedule", ORDERS)
def test_listed_copies_are_those_that_the_engine_sums(schedule):
    layout = small(schedule=schedule, ep=1)
    names = copied_weights(layout.config, schedule, layout.pp)
    values: dict[str, int] = {}
    for rank in range(layout.pp):
        values |= build(layout, rank * layout.dp).tensors
    biases = sum(count for name, count in values.items() if name.endswith("bias")) if schedule == "dualpipe" else 0
    assert sum(values[name] for name in names) + biases == sum(count for _, count in layout.copies)


def test_no_process_group_is_left_and_none_is_disturbed():
    build(small(), 0)
    assert not dist.is_initialized()
    with pytest.raises(ValueError, match="rank is 8; it must be one of 0 to 7"):
        build(small(), 8)
    assert not dist.is_initialized()


# ---- mutations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place, name, wrong", [
    (meshes, "spread_experts", lambda *everything: None),
    (building, "parallelise", lambda stage, mesh: None),
    (bytes_of, "piece_of", lambda length, pieces, index: length // pieces),
    (bytes_of, "MASTER", 2),
    (bytes_of, "SLOTS", 0),
    (building, "KINDS", {4: building.KINDS[8], 8: building.KINDS[8]})])
def test_the_comparison_sees(monkeypatch, place, name, wrong):
    monkeypatch.setattr(place, name, wrong)
    if name == "SLOTS":
        monkeypatch.setitem(globals(), name, wrong)
    with pytest.raises(AssertionError):
        compare(REPORT, 128)


# ---- the plan and its text ------------------------------------------------------------------------------------------


def test_kinds_of_ranks():
    assert kinds(REPORT) == [[0, 15], list(range(1, 15))]
    assert kinds(small("mini", schedule="1f1b")) == [[0], [1], [2], [3]]      # fewer chunks in flight from rank to rank
    assert kinds(small(pp=1, gpus=2, micro_batches=2, schedule="1f1b")) == [[0]]


def test_the_report_s_plan():
    got = plan(REPORT)
    assert [kind.ranks for kind in got.ranks] == [[0, 15], list(range(1, 15))]
    assert all(kind.agrees(precision) for kind in got.ranks for precision in ("fp8",))
    assert [step.durations.source for step in got.steps] == ["the public trace, scaled by FLOPs",
                                                             "table 4 of arXiv 2505.09343"]
    assert max(kind.memory["fp8"].total for kind in got.ranks) < 80e9 < max(
        kind.memory["bf16"].total for kind in got.ranks)


def test_one_gpu_alone():
    got = plan(REPORT, gpu=300)
    (kind,) = got.ranks
    assert (kind.ranks, kind.built.gpu, kind.built.pipeline_rank) == ([2], 300, 2) and kind.agrees("fp8")


def test_other_layouts_have_no_published_figures():
    got = plan(small(), "fp32")
    assert len(got.steps) == 1
    text = "\n".join(plan_lines(got))
    assert all(words not in text for words in ("published", "as our engine"))
    assert all(words in text for words in ("smaller products", "MB (10^6 bytes)"))


@pytest.mark.parametrize("arguments, words", [
    (dict(precision="int8"), "precision is 'int8'"), (dict(gpu=-1), "there is no GPU -1"),
    (dict(gpu=2048), "there is no GPU 2048; the layout has GPUs 0 to 2047")])
def test_wrong_plans_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        plan(REPORT, **arguments)


def test_the_text_says_if_shapes_and_objects_differ(monkeypatch):
    assert "Values and optimiser are what shapes say" in "\n".join(plan_lines(plan(small())))
    monkeypatch.setattr(bytes_of, "MASTER", 2)
    assert "ARE NOT what shapes say" in "\n".join(plan_lines(plan(small())))


# ---- the command ----------------------------------------------------------------------------------------------------


def call(*arguments: str):
    return CliRunner().invoke(app, ["plan", *arguments])


def test_the_command_plans_the_report_s_layout_in_under_ten_seconds():
    began = time.process_time()
    result = call("--preset", "full", "--pp", "16", "--ep", "64", "--gpus", "2048")
    assert time.process_time() - began < 10
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["values", "held", "4,934,071,040", "3,273,263,104", "built"] in lines
    for words in ("671,026,419,200 values of the main model", "682,636,487,424 once more", "180,000", "19.93",
                  "what stays unexplained", "62,914,560 tokens a step"):
        assert words in result.stdout
    assert all(len(line) <= 120 for line in result.stdout.splitlines())


def test_small_layouts_take_batch_and_length_from_their_recipe():
    result = call("--preset", "nano", "--pp", "2", "--ep", "2", "--gpus", "4", "--precision", "fp32")
    assert result.exit_code == 0, result.output
    assert "4 micro-batches of one sequence of 256 tokens" in result.stdout


@pytest.mark.parametrize("arguments, words", [
    (["--pp", "15"], "2048 GPUs do not divide into pp = 15"), (["--micro-batches", "24"], "it needs at least 32"),
    (["--schedule", "gpipe"], "schedule is 'gpipe'"), (["--preset", "huge"], "there is no preset 'huge'"),
    (["--precision", "int4"], "precision is 'int4'"), (["--rank", "5000"], "there is no GPU 5000"),
    (["--gpus", str(16 * 7 * 64)], "a batch of 15360 sequences cannot be shared out over 448 pipelines"),
    (["--preset", "nano"], "a batch of 8 sequences cannot be shared out over 128 pipelines"),
    (["--pp", "0"], "pp is 0"),
    (["--preset", "nano", "--gpus", "16", "--ep", "1", "--schedule", "1f1b"], "6 layers cannot be cut into 16 stages")])
def test_wrong_commands_are_refused_in_a_sentence(arguments, words):
    result = call(*arguments)
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.exit_code == 1 and words in line and "Traceback" not in result.output
