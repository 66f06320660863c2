"""Copies of tokens and the experts of one rank, without any process: what goes where, and what comes back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minidsv3.fp8_ffn import FP8Experts
from minidsv3.fp8_products import Products
from minidsv3.kernels import quantize_tiles, route, weighted_swiglu
from minidsv3.kernels.fp8_gemm import dequantize_tiles
from minidsv3.moe import Experts
from minidsv3.parallel import experts as parallel_experts
from minidsv3.parallel.dispatch import Hop, Tokens, dispatch, fan_in, fan_out
from minidsv3.parallel.experts import ParallelExperts, ParallelFP8Experts, own_experts
from minidsv3.weight_gradients import defer_weight_gradients
from tiny import tiny_config


def draw_tokens(count: int, experts: int, k: int, seed: int = 0, elsewhere: float = 0.0) -> Tokens:
    """Tokens that chose k different experts; some of the choices are served elsewhere, never all of a token's."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(count, experts, generator=generator).topk(k, -1).indices
    away = torch.rand(count, k, generator=generator) < elsewhere
    away[:, 0] = False
    weights = torch.rand(count, k, generator=generator, dtype=torch.float64) + 0.1
    return Tokens(torch.randn(count, 6, generator=generator, dtype=torch.float64),
                  chosen.masked_fill(away, -1), weights.masked_fill(away, 0))


