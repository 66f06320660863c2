"""How long a step takes: seconds of one chunk, the schedule that arranges them, and what that means for a training run.

Seconds of a chunk come from one of two publications of DeepSeek's:

    trace      the public profile of one F&B block (deepseek-ai/profile-data, train.json: H800, 64 GPUs, 4 MoE layers,
               4096 tokens, FP8). Other layouts are scaled by their FLOPs. Lone chunks wait for their exchange between
               experts, whose time is its bytes over the links.
    table 4    the paper on V3's hardware (arXiv 2505.09343) splits a step of 19.9 s into lone forwards, backwards for
               input and for weights, F&B blocks, bubble and optimiser. Divided by how often the order does each.

The two are independent of each other, and the second is no prediction: its parts and its sum are of one measurement.
All stages count as equally long, which real ones are not: `stage_work` says how unequal a split makes them.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..config import ModelConfig
from ..cost import H800_BF16_FLOPS, training_flops
from .layout import NODE, Layout, Piece, count, piece_weights
from .memory import Kept
from .schedule import Overlapped
from .simulate import Timeline, simulate
from .traffic import Cluster, by_node, choose

SAMPLE = 8192                       # random tokens of which the rows on each link are counted

TRACE_SECONDS = {"F": 0.0359, "I": 0.0586, "W": 0.0351}       # attention + MLP: 17.5 + 18.4, 37.4 + 21.2, 9.6 + 25.5 ms
TRACE_BLOCK = 0.1290                                          # the whole F&B block, 4 layers forward and 4 backward
TRACE_EXCHANGE, TRACE_HIDDEN = 0.1134, 0.963                  # of it exchange; the part hidden behind work
TRACE_LAYERS = 4
TABLE_4 = {"F": 1.13, "I": 1.99, "W": 0.48, "F&B": 13.95, "bubble": 2.06, "optimiser": 0.29}    # seconds a step


@dataclass(frozen=True, kw_only=True)
class Published:
    """Figures of the full run on 2048 H800s. Hours and days: report, section 1; the rest: arXiv 2505.09343."""

    step_seconds: float = 19.926
    tokens_per_day: float = 272.80e9
    hours_per_trillion: float = 180_000
    days_per_trillion: float = 3.7
    tflops: float = 385             # with causal attention
    tflops_not_causal: float = 432
    mfu: float = 0.3894
    mfu_not_causal: float = 0.4373


PUBLISHED = Published()


# ---- exchange between experts ---------------------------------------------------------------------------------------

@dataclass(frozen=True, kw_only=True)
class Links:
    """What one GPU sends in one MoE layer and chunk, forward or backward, and how long that takes."""

    between_rows: float             # copies of a token that leave its node
    inside_rows: float              # copies that move on inside a node
    between_bytes: float            # of one dispatch and one combine
    inside_bytes: float
    between_seconds: float          # InfiniBand
    inside_seconds: float           # NVLink

    @property
    def seconds(self) -> float:
        """The slower link's time: both are used at once."""
        return max(self.between_seconds, self.inside_seconds)


