"""What the FP8 tests compare with: quantisation spelled out tile by tile, and products without any rounding."""

import torch
from torch import Tensor

from minidsv3 import fp8_attention, fp8_ffn
from minidsv3.fp8_products import Operand, Products, WeightOperands, padded
from minidsv3.kernels import Permutation, permute, swiglu


def fake(x: Tensor, rows: int, columns: int, pow2: bool = False) -> Tensor:
    """x [M, K] in float64 as E4M3 gives it back, with one FP32 scale for `rows` x `columns` values."""
    y = x.double().clone()
    for i in range(0, x.shape[0], rows):
        for j in range(0, x.shape[1], columns):
            tile = y[i:i + rows, j:j + columns]
            scale = tile.float().abs().max() / torch.tensor(448.0) or torch.tensor(1.0)
            scale = 2.0 ** scale.log2().ceil() if pow2 else scale
            tile.copy_((tile.float() / scale).to(torch.float8_e4m3fn).double() * scale.double())
    return y


def doubt(x: Tensor, rows: int, columns: int) -> Tensor:
    """How far each value of x [M, K] may move: half a step, 2^-4 of a normal number; below E4M3's normal numbers, where
    steps are 2^-9, half of that in units of the scale."""
    y = x.double().abs()
    for i in range(0, x.shape[0], rows):
        for j in range(0, x.shape[1], columns):
            tile = y[i:i + rows, j:j + columns]
            tile.copy_(torch.maximum(tile * 2.0 ** -4, torch.full_like(tile, tile.max().item() / 448 * 2.0 ** -10)))
    return y


def product_bound(a: Tensor, a_doubt: Tensor, b: Tensor, b_doubt: Tensor) -> Tensor:
    """The largest error of a b^T whose sides moved by their doubts; and 2^-8 of it for sums and results rounded."""
    a, b = a.double().abs(), b.double().abs()
    exact = a_doubt @ b.T + a @ b_doubt.T + a_doubt @ b_doubt.T
    return exact + 2.0 ** -8 * (a @ b.T + exact)


class Exact(Products):
    """Operands that are not quantised and products in their own dtype: with them every layer must be the plain one."""

    def tiles(self, x: Tensor, pow2: bool = False, least: float = 0.0) -> Operand:
        x = padded(x)
        return Operand(x, x.new_ones(-(-x.shape[-1] // 128), len(x)))

    def columns(self, x: Tensor, pow2: bool = False, least: float = 0.0) -> Operand:
        return self.tiles(padded(x).T.contiguous())

    def slopes(self, slope: Tensor) -> tuple[Operand, Operand]:
        return self.tiles(slope), self.columns(slope)

    def dispatched_columns(self, operand: Operand, order: Permutation) -> Operand:
        return self.columns(permute(operand.values(), order))

    dispatched_slope_columns = dispatched_columns

    def weight(self, weight: Tensor) -> WeightOperands:
        return WeightOperands(Operand(padded(weight), None), Operand(padded(weight).mT.contiguous(), None))

    def weight_values(self, operand: Operand) -> Tensor:
        return operand.codes

    def multiply(self, a: Operand, b: Operand) -> Tensor:
        return a.values() @ b.codes.T

    def multiply_groups(self, a: Operand, b: Operand, ends: Tensor) -> Tensor:
        return self.by_expert(lambda expert, rows: a.values()[rows] @ b.codes[expert].T, len(a.codes), ends)

    def weight_gradient(self, slope: Operand, x: Operand, into: Tensor | None = None) -> Tensor:
        product = slope.values() @ x.values().T
        return product if into is None else into.add_(product)

    def group_gradients(self, slope: Operand, x: Operand, ends: Tensor, into: Tensor | None = None) -> Tensor:
        starts = [0, *ends.tolist()]
        slope, x = slope.values(), x.values()
        product = torch.stack([slope[:, i:j] @ x[:, i:j].T for i, j in zip(starts, starts[1:])])
        return product if into is None else into.add_(product)

    def by_expert(self, multiply, rows: int, ends: Tensor) -> Tensor:
        starts = [0, *ends.tolist(), rows]
        parts = [multiply(e, slice(i, j)) for e, (i, j) in enumerate(zip(starts[:-2], starts[1:-1]))]
        return torch.cat([*parts, parts[0].new_zeros(starts[-1] - starts[-2], parts[0].shape[1])])

    def swiglu_tiles(self, gate: Tensor, up: Tensor) -> Operand:
        return self.tiles(swiglu(padded(gate), padded(up)))

    def swiglu_backward(self, gate: Operand, up: Operand, slope: Tensor, weights: Tensor | None = None
                        ) -> tuple[Tensor, Operand, Tensor]:
        weights = slope.new_ones(len(slope)) if weights is None else weights
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (gate.values(), up.values(), weights)]
            hidden = swiglu(*leaves[:2]) * leaves[2][:, None]
        d_gate, d_up, d_weights = torch.autograd.grad(hidden, leaves, slope)
        return torch.cat((d_gate, d_up), -1), self.columns(hidden), d_weights


def without_rounding(monkeypatch) -> None:
    """Nothing that is kept for the backward pass is rounded either."""
    monkeypatch.setattr(Operand, "values", lambda self, dtype=None: self.codes * self.scales.T.repeat_interleave(
        128, 1)[:, :self.codes.shape[1]])
    monkeypatch.setattr(fp8_ffn, "cached", lambda x: Exact().tiles(x))
    monkeypatch.setattr(fp8_ffn, "by_row", lambda weights, order: weights.flatten()[order.sources.clamp(min=0).long()])
    monkeypatch.setattr(fp8_attention, "quantize_e5m6", lambda x: (x, x.new_ones(1)))
    monkeypatch.setattr(fp8_attention, "dequantize_e5m6", lambda packed, scales, width: packed)
