"""The GPU benchmarks' arithmetic, and what they refuse; their numbers are taken by hand on a GPU that is alone."""

import pytest
import torch

from minidsv3 import bench_kernels, bench_training
from minidsv3.bench_kernels import call, copies_of_inputs, traffic
from minidsv3.kernels.registry import OPERATIONS

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")


def test_traffic_counts_inputs_outputs_and_gradients_once_each_way():
    norm = OPERATIONS["rms_norm"]
    inputs = norm.cases["7 x 24"](torch.float32)
    x, weight = 4 * 7 * 24, 4 * 24
    assert traffic(norm, inputs, backward=False) == x + weight + x
    # forward, the same again with dy in y's place, and the gradients of both inputs
    assert traffic(norm, inputs, backward=True) == 2 * (x + weight + x) + x + weight


def test_what_comes_back_as_it_went_in_was_not_moved():
    """`Routing` carries its logits along."""
    routing = OPERATIONS["route"]
    logits, bias = routing.cases["one token"](torch.float32)
    result = routing.function(logits, bias, **routing.options)
    moved = sum(y.nbytes for y in result if y is not logits)
    assert traffic(routing, (logits, bias), backward=False) == logits.nbytes + bias.nbytes + moved


def test_small_inputs_are_copied_until_they_cannot_lie_in_the_cache(monkeypatch):
    monkeypatch.setattr(bench_kernels, "INPUTS", 1000)
    assert len(copies_of_inputs(lambda: (torch.zeros(50), 3), "cpu")) == 5
    assert len(copies_of_inputs(lambda: (torch.zeros(5000), 3), "cpu")) == 1
    assert len(copies_of_inputs(lambda: (torch.zeros(1), 3), "cpu")) == bench_kernels.MOST_COPIES


def test_a_timed_backward_gives_all_gradients():
    norm = OPERATIONS["rms_norm"]
    x, weight = norm.cases["7 x 24"](torch.float64)
    y, (dx, dw) = norm.function(x, weight, 1e-6), call(norm, norm.function, (x, weight), backward=True)()
    assert torch.equal(dx, torch.autograd.grad(y.sum(), x, retain_graph=True)[0])
    assert torch.equal(dw, torch.autograd.grad(y.sum(), weight)[0])


@no_gpu
@pytest.mark.parametrize("bench", [bench_kernels.bench_kernels, bench_training.bench_training])
def test_without_a_gpu_nothing_is_measured(bench, tmp_path):
    with pytest.raises(ValueError, match="needs a CUDA device"):
        bench(tmp_path / "out.json")
    assert not list(tmp_path.iterdir())


def test_an_unknown_operation_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="no operation softmax; there are rms_norm"):
        bench_kernels.bench_kernels(tmp_path / "out.json", ["softmax"])


def test_both_sides_of_the_training_benchmark_have_the_same_parameters():
    with torch.device("meta"):
        ours, theirs = bench_training.Transformer(bench_training.mini(0)), bench_training.peer("sdpa", "eager")
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) == 1_242_793_984
    assert not ours.mtp_modules