def links(layout: Layout, precision: str = "fp8") -> Links:
    """Two hops (traffic.py) with balanced random choices and full speed: a lower bound of what a cluster takes.

    In FP8, dispatch sends codes and combine BF16; the backward sends gradients of outputs as codes, of inputs in BF16.
    """
    config = layout.config
    cluster = Cluster(layout.nodes, layout.ep // layout.nodes)
    experts = choose(SAMPLE, config.n_routed_experts, config.n_group, config.topk_group, config.num_experts_per_tok)
    gpus = experts // (config.n_routed_experts // layout.ep)
    between, inside = (rows.sum().item() / SAMPLE for rows in by_node(torch.arange(SAMPLE) % layout.ep, gpus, cluster))
    row = sum(Kept("row", config.hidden_size, kind).bytes(precision) for kind in ("product", "wide"))
    sent = layout.sequence * row
    return Links(between_rows=between, inside_rows=inside, between_bytes=between * sent, inside_bytes=inside * sent,
                 between_seconds=between * sent / cluster.between, inside_seconds=inside * sent / cluster.inside)


# ---- seconds of a chunk ---------------------------------------------------------------------------------------------

class Durations(NamedTuple):
    """Seconds of one chunk, as `simulate` takes them; `source` says whose."""

    source: str
    forward: float
    backward_input: float
    backward_weight: float
    overlapped: float
    communication: float = 0.0


SLOWDOWN = {"fp8": 1, "bf16": 2, "fp32": 4}      # of a product against FP8, as the tensor cores' peaks (FP32 as TF32)


def chunk_flops(config: ModelConfig, piece: Piece, sequence: int, precision: str = "fp8") -> dict[str, float]:
    """FLOPs of a stage's F, I and W on one sequence, each product counted as often as it is slower than in FP8.

    F multiplies each weight a token uses, and so do W and I, which also runs the latents' up-projections again.
    Attention's own products (BF16 in every precision) are 2 forward and 5 backward: scores again, dV, dP, dQ, dK.
    """
    weights = [weight for weight in piece_weights(config, piece, shared_embedding=True) if weight.part != "embedding"]
    products = 2 * sum(weight.size * weight.used for weight in weights)
    products += 2 * piece.last * config.num_nextn_predict_layers * config.vocab_size * config.hidden_size   # MTP's head
    layers = len(piece.layers) + piece.last * config.num_nextn_predict_layers
    heads, key, value = config.num_attention_heads, config.qk_head_dim, config.v_head_dim
    up = 2 * layers * heads * (config.q_lora_rank * key + config.kv_lora_rank * (config.qk_nope_head_dim + value))
    attention = layers * heads * (key + value) * (sequence + 1)         # causal: (sequence + 1) / 2 keys on average
    slow = SLOWDOWN[precision]
    return {phase: sequence * (slow * linear + dot) for phase, linear, dot in (
        ("F", products, attention), ("I", products + up, 2.5 * attention), ("W", products, 0))}


def from_trace(layout: Layout, precision: str = "fp8") -> Durations:
    """The public trace's seconds, scaled by FLOPs to the layout's mean stage."""
    full = ModelConfig.preset("full")
    traced = chunk_flops(full, Piece(5, range(17, 17 + TRACE_LAYERS), False, False), 4096)
    own = [chunk_flops(layout.config, piece, layout.sequence, precision) for piece in layout.pieces]
    seconds = {phase: TRACE_SECONDS[phase] * sum(each[phase] for each in own) / len(own) / traced[phase]
               for phase in traced}
    moe = layout.config.moe_layers / len(layout.pieces)                 # layers with an exchange in the mean stage
    communication = moe * links(layout, precision).seconds
    block = max(sum(seconds.values()) * TRACE_BLOCK / sum(TRACE_SECONDS.values()), 2 * communication)
    return Durations("the public trace, scaled by FLOPs", seconds["F"], seconds["I"], seconds["W"], block,
                     communication)


def from_table_4(layout: Layout) -> Durations:
    """Table 4's seconds over how often a rank does each, mean over the ranks; exchanges are inside."""
    times = Counter(name for order in layout.orders for action in order for name in _names(action))
    each = {name: TABLE_4[name] * layout.pp / times[name] for name in ("F", "I", "W", "F&B")}
    return Durations("table 4 of arXiv 2505.09343", each["F"], each["I"], each["W"], each["F&B"])


def _names(action) -> list[str]:
    """What table 4 calls it: a full backward is one for input and one for weights."""
    if isinstance(action, Overlapped):
        return ["F&B"]
    return ["I", "W"] if action.kind == "B" else [action.kind]


# ---- the step -------------------------------------------------------------------------------------------------------

@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a step of so many seconds amounts to, in the units of `Published`."""

    step_seconds: float
    tokens_per_day: float
    hours_per_trillion: float       # GPU hours for 10^12 tokens
    days_per_trillion: float
    tflops: float                   # of one GPU, without MTP and recomputation, with causal attention
    tflops_not_causal: float        # as if every token attended to the whole sequence
    mfu: float                      # share of the BF16 peak
    mfu_not_causal: float


def rates(layout: Layout, seconds: float) -> Rates:
    """The layout's step if it takes `seconds`. Raises ValueError unless they are positive."""
    if not seconds > 0:
        raise ValueError(f"a step of {seconds} seconds is none; give a positive number")
    causal = training_flops(layout.config, layout.sequence)
    not_causal = causal.weights + training_flops(layout.config, 2 * layout.sequence - 1).attention
    speed, speed_not_causal = (flops * layout.tokens / seconds / layout.gpus for flops in (causal.main, not_causal))
    return Rates(
        step_seconds=seconds, tokens_per_day=layout.tokens / seconds * 86400,
        hours_per_trillion=1e12 / layout.tokens * seconds * layout.gpus / 3600,
        days_per_trillion=1e12 / layout.tokens * seconds / 86400,
        tflops=speed / 1e12, tflops_not_causal=speed_not_causal / 1e12,
        mfu=speed / H800_BF16_FLOPS, mfu_not_causal=speed_not_causal / H800_BF16_FLOPS)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimiser step: the schedule's timeline with these durations, and the optimiser. Seconds."""

    durations: Durations
    timeline: Timeline
    optimiser: float

    @property
    def seconds(self) -> float:
        return self.timeline.makespan + self.optimiser


def estimate(layout: Layout, durations: Durations, optimiser: float, stages: Sequence[float] = ()) -> Step:
    """Simulates the layout's order, with equal stages or with work in the ratio of `stages`."""
    timeline = simulate(layout.orders, *durations[1:], stages=stages)
    return Step(durations=durations, timeline=timeline, optimiser=optimiser)


def optimiser_seconds(layout: Layout) -> float:
    """Reducing FP32 gradients and gathering BF16 weights, 6 bytes a parameter over the slowest rank's link.

    Each GPU sends all but its own share. Mirrored ranks hold the same stages, so they are replicas of each other too.
    """
    mirrors = sum(len(layout.held(rank)) for rank in range(layout.pp)) // len(layout.pieces)
    cluster = Cluster(-(-layout.dp // NODE), NODE)
    link = cluster.inside if cluster.nodes == 1 else cluster.between

    def sent(rank: int) -> float:
        weights = layout.weights(rank)
        experts = count(weight for weight in weights if weight.part == "routed")
        return ((count(weights) - experts) * (1 - 1 / (layout.dp * mirrors))
                + experts * (1 - 1 / (layout.edp * mirrors)))
    return max(map(sent, range(layout.pp))) * 6 / link


def stage_work(layout: Layout) -> list[float]:
    """The FLOPs of each stage over the mean."""
    stages = [sum(chunk_flops(layout.config, piece, layout.sequence).values()) for piece in layout.pieces]
    return [flops * len(stages) / sum(stages) for flops in stages]
