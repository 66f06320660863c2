"""Load balancing: the bias update after each step, and the sequence-wise loss against its equations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import minidsv3.model
from minidsv3.balance import max_violation, routers, sequence_balance_loss, update_biases
from tiny import tiny_model, tiny_tokens


# ---- the bias ---------------------------------------------------------------------------------------------------

def fresh_biases(model) -> list[Tensor]:
    for router in routers(model):
        router.e_score_correction_bias.zero_()
    return [router.e_score_correction_bias for router in routers(model)]


def test_overloaded_experts_step_down_and_idle_ones_up_by_gamma_whatever_the_violation():
    """No magnitude, no centring: the biases' mean may move (here three up, one down)."""
    model = tiny_model()
    biases = fresh_biases(model)
    load = torch.zeros(len(biases), 16)
    load[0, 3] = 1000.0
    load[1] = 7.0
    load[2, :8], load[2, 8:] = 5.0, 5.000001
    update_biases(model, load, gamma=0.001)
    assert biases[0].tolist() == pytest.approx([0.001] * 3 + [-0.001] + [0.001] * 12)
    assert torch.count_nonzero(biases[1]) == 0                   # exactly even: sign(0) leaves b alone
    assert biases[2].tolist() == pytest.approx([0.001] * 8 + [-0.001] * 8)


def test_update_moves_the_bias_of_the_mtp_layer_too():
    """Trap 15: a hook over the main layers alone would leave it behind."""
    model = tiny_model()
    before = [bias.clone() for bias in fresh_biases(model)]
    assert len(before) == 3 and routers(model)[-1] is model.mtp_modules[0].mlp.gate
    losses = model.loss(tiny_tokens(4, 17), mtp_weight=0.3)
    assert losses.load.shape == (3, 16) and losses.load.sum(-1).tolist() == [4 * 16 * 4, 4 * 16 * 4, 4 * 15 * 4]
    update_biases(model, losses.load, 0.001)
    assert all((router.e_score_correction_bias != bias).any() for router, bias in zip(routers(model), before))


def test_bias_of_an_mtp_layer_that_did_not_run_rests():
    model = tiny_model()
    biases = fresh_biases(model)
    update_biases(model, model.loss(tiny_tokens(2, 9)).load, 0.001)
    assert torch.count_nonzero(biases[0]) > 0 and torch.count_nonzero(biases[2]) == 0


def test_gamma_of_zero_freezes_the_bias_which_keeps_routing():
    """Trap 16: the last 500 B tokens of pre-training; b is still in the choice."""
    model, tokens = tiny_model(), tiny_tokens(2, 9)
    before = [router.e_score_correction_bias.clone() for router in routers(model)]
    routed = model.loss(tokens).load
    update_biases(model, routed, gamma=0.0)
    assert all(torch.equal(router.e_score_correction_bias, bias) for router, bias in zip(routers(model), before))
    assert torch.equal(model.loss(tokens).load, routed)
    fresh_biases(model)
    assert not torch.equal(model.loss(tokens).load, routed)


@given(st.lists(st.integers(0, 2**31), min_size=16, max_size=16))
@settings(max_examples=100, deadline=None)
def test_direction_of_every_step(counts):
    """Counts up to 2^31 tokens: compared as whole numbers, 16 n against the sum."""
    model = tiny_model(num_hidden_layers=2, num_nextn_predict_layers=0)
    bias, = fresh_biases(model)
    update_biases(model, torch.tensor([counts], dtype=torch.float64), gamma=0.5)
    total = sum(counts)
    assert bias.tolist() == [0.5 * ((16 * n < total) - (16 * n > total)) for n in counts]


def test_steps_of_a_thousandth_add_up_in_a_bf16_model():
    model = tiny_model(dtype=torch.bfloat16)
    load = torch.ones(3, 16)
    load[:, 0] = 0
    for bias in fresh_biases(model):
        bias += 2
    for _ in range(10):
        update_biases(model, load, 0.001)
    assert routers(model)[0].e_score_correction_bias[0].item() == pytest.approx(2.01, abs=1e-5)


def test_load_of_other_layers_is_refused():
    with pytest.raises(ValueError, match=r"load has 2 rows; the model has 3 MoE layers \(MTP's included\)"):
        update_biases(tiny_model(), torch.ones(2, 16), 0.001)


def test_updates_balance_a_skewed_router():
    """The point of it all: a router that loves four experts spreads its tokens without any loss."""
    model, tokens = tiny_model(num_hidden_layers=2, num_nextn_predict_layers=0), tiny_tokens(8, 33)
    bias, = fresh_biases(model)
    bias[:4] += 1
    skewed = max_violation(model.loss(tokens).load)
    for _ in range(150):
        update_biases(model, model.loss(tokens).load, 0.01)
    assert skewed.item() > 2 and max_violation(model.loss(tokens).load).item() < 0.3


# ---- the sequence-wise loss ---------------------------------------------------------------------------------------

def slow_balance_loss(logits: Tensor, top_k: int) -> float:
    """Eqs. 17-20 for one sequence, alpha left out: sum_i f_i P_i."""
    scores = logits.sigmoid().tolist()
    length, experts = logits.shape
    frequency, share = [0.0] * experts, [0.0] * experts
    for s in scores:
        for i in sorted(range(experts), key=lambda i: -s[i])[:top_k]:
            frequency[i] += experts / (top_k * length)                   # (18)
        for i in range(experts):
            share[i] += s[i] / sum(s) / length                           # (19), (20)
    return sum(f * p for f, p in zip(frequency, share))