def copies_by_hand(tokens: Tokens, members: int, experts: int) -> list[tuple[int, int, dict[int, float]]]:
    """(member, token, {expert in the member: weight}) of every copy, in order."""
    made = []
    for member in range(members):
        for token, (chosen, weights) in enumerate(zip(tokens.experts.tolist(), tokens.weights.tolist())):
            own = {i - member * experts: w for i, w in zip(chosen, weights) if i >= 0 and i // experts == member}
            made += [(member, token, own)] if own else []
    return made


@settings(deadline=None, max_examples=60)
@given(count=st.integers(0, 9), members=st.integers(1, 4), experts=st.integers(1, 3), k=st.integers(1, 4),
       seed=st.integers(0, 99))
def test_copies_are_those_made_by_hand(count, members, experts, k, seed):
    tokens = draw_tokens(count, members * experts, min(k, members * experts), seed, elsewhere=0.4)
    copies, order = fan_out(tokens, members, experts)
    expected = copies_by_hand(tokens, members, experts)
    found = [{i: w for i, w in zip(chosen, weights) if i >= 0}
             for chosen, weights in zip(copies.experts.tolist(), copies.weights.tolist())]
    assert found == [own for _, _, own in expected]
    assert torch.equal(copies.x, tokens.x[[token for _, token, _ in expected]])
    sizes = order.ends[:-1].diff(prepend=order.ends.new_zeros(1)).tolist()
    assert sizes == [sum(member == m for m, _, _ in expected) for member in range(members)]
    assert (copies.weights[copies.experts < 0] == 0).all()
    visits = torch.tensor([sum(t == token for _, t, _ in expected) for token in range(count)]).view(-1, 1)
    torch.testing.assert_close(fan_in(copies.x, order), tokens.x * visits)


def test_copies_and_sums_have_right_gradients():
    tokens = draw_tokens(5, 6, 3, elsewhere=0.3)

    def there_and_back(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        copies, order = fan_out(Tokens(x, tokens.experts, weights), 3, 2)
        return fan_in(copies.x * copies.weights.sum(1, keepdim=True) ** 2, order), copies.weights
    assert torch.autograd.gradcheck(there_and_back, (tokens.x.requires_grad_(), tokens.weights.requires_grad_()))


# ---- the experts of one rank ------------------------------------------------------------------------------------


def layer(dtype: torch.dtype = torch.float64) -> Experts:
    torch.manual_seed(1)
    experts = Experts(tiny_config()).to(dtype)
    with torch.no_grad():
        for weight in experts.parameters():
            weight.normal_(0, 0.3)
    return experts


def inputs(count: int, dtype: torch.dtype = torch.float64):
    torch.manual_seed(2)
    logits = torch.randn(count, 16, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    routing = route(logits, torch.randn(16, dtype=logits.dtype), n_group=4, topk_group=2, top_k=4)
    return torch.randn(count, 32, dtype=dtype, requires_grad=True), logits, routing


def outcome(out: Tensor, x: Tensor, logits: Tensor, experts: Experts) -> dict[str, Tensor]:
    torch.manual_seed(3)
    wanted = {"x": x, "logits": logits, **dict(experts.named_parameters())}
    slopes = torch.autograd.grad((out * torch.randn_like(out)).sum(), list(wanted.values()), retain_graph=True)
    return {"out": out, **dict(zip(wanted, slopes))}


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def alone_and_definition(dtype: torch.dtype = torch.float64) -> float:
    experts, (x, logits, routing) = layer(dtype), inputs(23, dtype)
    alone = ParallelExperts(experts, hops=[])
    return difference(outcome(alone(x, routing), x, logits, alone),
                      outcome(experts.loop(x, routing), x, logits, experts))


def test_one_rank_with_all_experts_is_the_layer():
    assert alone_and_definition() < 1e-12
    assert alone_and_definition(torch.float32) < 1e-4


@pytest.mark.parametrize("name, wrong", [
    ("weighted_swiglu", lambda rows, weights: weighted_swiglu(rows, weights) * weights.unsqueeze(1)),
    ("fan_in", lambda rows, order: fan_in(rows.flip(0), order)),
])
def test_the_comparison_catches(monkeypatch, name, wrong):
    monkeypatch.setattr(parallel_experts, name, wrong)
    assert alone_and_definition() > 1e-2


def test_no_token_at_all():
    """A rank for which nobody has a token still takes part, and its weights get zeros."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        experts = ParallelExperts(layer(dtype), hops=[])
        x, logits, routing = inputs(0, dtype)
        experts(x, routing).sum().backward()
        assert experts.gate_up_proj.grad.count_nonzero() == experts.down_proj.grad.count_nonzero() == 0


def test_weight_gradients_may_wait():
    now, later = (ParallelExperts(layer(), hops=[]) for _ in range(2))
    store = defer_weight_gradients(later)
    for experts in (now, later):
        x, _, routing = inputs(23)
        experts(x, routing).square().sum().backward()
    assert later.gate_up_proj.grad is None and len(store) == 2
    store.take()()
    for name, weight in now.named_parameters():
        torch.testing.assert_close(later.get_parameter(name).grad, weight.grad, rtol=1e-12, atol=1e-12)


# ---- in FP8 -----------------------------------------------------------------------------------------------------


def fp8_layer() -> FP8Experts:
    experts = layer(torch.float32)
    experts.__class__ = FP8Experts
    experts.compute_with(Products())
    return experts


@pytest.mark.parametrize("count", [23, 0])
def test_one_rank_with_all_experts_is_the_layer_in_fp8_too(count):
    """To the bit, but for the order in which a token's rows are added."""
    experts, (x, logits, routing) = fp8_layer(), inputs(count, torch.float32)
    alone = ParallelFP8Experts(experts, hops=[])
    found, want = (outcome(some(x, routing), x, logits, some) for some in (alone, experts))
    for name in ("logits", "gate_up_proj", "down_proj"):
        assert torch.equal(found[name], want[name]), name
    for name in ("out", "x"):
        assert (found[name] - want[name]).norm() <= 2**-8 * want[name].norm(), name
    assert list(alone.state_dict()) == list(experts.state_dict())


def test_codes_are_made_once_a_step():
    alone = ParallelFP8Experts(fp8_layer(), hops=[])
    codes = alone.gate_up_codes(alone.gate_up_proj)
    assert alone.gate_up_codes(alone.gate_up_proj) is codes
    with torch.no_grad():
        alone.gate_up_proj.mul_(2)
    assert alone.gate_up_codes(alone.gate_up_proj) is not codes


def test_slots_that_no_token_needs_take_no_rows(monkeypatch):
    """Of four choices at most two are here: two slots of each of nine tokens, whichever those two are."""
    alone, seen = ParallelFP8Experts(fp8_layer(), hops=[]), []
    tokens = draw_tokens(9, 16, 4)
    here = torch.rand(9, 4, generator=torch.Generator().manual_seed(5)).argsort(1) < 2
    monkeypatch.setattr(alone, "serve", lambda *arguments: seen.append(arguments))
    alone.compute(tokens._replace(experts=tokens.experts.where(here, -1), weights=tokens.weights.where(here, 0)))
    ((_, chosen, weights, load),) = seen
    assert chosen.shape == weights.shape == (9, 2) and load.sum() == 18 and len(load) == 17
    for token in range(9):
        kept = dict(zip(tokens.experts[token][here[token]].tolist(), tokens.weights[token][here[token]].tolist()))
        assert dict(zip(chosen[token].tolist(), weights[token].tolist())) == kept


# ---- FP8 on the wire --------------------------------------------------------------------------------------------


def travelled(x: Tensor) -> Tensor:
    return dequantize_tiles(*quantize_tiles(x, pow2=True))


def test_the_stated_error_holds_and_is_reached():
    x = torch.randn(64, 300) * torch.logspace(-6, 3, 300)
    scales = quantize_tiles(x, pow2=True)[1].T.repeat_interleave(128, 1)[:, :300]
    bound = torch.maximum(x.abs() / 16, scales * 2**-10)
    share = (travelled(x) - x).abs() / bound
    assert 0.9 < share.max() <= 1


def test_a_second_hop_rounds_nothing():
    """A code times a power of two is exact in BF16, and gives the same code again; with other scales it is not."""
    x = (torch.randn(64, 300) * torch.logspace(-6, 3, 300)).bfloat16()
    once = travelled(x).bfloat16()
    assert torch.equal(once, travelled(x)) and torch.equal(travelled(once), once)
    other = dequantize_tiles(*quantize_tiles(x))
    assert not torch.equal(other.bfloat16(), other)


# ---- refusals ---------------------------------------------------------------------------------------------------


class Group:
    """What the sizes of a process group need."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = lambda: rank, lambda: size


def test_ranks_count_like_digits():
    runs = [own_experts(16, [Hop(Group(node, 2), range(0)), Hop(Group(gpu, 4), range(0))])
            for node in range(2) for gpu in range(4)]
    assert [index for run in runs for index in range(16)[run]] == list(range(16))


def test_refusals():
    with pytest.raises(ValueError, match="16 experts cannot be shared out equally among 3 ranks"):
        ParallelExperts(layer(), [Hop(Group(0, 3), range(1))])
    with pytest.raises(ValueError, match="the experts are FP8Experts; ParallelExperts takes a rank's part of Experts"):
        ParallelExperts(fp8_layer(), hops=[])
    with pytest.raises(ValueError, match="the experts are Experts; ParallelFP8Experts takes a rank's part of FP8Exp"):
        ParallelFP8Experts(layer(), hops=[])
    with pytest.raises(ValueError, match="payload is 'fp4'; it must be 'fp8', or None"):
        dispatch(draw_tokens(2, 4, 2), 4, [], payload="fp4")
