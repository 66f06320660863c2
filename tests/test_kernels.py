"""Every operation against its definition (values and gradients), every definition against a loop from its equation."""

import cmath
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compare import assert_alike, outputs, values_and_gradients
from minidsv3.kernels import cross_entropy, linear_cross_entropy, rms_norm, rope, route, swiglu
from minidsv3.kernels.registry import OPERATIONS

CASES = [pytest.param(operation, case, dtype, id=f"{operation.name}-{case}-{dtype}".replace("torch.", ""))
         for operation in OPERATIONS.values() for case in operation.cases for dtype in operation.dtypes]
EXACT = [operation for operation in OPERATIONS.values() if torch.float64 in operation.dtypes]


# ---- from the registry ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("operation, case, dtype", CASES)
def test_function_equals_definition(operation, case, dtype):
    inputs = operation.cases[case](dtype)
    definition = values_and_gradients(operation, operation.reference, inputs)
    assert_alike(values_and_gradients(operation, operation.function, inputs), definition, operation.tolerance[dtype])


def apart(x: torch.Tensor) -> torch.Tensor:
    """x with another number between any two of its values."""
    return torch.stack((x.detach(), torch.full_like(x, 7)), -1)[..., 0].requires_grad_(x.requires_grad)


@pytest.mark.parametrize("operation", EXACT, ids=lambda operation: operation.name)
def test_strides_do_not_matter(operation):
    for build in operation.cases.values():
        inputs = build(torch.float64)
        strided = tuple(apart(x) if isinstance(x, torch.Tensor) else x for x in inputs)
        together = values_and_gradients(operation, operation.function, inputs)
        assert_alike(values_and_gradients(operation, operation.function, strided), together, 1e-14)


@pytest.mark.parametrize("operation", EXACT, ids=lambda operation: operation.name)
def test_gradient_is_the_derivative(operation):
    inputs = next(iter(operation.cases.values()))(torch.float64)

    def floats(*x):
        return [y for y in outputs(operation.function(*x, **operation.options)) if y.requires_grad]
    if any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs):
        assert torch.autograd.gradcheck(floats, inputs)


# ---- from the equations -----------------------------------------------------------------------------------------

def test_rms_norm_is_its_equation():
    x, weight = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    rms = math.sqrt(sum(v * v for v in x.tolist()) / 5 + 0.1)
    expected = [v / rms * w for v, w in zip(x.tolist(), weight.tolist())]
    assert rms_norm(x, weight, 0.1).tolist() == pytest.approx(expected, abs=1e-14)


def test_rms_norm_in_bf16_rounds_once():
    """Statistics, product and gain in FP32: rounding x / rms before the gain would change a quarter of the values."""
    x, weight = torch.randn(64, 96).bfloat16(), (torch.rand(96) + 0.5).bfloat16()
    exact = rms_norm(x.double(), weight.double(), 1e-6)
    assert torch.equal(rms_norm(x, weight, 1e-6), exact.to(torch.float32).bfloat16())


def test_rope_multiplies_adjacent_pairs_as_complex_numbers():
    x, angles = torch.randn(1, 3, 2, 6, dtype=torch.float64), torch.randn(1, 3, 3, dtype=torch.float64)
    turned = rope(x, angles.cos(), angles.sin())
    for t in range(3):
        for head in range(2):
            for pair in range(3):
                a, b = x[0, t, head, 2 * pair:2 * pair + 2].tolist()
                expected = complex(a, b) * cmath.exp(1j * float(angles[0, t, pair]))
                found = complex(*turned[0, t, head, 2 * pair:2 * pair + 2].tolist())
                assert found == pytest.approx(expected, abs=1e-14)


def test_swiglu_is_its_equation():
    gate, up = torch.randn(2, 9, dtype=torch.float64)
    expected = [g / (1 + math.exp(-g)) * u for g, u in zip(gate.tolist(), up.tolist())]
    assert swiglu(gate, up).tolist() == pytest.approx(expected, abs=1e-14)


