"""FFNs and experts in FP8: SwiGLU's inputs are kept in FP8, and its product is made again (report section 3.3.3).

    gate, up = x W_gate^T, x W_up^T          kept: 1 x 128, one byte a value each; x itself is a norm's output
    h = silu(gate) up                        quantised as it arises, for the forward product 1 x 128,
    y = h W_down^T                           and in the backward pass, from gate and up, 128 x 1

Experts do the same to rows sorted by expert. What goes to an expert is quantised before it is copied: tokens in the
forward pass, and the gradient of the experts' sum in the backward pass; one byte a value travels (3.3.2, "low-precision
communication"). Scales are powers of two, because Wgrad needs what arrived a second time along the other axis: decoded,
it is exact in BF16. Sums over a token's experts stay in BF16.

The router's weight of a row goes into the scales of h in the forward pass, where codes stay as they are. The backward
pass makes h weighted before it quantises it, since Wgrad's tiles lie across rows.
"""

import torch
from torch import Tensor

from .fp8_linear import FP8Linear, WeightCodes, linears, remembered, weight_gradient
from .fp8_products import ALIGN, Operand, Products, cached
from .kernels import Permutation, Routing, sort_by_expert, unpermute
from .moe import MLP, Experts
from .recompute import Normed


class FP8MLP(MLP):
    """The dense layers' FFN and the shared expert."""

    def forward(self, x: Tensor | Normed) -> Tensor:
        gate, up = linears(x, self.gate_proj, self.up_proj)
        return _Down.apply(gate, up, self.down_proj, self.down_proj.weight)


