"""What is made again in the backward pass is what was there, bit for bit; and the bytes that this saves, counted."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from minidsv3 import ModelConfig, fp8_attention, fp8_ffn, fp8_linear, recompute
from minidsv3.attention import make_context
from minidsv3.attention_gradient import attend, attend_backward
from minidsv3.block import Block
from minidsv3.fp8 import to_fp8
from minidsv3.kernels import Routing, mla_attention, rms_norm, use_kernels
from minidsv3.layers import RMSNorm
from minidsv3.parallel.memory import Kept, kept_by_layer
from minidsv3.recompute import Normed, RecomputedNorm, RecomputedRouter
from test_fp8 import chosen, fp8_experts, fp8_linear_of
from tiny import tiny_config, tiny_model

EPS = 1e-6


def normed(x: Tensor, gain: Tensor) -> Normed:
    """The norm of x as a leaf, so that its gradient can be seen."""
    return Normed(rms_norm(x, gain, EPS).requires_grad_(), x, gain, EPS)


# ---- equal bits -----------------------------------------------------------------------------------------------------

def test_the_norm_is_rms_norm():
    plain, lean = RMSNorm(24, EPS).double(), RecomputedNorm(24, EPS).double()
    gradients = []
    for norm in (plain, lean):
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5, generator=torch.Generator().manual_seed(0))
        x = torch.arange(96.0).sin().double().view(2, 2, 24).requires_grad_()
        y = norm(x)
        y = y.value if norm is lean else y
        (y * torch.arange(96.0).cos().view(2, 2, 24)).sum().backward()
        gradients.append((y.detach(), x.grad, norm.weight.grad))
    for got, want in zip(gradients[1], gradients[0]):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-15)


def linear_results(remembers: bool) -> list[Tensor]:
    """y, the gradient of the norm's output and dW, from the norm's input or from what the linear itself kept."""
    x, gain, matrix = torch.randn(40, 96), torch.rand(96) + 0.5, fp8_linear_of(torch.randn(64, 96))
    given = normed(x, gain)
    y = matrix(given if remembers else given.value)
    y.backward(torch.randn(40, 64).bfloat16())
    return [y.detach(), given.value.grad, matrix.weight.grad]


def expert_results(remembers: bool) -> list[Tensor]:
    config = tiny_config()
    x, gain, experts = torch.randn(30, 32), torch.rand(32) + 0.5, fp8_experts(config)
    routing = chosen("any", config, 30)
    given = normed(x, gain)
    y = experts(given if remembers else given.value, routing)
    y.backward(torch.randn(30, 32).bfloat16())
    return [y.detach(), given.value.grad, experts.gate_up_proj.grad, experts.down_proj.grad, routing.weights.grad]


def router_results(remembers: bool) -> list[Tensor]:
    config = tiny_config()
    x, gain, router = torch.randn(30, 32), torch.rand(32) + 0.5, RecomputedRouter(config)
    torch.nn.init.normal_(router.weight)
    given = normed(x, gain)
    logits = router.logits(given) if remembers else super(RecomputedRouter, router).logits(given.value)
    logits.backward(torch.randn(30, 16))
    return [logits.detach(), given.value.grad, router.weight.grad]


@pytest.mark.parametrize("results", [linear_results, expert_results, router_results])
def test_recomputed_is_remembered_bit_for_bit(results):
    found = []
    for remembers in (True, False):
        torch.manual_seed(0)
        found.append(results(remembers))
    for recomputed, remembered in zip(*found):
        assert recomputed.dtype == remembered.dtype and recomputed.any() and torch.equal(recomputed, remembered)


@pytest.mark.parametrize("results, where", [(linear_results, fp8_linear), (expert_results, fp8_linear),
                                            (router_results, recompute)])
def test_the_comparison_sees_another_gain(monkeypatch, results, where):
    monkeypatch.setattr(where, "rms_norm", lambda x, gain, eps: rms_norm(x, gain * 1.1, eps))
    with pytest.raises(AssertionError):
        test_recomputed_is_remembered_bit_for_bit(results)


# ---- attention ------------------------------------------------------------------------------------------------------

def attention_inputs(dtype: torch.dtype) -> list[Tensor]:
    """Query [2, 9, 3, 16 + 16], key_value [2, 9, 3, 16 + 32] and rope_key [2, 9, 16]."""
    return [torch.randn(*shape, dtype=dtype).requires_grad_() for shape in ((2, 9, 3, 32), (2, 9, 3, 48), (2, 9, 16))]


@pytest.mark.parametrize("kernels, dtype, tolerance", [
    ("torch", torch.float64, 1e-13), ("triton", torch.float32, 1e-5)])
def test_attention_and_its_gradient_are_the_kernels_definition(kernels, dtype, tolerance):
    inputs, slope = attention_inputs(dtype), torch.randn(2, 9, 3, 32, dtype=dtype)
    want = torch.stack([mla_attention(*(x[row] for x in inputs), torch.tensor([0, 9]), 9, 0.3) for row in range(2)])
    want.backward(slope)
    with use_kernels(kernels), torch.no_grad():
        out, log_sum = attend(*inputs, 0.3)
        gradients = attend_backward(*inputs, 0.3, out, log_sum, slope)
    for got, expected in zip((out, *gradients), (want, *(x.grad for x in inputs))):
        torch.testing.assert_close(got, expected.detach(), rtol=0, atol=tolerance * expected.abs().max().item())


def test_attention_keeps_its_output_in_twelve_bits(monkeypatch):
    """Both uses of the output take what comes out of E5M6: with zeros in its place the gradients change."""
    def gradients() -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        model = to_fp8(tiny_model(dtype=torch.float32))
        block, x = model.blocks[0], torch.randn(1, 20, 32)
        block(x, make_context(model.config, x.shape[:2], x.dtype, x.device)).square().sum().backward()
        return block.self_attn.o_proj.weight.grad, block.self_attn.q_b_proj.weight.grad
    before = gradients()
    found = fp8_attention.dequantize_e5m6
    monkeypatch.setattr(fp8_attention, "dequantize_e5m6", lambda *kept: torch.zeros_like(found(*kept)))
    assert not gradients()[0].any() and not torch.equal(gradients()[1], before[1])


# ---- bytes ----------------------------------------------------------------------------------------------------------

def bytes_kept(config: ModelConfig, layer: int, tokens: int, fp8: bool) -> float:
    """Bytes a token that a layer's forward pass saves for its backward, the weights and their copies aside.

    Counted on tensors without memory, along the path that a GPU takes; weights and the residual stream in BF16.
    """
    kept = {}

    def count(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in weights and x.shape != (config.n_routed_experts, config.hidden_size):  # router in FP32
            kept[storage._cdata] = storage.nbytes()
        return x

    with FakeTensorMode(), use_kernels("triton"), torch.autocast("cpu", torch.bfloat16):
        torch.set_default_dtype(torch.bfloat16)
        block = Block(config, layer)
        torch.set_default_dtype(torch.float32)
        weights = {weight.untyped_storage()._cdata for weight in block.parameters()}
        x = torch.empty(1, tokens, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        context = make_context(config, x.shape[:2], x.dtype, x.device)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            (to_fp8(block) if fp8 else block)(x, context)
    return sum(kept.values()) / tokens


NORMS = 2 * 4       # 1 / rms of each token, for the gradients of the two norms


def expected(config: ModelConfig, moe: bool, tokens: int) -> float:
    """`kept_by_layer`, which has the rows of a balanced expert-parallel layer. Here all experts are on one GPU: what
    came to them is made again from the norm's input, and there is room for the worst case of padding."""
    kept = {row.name: row.bytes("fp8") for row in kept_by_layer(config, moe)}
    if not moe:
        return sum(kept.values()) + NORMS
    del kept["rows that came to the experts"]
    chosen, experts = config.num_experts_per_tok, config.n_routed_experts
    rows = -(-(tokens * chosen + experts * 127) // 128) * 128
    row = Kept("gate and up", config.moe_intermediate_size, "product", rows=2).bytes("fp8")
    kept["gate and up of the experts"] = rows / tokens * row
    order = chosen * (8 + 4 + 4) + 4 * rows / tokens + 4 * experts / tokens     # experts, weights, rows; sources; ends
    return sum(kept.values()) + NORMS + order


@pytest.mark.parametrize("preset, tokens", [("nano", 256), ("mini", 2048), ("full", 4096), ("full", 16384)])
@pytest.mark.parametrize("moe", [False, True])
def test_a_layer_keeps_what_the_report_says_and_no_more(preset, tokens, moe):
    config = ModelConfig.preset(preset)
    assert bytes_kept(config, config.first_k_dense_replace if moe else 0, tokens, fp8=True) == pytest.approx(
        expected(config, moe, tokens), rel=1e-12)


@pytest.mark.parametrize("layer, bf16, fp8", [(0, 324.6, 96.5), (3, 469.6, 106.1)])
def test_what_it_saves_at_full_size(layer, bf16, fp8):
    """Kilobytes a token of a layer, 16,384 tokens on one GPU."""
    config = ModelConfig.preset("full")
    assert round(bytes_kept(config, layer, 16384, fp8=False) / 1000, 1) == bf16
    assert round(bytes_kept(config, layer, 16384, fp8=True) / 1000, 1) == fp8
