"""Exercises of chapter 02: references against the package and by counting, and typical tests that spare mutants."""

import random
from itertools import combinations

import pytest
import torch

from minidsv3.balance import update_biases
from minidsv3.course import router
from minidsv3.course.compare import difference
from minidsv3.kernels import route
from minidsv3.moe import MoE
from tiny import tiny_config

SEEDS = range(20)


def cases(task, seed):
    return list(task.cases(random.Random(f"{seed}")).values())


# ---- numbers of the published model ---------------------------------------------------------------------------------

def test_copies_of_the_published_model():
    assert router.copies_reference(256, 8, 8) == pytest.approx(4.63282, abs=1e-5)
    assert round(router.copies_with_replacement(256, 8, 8), 2) == 4.59
    assert round(router.copies_with_own_node(256, 8, 8), 2) == 5.29
    assert router.copies_per_expert(256, 8, 8) == 7.0


@pytest.mark.parametrize("experts, nodes, top_k", [(8, 4, 3), (12, 3, 4), (10, 5, 2)])
def test_copies_by_counting_every_choice(experts, nodes, top_k):
    choices = list(combinations(range(experts), top_k))
    visited = [len({expert // (experts // nodes) for expert in choice} - {0}) for choice in choices]
    assert router.copies_reference(experts, nodes, top_k) == pytest.approx(sum(visited) / len(choices), abs=1e-12)


def test_numbers_in_the_gate_s_sentence():
    """s = 0.8, 0.3 and b = -0.3, +0.15: .53/.47 with the leak, .73/.27 without."""
    logits = torch.tensor([[0.8, 0.3]], dtype=torch.float64).logit()
    bias = torch.tensor([-0.3, 0.15], dtype=torch.float64)
    assert [f"{w:.2f}" for w in router.gate_solution(logits, bias, 2, 1.0)[0]] == ["0.73", "0.27"]
    assert [f"{w:.2f}" for w in router.gate_with_leaking_bias(logits, bias, 2, 1.0)[0]] == ["0.53", "0.47"]


def test_even_load_gives_a_loss_of_one():
    """The anchor of exercise 2.4, and the misconception of a question: flat affinities give 1 for any load."""
    flat, bias = torch.zeros(2, 9, 8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    assert router.balance_solution(flat, bias, 2).item() == pytest.approx(1, abs=1e-12)
    assert router.balance_without_factor(flat, bias, 2).item() == pytest.approx(0.25, abs=1e-12)


def test_the_loss_can_go_below_one():
    """What question 02.one says: favour whom P favours less, and the sum of products falls below 1."""
    s = torch.tensor([[0.41, 0.40, 0.40]] * 3 + [[0.03, 0.90, 0.03]], dtype=torch.float64)
    assert router.balance_solution(s.logit()[None], None, 1).item() < 0.96


# ---- the cases show what they should --------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", SEEDS)
def test_loads_have_an_expert_at_the_mean_and_signs_that_disagree(seed):
    for bias, load, gamma in cases(router.UPDATE, seed):
        total = load.sum(0).double()
        assert (total == total.mean()).any() and (total < total.mean()).sum() != (total > total.mean()).sum()
        right = router.update_reference(bias, load, gamma)
        assert difference(router.update_per_micro_batch(bias, load, gamma), right, 1e-9)


@pytest.mark.parametrize("seed", SEEDS)
def test_some_allowed_affinities_are_negative(seed):
    scores, bias, n_group, topk_group, top_k = cases(router.GROUPS, seed)[0]
    chosen = router.choose_reference(scores, bias, n_group, topk_group, top_k).bool()
    assert ((scores + bias)[chosen] < 0).any()


def test_the_update_is_the_model_s():
    """Two layers at once, as a training step calls it."""
    bias, load, gamma = cases(router.UPDATE, 0)[1]
    layers = torch.nn.ModuleList(MoE(tiny_config(n_routed_experts=len(bias), n_group=1, topk_group=1)).double()
                                 for _ in range(2))
    for layer in layers:
        layer.gate.e_score_correction_bias.copy_(bias)
    update_biases(layers, torch.stack([load.sum(0), load.sum(0).flip(0)]), gamma)
    assert torch.equal(layers[0].gate.e_score_correction_bias, router.update_reference(bias, load, gamma))


def test_top_k_after_masking_has_fewer_experts():
    scores, bias, n_group, topk_group, top_k = cases(router.GROUPS, 0)[1]
    late = router.choose_then_mask(scores, bias, n_group, topk_group, top_k).sum(1)
    assert late.max() <= top_k and (late < top_k).any()
    assert (router.choose_solution(scores, bias, n_group, topk_group, top_k).sum(1) == top_k).all()


# ---- mutants --------------------------------------------------------------------------------------------------------

def typical_test(offset: float, n_group: int = 4, topk_group: int = 2):
    """A test that compares with the package, on biases near `offset`."""
    def test(candidate):
        torch.manual_seed(0)
        logits, bias = torch.randn(40, 16, dtype=torch.float64), torch.full((16,), offset, dtype=torch.float64)
        routing = route(logits, bias, n_group=n_group, topk_group=topk_group, top_k=4, scaling_factor=2.5)
        want = router.spread(routing.weights, routing.experts, 16)
        assert torch.allclose(candidate(logits, bias, n_group, topk_group, 4, 2.5), want, rtol=0, atol=1e-10)
    return test


@pytest.mark.parametrize("test, alive", [
    (typical_test(0.0), {"bias leaks", "mask 0", "groups without bias", "no bias"}),
    (typical_test(0.5), {"mask 0", "groups without bias", "no bias"}),
    (typical_test(-2.0, 1, 1), {"mask 0", "best of group", "groups without bias", "no bias", "no groups"}),
], ids=["bias 0", "bias above 0", "one group"])
def test_typical_tests_spare_some(test, alive):
    def survives(function) -> bool:
        try:
            test(function)
        except AssertionError:
            return False
        return True
    assert {name for name, (function, _) in router.ROUTERS.wrong.items() if survives(function)} == alive
    assert not router.ROUTERS.judge(test, 0).solved


def test_there_are_eight_routers():
    assert len(router.ROUTERS.wrong) == 8