def test_cross_entropy_is_its_equation():
    logits, targets = torch.randn(4, 7, dtype=torch.float64), torch.tensor([0, 6, 3, 3])
    expected = [math.log(sum(map(math.exp, row))) - row[t] for row, t in zip(logits.tolist(), targets.tolist())]
    assert cross_entropy(logits, targets).tolist() == pytest.approx(expected, abs=1e-14)


def test_cross_entropy_survives_large_logits():
    logits = torch.tensor([[1e4, 0.0], [-1e4, 0.0]])
    assert cross_entropy(logits, torch.tensor([0, 1])).tolist() == [0.0, 0.0]
    weight = torch.tensor([[1e4], [-1e4]])
    assert linear_cross_entropy(torch.ones(1, 1), weight, torch.tensor([0]), torch.ones(1)).item() == 0.0


@pytest.mark.parametrize("rows", [1, 2, 5, 100])
def test_fused_loss_does_not_depend_on_its_chunks(rows, monkeypatch):
    operation = OPERATIONS["linear_cross_entropy"]
    inputs = operation.cases["7 x 24"](torch.float64)
    whole = values_and_gradients(operation, operation.function, inputs)
    monkeypatch.setitem(linear_cross_entropy.__globals__["CHUNK_VALUES"], "cpu", rows * 24)
    assert_alike(values_and_gradients(operation, operation.function, inputs), whole, 1e-14)


# ---- the router -------------------------------------------------------------------------------------------------

@st.composite
def routings(draw):
    """Logits and biases from three values each, so that ties are everywhere."""
    n_group, topk_group = draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2), (8, 4), (4, 3)]))
    per_group = draw(st.integers(2, 4))
    top_k = draw(st.integers(1, topk_group * per_group))
    level = st.sampled_from([-1.0, 0.0, 0.75])
    experts = n_group * per_group
    logits = draw(st.lists(st.lists(level, min_size=experts, max_size=experts), min_size=1, max_size=3))
    bias = draw(st.lists(level, min_size=experts, max_size=experts))
    options = dict(n_group=n_group, topk_group=topk_group, top_k=top_k, normalise=draw(st.booleans()),
                   scaling_factor=draw(st.sampled_from([1.0, 2.5])))
    return torch.tensor(logits, dtype=torch.float64), torch.tensor(bias, dtype=torch.float64), options


def best(scores: dict[int, float], k: int) -> list[int]:
    """Keys of the k largest; among equals the smaller key."""
    return sorted(scores, key=lambda key: (-scores[key], key))[:k]


def slow_route(scores: list[float], bias: list[float], *, n_group: int, topk_group: int, top_k: int,
               normalise: bool, scaling_factor: float) -> dict[int, float]:
    """One token through eqs. 13-16 and node-limited routing: expert -> weight, best first."""
    choice = {i: s + b for i, (s, b) in enumerate(zip(scores, bias))}
    size = len(scores) // n_group
    members = {g: {i: choice[i] for i in range(g * size, (g + 1) * size)} for g in range(n_group)}
    group_score = {g: sum(sorted(m.values(), reverse=True)[:2]) for g, m in members.items()}
    allowed = {i: choice[i] for g in best(group_score, topk_group) for i in members[g]}
    chosen = best(allowed, top_k)
    total = sum(scores[i] for i in chosen) if normalise else 1.0
    return {i: scores[i] / total * scaling_factor for i in chosen}


@given(routings())
@settings(max_examples=200, deadline=None)
def test_route_is_its_equations_ties_included(case):
    logits, bias, options = case
    routing = route(logits, bias, **options)
    counts = [0] * len(bias)
    for scores, experts, weights in zip(logits.sigmoid().tolist(), routing.experts.tolist(), routing.weights.tolist()):
        expected = slow_route(scores, bias.tolist(), **options)
        assert experts == list(expected)
        assert weights == pytest.approx(list(expected.values()), rel=1e-12)
        for expert in experts:
            counts[expert] += 1
    assert routing.load.tolist() == counts


