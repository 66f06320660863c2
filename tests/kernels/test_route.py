"""The router beyond the registry's cases: other options, exact ties, NaN, negative biases, refusals; and mutations."""

import importlib

import pytest
import torch

from compare import assert_alike
from minidsv3.kernels import route, route_reference, use_kernels
from minidsv3.kernels.backend import INTERPRETED, tl, triton

DEVICE = "cpu" if INTERPRETED else "cuda"
FILE = importlib.import_module("minidsv3.kernels.route")
FULL = {"n_group": 8, "topk_group": 4, "top_k": 8, "scaling_factor": 2.5}
OPTIONS = {
    "no groups": (20, {"n_group": 1, "topk_group": 1, "top_k": 3}),
    "no limit": (24, {"n_group": 4, "topk_group": 4, "top_k": 5}),
    "five groups of three, three kept": (15, {"n_group": 5, "topk_group": 3, "top_k": 6}),
    "one group kept, all of it taken": (12, {"n_group": 3, "topk_group": 1, "top_k": 4}),
    "one expert": (8, {"n_group": 4, "topk_group": 2, "top_k": 1, "normalise": False}),
    "not normalised": (16, {"n_group": 4, "topk_group": 2, "top_k": 4, "normalise": False, "scaling_factor": 0.5}),
    "full": (64, FULL),
}
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]


