"""Cross-entropy over the vocabulary: -log softmax(logits)[target], in nats; alone, and fused with the output head.

With 129,280 words the logits of one sequence of 4096 tokens weigh 2 GB in FP32, their gradient as much again.
The fused form never holds them: it takes a few tokens at a time through head, softmax and both gradients while the
chunk is in cache.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import wide

CHUNK_VALUES = {"cpu": 2**21, "cuda": 2**28}   # logits held at once: about what a CPU's cache holds; 0.5 GB in bf16


def cross_entropy_reference(logits: Tensor, targets: Tensor) -> Tensor:
    """The definition. logits [N, vocab], targets [N] int64; returns [N] in at least FP32, one loss a token."""
    return -wide(logits).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The same through torch's own kernel; raises ValueError unless logits are [N, vocab] and targets [N]."""
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"cross_entropy got logits {list(logits.shape)} and targets {list(targets.shape)}; "
                         "they must be [N, vocab] and [N]")
    return F.cross_entropy(wide(logits), targets, reduction="none")


def linear_cross_entropy_reference(hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor) -> Tensor:
    """The definition of the fused form: sum_i token_weights_i * cross_entropy(hidden_i W^T, target_i), a scalar.

    hidden [N, d], weight [vocab, d], targets [N] int64, token_weights [N] (constants: no gradient flows to them).
    """
    return (cross_entropy_reference(F.linear(hidden, weight), targets) * token_weights).sum()


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor) -> Tensor:
    """`linear_cross_entropy_reference` without the logits; gradients are computed in the forward pass, chunk by chunk.

    Raises ValueError for shapes that do not fit. Differentiable once.
    """
    rows = hidden.shape[:1]
    if hidden.dim() != 2 or hidden.shape[1:] != weight.shape[1:] or not targets.shape == token_weights.shape == rows:
        raise ValueError(f"linear_cross_entropy got hidden {list(hidden.shape)}, weight {list(weight.shape)}, "
                         f"targets {list(targets.shape)} and token_weights {list(token_weights.shape)}; "
                         "it needs [N, d], [vocab, d], [N] and [N]")
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    if not torch.is_grad_enabled():   # evaluation: two of the three matrix products are for gradients
        hidden, weight = hidden.detach(), weight.detach()
    token_weights = token_weights.to(torch.promote_types(hidden.dtype, torch.float32))   # the dtype of the logits
    return _LinearCrossEntropy.apply(hidden, weight, targets, token_weights)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, token_weights):
        learns = any(ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(hidden) if learns else None
        grad_weight = torch.zeros_like(wide(weight)) if learns else None
        total = wide(hidden.new_zeros(()))
        rows = max(1, CHUNK_VALUES.get(hidden.device.type, 2**24) // weight.shape[0])
        with torch.autocast(hidden.device.type, enabled=False):
            for h, target, w, dh in zip(*(t.split(rows) for t in (hidden, targets, token_weights)),
                                        grad_hidden.split(rows) if learns else [None] * len(hidden)):
                logits = wide(h @ weight.t())
                target_logit = logits.gather(-1, target[:, None])
                peak = logits.amax(-1, keepdim=True)
                p = logits.sub_(peak).exp_()
                norm = p.sum(-1, keepdim=True)
                total += ((norm.log() + peak - target_logit).squeeze(-1) * w).sum()
                if learns:   # d loss / d logits = (softmax - one_hot) * w, written over the logits
                    slope = p.mul_(w[:, None] / norm).scatter_add_(-1, target[:, None], -w[:, None]).to(h.dtype)
                    torch.mm(slope, weight, out=dh)
                    grad_weight += slope.t() @ h
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * slope, (grad_weight * slope).to(ctx.weight_dtype), None, None
