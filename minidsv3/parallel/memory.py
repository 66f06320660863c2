"""What one GPU of a layout holds, in bytes: counted from shapes alone (report sections 3.2.3, 3.3.3).

    weights       what is multiplied: all tensors of a GPU's stages, its share of the experts, whole. FP8 codes lie
                  there twice, as they are for Fprop and turned for Dgrad: tensor cores read FP8 along the sum
    gradients     FP32, added up over a step's micro-batches, whole as well
    optimiser     FP32 master weights and Adam's moments, sharded: over dp, for experts over edp ("ZeRO-1")
    activations   what a forward leaves for its backward, times the micro-batches in flight
    buffers       what arrives from the neighbours in the pipeline, and one layer's rows on their way between experts

Recomputation as in the report: outputs of RMSNorm, of the latents' up-projections and of SwiGLU are not kept. In FP8
the inputs of the experts and of SwiGLU are kept as codes in 1 x 128 tiles, the input of the linear after attention in
12 bits (E5M6). Not counted: the CUDA context, NCCL's buffers, what fragmentation wastes, and the workspace of a layer
that is being computed. The average of the weights (EMA) lies in CPU memory.
"""

from dataclasses import dataclass
from typing import NamedTuple

from ..config import ModelConfig
from ..cost import TRAINING_BYTES, VALUE_BYTES, Weight
from ..kernels.quantize import TILE
from .layout import Layout, Piece, count
from .schedule import Action, Overlapped

MASTER = 4                          # bytes of an FP32 master weight
SLOTS = 2                           # receive buffers of each kind: one arrives while another is read
BITS = {"fp32": {"stream": 32, "wide": 32, "product": 32, "attention": 32, "exact": 32},
        "bf16": {"stream": 16, "wide": 16, "product": 16, "attention": 16, "exact": 32},
        "fp8": {"stream": 16, "wide": 16, "product": 8, "attention": 12, "exact": 32}}