def inputs(tokens: int, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(tokens, experts, device=DEVICE), torch.randn(experts, device=DEVICE)


def results(function, logits: torch.Tensor, bias: torch.Tensor, **options) -> list[torch.Tensor]:
    """Experts, weights, load and the gradient of the logits."""
    logits = logits.detach().requires_grad_()
    with use_kernels("triton"):
        routing = function(logits, bias, **options)
    slope = torch.randn(routing.weights.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    gradient, = torch.autograd.grad(routing.weights, logits, slope)
    return [routing.experts, routing.weights.detach(), routing.load, gradient]


def assert_same(logits: torch.Tensor, bias: torch.Tensor, **options) -> None:
    """Kernel against definition: experts and load exactly, weights and gradient within 1e-5 of the largest."""
    assert_alike(results(route, logits, bias, **options), results(route_reference, logits, bias, **options), 1e-5)


@pytest.mark.parametrize("experts, options", OPTIONS.values(), ids=OPTIONS)
def test_kernel_equals_definition(experts, options):
    assert_same(*inputs(19, experts), **options)


def test_by_hand():
    """Affinities 0.5, 0.6, 0.7, 0.8 and a bias that lifts the first over the second: the weights know no bias."""
    s = torch.tensor([[0.5, 0.6, 0.7, 0.8]], device=DEVICE)
    experts, weights, load, _ = results(route, s.logit(), torch.tensor([0.15, 0, 0, 0], device=DEVICE), n_group=1,
                                        topk_group=1, top_k=3, scaling_factor=3.0)
    assert experts.tolist() == [[3, 2, 0]] and load.tolist() == [1, 0, 1, 1]
    torch.testing.assert_close(weights, torch.tensor([[2.4, 2.1, 1.5]], device=DEVICE) / 2)


def test_among_equals_the_lower_index_wins():
    logits, bias = torch.zeros(3, 64, device=DEVICE), torch.zeros(64, device=DEVICE)
    experts, weights, load, _ = results(route, logits, bias, **FULL)
    assert experts.tolist() == [list(range(8))] * 3
    assert (weights == 2.5 / 8).all() and load.tolist() == [3.0] * 8 + [0.0] * 56
    assert_same(logits, bias, **FULL)


def test_ties_of_groups_and_of_experts_in_many_rows():
    """Few distinct values: nearly every comparison is among equals."""
    logits = torch.randint(0, 3, (40, 32), device=DEVICE).float()
    assert_same(logits, torch.zeros(32, device=DEVICE), n_group=8, topk_group=3, top_k=7)


@pytest.mark.parametrize("experts, groups", [(32, 8), (15, 5)])
def test_negative_sums_do_not_let_a_forbidden_expert_win(experts, groups):
    """Nor a group that is none: five groups are computed as eight."""
    logits, bias = inputs(9, experts)
    assert_same(logits, bias - 5, n_group=groups, topk_group=2, top_k=6)


@pytest.mark.parametrize("tokens, experts", [(1, 24), (17, 24), (33, 48)])
def test_load_counts_tokens_that_fill_no_block(tokens, experts):
    """Three members a group, six of eight slots: most of what a block holds is padding."""
    routing = results(route, *inputs(tokens, experts), n_group=experts // 3, topk_group=4, top_k=6)
    assert torch.equal(routing[2], torch.bincount(routing[0].flatten(), minlength=experts).float())


def test_nan_counts_as_the_largest():
    logits, bias = inputs(4, 32)
    logits[1, 5] = logits[2, 30] = logits[2, 9] = float("nan")
    options = {"n_group": 8, "topk_group": 4, "top_k": 4}
    experts, weights, *_ = results(route, logits, bias, **options)
    assert experts[1, 0] == 5 and experts[2, :2].tolist() == [9, 30]
    assert weights[1:3].isnan().all() and weights[[0, 3]].isfinite().all()
    assert_same(logits, bias, **options)


@pytest.mark.filterwarnings("ignore:overflow")   # NumPy's, where it interprets exp(1e30)
def test_infinite_logits():
    logits, bias = inputs(3, 16)
    logits[0, 3], logits[1, :8], logits[2, 10] = float("inf"), float("-inf"), -1e30
    assert_same(logits, bias, n_group=4, topk_group=3, top_k=5)


def test_bfloat16_logits_beside_one_another_or_apart():
    logits, bias = inputs(12, 64)
    assert_same(logits.bfloat16()[::2, ::2], bias[::2], n_group=4, topk_group=2, top_k=4, normalise=False)


@pytest.mark.parametrize("shape, options", [
    ((4, 10), {"n_group": 4, "topk_group": 2, "top_k": 2}), ((4, 8), {"n_group": 4, "topk_group": 5, "top_k": 2}),
    ((4, 8), {"n_group": 4, "topk_group": 2, "top_k": 5}), ((4, 8), {"n_group": 8, "topk_group": 4, "top_k": 2}),
], ids=["groups of 2.5", "more groups than there are", "too few experts", "a group of one"])
def test_refuses_groups_that_do_not_fit(shape, options):
    with pytest.raises(ValueError, match="cannot take the best"):
        route(torch.zeros(shape), torch.zeros(shape[1]), **options)


def test_refuses_a_bias_of_another_length():
    with pytest.raises(ValueError, match=r"logits \[4, 8\] and bias \[7\]"):
        route(torch.zeros(4, 8), torch.zeros(7), n_group=1, topk_group=1, top_k=2)


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _best_twice(a, b, c, d):
    return tl.maximum(a, c), tl.maximum(a, c)


@pytest.mark.skipif(not INTERPRETED, reason="a compiled kernel keeps the functions it was compiled with")
@pytest.mark.parametrize("name, wrong, test", [
    ("_order", _bits, lambda: test_negative_sums_do_not_let_a_forbidden_expert_win(32, 8)),
    ("_two_best", _best_twice, lambda: test_kernel_equals_definition(*OPTIONS["five groups of three, three kept"])),
], ids=["bits as they are", "the best counted twice"])
def test_comparisons_see_a_wrong_kernel(monkeypatch, name, wrong, test):
    test()
    monkeypatch.setattr(FILE, name, wrong)
    with pytest.raises(AssertionError):
        test()


def test_comparisons_see_another_rule_for_ties(monkeypatch):
    monkeypatch.setattr(FILE, "_best", lambda values, k: values.shape[-1] - 1 - values.flip(-1).sort(
        dim=-1, descending=True, stable=True).indices[..., :k])
    with pytest.raises(AssertionError):
        test_ties_of_groups_and_of_experts_in_many_rows()
