"""Latent attention in FP8: only latents, the output and one number a query wait for the backward pass.

    c_q, c_kv = norm(x) W^DQ, norm(x) W^DKV          kept in BF16: 1536 + 576 values a token at full size
    q = norm(c_q) W^UQ,  k, v = norm(c_kv) W^UKV     made again: 24576 + 32768 values (report section 3.2.3)
    o = attention(q, k, v)                           kept in E5M6, 1.5 bytes a value (3.3.3), and each query's
    y = o W^O                                        log of the sum of exp(logits)

o has two uses in the backward pass: the gradient of attention, for which FP8 would be too coarse, and the weight
gradient of W^O. Its scales are powers of two. Attention itself computes in BF16 with sums in FP32, as do the norms.
"""

import torch
from torch import Tensor

from .attention import MLA, Context
from .attention_gradient import attend, attend_backward
from .fp8_linear import fprop, linears, weight_gradient
from .kernels import dequantize_e5m6, quantize_e5m6, rope
from .recompute import Normed


class FP8MLA(MLA):
    """Latent attention of one layer behind a `RecomputedNorm`. With a cache, or without gradients, it is `MLA` in BF16
    with FP8 matrices."""

    def forward(self, x: Normed, context: Context) -> Tensor:
        """x [B, T, hidden] -> [B, T, hidden] in BF16 (eq. 11)."""
        if context.cache is not None or not torch.is_grad_enabled():
            with torch.autocast(x.value.device.type, torch.bfloat16):
                return super().forward(x.value, context)
        c_q, c_kv = linears(x, self.q_a_proj, self.kv_a_proj_with_mqa)
        return _Core.apply(c_q, c_kv, self, context, self.o_proj.weight, *self.expanding())

    def absorbed(self, query: Tensor, cached: Tensor, visible: Tensor | None, lengths: Tensor | None = None) -> Tensor:
        """As in `MLA`, from a cache of any dtype."""
        return super().absorbed(query, cached.to(query.dtype), visible, lengths)

    def expanding(self) -> tuple[Tensor, ...]:
        """The parameters between the latents and attention."""
        modules = self.q_a_layernorm, self.q_b_proj, self.kv_a_layernorm, self.kv_b_proj
        return tuple(module.weight for module in modules)

    def expand(self, c_q: Tensor, c_kv: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, T, heads, 128 + 64] (eqs. 6-9), [key, value] [B, T, heads, 128 + 128] and the rotary key
        [B, T, 64] that heads share (eqs. 1-5), of the latents [B, T, 1536] and [B, T, 512 + 64]."""
        heads, turn = (self.config.num_attention_heads, -1), (context.cos, context.sin)
        query = self.q_b_proj(self.q_a_layernorm(c_q)).unflatten(-1, heads)
        query = rope(query, *turn, nope=self.config.qk_nope_head_dim)
        latent, k_rope = c_kv.split([self.config.kv_lora_rank, self.config.qk_rope_head_dim], -1)
        k_rope = rope(k_rope.unsqueeze(2), *turn).squeeze(2)
        return query, self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, heads), k_rope


class _Core(torch.autograd.Function):
    """From the latents to the layer's output: norms, up-projections, attention and W^O."""

    @staticmethod
    def forward(ctx, c_q: Tensor, c_kv: Tensor, mla: FP8MLA, context: Context, *weights: Tensor) -> Tensor:
        out, log_sum = attend(*mla.expand(c_q, c_kv, context), mla.scale)
        out = out.flatten(2)
        ctx.save_for_backward(c_q, c_kv, log_sum, *quantize_e5m6(out.flatten(0, 1)))
        ctx.mla, ctx.context = mla, context
        return fprop(out, (mla.o_proj,))[0]

    @staticmethod
    def backward(ctx, slope: Tensor) -> tuple:
        mla, products = ctx.mla, ctx.mla.o_proj.codes.products
        c_q, c_kv, log_sum, *kept = ctx.saved_tensors
        shape, slope = slope.shape[:-1], slope.flatten(0, -2)
        out = dequantize_e5m6(*kept, mla.o_proj.in_features)
        turned = mla.o_proj.codes(mla.o_proj.weight).turned
        tiles, columns = products.slopes(slope)
        d_out = products.multiply(tiles, turned)[:len(out), :out.shape[1]]
        d_o_proj = weight_gradient(mla.o_proj, mla.o_proj.weight, products.weight_gradient, columns,
                                   products.columns(out, mla.o_proj.pow2))

        with torch.enable_grad():      # a graph of the up-projections alone, which lives until this function ends
            latents = [x.detach().requires_grad_() for x in (c_q, c_kv)]
            expanded = mla.expand(*latents, ctx.context)
        by_head = shape + (mla.config.num_attention_heads, mla.config.v_head_dim)
        slopes = attend_backward(*(x.detach() for x in expanded), mla.scale, out.view(by_head), log_sum,
                                 d_out.reshape(by_head))
        weights = mla.expanding()
        wanted = [*latents, *(weight for weight in weights if weight.requires_grad)]
        found = iter(torch.autograd.grad(expanded, wanted, slopes, allow_unused=True))     # None: waits in a store
        d_q, d_kv = next(found), next(found)
        return d_q, d_kv, None, None, d_o_proj, *(next(found) if weight.requires_grad else None for weight in weights)
