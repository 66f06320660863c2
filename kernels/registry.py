"""One list of all operations: tests compare values and gradients from it, the benchmark and the course read it."""

from .cases import (cross_entropy, e5m6, fp8_gemm, fp8_grouped_gemm, grouped_gemm, mla_attention, mla_decode,
                    permute, permute_columns, quantize, rms_norm, rope, route, swiglu, swiglu_quantize, weighted_swiglu)
from .operation import Operation

OPERATIONS: dict[str, Operation] = {operation.name: operation for operation in (
    rms_norm.OPERATION, rope.OPERATION, swiglu.OPERATION, weighted_swiglu.OPERATION,
    route.OPERATION, permute.SORT, permute.PERMUTE, permute.PERMUTE_TILES, permute.UNPERMUTE, permute_columns.OPERATION,
    grouped_gemm.OPERATION, mla_attention.OPERATION, mla_decode.OPERATION,
    cross_entropy.OPERATION, cross_entropy.LINEAR,
    quantize.TILES, quantize.COLUMNS, quantize.BLOCKS, quantize.DEQUANTIZE,
    e5m6.QUANTIZE, e5m6.DEQUANTIZE,
    swiglu_quantize.OPERATION, swiglu_quantize.BACKWARD,
    fp8_gemm.OPERATION, fp8_gemm.WGRAD, fp8_grouped_gemm.OPERATION, fp8_grouped_gemm.WGRAD)}
