"""The experts: three ways to compute them agree, no token is dropped, and routing keeps its precision."""

import pytest
import torch
from torch import Tensor

from minidsv3 import Transformer
from minidsv3.kernels import Routing
from minidsv3.moe import MLP, Experts, MoE, Router
from tiny import randomise, tiny_config, tiny_model, tiny_tokens

CONFIG = tiny_config()


def experts_of(dtype: torch.dtype = torch.float32) -> Experts:
    return randomise(Transformer(CONFIG), 0).model.layers[1].mlp.experts.to(dtype)


def routing_to(experts: list[list[int]]) -> Routing:
    """A routing of one token a row to these experts, with weights that differ."""
    chosen = torch.tensor(experts)
    weights = torch.rand(chosen.shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    load = torch.bincount(chosen.flatten(), minlength=16).float()
    return Routing(torch.zeros(len(experts), 16), chosen, weights, load)


def outcome(form, x: Tensor, routing: Routing, experts: Experts) -> list[Tensor]:
    """Values and the gradients of input, router's weights and both matrices."""
    x = x.clone().requires_grad_()
    y = form(x, routing)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    leaves = [x, routing.weights, experts.gate_up_proj, experts.down_proj]
    return [y, *torch.autograd.grad(y, leaves, cotangent)]


CASES = {
    "random": [[(3 * t + k * (t + 2)) % 16 for k in range(4)] for t in range(40)],
    "all tokens to four experts": [[0, 5, 6, 15]] * 30,
    "one token": [[7, 2, 9, 0]],
    "one expert a token": [[t % 3 * 7] for t in range(9)],
    "only the last expert": [[15]] * 5,
}


@pytest.mark.parametrize("form", ["grouped", "gathered"])
@pytest.mark.parametrize("case", CASES)
def test_every_form_equals_the_loop(form, case):
    """Values and gradients to 1e-6 of the largest, in FP32; experts that no token chose get a gradient of 0."""
    experts, routing = experts_of(), routing_to(CASES[case])
    x = torch.randn(len(CASES[case]), CONFIG.hidden_size)
    loop, other = (outcome(each, x, routing, experts) for each in (experts.loop, getattr(experts, form)))
    for expected, found in zip(loop, other, strict=True):
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    idle = routing.load == 0
    assert torch.count_nonzero(other[3][idle]) == torch.count_nonzero(other[4][idle]) == 0


def test_loop_is_equation_12():
    """sum over the chosen of weight * W_down (silu(W_gate x) * W_up x), gate's rows first, in float64."""
    experts, routing = experts_of(torch.float64), routing_to([[3, 1], [0, 3], [2, 9]])
    x = torch.randn(3, CONFIG.hidden_size, dtype=torch.float64)
    expected = torch.zeros_like(x)
    for token in range(3):
        for expert, weight in zip(routing.experts[token], routing.weights[token]):
            gate, up = experts.gate_up_proj[expert].chunk(2)
            inner = torch.nn.functional.silu(gate @ x[token]) * (up @ x[token])
            expected[token] += weight * (experts.down_proj[expert] @ inner)
    for form in (experts.loop, experts.gathered, experts):
        assert torch.allclose(form(x, routing), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 64])
def test_output_keeps_dtype_and_shape(dtype, tokens):
    layer = tiny_model(dtype=dtype).model.layers[1].mlp
    y = layer(torch.randn(1, tokens, CONFIG.hidden_size, dtype=dtype))
    assert y.dtype == dtype and y.shape == (1, tokens, CONFIG.hidden_size) and y.isfinite().all()


def test_no_token_is_dropped_when_all_want_the_same_experts():
    layer = tiny_model().model.layers[1].mlp
    layer.gate.e_score_correction_bias[:4] += 100
    record = []
    layer(torch.randn(2, 50, CONFIG.hidden_size, dtype=torch.float64), record)
    assert record[0].load.tolist() == [100.0] * 4 + [0.0] * 12


@pytest.mark.parametrize("shared", [0, 1, 2])
def test_shared_expert_is_one_mlp_that_nothing_weighs(shared):
    """Trap 32: width n_shared * moe_intermediate_size, no gate, no factor of 2.5."""
    layer = tiny_model(n_shared_experts=shared).model.layers[1].mlp
    x = torch.randn(1, 7, CONFIG.hidden_size, dtype=torch.float64)
    routed = layer.experts(x[0], layer.gate(x[0]))[None]
    if shared:
        assert isinstance(layer.shared_experts, MLP)
        assert layer.shared_experts.gate_proj.weight.shape == (shared * 16, 32)
        routed = routed + layer.shared_experts(x)
    assert torch.equal(layer(x), routed)
    assert (layer.shared_experts is None) == (shared == 0)


# ---- the router's precision -------------------------------------------------------------------------------------

def test_router_computes_in_fp32_in_a_bf16_model():
    """Trap 12: the bf16 weights and inputs are exact in FP32; their product and the sigmoid are taken there."""
    router = tiny_model(dtype=torch.bfloat16).model.layers[1].mlp.gate
    x = torch.randn(200, CONFIG.hidden_size).bfloat16()
    routing = router(x)
    assert routing.logits.dtype == routing.weights.dtype == torch.float32
    exact = x.double() @ router.weight.double().T
    assert (routing.logits - exact).abs().max() < 1e-5
    assert (torch.nn.functional.linear(x, router.weight).double() - exact).abs().max() > 1e-3    # what bf16 would give


def test_autocast_does_not_lower_the_router():
    router = tiny_model(dtype=torch.float32).model.layers[1].mlp.gate
    x = torch.randn(20, CONFIG.hidden_size)
    expected = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        routing = router(x)
    assert torch.equal(routing.logits, expected.logits) and torch.equal(routing.weights, expected.weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_bias_survives_a_change_of_dtype_exactly(dtype):
    """Trap 13: FP32, a buffer, saved; steps of 0.001 beside a bias of 2 would vanish in bf16."""
    model = tiny_model(dtype=torch.float32)
    before = [router.e_score_correction_bias.clone() for router in model.modules() if isinstance(router, Router)]
    assert len(before) == 3
    for moved in (model.to(dtype), model.to(torch.float32), model.to(dtype)):
        after = [router.e_score_correction_bias for router in moved.modules() if isinstance(router, Router)]
        assert all(bias.dtype == torch.float32 for bias in after)
        assert all(torch.equal(one, other) for one, other in zip(before, after))
    assert model.lm_head.weight.dtype == dtype


def test_bias_becomes_float64_with_the_model_and_follows_to_the_meta_device():
    model = Transformer(CONFIG).double()
    assert model.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float64
    assert model.bfloat16().to("meta").model.layers[1].mlp.gate.e_score_correction_bias.is_meta


def test_bias_is_saved_and_never_learned():
    model = Transformer(CONFIG)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert name in model.state_dict() and name not in dict(model.named_parameters())
    model.loss(tiny_tokens(2, 9), mtp_weight=0.3, balance_weight=1e-4).total.backward()
    assert all(router.e_score_correction_bias.grad is None for router in model.modules() if isinstance(router, Router))


@pytest.mark.parametrize("width", [32, 48])
def test_every_width_has_the_bias_and_the_group_score(width):
    """Trap 14: the official demo has a bias only at width 7168 and otherwise scores a group by its best expert."""
    layer = MoE(tiny_config(hidden_size=width))
    assert layer.gate.e_score_correction_bias.shape == (16,)
    assert layer.gate.e_score_correction_bias.dtype == torch.float32
