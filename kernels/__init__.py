"""The operations that deserve a kernel, each in a file of its own beside its PyTorch definition.

`name_reference` is the definition, which says what the operation means. `name` is what the model calls: on a GPU it
takes the Triton kernel between the two, elsewhere the definition or, in a few files, the same in fewer passes over
memory (`use_kernels` switches). This floor imports torch and, where there is one,
Triton; it is imported as `minidsv3.kernels`. `registry.OPERATIONS` lists all of them with inputs to try.
"""

# Full names: transformers looks for a project called `kernels` and may import this folder. With relative imports that
# would make a second copy of every module, whose operators take the first one's place.
from minidsv3.kernels.backend import use_kernels, uses_triton
from minidsv3.kernels.contract import contract, linear
from minidsv3.kernels.cross_entropy import (cross_entropy, cross_entropy_reference, linear_cross_entropy,
                                            linear_cross_entropy_reference)
from minidsv3.kernels.e5m6 import (dequantize_e5m6, dequantize_e5m6_reference, quantize_e5m6,
                                   quantize_e5m6_reference)
from minidsv3.kernels.fp8_gemm import fp8_gemm, fp8_gemm_reference
from minidsv3.kernels.fp8_grouped_gemm import (fp8_grouped_gemm, fp8_grouped_gemm_reference, fp8_grouped_wgrad,
                                               fp8_grouped_wgrad_reference)
from minidsv3.kernels.grouped_gemm import grouped_gemm, grouped_gemm_reference
from minidsv3.kernels.mla_attention import mla_attention, mla_attention_reference
from minidsv3.kernels.mla_decode import mla_decode, mla_decode_reference
from minidsv3.kernels.permute import (Permutation, permute, permute_reference, permute_tiles, permute_tiles_reference,
                                      sort_by_expert, sort_by_expert_reference, unpermute, unpermute_reference)
from minidsv3.kernels.permute_columns import permute_columns, permute_columns_reference
from minidsv3.kernels.quantize import (dequantize_blocks, dequantize_blocks_reference, quantize_blocks,
                                       quantize_blocks_reference, quantize_columns, quantize_columns_reference,
                                       quantize_tiles, quantize_tiles_reference)
from minidsv3.kernels.rms_norm import rms_norm, rms_norm_reference
from minidsv3.kernels.rope import rope, rope_reference
from minidsv3.kernels.route import Routing, route, route_reference
from minidsv3.kernels.swiglu import swiglu, swiglu_reference
from minidsv3.kernels.swiglu_quantize import (swiglu_quantize, swiglu_quantize_backward,
                                              swiglu_quantize_backward_reference, swiglu_quantize_reference)
from minidsv3.kernels.weighted_swiglu import weighted_swiglu, weighted_swiglu_reference

__all__ = ["Permutation", "Routing", "contract", "cross_entropy", "cross_entropy_reference", "dequantize_blocks",
           "dequantize_blocks_reference", "dequantize_e5m6", "dequantize_e5m6_reference", "fp8_gemm",
           "fp8_gemm_reference", "fp8_grouped_gemm", "fp8_grouped_gemm_reference", "fp8_grouped_wgrad",
           "fp8_grouped_wgrad_reference", "grouped_gemm", "grouped_gemm_reference", "linear", "linear_cross_entropy",
           "linear_cross_entropy_reference", "mla_attention", "mla_attention_reference", "mla_decode",
           "mla_decode_reference", "permute", "permute_columns", "permute_columns_reference", "permute_reference",
           "permute_tiles", "permute_tiles_reference", "quantize_blocks", "quantize_blocks_reference",
           "quantize_columns", "quantize_columns_reference", "quantize_e5m6", "quantize_e5m6_reference",
           "quantize_tiles", "quantize_tiles_reference", "rms_norm", "rms_norm_reference", "rope", "rope_reference",
           "route", "route_reference", "sort_by_expert", "sort_by_expert_reference", "swiglu", "swiglu_quantize",
           "swiglu_quantize_backward", "swiglu_quantize_backward_reference", "swiglu_quantize_reference",
           "swiglu_reference", "unpermute", "unpermute_reference", "use_kernels", "uses_triton", "weighted_swiglu",
           "weighted_swiglu_reference"]
