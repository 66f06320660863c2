"""Cross-entropy over the vocabulary: -log softmax(logits)[target], in nats; alone, and fused with the output head.

    loss = log sum_j exp(l_j) - l_target         d loss / d l_j = softmax(l)_j - [j = target]

With 129,280 words the logits of one sequence of 4096 tokens weigh 1 GB in BF16, and so does their gradient. The kernel
writes the gradient over the logits. The fused form never holds either: it takes a few tokens at a time through head,
softmax and both gradients while the chunk is in cache.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import tl, triton, uses_triton
from .precision import wide

CHUNK_VALUES = {"cpu": 2**21, "cuda": 2**28}   # logits held at once: about what a CPU's cache holds; 0.5 GB in bf16


def cross_entropy_reference(logits: Tensor, targets: Tensor) -> Tensor:
    """The definition. logits [N, vocab], targets [N] int64; returns [N] in at least FP32, one loss a token."""
    return -wide(logits).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


@triton.jit
def _loss(LOGITS, TARGETS, LOSS, LSE, stride, words, BLOCK: tl.constexpr):
    """One token a program: the sum of exponentials grows block by block and shrinks when a larger logit appears."""
    row = tl.program_id(0).to(tl.int64)
    peak, total = -3.4e38, 0.0             # -inf would give NaN where a block holds nothing else
    for start in range(0, words, BLOCK):
        word = start + tl.arange(0, BLOCK)
        x = tl.load(LOGITS + row * stride + word, mask=word < words, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, tl.max(x))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(x - higher))
        peak = higher
    lse = peak + tl.log(total)
    target = tl.load(TARGETS + row)
    there = (target >= 0) & (target < words)
    chosen = tl.load(LOGITS + row * stride + target, mask=there, other=float("nan")).to(tl.float32)
    tl.store(LSE + row, lse)
    tl.store(LOSS + row, lse - chosen)


@triton.jit
def _slope(LOGITS, TARGETS, LSE, WEIGHTS, stride, words, BLOCK: tl.constexpr):
    """A token's gradient, times its weight, over its logits."""
    row, word = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = LOGITS + row * stride + word
    p = tl.exp(tl.load(at, mask=word < words, other=0.0).to(tl.float32) - tl.load(LSE + row))
    slope = (p - tl.where(word == tl.load(TARGETS + row), 1.0, 0.0)) * tl.load(WEIGHTS + row)
    tl.store(at, slope.to(LOGITS.dtype.element_ty), mask=word < words)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """`cross_entropy_reference`; raises ValueError unless logits are [N, vocab] and targets [N].

    Where the kernel computes, backward writes the gradient over the logits: afterwards they hold it, and torch refuses
    a second backward. It gives NaN for a target outside the vocabulary, which torch refuses elsewhere.
    """
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"cross_entropy got logits {list(logits.shape)} and targets {list(targets.shape)}; "
                         "they must be [N, vocab] and [N]")
    if uses_triton(logits, targets):
        return _cross_entropy(logits if logits.stride(-1) == 1 else logits.contiguous(), targets)[0]
    return F.cross_entropy(wide(logits), targets, reduction="none")


@torch.library.custom_op("minidsv3::cross_entropy", mutates_args=())
def _cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The losses [N] and log sum exp of each row [N], in FP32."""
    losses, lse = (torch.empty(len(logits), device=logits.device) for _ in range(2))
    if len(logits):
        _loss[(len(logits),)](logits, targets.contiguous(), losses, lse, logits.stride(0), logits.shape[1],
                              **_block(logits, 8192))
    return losses, lse


@torch.library.custom_op("minidsv3::cross_entropy_backward", mutates_args=("logits",))
def _cross_entropy_backward(logits: Tensor, targets: Tensor, lse: Tensor, weights: Tensor) -> None:
    """Writes weights [N] times the gradient over the logits."""
    if logits.numel():
        options = _block(logits, 4096)
        _slope[(len(logits), triton.cdiv(logits.shape[1], options["BLOCK"]))](
            logits, targets.contiguous(), lse, weights.contiguous(), logits.stride(0), logits.shape[1], **options)


def _block(logits: Tensor, most: int) -> dict[str, int]:
    block = min(triton.next_power_of_2(logits.shape[1]), most)
    return {"BLOCK": block, "num_warps": min(max(block // 1024, 1), 8)}


_cross_entropy.register_fake(
    lambda logits, targets: tuple(logits.new_empty(len(logits), dtype=torch.float32) for _ in range(2)))
_cross_entropy_backward.register_fake(lambda logits, targets, lse, weights: None)


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _gradient(ctx, slope: Tensor, _) -> tuple:
    logits, targets, lse = ctx.saved_tensors
    logits = logits.detach()
    _cross_entropy_backward(logits, targets, lse, slope)
    return logits, None


_cross_entropy.register_autograd(_gradient, setup_context=_keep)


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
                loss, slope = _loss_and_slope(h @ weight.t(), target, w, learns)
                total = total + loss     # torch 2.11 compiles `+=` on what is returned to a gradient of zero
                if learns:
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


def _loss_and_slope(logits: Tensor, target: Tensor, w: Tensor, learns: bool) -> tuple[Tensor, Tensor | None]:
    """The weighted sum of the losses of a chunk, and its gradient by the logits, written over them."""
    if uses_triton(logits, target) and not torch.compiler.is_compiling():   # which fuses the definition itself
        losses, lse = _cross_entropy(logits, target)
        if learns:
            _cross_entropy_backward(logits, target, lse, w)
        return (losses * w).sum(), logits
    dtype, logits = logits.dtype, wide(logits)
    target_logit = logits.gather(-1, target[:, None])
    peak = logits.amax(-1, keepdim=True)
    p = logits.sub_(peak).exp_()
    norm = p.sum(-1, keepdim=True)
    loss = ((norm.log() + peak - target_logit).squeeze(-1) * w).sum()
    if not learns:
        return loss, None
    return loss, p.mul_(w[:, None] / norm).scatter_add_(-1, target[:, None], -w[:, None]).to(dtype)