@given(routings())
@settings(max_examples=50, deadline=None)
def test_bias_steers_the_choice_and_never_the_weight(case):
    logits, bias, options = case
    routing = route(logits, bias, **options)
    chosen = logits.sigmoid().gather(1, routing.experts)
    expected = chosen / chosen.sum(-1, keepdim=True) if options["normalise"] else chosen
    assert torch.allclose(routing.weights, expected * options["scaling_factor"], rtol=1e-12)


def test_forbidden_groups_lose_even_if_everything_else_is_negative():
    """A mask of 0 in place of -inf lets an expert of a dropped group win here."""
    bias = torch.tensor([-2.0, -2.1, -2.2, -2.3, -2.9, -2.9, -2.9, -2.9])
    assert route(torch.zeros(1, 8), bias, n_group=2, topk_group=1, top_k=3).experts.tolist() == [[0, 1, 2]]


def test_a_group_is_worth_its_two_best():
    """Group 0 has the single best expert, group 1 the better pair; K = 3 is not 2M, and still two are summed."""
    bias = torch.tensor([3.0, 0.0, 0.0, 2.0, 2.0, -9.0])
    assert sorted(route(torch.zeros(1, 6), bias, n_group=2, topk_group=1, top_k=3).experts[0].tolist()) == [3, 4, 5]


def test_gradient_reaches_all_scores_in_the_sum_and_never_the_bias():
    logits, bias = torch.randn(5, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    routing = route(logits, bias, n_group=2, topk_group=1, top_k=2)
    routing.weights[:, 0].sum().backward()
    assert bias.grad is None
    assert (logits.grad.gather(1, routing.experts) != 0).all()
    assert torch.count_nonzero(logits.grad) == 10


# ---- refusals ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("call, sentence", [
    (lambda: rms_norm(torch.ones(2, 4), torch.ones(3), 1e-6), r"weight of shape \[3\].*needs \[4\]"),
    (lambda: rope(torch.ones(1, 2, 4), torch.ones(1, 2, 2), torch.ones(1, 2, 2)),
     r"x must be \[B, T, heads, nope \+ d\]"),
    (lambda: rope(torch.ones(1, 2, 1, 4), torch.ones(1, 2, 4), torch.ones(1, 2, 4)), r"tables \[B or 1, T, d/2\]"),
    (lambda: swiglu(torch.ones(2), torch.ones(3)), "must be alike"),
    (lambda: swiglu(torch.ones(2), torch.ones(2).double()), "must be alike"),
    (lambda: cross_entropy(torch.ones(2, 3), torch.ones(3).long()), r"\[N, vocab\] and \[N\]"),
    (lambda: linear_cross_entropy(torch.ones(2, 3), torch.ones(5, 4), torch.zeros(2).long(), torch.ones(2)),
     r"needs \[N, d\]"),
    (lambda: route(torch.ones(2, 8), torch.ones(4), n_group=1, topk_group=1, top_k=1), r"\[2, 8\] and bias \[4\]"),
    (lambda: route(torch.ones(2, 8), torch.ones(8), n_group=4, topk_group=1, top_k=3), "best 3 of 8 experts from 1"),
    (lambda: route(torch.ones(2, 8), torch.ones(8), n_group=3, topk_group=1, top_k=1), "from 1 of 3 groups"),
])
def test_shapes_that_do_not_fit_are_refused_in_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_evaluation_computes_no_gradients_of_the_head(monkeypatch):
    hidden, weight = torch.randn(4, 3).requires_grad_(), torch.randn(7, 3).requires_grad_()
    arguments = hidden, weight, torch.tensor([0, 1, 2, 6]), torch.ones(4)
    want = linear_cross_entropy(*arguments).item()
    monkeypatch.setattr(torch, "mm", lambda *_, **__: pytest.fail("a gradient was computed"))
    with torch.no_grad():
        assert linear_cross_entropy(*arguments).item() == want