@given(st.integers(1, 4), st.integers(1, 12), st.integers(2, 9), st.data())
@settings(max_examples=50, deadline=None)
def test_sequence_loss_is_its_equations(batch, length, experts, data):
    top_k = data.draw(st.integers(1, experts))
    logits = torch.randn(batch, length, experts, dtype=torch.float64)
    expected = sum(slow_balance_loss(sequence, top_k) for sequence in logits) / batch
    assert sequence_balance_loss(logits, top_k).item() == pytest.approx(expected, rel=1e-12)


def test_sequence_loss_is_one_when_even_and_grows_to_n_over_k_when_collapsed():
    scores = torch.randn(8)
    even = torch.stack([scores.roll(i) for i in range(8)])[None]         # each expert once at every rank
    assert sequence_balance_loss(even, 2).item() == pytest.approx(1.0, abs=1e-6)
    collapsed = torch.tensor([30.0, 30.0] + [-30.0] * 6).expand(1, 5, 8)
    assert sequence_balance_loss(collapsed, 2).item() == pytest.approx(4.0)


def test_sequences_are_balanced_one_by_one():
    """Two sequences that each collapse, on other experts, are even as a batch and still unbalanced."""
    one, other = torch.tensor([9.0, -9.0]).expand(4, 2), torch.tensor([-9.0, 9.0]).expand(4, 2)
    assert sequence_balance_loss(torch.cat((one, other))[None], 1).item() == pytest.approx(1.0, abs=1e-3)
    assert sequence_balance_loss(torch.stack((one, other)), 1).item() == pytest.approx(2.0, abs=1e-3)


def test_gradient_flows_through_the_share_alone():
    logits = torch.randn(1, 6, 8, dtype=torch.float64, requires_grad=True)
    gradient, = torch.autograd.grad(sequence_balance_loss(logits, 2), logits)
    scores = logits.detach().sigmoid().requires_grad_()
    frequency = torch.zeros(6, 8).double().scatter(1, scores[0].topk(2).indices, 1.0).mean(0) * 4
    through_share, = torch.autograd.grad(((scores / scores.sum(-1, keepdim=True)).mean(1) * frequency).sum(), scores)
    assert torch.allclose(gradient, through_share * (scores * (1 - scores)).detach(), rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(lambda x: sequence_balance_loss(x, 2), logits)


def balance_of(model, tokens: Tensor) -> Tensor:
    return model.loss(tokens, balance_weight=1e-4).balance.detach()


def test_loss_ignores_bias_and_groups():
    """Trap 17: f counts the top-k of s itself, not what was routed; moving b moves the routing and not this loss.

    One MoE layer, so that other experts cannot change the next layer's input.
    """
    model, tokens = tiny_model(num_hidden_layers=2, num_nextn_predict_layers=0), tiny_tokens(2, 17)
    losses = model.loss(tokens, balance_weight=1.0)
    record = []
    model(tokens[:, :-1], record=record)
    expected = sum(slow_balance_loss(sequence, 4) for sequence in record[0].logits.unflatten(0, (2, 16))) / 2
    assert losses.balance.item() == pytest.approx(expected, rel=1e-12)
    assert (losses.total - losses.main).item() == pytest.approx(expected, rel=1e-10)
    fresh_biases(model)
    assert balance_of(model, tokens) == losses.balance.detach()
    assert not torch.equal(model.loss(tokens).load, losses.load)


def from_choice_with(bias: float, grouped: bool):
    """The mutated loss: f from a choice with bias, or within the best of two groups only."""
    def loss(logits: Tensor, top_k: int) -> Tensor:
        scores = logits.sigmoid()
        choice = scores + bias * torch.linspace(-1, 1, scores.shape[-1])
        if grouped:
            halves = choice.unflatten(-1, (2, -1))
            best = halves.sum(-1).argmax(-1)[..., None, None]
            choice = halves.masked_fill(torch.arange(2)[:, None] != best, -9).flatten(-2)
        chosen = torch.zeros_like(scores).scatter(-1, choice.topk(top_k).indices, 1.0)
        share = scores / scores.sum(-1, keepdim=True)
        return (chosen.mean(1) * scores.shape[-1] / top_k * share.mean(1)).sum(-1).mean()
    return loss


@pytest.mark.parametrize("bias, grouped", [(0.5, False), (0.0, True)], ids=["with bias", "within groups"])
def test_a_choice_with_bias_or_groups_would_be_noticed(bias, grouped, monkeypatch):
    model, tokens = tiny_model(num_hidden_layers=2, num_nextn_predict_layers=0), tiny_tokens(2, 17)
    sound = balance_of(model, tokens)
    monkeypatch.setattr(minidsv3.model, "sequence_balance_loss", from_choice_with(0.0, False))
    assert balance_of(model, tokens) == pytest.approx(sound.item(), rel=1e-12)
    monkeypatch.setattr(minidsv3.model, "sequence_balance_loss", from_choice_with(bias, grouped))
    assert abs(balance_of(model, tokens) - sound) > 1e-3


# ---- metrics ----------------------------------------------------------------------------------------------------

def test_max_violation_is_the_excess_of_the_fullest_expert():
    load = torch.tensor([[4.0, 4.0, 4.0, 4.0], [16.0, 0.0, 0.0, 0.0], [6.0, 2.0, 4.0, 4.0]])
    assert max_violation(load).tolist() == [0.0, 3.0, 0.5]