class _Down(torch.autograd.Function):
    """silu(gate) * up times the matrix `down`: gate and up [.., width] -> [.., hidden]."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, down: FP8Linear, weight: Tensor) -> Tensor:
        products, shape = down.codes.products, gate.shape[:-1]
        gate, up = gate.flatten(0, -2), up.flatten(0, -2)
        ctx.save_for_backward(*cached(gate), *cached(up))
        ctx.down = down
        y = products.multiply(products.swiglu_tiles(gate, up), down.codes(weight).straight)
        return y[:len(gate), :down.out_features].unflatten(0, shape)

    @staticmethod
    def backward(ctx, slope: Tensor) -> tuple:
        gate, up = Operand(*ctx.saved_tensors[:2]), Operand(*ctx.saved_tensors[2:])
        down, products, shape = ctx.down, ctx.down.codes.products, slope.shape[:-1]
        slope = slope.flatten(0, -2)
        tiles, columns = products.slopes(slope)
        d_hidden = products.multiply(tiles, down.codes(down.weight).turned)
        d_gate_up, hidden, _ = products.swiglu_backward(gate, up, d_hidden)
        gradient = weight_gradient(down, down.weight, products.weight_gradient, columns, hidden)
        d_gate, d_up = (x[:len(slope), :down.in_features].unflatten(0, shape) for x in d_gate_up.chunk(2, -1))
        return d_gate, d_up, None, gradient


class FP8Experts(Experts):
    """All routed experts of a layer. `fp8.to_fp8` says with which products (`compute_with`)."""

    gate_up_codes: WeightCodes
    down_codes: WeightCodes

    def compute_with(self, products: Products) -> None:
        self.gate_up_codes = WeightCodes(products, self.gate_up_proj)
        self.down_codes = WeightCodes(products, self.down_proj)

    def forward(self, x: Tensor | Normed, routing: Routing) -> Tensor:
        """x [N, hidden] -> sum over the chosen experts of weight * expert(x), [N, hidden] in BF16."""
        return self.serve(x, routing.experts, routing.weights, routing.load)

    def serve(self, x: Tensor | Normed, chosen: Tensor, weights: Tensor, load: Tensor) -> Tensor:
        """The same for the experts `chosen` [N, k], of which `load` may count one more than there are: nothing
        multiplies the rows of that last one, and they add nothing."""
        order = sort_by_expert(chosen, load, align=ALIGN)
        order = order._replace(ends=order.ends[:len(self.gate_up_proj)])
        value, normed = (x.value, x) if isinstance(x, Normed) else (x, None)
        gate_up = _Dispatched.apply(value, normed, self, order, self.gate_up_proj)
        return _Combined.apply(gate_up, weights, self, order, self.down_proj)


class _Dispatched(torch.autograd.Function):
    """Tokens [N, hidden], on the rows of their experts, times gate and up: [R, 2 width]."""

    @staticmethod
    def forward(ctx, x: Tensor, normed: Normed | None, experts: FP8Experts, order: Permutation,
                weight: Tensor) -> Tensor:
        products = experts.gate_up_codes.products
        tokens = products.tiles(x, pow2=True).rows(len(x))
        saved, ctx.again = remembered(x, normed, lambda x: products.tiles(x, pow2=True).rows(len(x)))
        ctx.save_for_backward(*order, *saved)
        ctx.experts, ctx.width = experts, x.shape[1]
        rows = products.dispatch(tokens, order)
        return products.multiply_groups(rows, experts.gate_up_codes(weight).straight, order.ends)[:, :weight.shape[1]]

    @staticmethod
    def backward(ctx, slope: Tensor) -> tuple:
        experts, products = ctx.experts, ctx.experts.gate_up_codes.products
        order, tokens = Permutation(*ctx.saved_tensors[:3]), ctx.again(ctx.saved_tensors[3:])
        turned = experts.gate_up_codes(experts.gate_up_proj).turned
        tiles, columns = products.slopes(slope)
        d_rows = products.multiply_groups(tiles, turned, order.ends)
        dx = unpermute(d_rows[:, :ctx.width], order)
        gradient = weight_gradient(experts, experts.gate_up_proj, products.group_gradients, columns,
                                   products.dispatched_columns(tokens, order), order.ends)
        return dx, None, None, None, gradient


class _Combined(torch.autograd.Function):
    """silu(gate) * up of each row, times its weight and its expert's matrix, summed for each token: gate_up
    [R, 2 width] and weights [N, k] -> [N, hidden]."""

    @staticmethod
    def forward(ctx, gate_up: Tensor, weights: Tensor, experts: FP8Experts, order: Permutation,
                weight: Tensor) -> Tensor:
        products = experts.down_codes.products
        straight = experts.down_codes(weight).straight
        gate, up = gate_up.chunk(2, -1)
        ctx.save_for_backward(weights, *order, *cached(gate), *cached(up))
        ctx.experts = experts
        hidden = products.weighted(products.swiglu_tiles(gate, up), by_row(weights, order))
        return unpermute(products.multiply_groups(hidden, straight, order.ends)[:, :weight.shape[1]], order)

    @staticmethod
    def backward(ctx, slope: Tensor) -> tuple:
        experts, products = ctx.experts, ctx.experts.down_codes.products
        weights, *saved = ctx.saved_tensors
        order, gate, up = Permutation(*saved[:3]), Operand(*saved[3:5]), Operand(*saved[5:])

        tokens = products.slope_tiles(slope, pow2=True).rows(len(slope))
        turned = experts.down_codes(experts.down_proj).turned
        d_hidden = products.multiply_groups(products.dispatch(tokens, order), turned, order.ends)
        d_gate_up, hidden, d_rows = products.swiglu_backward(gate, up, d_hidden, by_row(weights, order))
        d_gate_up = d_gate_up.unflatten(1, (2, -1))[:, :, :experts.down_proj.shape[2]].flatten(1)   # without `padded`
        gradient = weight_gradient(experts, experts.down_proj, products.group_gradients,
                                   products.dispatched_slope_columns(tokens, order), hidden, order.ends)
        return d_gate_up, d_rows[order.rows].to(weights.dtype), None, None, gradient


def by_row(weights: Tensor, order: Permutation) -> Tensor:
    """weights [N, k] of choices on their rows [R]; padding, whose values are zeros, gets any."""
    return weights.flatten().index_select(0, order.sources.clamp(min=0)).float()
