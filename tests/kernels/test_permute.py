"""Moving tokens to their experts and back, beyond the registry's cases: by hand, as a round trip, with FP8, mutated."""

import importlib

import pytest
import torch

from compare import assert_alike
from minidsv3.kernels import (Permutation, permute, permute_tiles, permute_tiles_reference, quantize_tiles,
                              sort_by_expert, sort_by_expert_reference, unpermute, unpermute_reference, use_kernels)
from minidsv3.kernels.backend import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
FILE = importlib.import_module("minidsv3.kernels.permute")
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]


@pytest.fixture(autouse=True)
def triton_kernels():
    with use_kernels("triton"):
        yield


def chosen(tokens: int, experts: int, slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Different experts for each token, and the load."""
    choices = torch.rand(tokens, experts, device=DEVICE).argsort(-1)[:, :slots].contiguous()
    return choices, torch.bincount(choices.flatten(), minlength=experts).float()


def test_by_hand():
    """Three tokens, two choices each: expert 1 nobody, expert 2 three rows; aligned to two rows, one is padding."""
    experts = torch.tensor([[2, 0], [2, 3], [0, 2]], device=DEVICE)
    load = torch.tensor([2.0, 0, 3, 1], device=DEVICE)
    plain, aligned = sort_by_expert(experts, load), sort_by_expert(experts, load, 2)
    assert plain.sources.tolist() == [1, 4, 0, 2, 5, 3] and plain.ends.tolist() == [2, 2, 5, 6]
    assert plain.rows.tolist() == [[2, 0], [3, 5], [1, 4]]
    assert aligned.sources.tolist() == [1, 4, 0, 2, 5, -1, 3, -1, -1, -1] and aligned.ends.tolist() == [2, 2, 6, 8]
    x = torch.tensor([[1.0], [10.0], [100.0]], device=DEVICE)
    assert permute(x, aligned).flatten().tolist() == [1, 100, 1, 10, 100, 0, 10, 0, 0, 0]
    weights = torch.tensor([[1.0, 2], [3, 4], [5, 6]], device=DEVICE)
    rows = torch.arange(10.0, device=DEVICE)[:, None]
    assert unpermute(rows, aligned, weights).flatten().tolist() == [2 * 1 + 0 * 2, 3 * 3 + 6 * 4, 1 * 5 + 4 * 6]


@pytest.mark.parametrize("align", [1, 16, 128])
def test_every_choice_has_one_row_among_its_expert_s_in_the_tokens_order(align):
    experts, load = chosen(300, 12, 3)
    rows, sources, ends = sort_by_expert(experts, load, align)
    assert torch.equal(sources[rows.flatten().long()], torch.arange(900, dtype=torch.int32, device=DEVICE))
    assert (sources >= 0).sum() == 900 and not (ends % align).any() and not len(sources) % align
    begin = 0
    for expert, end in enumerate(ends.tolist()):
        mine = sources[begin:end][:int(load[expert])].long()
        assert (experts.flatten()[mine] == expert).all() and (mine.diff() > 0).all()
        assert (sources[begin:end][int(load[expert]):] == -1).all()
        begin = end
    assert (sources[begin:] == -1).all()


@pytest.mark.parametrize("block", [32, 256])
def test_blocks_of_the_sort_may_have_any_size(monkeypatch, block):
    monkeypatch.setattr(FILE, "_BLOCK", block)
    experts, load = chosen(100, 6, 4)
    assert_alike(list(sort_by_expert(experts, load, 8)), list(sort_by_expert_reference(experts, load, 8)), 0.0)


def test_more_blocks_than_one_step_of_the_prefix_sums(monkeypatch):
    monkeypatch.setattr(FILE, "_BLOCK", 2)
    experts, load = chosen(300, 4, 2)
    assert_alike(list(sort_by_expert(experts, load)), list(sort_by_expert_reference(experts, load)), 0.0)


def test_a_round_trip_multiplies_by_the_weights_sum():
    places = sort_by_expert(*chosen(40, 8, 4), 16)
    x, weights = torch.randn(40, 24, device=DEVICE), torch.rand(40, 4, device=DEVICE)
    torch.testing.assert_close(unpermute(permute(x, places), places, weights), x * weights.sum(1, keepdim=True))
    torch.testing.assert_close(unpermute(permute(x, places), places), 4 * x)


def test_padding_goes_nowhere():
    """NaN in padding rows reaches neither sums nor gradients, and padding's own gradient is zero."""
    places = sort_by_expert(*chosen(20, 6, 2), 8)
    rows, weights = torch.randn(len(places.sources), 16, device=DEVICE), torch.rand(20, 2, device=DEVICE)
    rows[places.sources < 0] = float("nan")
    rows, weights = rows.requires_grad_(), weights.requires_grad_()
    y = unpermute(rows, places, weights)
    drows, dweights = torch.autograd.grad(y.sum(), (rows, weights))
    assert y.isfinite().all() and dweights.isfinite().all() and not drows[places.sources < 0].any()


def test_sums_are_rounded_once():
    """1 + 2^-9 + 2^-9 is a BF16 number that sums rounded in BF16 never reach."""
    places = sort_by_expert(torch.tensor([[0, 1, 2, 3]], device=DEVICE), torch.ones(4, device=DEVICE))
    rows = torch.tensor([[1.0], [2.0**-9], [2.0**-8], [2.0**-9]], device=DEVICE, dtype=torch.bfloat16)
    assert unpermute(rows, places).item() == 1 + 2.0**-7
    assert unpermute_reference(rows, places).item() == 1 + 2.0**-7


@pytest.mark.parametrize("align", [1, 16])
def test_codes_and_scales_move_together(align):
    places = sort_by_expert(*chosen(30, 6, 2), align)
    x = torch.randn(30, 300, device=DEVICE).bfloat16() * torch.logspace(-3, 3, 30, device=DEVICE)[:, None].bfloat16()
    moved = permute_tiles(*quantize_tiles(x), places)
    assert_alike(list(moved), list(permute_tiles_reference(*quantize_tiles(x), places)), 0.0)
    held = places.sources >= 0
    codes, scales = quantize_tiles(permute(x, places))
    assert torch.equal(moved[0].view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(moved[1][:, held], scales[:, held]) and not moved[1][:, ~held].any()


def test_definition_in_float64_has_the_right_gradients():
    places = sort_by_expert_reference(*chosen(5, 4, 2), 4)
    x = torch.randn(5, 3, dtype=torch.float64, device=DEVICE).requires_grad_()
    rows = torch.randn(len(places.sources), 3, dtype=torch.float64, device=DEVICE).requires_grad_()
    weights = torch.rand(5, 2, dtype=torch.float64, device=DEVICE).requires_grad_()
    with use_kernels("torch"):
        assert torch.autograd.gradcheck(lambda x: permute(x, places), x)
        assert torch.autograd.gradcheck(lambda rows, weights: unpermute(rows, places, weights), (rows, weights))


@pytest.mark.parametrize("call, sentence", [
    (lambda places: sort_by_expert(torch.zeros(4, dtype=torch.int64), torch.ones(2)), r"experts \[4\] in torch.int64"),
    (lambda places: sort_by_expert(torch.zeros(4, 1, dtype=torch.int32), torch.ones(2)), r"\[4, 1\] in torch.int32"),
    (lambda places: permute(torch.zeros(3, 8), places), r"permute got a tensor of shape \[3, 8\]; it needs 2 rows"),
    (lambda places: unpermute(torch.zeros(3, 8), places), r"unpermute got .* \[3, 8\]; it needs 4 rows"),
    (lambda places: unpermute(torch.zeros(4, 8), places, torch.ones(4)), r"weights of shape \[4\]; it needs \[2, 2\]"),
    (lambda places: permute_tiles(torch.zeros(2, 200), torch.ones(1, 2), places), r"scales.* \[1, 2\].*\[2, 2\]"),
], ids=["flat experts", "int32", "permute", "unpermute", "weights", "scales"])
def test_refuses(call, sentence):
    places = sort_by_expert_reference(torch.tensor([[0, 1], [1, 2]]), torch.tensor([1.0, 2, 1]))
    with pytest.raises(ValueError, match=sentence):
        call(places)


@pytest.mark.parametrize("name, wrong, test", [
    ("_padded", lambda rows, sources: False, test_padding_goes_nowhere),
    ("_capacity", lambda experts, load, align: experts.numel() + len(load) * align, test_by_hand),
], ids=["padding left as it was", "more rows than needed"])
def test_comparisons_see_a_wrong_kernel(monkeypatch, name, wrong, test):
    test()
    monkeypatch.setattr(FILE, name, wrong)
    monkeypatch.setattr(torch, "empty", lambda *a, **k: torch.zeros(*a, **k) + 3)
    with pytest.raises(AssertionError):
        test()


def test_comparisons_see_an_unstable_sort(monkeypatch):
    """The kernel against a definition that turns the tokens' order round within each expert."""
    experts, load = chosen(50, 4, 2)

    def turned(experts: torch.Tensor, load: torch.Tensor) -> Permutation:
        places = sort_by_expert_reference(experts.flip(0), load)
        return places._replace(rows=places.rows.flip(0))
    with pytest.raises(AssertionError):
        assert_alike([sort_by_expert(experts, load).rows], [turned(experts, load).rows], 0.0)
