"""The whole model through its kernels (interpreted on a CPU, compiled on a GPU) agrees with its definitions."""

import pytest
import torch

from minidsv3.attention import LatentCache
from minidsv3.kernels import use_kernels
from minidsv3.kernels.backend import INTERPRETED
from minidsv3.weight_gradients import has_grouped_mm
from test_operations import DEVICE, OperatorCalls
from tiny import tiny_model, tiny_tokens

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
EXPECTED = {"rms_norm", "rms_norm_backward", "route", "route_backward", "swiglu", "swiglu_backward",
            "mla_attention", "mla_attention_backward", "rope", "cross_entropy", "cross_entropy_backward"}
if has_grouped_mm(torch.empty(0, device=DEVICE)):    # not in FP32 on a GPU: the loop moves tokens there
    EXPECTED |= {"sort_by_expert", "permute", "unpermute", "weighted_swiglu", "weighted_swiglu_backward"}

BEHIND = {"permute", "unpermute"}      # operators in which the definition runs on a CPU


def logits_loss_and_gradients(kernels: str) -> tuple[torch.Tensor, dict[str, torch.Tensor], set[str]]:
    """Of one small model and batch, and which of our operators ran."""
    model = tiny_model(dtype=torch.float32).to(DEVICE)
    tokens = tiny_tokens(2, 11).to(DEVICE)
    with use_kernels(kernels), OperatorCalls() as seen:
        loss = model.loss(tokens, mtp_weight=0.3, balance_weight=1e-2).total
        loss.backward()
        logits = model(tokens[:, :-1]).detach()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return logits, gradients | {"loss": loss.detach()}, {call[0].name().split("::")[1] for call in seen.calls}


def test_logits_loss_and_gradients_agree():
    logits, gradients, operators = logits_loss_and_gradients("triton")
    wanted_logits, wanted, others = logits_loss_and_gradients("torch")
    assert others <= BEHIND
    assert EXPECTED <= operators
    assert (logits - wanted_logits).abs().max() <= 2e-5 * wanted_logits.abs().max()
    for name, gradient in gradients.items():
        assert (gradient - wanted[name]).abs().max() <= 1e-4 * wanted[name].abs().max(), name


def test_decoding_reads_the_cache_through_the_kernel():
    """Rows of different lengths, then two new tokens each: as the definitions have it."""
    model = tiny_model(dtype=torch.float32).to(DEVICE)
    prompt, new = tiny_tokens(2, 9).to(DEVICE), tiny_tokens(2, 2, seed=1).to(DEVICE)

    def logits(kernels: str) -> tuple[torch.Tensor, set[str]]:
        cache = LatentCache(model.config, 2, 32, device=DEVICE)
        with torch.no_grad(), use_kernels(kernels), OperatorCalls() as seen:
            model(prompt, cache)
            cache.lengths = torch.tensor([9, 5], device=DEVICE)
            out = model(new, cache)
        return out, {call[0].name().split("::")[1] for call in seen.calls}

    (ours, operators), (wanted, others) = logits("triton"), logits("torch")
    assert "mla_decode" in operators and others <= BEHIND
    assert (ours - wanted).abs().max() <= 2e-5 * wanted.abs().max()