class Kept(NamedTuple):
    """Rows that a layer keeps for each token until its backward: `rows` times `width` values."""

    name: str
    width: int
    kind: str                       # of BITS: the residual stream, other BF16, what FP8 products take, E5M6, FP32
    rows: int = 1

    def bytes(self, precision: str) -> int:
        """Bytes a token. Quantised rows carry an FP32 scale for each tile."""
        bits = BITS[precision][self.kind]
        scales = -(-self.width // TILE) * 4 if bits < 16 else 0
        return self.rows * (-(-self.width * bits // 8) + scales)


def kept_by_layer(config: ModelConfig, moe: bool) -> list[Kept]:
    """What one layer keeps: the places where recomputation starts, and what cannot be recomputed cheaply."""
    d, heads, width = config.hidden_size, config.num_attention_heads, config.moe_intermediate_size
    attention = [
        Kept("input of the attention's norm", d, "stream"),
        Kept("latents before their norms, with the rotary key",
             config.q_lora_rank + config.kv_lora_rank + config.qk_rope_head_dim, "wide"),
        Kept("output of attention", heads * config.v_head_dim, "attention"),
        Kept("log-sum-exp of attention", heads, "exact"),
        Kept("input of the FFN's norm", d, "stream"),
    ]
    if not moe:
        return attention + [Kept("gate and up", config.intermediate_size, "product", rows=2)]
    chosen, shared = config.num_experts_per_tok, config.n_shared_experts * width
    return attention + [
        Kept("affinities", config.n_routed_experts, "exact"),
        Kept("rows that came to the experts", d, "product", rows=chosen),
        Kept("gate and up of the experts", width, "product", rows=2 * chosen),
        Kept("gate and up of the shared expert", shared, "product", rows=2 if shared else 0),
    ]


def kept_by_stage(config: ModelConfig, piece: Piece) -> list[Kept]:
    """The same for all layers of a stage, with what the heads of main model and MTP modules keep."""
    d = config.hidden_size
    kept = [each for layer in piece.layers for each in kept_by_layer(config, config.is_moe(layer))]
    if not piece.last:
        return kept + [Kept("output, which torch's runtime holds to start the backward from", d, "stream")]
    kept.append(Kept("input of the final norm", d, "stream"))
    for _ in range(config.num_nextn_predict_layers):
        kept += [Kept("input of the MTP module", d, "stream"), Kept("its embedded tokens", d, "stream"),
                 *kept_by_layer(config, moe=True), Kept("input of its head's norm", d, "stream")]
    return kept


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one GPU. `parameters` and `experts` (the routed ones among them) are values, biases included."""

    parameters: int
    experts: int
    weights: int
    gradients: int
    optimiser: int                  # master weights and moments
    activations: int
    buffers: int
    in_flight: int                  # chunks at the peak
    # not in `total`: where our engine holds more than the report's has to
    gathered: int                   # FSDP gathers the shards in FP32, and what is multiplied in BF16 stays FP32 too
    stream: int                     # under autocast the residual stream is FP32

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimiser + self.activations + self.buffers

    @property
    def ours(self) -> int:
        return self.total + self.gathered + self.stream


def memory(layout: Layout, rank: int, precision: str = "fp8", data_rank: int = 0) -> Memory:
    """What the GPU of pipeline rank `rank` and data rank `data_rank` holds. Data rank 0 has the largest shards.

    Balanced routing: each GPU receives as many rows as it sends. Raises ValueError for an unknown precision or rank.
    """
    if precision not in BITS:
        raise ValueError(f"precision is {precision!r}; it must be one of {', '.join(BITS)}")
    if not 0 <= rank < layout.pp:
        raise ValueError(f"there is no pipeline rank {rank}; ranks count from 0 to {layout.pp - 1}")
    if not 0 <= data_rank < layout.dp:
        raise ValueError(f"there is no data rank {data_rank}; ranks count from 0 to {layout.dp - 1}")
    weights = layout.weights(rank)
    learned = [weight for weight in weights if weight.part != "biases"]
    values = TRAINING_BYTES[precision]

    def at_peak(*kinds: str) -> tuple[int, int]:
        """The most chunks in flight, and the most bytes of these kinds that they keep."""
        sizes = {}
        for piece in layout.held(rank):
            kept = [each for each in kept_by_stage(layout.config, piece) if each.kind in kinds]
            sizes[piece.stage] = layout.sequence * sum(each.bytes(precision) for each in kept)
        return peak(layout.orders[rank], sizes)

    in_flight, activations = at_peak(*BITS[precision])
    _, stream = at_peak("stream")
    return Memory(
        parameters=count(weights), experts=count(weight for weight in weights if weight.part == "routed"),
        weights=sum(weight_bytes(weight, precision) for weight in weights),
        gradients=values.gradient * count(learned),
        optimiser=(MASTER + values.moments) * sum(shard(layout, weight, data_rank) for weight in learned),
        activations=activations, buffers=buffers(layout, rank, precision), in_flight=in_flight,
        gathered=MASTER * count(learned) - sum(weight_bytes(weight, precision) for weight in learned
                                               if format_of(weight, precision) != "fp8"),
        stream=0 if precision == "fp32" else stream)


def format_of(weight: Weight, precision: str) -> str:
    """How a tensor that is multiplied is stored; in FP8 is what the released checkpoint has in FP8."""
    return weight.storage if precision == "fp8" or weight.storage == "fp32" else precision


def weight_bytes(weight: Weight, precision: str) -> int:
    """Bytes of all copies of a tensor: FP8 with an FP32 scale for each 128 x 128 block, and twice."""
    kind = format_of(weight, precision)
    if kind != "fp8":
        return weight.copies * weight.size * VALUE_BYTES[kind]
    rows, columns = weight.shape
    return 2 * weight.copies * (weight.size + 4 * -(-rows // TILE) * -(-columns // TILE))


def shard(layout: Layout, weight: Weight, data_rank: int) -> int:
    """Values of a data rank's shard. FSDP cuts the first axis in equal pieces rounded up, so that the last ranks may
    get less, or nothing; experts are cut by rows, which edp divides (mesh.py)."""
    if weight.part == "routed":
        return weight.copies * weight.size // layout.edp
    rows = piece_of(weight.shape[0], layout.dp, data_rank)
    return weight.copies * rows * (weight.size // weight.shape[0])


def piece_of(length: int, pieces: int, index: int) -> int:
    """How many of `length` things are in piece `index` of `pieces`."""
    size = -(-length // pieces)
    return max(0, min(size, length - index * size))


def peak(order: list[Action | Overlapped], sizes: dict[int, int]) -> tuple[int, int]:
    """The most chunks that a rank holds at once and the most bytes, if a chunk of stage s has sizes[s].

    A chunk is held from its forward to the end of its backward for weights (what I frees is not counted); the forward
    of an F&B block begins before its backward has freed anything.
    """
    held: list[int] = []
    most = 0, 0
    for action in order:
        held += [part.stage for part in action.parts if part.kind == "F"]
        most = max(most[0], len(held)), max(most[1], sum(sizes[stage] for stage in held))
        for part in action.parts:
            if part.kind in "BW":
                held.remove(part.stage)
    return most


def buffers(layout: Layout, rank: int, precision: str) -> int:
    """Receive buffers of the pipeline, and of one layer's exchange between experts in an F&B block.

    A stage receives activations unless it is the first and gradients unless it is the last, [sequence, hidden] each;
    SLOTS of each, besides those that are counted as inputs of chunks in flight (torch_stage.py).
    The forward's combine brings rows in BF16; the backward's dispatch brings codes, its combine BF16.
    """
    d = layout.config.hidden_size
    wide, code = (Kept("row", d, kind).bytes(precision) for kind in ("wide", "product"))
    arriving = sum((not piece.first) + (not piece.last) for piece in layout.held(rank))
    rows = layout.config.num_experts_per_tok * (layout.ep > 1)
    return layout.sequence * (SLOTS * arriving * wide + rows * (2 * wide + code))
