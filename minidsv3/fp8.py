"""FP8 training, as the report does it (section 3.3, appendix B): `to_fp8(model)` and what it changes.

    in FP8 (E4M3)         the three products of every matrix of attention, FFNs and experts        fp8_products.py
    in BF16 or FP32       embedding, output head, router, norms, attention's products, eh_proj     as they were
    FP32                  master weights and their gradients; AdamW's moments are BF16             optim.py

    what waits for the backward pass, of each layer
    inputs of the norms   the residual stream, as it is; the norms run again                       recompute.py
    attention             latents in BF16; output in E5M6; q, k and v are made again               fp8_attention.py
    FFN and experts       gate and up in FP8; SwiGLU runs again                                    fp8_ffn.py

Parameters, their names and the state dict stay. The same code runs on a CPU, in the kernels' definitions.
"""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from .attention import MLA
from .block import Block
from .formats import E4M3, E5M2
from .fp8_ablations import Ablated, OneScale, Unpromoted
from .fp8_attention import FP8MLA
from .fp8_ffn import FP8MLP, FP8Experts
from .fp8_linear import FP8Linear, WeightCodes
from .fp8_products import Products
from .kernels.quantize import TILE
from .layers import Linear
from .moe import MLP, Experts, Router
from .recompute import RecomputedNorm, RecomputedRouter

__all__ = ["FP8Linear", "FP8Recipe", "to_fp8"]


@dataclass(frozen=True, kw_only=True)
class FP8Recipe:
    """How tensors are quantised and products added. The defaults are the report's; what else there is, its ablations
    (appendix B) and the hybrid format of others, is in `fp8_ablations.py`.

    Raises ValueError for unknown words, and for choices that exclude each other.
    """

    pow2: bool = False                              # all scales powers of two, not only those that must be
    gradient: Literal["e4m3", "e5m2"] = "e4m3"      # format of the gradients of activations
    gradient_blocks: bool = False                   # these in 128 x 128: diverged at 16 B (appendix B.2)
    scales: Literal["tiles", "tensor"] = "tiles"    # one scale for 128 of a sum, or for a whole tensor
    promote: bool = True                            # FP32 sums each 128; False: the tensor core's own 14 bits

    def __post_init__(self):
        for name, choices in {"gradient": ("e4m3", "e5m2"), "scales": ("tiles", "tensor")}.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(choices)}")
        if not self.promote and self.scales == "tiles":
            raise ValueError("promote is False and scales are 'tiles'; scales that change within a sum are applied "
                             "outside of the tensor cores, which is promotion: choose 'tensor'")
        if not self.promote and self.gradient == "e5m2":
            raise ValueError("promote is False and gradient is 'e5m2'; experts' products without promotion take E4M3 "
                             "alone: choose 'e4m3'")
        if self.gradient_blocks and self.scales == "tensor":
            raise ValueError("gradient_blocks is True and scales are 'tensor'; blocks replace tiles: choose 'tiles'")

    def products(self) -> Products:
        """What takes the products."""
        gradient = {"e4m3": E4M3, "e5m2": E5M2}[self.gradient]
        if not self.promote:
            return Unpromoted(self.pow2)
        if self.scales == "tensor":
            return OneScale(self.pow2, gradient)
        if self.gradient_blocks:
            return Ablated(self.pow2, gradient, (TILE, TILE))
        return Ablated(self.pow2, gradient, (1, TILE)) if gradient is E5M2 else Products(self.pow2)


def to_fp8(model: nn.Module, recipe: FP8Recipe = FP8Recipe()) -> nn.Module:
    """Makes every layer of `model`, a `Transformer` or a part of one, compute in FP8, in place; returns it.

    Run it in BF16 autocast, as `TrainConfig(precision="fp8")` does. Raises ValueError if there is no layer in it, or
    one with parts of other classes, as `parallel` leaves: then the model is as it was.
    """
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    if not blocks:
        raise ValueError(f"{type(model).__name__} holds no Block, so there is nothing to compute in FP8")
    products = recipe.products()
    parts = [part for block in blocks for part in (*block.self_attn.modules(), *block.mlp.modules())]
    check_classes(parts)
    for part in parts:
        if type(part) in TWINS:
            part.__class__ = TWINS[type(part)]
        if isinstance(part, FP8Linear):
            part.codes = WeightCodes(products, part.weight)
        elif isinstance(part, FP8Experts):
            part.compute_with(products)
    for block in blocks:
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.__class__ = RecomputedNorm
        block.self_attn.o_proj.pow2 = True      # its input waits in E5M6 and is quantised again, along tokens
    return model


def check_classes(parts: list[nn.Module]) -> None:
    """Refuses what would stay in BF16 unnoticed: a class derived from one that has a twin, and not from the twin."""
    for part in parts:
        if isinstance(part, tuple(TWINS)) and type(part) not in TWINS and not isinstance(part, tuple(TWINS.values())):
            raise ValueError(f"the model holds {type(part).__name__}, which to_fp8 cannot change; call to_fp8 first, "
                             "and then what spreads or shards the model")


# The same parameters, another forward: an object changes its class, so that names and references to it stay.
TWINS = {Linear: FP8Linear, MLA: FP8MLA, MLP: FP8MLP, Experts: FP8Experts, Router: RecomputedRouter}
