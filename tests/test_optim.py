"""Schedules against the report's numbers on both sides of every milestone; AdamW against torch's; averaged weights."""

import copy
from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import nn

from minidsv3.optim import EMA, AdamW, Recipe, parameter_groups

T, B = 10**12, 10**9
FULL = Recipe.preset("full")


# ---- schedules ------------------------------------------------------------------------------------------------------

def test_full_recipe_is_the_report():
    assert FULL == Recipe()
    assert (FULL.total_tokens, FULL.sequence_length) == (14_800_000_000_000, 4096)
    assert (FULL.betas, FULL.weight_decay, FULL.clip_norm) == ((0.9, 0.95), 0.1, 1.0)
    with pytest.raises(FrozenInstanceError):
        FULL.peak_lr = 1.0


@pytest.mark.parametrize("tokens, lr", [
    (0, 0.0), (FULL.warmup_until // 2, 1.1e-4), (FULL.warmup_until, 2.2e-4), (5 * T, 2.2e-4),
    (10 * T - 1, 2.2e-4), (10 * T, 2.2e-4),
    (10 * T + 4300 * B // 4, 2.2e-5 + 1.98e-4 * (1 + 0.5**0.5) / 2),        # a quarter of the cosine
    (10 * T + 4300 * B // 2, (2.2e-4 + 2.2e-5) / 2),                        # its middle
    (14_300 * B - 1, 2.2e-5), (14_300 * B, 2.2e-5),
    (14_300 * B + 333 * B - 1, 2.2e-5), (14_300 * B + 333 * B, 7.3e-6),
    (14_800 * B - 1, 7.3e-6), (14_800 * B, 7.3e-6),
])
def test_learning_rate(tokens, lr):
    assert FULL.lr(tokens) == pytest.approx(lr, rel=1e-9, abs=1e-18)


def test_learning_rate_leaps_nowhere_but_at_the_last_phase():
    step = FULL.total_tokens // 5000
    rates = [FULL.lr(number * step) for number in range(20, 5000)]
    leaps = [number for number, (a, b) in enumerate(zip(rates, rates[1:])) if abs(a - b) > 4e-7]
    assert len(leaps) == 1
    assert rates == sorted(rates, reverse=True)


def test_warm_up_is_two_thousand_steps_of_the_growing_batch():
    tokens, steps = 0, 0
    while tokens < FULL.warmup_until:
        tokens, steps = tokens + FULL.sequence_length * FULL.batch_size(tokens), steps + 1
    assert (tokens, steps) == (FULL.warmup_until, 2000)


@pytest.mark.parametrize("tokens, batch", [
    (0, 3072), (469 * B // 2, (3072 + 15360) // 2), (469 * B - 1, 15359), (469 * B, 15360), (14 * T, 15360)])
def test_batch_size(tokens, batch):
    assert FULL.batch_size(tokens) == batch


@pytest.mark.parametrize("tokens, gamma, mtp_weight", [
    (0, 0.001, 0.3), (10 * T - 1, 0.001, 0.3), (10 * T, 0.001, 0.1),
    (14_300 * B - 1, 0.001, 0.1), (14_300 * B, 0.0, 0.1), (14_800 * B, 0.0, 0.1)])
def test_coefficients(tokens, gamma, mtp_weight):
    assert FULL.gamma(tokens) == gamma
    assert FULL.mtp_weight(tokens) == mtp_weight
    assert FULL.balance_weight(tokens) == 1e-4


@pytest.mark.parametrize("name, length, batch", [("full_32k", 32768, 1920), ("full_128k", 131072, 480)])
def test_long_context_is_a_thousand_steps_at_one_rate(name, length, batch):
    recipe = Recipe.preset(name)
    assert recipe.sequence_length == length
    assert recipe.total_tokens == 1000 * length * batch
    for tokens in (0, 1, recipe.total_tokens // 2, recipe.total_tokens - 1, recipe.total_tokens):
        assert (recipe.lr(tokens), recipe.batch_size(tokens)) == (7.3e-6, batch)
        assert (recipe.gamma(tokens), recipe.mtp_weight(tokens)) == (0.0, 0.1)


def test_scaling_keeps_every_share():
    small = Recipe.preset("full", total_tokens=14_800_000)
    for part in (0, 0.001, 0.01, 0.03, 0.5, 10 / 14.8, 0.7, 0.9, 14.3 / 14.8, 0.98, 0.99, 1):
        big, little = round(part * 14_800) * B, round(part * 14_800) * 1000
        assert small.lr(little) == pytest.approx(FULL.lr(big), rel=1e-3)
        assert small.gamma(little) == FULL.gamma(big) and small.mtp_weight(little) == FULL.mtp_weight(big)
        assert abs(small.batch_size(little) - FULL.batch_size(big)) <= 1
    assert FULL.scaled(FULL.total_tokens) == FULL


@pytest.mark.parametrize("name, tokens", [("nano", None), ("nano", 200_000), ("mini", None), ("mini", 10 * B)])
def test_small_recipes_have_the_same_phases(name, tokens):
    recipe = Recipe.preset(name, tokens)
    total = recipe.total_tokens
    assert tokens in (None, total)
    assert recipe.lr(0) == 0 and recipe.lr(total // 20) == pytest.approx(recipe.peak_lr)
    assert recipe.lr(total * 67 // 100) == recipe.peak_lr > recipe.lr(total * 68 // 100)
    assert recipe.lr(total * 97 // 100) == pytest.approx(recipe.peak_lr / 10)
    assert recipe.lr(total) == pytest.approx(recipe.peak_lr * 7.3 / 220)
    assert recipe.gamma(total * 96 // 100) > 0 == recipe.gamma(total * 97 // 100)
    assert recipe.mtp_weight(total * 67 // 100) == 0.3 and recipe.mtp_weight(total * 68 // 100) == 0.1


def test_nano_recipe_is_a_few_hundred_steps():
    nano = Recipe.preset("nano")
    assert 100 < nano.total_tokens / (nano.sequence_length * nano.last_batch) < 1000
    assert nano.gamma(0) == 0.01


@pytest.mark.parametrize("changes, sentence", [
    ({"peak_until": 15 * T}, "must follow one another and end within the run"),
    ({"warmup_until": 11 * T}, "must follow one another"),
    ({"first_batch": 0}, "the batch goes from 0 to 15360"),
    ({"last_batch": 100}, "the batch goes from 3072 to 100"),
    ({"sequence_length": 0}, "sequence_length 0; both must be at least 1"),
])
def test_recipes_that_do_not_fit_together_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        Recipe(**changes)


def test_unknown_recipe_is_refused():
    with pytest.raises(ValueError, match="no recipe 'huge'; choose one of full, full_32k, full_128k, mini, nano"):
        Recipe.preset("huge")
    with pytest.raises(ValueError, match="total_tokens is 0"):
        Recipe.preset("nano", 0)


# ---- AdamW ----------------------------------------------------------------------------------------------------------

class Net(nn.Module):
    """A matrix, a vector, a fused stack of experts, a shared matrix and a routing bias."""

    def __init__(self, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.matrix = nn.Parameter(torch.randn(8, 8, generator=generator))
        self.gain = nn.Parameter(torch.ones(8))
        self.experts = nn.Parameter(torch.randn(2, 8, 8, generator=generator))
        self.shared = self.matrix
        self.idle = nn.Parameter(torch.ones(3, 3))
        self.register_buffer("e_score_correction_bias", torch.zeros(2))

    def forward(self, x):
        return ((x * self.gain) @ self.matrix).tanh() @ self.experts.sum(0)


def train(net, optimizer, steps, start=0):
    for number in range(start, start + steps):
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(16, 8, generator=generator, dtype=net.matrix.dtype)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + number)
        optimizer.zero_grad()
        (net(x) - x.roll(1)).square().mean().backward()
        optimizer.step()
    return net


def ours(net, moments=torch.float32):
    return AdamW(parameter_groups(net, 0.1), lr=1e-2, moments=moments)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_groups_hold_each_parameter_once_and_no_bias():
    net = Net()
    decayed, rest = parameter_groups(net, 0.1)
    assert [id(p) for p in decayed["params"]] == [id(p) for p in (net.matrix, net.experts, net.idle)]
    assert [id(p) for p in rest["params"]] == [id(net.gain)]
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    net.experts.requires_grad_(False)
    assert len(parameter_groups(net, 0.1)[0]["params"]) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fp32_moments_equal_torch(dtype):
    net, peer = Net().to(dtype), Net().to(dtype)
    theirs = torch.optim.AdamW(parameter_groups(peer, 0.1), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, fused=True)
    assert same(train(net, ours(net), 20), train(peer, theirs, 20))
    slow = Net().to(dtype)
    definition = torch.optim.AdamW(parameter_groups(slow, 0.1), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, foreach=False)
    train(slow, definition, 20)
    for a, b in zip(net.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_bf16_moments_differ_by_their_rounding_alone():
    net, peer = Net().double(), Net().double()
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    optimizer = ours(net, torch.bfloat16)
    mean = {p: torch.zeros_like(p) for p in peer.parameters()}
    square = {p: torch.zeros_like(p) for p in peer.parameters()}
    for step in range(1, 6):
        for model in (net, peer):
            model.zero_grad()
            (model(x) - x.roll(1)).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            for p in peer.parameters():
                if p.grad is not None:                        # the algorithm as published, on rounded moments
                    m, v = 0.9 * mean[p] + 0.1 * p.grad, 0.95 * square[p] + 0.05 * p.grad**2
                    decay = 0.1 if p.ndim >= 2 else 0.0
                    p.mul_(1 - 1e-2 * decay)
                    p.sub_(1e-2 * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8))
                    mean[p], square[p] = m.bfloat16().double(), v.bfloat16().double()
    for p, q in zip(net.parameters(), peer.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
        if p.grad is not None:
            assert torch.equal(optimizer.state[p]["exp_avg"].double(), mean[q])


def test_bf16_moments_take_half_the_memory_and_train_as_well():
    def loss(moments):
        net = Net()
        optimizer = ours(net, moments)
        train(net, optimizer, 200)
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        return optimizer, (net(x) - x.roll(1)).square().mean().item()
    exact, expected = loss(torch.float32)
    rounded, got = loss(torch.bfloat16)
    assert got == pytest.approx(expected, rel=0.02)
    size = [sum(state[name].nbytes for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq"))
            for optimizer in (exact, rounded)]
    assert size[0] == 2 * size[1]


@pytest.mark.parametrize("beta2, decays", [(0.95, True), (0.999, False)])
def test_bf16_second_moment_decays_only_with_the_small_beta(beta2, decays):
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = AdamW([weight], lr=0.0, betas=(0.9, beta2), moments=torch.bfloat16)
    weight.grad = torch.ones(4, 4)
    optimizer.step()
    before = optimizer.state[weight]["exp_avg_sq"].clone()
    weight.grad = torch.zeros(4, 4)
    for _ in range(50):
        optimizer.step()
    assert (optimizer.state[weight]["exp_avg_sq"] < before).all() == decays


def restored(moments, load):
    """Whether a run whose optimiser is saved and loaded on the way equals the one that is not."""
    whole = Net()
    train(whole, ours(whole, moments), 10)
    net = Net()
    first = ours(net, moments)
    train(net, first, 4)
    second = ours(net, moments)
    load(second, copy.deepcopy(first.state_dict()))
    kept = all(state[name].dtype == moments for state in second.state.values() for name in ("exp_avg", "exp_avg_sq"))
    return kept and same(train(net, second, 6, start=4), whole)


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_equals_uninterrupted(moments):
    assert restored(moments, AdamW.load_state_dict)


def test_that_test_sees_moments_cast_to_the_parameters_precision():
    assert not restored(torch.bfloat16, torch.optim.AdamW.load_state_dict)


def test_moments_are_loaded_into_the_precision_that_was_asked_for():
    net = Net()
    wide = ours(net)
    train(net, wide, 2)
    narrow = ours(net, torch.bfloat16)
    narrow.load_state_dict(wide.state_dict())
    assert {state["exp_avg_sq"].dtype for state in narrow.state.values()} == {torch.bfloat16}
    assert {state["step"].dtype for state in narrow.state.values()} == {torch.float32}


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_a_closure_is_evaluated_once_with_gradients(moments):
    net = Net()
    optimizer = ours(net, moments)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        loss = net(torch.ones(2, 8)).sum()
        loss.backward()
        return loss

    assert torch.is_tensor(optimizer.step(closure)) and calls == [True]
    assert not same(net, Net())


def test_wrong_precisions_are_refused():
    with pytest.raises(ValueError, match="moments is torch.float16; choose torch.bfloat16 or torch.float32"):
        ours(Net(), torch.float16)
    with pytest.raises(ValueError, match="a parameter is torch.bfloat16; the optimiser needs master weights"):
        ours(Net().bfloat16())


# ---- average of the weights -----------------------------------------------------------------------------------------

def test_ema_is_the_weighted_sum_of_the_weights():
    net = nn.Linear(2, 2)
    ema = EMA(net, decay=0.9)
    expected = net.weight.detach().clone()
    for number in range(5):
        nn.init.constant_(net.weight, float(number))
        ema.update()
        expected = 0.9 * expected + 0.1 * number
    torch.testing.assert_close(ema.state_dict()["weight"], expected)


def test_ema_is_kept_in_fp32_and_apart_from_the_model():
    net = Net().bfloat16()
    ema = EMA(net, decay=0.999)
    assert {average.dtype for average in ema.state_dict().values()} == {torch.float32}
    assert "e_score_correction_bias" not in ema.state_dict() and "shared" not in ema.state_dict()
    before = net.gain.detach().clone()
    nn.init.constant_(net.gain, 2.0)
    ema.update()
    assert torch.equal(before, torch.ones(8).bfloat16())
    torch.testing.assert_close(ema.state_dict()["gain"], torch.full((8,), 1.001), rtol=1e-6, atol=0)


def test_swap_shows_the_average_and_gives_the_weights_back_even_after_an_error():
    net = Net()
    ema = EMA(net, decay=0.5)
    first, moved = copy.deepcopy(net), train(net, ours(net), 3)
    weights = copy.deepcopy(moved)
    with pytest.raises(RuntimeError), ema.swap() as model:
        assert model is net and same(net, first) and not same(net, weights)
        raise RuntimeError
    assert same(net, weights)
    other = Net(seed=1)
    ema.copy_to(other)
    assert same(other, first)


def test_ema_is_saved_and_loaded():
    net = Net()
    ema = EMA(net, decay=0.9)
    train(net, ours(net), 3)
    ema.update()
    again = EMA(Net(seed=5), decay=0.9)
    again.load_state_dict(copy.deepcopy(ema.state_dict()))
    assert all(torch.equal(again.state_dict()[name], average) for name, average in ema.state_dict().items())
    with pytest.raises(ValueError, match="does not fit the model: gain, idle, matrix is missing"):
        again.load_state_dict({"experts": ema.state_dict()["experts"]})


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_ema_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        EMA(Net(), decay)
