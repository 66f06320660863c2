"""FP8 training through the kernels (interpreted on a CPU, compiled on a GPU) agrees with FP8 training through their
definitions.

How well two correct ones can agree: a sum in another order falls on another code here and there, and every layer makes
more of it. A change of the weights by one part in a million moves the tiny model's gradient by 5 %, and all of FP8's
rounding by 22 %. So single values say little, and what is asked is that the kernels' gradient of each weight is neither
longer nor shorter than the definitions' along their direction, and less far from it than FP8 is from BF16.
"""

import pytest
import torch
from torch import Tensor

from minidsv3 import fp8_products
from minidsv3.accumulate import accumulate
from minidsv3.fp8 import FP8Recipe, to_fp8
from minidsv3.fp8_ablations import quantize, unpromoted
from minidsv3.formats import E4M3
from minidsv3.kernels import use_kernels, uses_triton
from minidsv3.kernels.backend import INTERPRETED
from test_operations import DEVICE, OperatorCalls
from tiny import tiny_model, tiny_tokens

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
# Every token visits every expert, so that no choice can change. Attention's kernel wants powers of two.
TINY = dict(n_routed_experts=4, n_group=2, topk_group=2, num_experts_per_tok=4, qk_nope_head_dim=16,
            qk_rope_head_dim=16, v_head_dim=16)
WIDE = dict(TINY, hidden_size=256, intermediate_size=320, moe_intermediate_size=144, q_lora_rank=192, kv_lora_rank=128,
            qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, vocab_size=512)
SIZES = [pytest.param(TINY, 17, id="tiny")] + ([] if INTERPRETED else [pytest.param(WIDE, 513, id="wide")])
EXPECTED = {"rms_norm", "mla_attention", "mla_attention_backward", "quantize_tiles", "quantize_columns",
            "quantize_blocks", "swiglu_quantize", "swiglu_quantize_backward", "fp8_gemm", "fp8_grouped_gemm",
            "fp8_grouped_wgrad", "permute_scales", "unpermute"}


def gradients(shape: dict, length: int, kernels: str, recipe: FP8Recipe | None = FP8Recipe()
              ) -> tuple[dict[str, Tensor], set[str]]:
    """Of all weights for one batch, and which of our operators ran."""
    model = tiny_model(dtype=torch.float32, num_hidden_layers=2, **shape).to(DEVICE)
    model = to_fp8(model, recipe) if recipe else model
    tokens = tiny_tokens(2, length, vocab_size=model.config.vocab_size).to(DEVICE)
    with use_kernels(kernels), OperatorCalls() as seen:
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model.loss(tokens, mtp_weight=0.3, balance_weight=1e-3).total
        loss.backward()
    found = {name: weight.grad for name, weight in model.named_parameters()}
    return found, {call[0].name().split("::")[1] for call in seen.calls}


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in gradients.values()])


@pytest.mark.parametrize("shape, length", SIZES)
def test_gradients_agree(shape, length):
    ours, operators = gradients(shape, length, "triton")
    definition, none = gradients(shape, length, "torch")
    plain, _ = gradients(shape, length, "torch", recipe=None)
    assert not none and EXPECTED <= operators
    assert distance(flat(ours), flat(definition)) < 0.7 * distance(flat(definition), flat(plain))
    for name, part in definition.items():
        along = ((ours[name] * part).sum() / part.square().sum()).item()
        assert abs(along - 1) < 0.1, name


def test_the_comparison_sees_a_wrong_kernel(monkeypatch):
    """A weight gradient that the kernels make of columns whose scales are a fifth too large."""
    right = fp8_products.quantize_columns

    def wrong(x: Tensor, pow2: bool = False, **options) -> tuple[Tensor, Tensor]:
        codes, scales = right(x, pow2, **options)
        return codes, scales * (1.2 if uses_triton(x) else 1.0)
    monkeypatch.setattr(fp8_products, "quantize_columns", wrong)
    with pytest.raises(AssertionError):
        test_gradients_agree(TINY, 17)


@pytest.mark.skipif(INTERPRETED, reason="on a CPU tests/test_fp8.py differentiates every recipe")
@pytest.mark.parametrize("settings", [
    dict(pow2=True), dict(gradient="e5m2"), dict(gradient_blocks=True), dict(scales="rows"), dict(scales="tensor"),
    dict(scales="rows", promote=False), dict(scales="tensor", promote=False)], ids=str)
def test_every_recipe_differentiates_on_a_gpu(settings):
    usual, plain, found = (flat(gradients(WIDE, 65, "auto", recipe)[0])
                           for recipe in (FP8Recipe(), None, FP8Recipe(**settings)))
    assert 0.01 < distance(found, usual) < 1.5 * distance(usual, plain)


@pytest.mark.skipif(INTERPRETED, reason="asks the tensor cores")
def test_tensor_cores_without_promotion_lose_what_their_model_loses():
    """Positive numbers, whose sums grow: the error is one of accumulation, not of codes."""
    a, b = (quantize(torch.rand(256, 4096, device="cuda"), E4M3, (1, None), False) for _ in range(2))
    exact = a.values(torch.float64) @ b.values(torch.float64).T
    model = accumulate(a.codes.cpu().float(), b.codes.cpu().float(), promote_every=None)
    found, expected = unpromoted(a, b), model.cuda() * a.scales[0][:, None] * b.scales[0]
    assert 0.07 < distance(expected.double(), exact) < 0.08
    assert distance(found, expected) < 0.003        # found is in BF16
