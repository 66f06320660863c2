"""What a model costs, counted from its `ModelConfig` alone: parameters, bytes, FLOPs, GPU hours, dollars.

Everything rests on two lists: the weights of the main model and those of its MTP modules, each with its hub name,
shape, number of copies, how many of them one token uses, and the format of the released checkpoint. Every count is a
sum over these lists, so the integers of the published model (671,026,419,200 values, 91,991 tensors) follow from its
shapes.
Shapes: report section 4.2 and the hub's files. FP8 and its 128 x 128 scales: section 3.3. Hours and price: section 1.
No torch: only whole numbers.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from .config import ModelConfig

H800_BF16_FLOPS = 989e12        # dense peak of one H800 (and H100) in bf16, FLOP a second
DOLLARS_PER_HOUR = 2.0          # the report's assumed rent of one H800
REPORT_MFU = 0.39               # derived: `utilisation` of the report's 2,664 K hours for 14.8 T tokens
BLOCK = 128                     # one scale for each 128 x 128 block of an FP8 weight
VALUE_BYTES = {"fp8": 1, "bf16": 2, "fp32": 4}


class Weight(NamedTuple):
    """Tensors of one name and shape. `copies` are stored; a token goes through `used` of them."""

    part: str                   # a field of `Parameters`
    name: str                   # the hub's name within its layer
    shape: tuple[int, ...]
    storage: str = "fp8"        # format of the released checkpoint, a key of VALUE_BYTES
    copies: int = 1
    used: int = 1

    @property
    def size(self) -> int:
        """Values in one copy."""
        return math.prod(self.shape)


def attention_weights(config: ModelConfig) -> list[Weight]:
    """Multi-head latent attention of one layer (eqs. 1-11), with the norms of its two latents."""
    d, heads, rope = config.hidden_size, config.num_attention_heads, config.qk_rope_head_dim
    nope, value = config.qk_nope_head_dim, config.v_head_dim
    query, latent = config.q_lora_rank, config.kv_lora_rank
    return [
        Weight("attention", "self_attn.q_a_proj.weight", (query, d)),
        Weight("attention", "self_attn.q_a_layernorm.weight", (query,), "bf16"),
        Weight("attention", "self_attn.q_b_proj.weight", (heads * (nope + rope), query)),
        Weight("attention", "self_attn.kv_a_proj_with_mqa.weight", (latent + rope, d)),
        Weight("attention", "self_attn.kv_a_layernorm.weight", (latent,), "bf16"),
        Weight("attention", "self_attn.kv_b_proj.weight", (heads * (nope + value), latent)),
        Weight("attention", "self_attn.o_proj.weight", (d, heads * value)),
    ]


def ffn_weights(part: str, prefix: str, hidden: int, width: int, copies: int = 1, used: int = 1) -> list[Weight]:
    """One SwiGLU network, or `copies` of them of which a token uses `used`."""
    shapes = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
    return [Weight(part, f"{prefix}.{name}.weight", shape, "fp8", copies, used) for name, shape in shapes.items()]


def layer_weights(config: ModelConfig, moe: bool) -> list[Weight]:
    """One Transformer layer with a dense or a DeepSeekMoE network (eqs. 12-16)."""
    d, experts, width = config.hidden_size, config.n_routed_experts, config.moe_intermediate_size
    names = ("input_layernorm", "post_attention_layernorm")
    norms = [Weight("norms", f"{name}.weight", (d,), "bf16") for name in names]
    if not moe:
        return attention_weights(config) + norms + ffn_weights("dense", "mlp", d, config.intermediate_size)
    shared = config.n_shared_experts
    return attention_weights(config) + norms + [
        Weight("router", "mlp.gate.weight", (experts, d), "bf16"),
        Weight("biases", "mlp.gate.e_score_correction_bias", (experts,), "fp32", used=0),
        *(ffn_weights("shared", "mlp.shared_experts", d, shared * width) if shared else []),
        *ffn_weights("routed", "mlp.experts.{e}", d, width, experts, config.num_experts_per_tok),
    ]


def main_weights(config: ModelConfig) -> list[Weight]:
    """Every tensor of the model without MTP; equal layers are one entry with many copies."""
    d, dense = config.hidden_size, config.first_k_dense_replace
    return [
        Weight("embedding", "embed_tokens.weight", (config.vocab_size, d), "bf16"),
        *_times(dense, layer_weights(config, moe=False)),
        *_times(config.num_hidden_layers - dense, layer_weights(config, moe=True)),
        Weight("norms", "norm.weight", (d,), "bf16"),
        Weight("head", "lm_head.weight", (config.vocab_size, d), "bf16"),
    ]


def mtp_weights(config: ModelConfig) -> list[Weight]:
    """Every tensor of the MTP modules (eqs. 21-23) as stored: embedding and head are copies of the main model's."""
    d = config.hidden_size
    return _times(config.num_nextn_predict_layers, [
        Weight("embedding", "embed_tokens.weight", (config.vocab_size, d), "bf16"),
        *(Weight("norms", f"{name}.weight", (d,), "bf16") for name in ("enorm", "hnorm", "shared_head.norm")),
        Weight("projection", "eh_proj.weight", (d, 2 * d), "bf16"),
        *layer_weights(config, moe=True),
        Weight("head", "shared_head.head.weight", (config.vocab_size, d), "bf16"),
    ])


def _times(layers: int, weights: list[Weight]) -> list[Weight]:
    return [weight._replace(copies=weight.copies * layers, used=weight.used * layers) for weight in weights]


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Values by part: all that are stored (`parameters`) or those that one token uses (`active_parameters`)."""

    embedding: int
    attention: int              # with the norms of the two latents
    dense: int                  # FFN of the first layers
    shared: int
    routed: int
    router: int                 # gate.weight
    norms: int
    head: int
    biases: int                 # e_score_correction_bias: moved by balancing, not by a gradient
    mtp: int                    # what the MTP modules hold for themselves
    mtp_stored: int             # the same with the copies of embedding and head in the checkpoint

    @property
    def learned(self) -> int:
        """The main model's parameters: what a gradient moves (671,026,404,352 at full size)."""
        return self.main - self.biases

    @property
    def main(self) -> int:
        """The main model's values with the biases of its routers (671,026,419,200)."""
        return (self.embedding + self.attention + self.dense + self.shared + self.routed + self.router + self.norms
                + self.head + self.biases)

    @property
    def multiplied(self) -> int:
        """`learned` without the embedding, which is a lookup and multiplies nothing (active: 36,625,603,584)."""
        return self.learned - self.embedding

    @property
    def body(self) -> int:
        """`learned` without embedding and head (active: 35,698,924,544)."""
        return self.multiplied - self.head

    @property
    def total(self) -> int:
        """The main model and what MTP adds to it in memory."""
        return self.main + self.mtp


def parameters(config: ModelConfig) -> Parameters:
    """How many values the model holds, by part."""
    return _count(config, lambda weight: weight.copies)


def active_parameters(config: ModelConfig) -> Parameters:
    """How many of them one token uses: k of the routed experts, everything else whole; selection biases count as none.

    `.learned` counts the whole embedding (37.55 B at full size), `.multiplied` does not (36.63 B), `.body` leaves out
    the head as well (35.70 B): papers use all three and call each "active".
    """
    return _count(config, lambda weight: weight.used)


def _count(config: ModelConfig, copies: Callable[[Weight], int]) -> Parameters:
    def total(weights: Iterable[Weight]) -> int:
        return sum(weight.size * copies(weight) for weight in weights)

    main, mtp = main_weights(config), mtp_weights(config)
    parts = ("embedding", "attention", "dense", "shared", "routed", "router", "norms", "head", "biases")
    return Parameters(
        **{part: total(weight for weight in main if weight.part == part) for part in parts},
        mtp=total(weight for weight in mtp if weight.part not in ("embedding", "head")),
        mtp_stored=total(mtp))


@dataclass(frozen=True, kw_only=True)
class Stored:
    """The released checkpoint: FP8 matrices with FP32 scales, the rest bf16, router biases FP32."""

    weights: int                # values of the model, MTP layer included (684,489,845,504)
    scales: int                 # weight_scale_inv, one for each 128 x 128 block (41,540,496)
    tensors: int                # 91,991
    bytes: int                  # 688,574,839,360

    @property
    def values(self) -> int:
        """What the hub shows as the model's size (684,531,386,000)."""
        return self.weights + self.scales


def stored(config: ModelConfig) -> Stored:
    """The size of the checkpoint in the format of the released one (section 3.3; the MTP layer stores its copies)."""
    weights = main_weights(config) + mtp_weights(config)
    scales = sum(weight.copies * -(-weight.shape[0] // BLOCK) * -(-weight.shape[1] // BLOCK)
                 for weight in weights if weight.storage == "fp8")
    return Stored(
        weights=sum(weight.copies * weight.size for weight in weights),
        scales=scales,
        tensors=sum(weight.copies * (2 if weight.storage == "fp8" else 1) for weight in weights),
        bytes=sum(weight.copies * weight.size * VALUE_BYTES[weight.storage] for weight in weights) + 4 * scales)


def kv_cache_bytes(config: ModelConfig, tokens: int = 1, dtype_bytes: int = 2) -> int:
    """Bytes of the main model's latent cache (70,272 a token): in each layer kv_lora_rank + qk_rope_head_dim values."""
    _require_positive(tokens=tokens, dtype_bytes=dtype_bytes)
    return config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim) * dtype_bytes * tokens


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Training FLOPs a token, forward and backward."""

    weights: int                # 6 for each active parameter that is multiplied
    attention: int              # queries with keys, probabilities with values
    mtp: int                    # the MTP modules' part of both, with the head used once more by each

    @property
    def main(self) -> int:
        """Without MTP: what a comparison of models usually means (250 GFLOP at full size and 4,096 tokens)."""
        return self.weights + self.attention

    @property
    def total(self) -> int:
        """What a training step computes."""
        return self.main + self.mtp


def training_flops(config: ModelConfig, context: int = 4096) -> Flops:
    """FLOPs of one training token in causal sequences of `context` tokens; recomputation is not counted.

    A product costs 2 FLOPs a weight forward and 4 backward. A token at position t attends to t keys, (context + 1) / 2
    on average, with (d_h + d_h^R) + d_v products a head and key.
    """
    _require_positive(context=context)
    active = active_parameters(config)
    per_key = config.num_attention_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    attention = 3 * per_key * (context + 1)              # one layer
    modules = config.num_nextn_predict_layers
    return Flops(weights=6 * active.multiplied, attention=config.num_hidden_layers * attention,
                 mtp=6 * (active.mtp + modules * active.head) + modules * attention)


def draft_cost(config: ModelConfig) -> float:
    """c: the weights that one MTP module multiplies for a draft, the head's included, over those of a main pass.

    0.044 at full size: where decoding waits for weights, that is the share of time which a draft adds to a pass.
    Raises ValueError for a config without modules.
    """
    modules, active = config.num_nextn_predict_layers, active_parameters(config)
    if not modules:
        raise ValueError("num_nextn_predict_layers is 0; a draft needs an MTP module")
    return (active.mtp / modules + active.head) / active.multiplied


def tokens_per_pass(acceptance: float, depth: int = 1) -> float:
    """Expected tokens of one speculative pass that verifies `depth` drafts, each accepted with probability `acceptance`
    if all before it were: 1 + p + ... + p^depth (Leviathan et al. 2023, eq. 1)."""
    if not 0 <= acceptance <= 1:
        raise ValueError(f"acceptance is {acceptance}; it is a probability, from 0 to 1")
    if depth < 0:
        raise ValueError(f"depth is {depth}; it counts drafts and is at least 0")
    return sum(acceptance ** accepted for accepted in range(depth + 1))


def speculative_speed(acceptance: float, draft: float, depth: int = 1) -> float:
    """Times as fast as plain decoding: `tokens_per_pass` over 1 + depth * c, with c = `draft` (see `draft_cost`).

    It takes a pass over depth + 1 tokens for as long as a pass over one: true while reading the weights is what takes
    time, so for small batches.
    """
    if draft < 0:
        raise ValueError(f"draft is {draft}; it is the cost of a draft over that of a pass, 0 or more")
    return tokens_per_pass(acceptance, depth) / (1 + depth * draft)


@dataclass(frozen=True, kw_only=True)
class GpuHours:
    """H800 hours of the final runs (report, table 1)."""

    pre_training: int = 2_664_000
    context_extension: int = 119_000
    post_training: int = 5_000

    @property
    def total(self) -> int:
        return self.pre_training + self.context_extension + self.post_training


REPORT_HOURS = GpuHours()


def hours(flops_per_token: float, tokens: float, mfu: float = REPORT_MFU,
          peak_flops: float = H800_BF16_FLOPS) -> float:
    """GPU hours to train on `tokens` tokens when a GPU reaches the fraction `mfu` of `peak_flops` a second.

    One assumption is hidden in `mfu`: a smaller model, or one with other shapes, would reach another fraction.
    """
    _require_positive(flops_per_token=flops_per_token, tokens=tokens, mfu=mfu, peak_flops=peak_flops)
    if mfu > 1:
        raise ValueError(f"mfu is {mfu}; it is a fraction of the peak and must be at most 1")
    return flops_per_token * tokens / (mfu * peak_flops) / 3600


def utilisation(flops_per_token: float, tokens: float, gpu_hours: float,
                peak_flops: float = H800_BF16_FLOPS) -> float:
    """The inverse question: the fraction of the peak that a run of `gpu_hours` reached."""
    _require_positive(flops_per_token=flops_per_token, tokens=tokens, gpu_hours=gpu_hours, peak_flops=peak_flops)
    return flops_per_token * tokens / (gpu_hours * 3600 * peak_flops)


def dollars(gpu_hours: float, per_hour: float = DOLLARS_PER_HOUR) -> float:
    """The rent of `gpu_hours`. The report's $5.576 M are its final runs only: no people, data or earlier research."""
    _require_positive(gpu_hours=gpu_hours, per_hour=per_hour)
    return gpu_hours * per_hour


@dataclass(frozen=True, kw_only=True)
class TrainingBytes:
    """Bytes that training keeps for each parameter, activations aside (section 3.3)."""

    weight: int                 # the copy that is multiplied
    master: int                 # FP32 weights of the optimiser, 0 where the copy itself is FP32
    gradient: int
    moments: int                # both of Adam's

    @property
    def total(self) -> int:
        return self.weight + self.master + self.gradient + self.moments


TRAINING_BYTES = {
    "fp32": TrainingBytes(weight=4, master=0, gradient=4, moments=8),
    "bf16": TrainingBytes(weight=2, master=4, gradient=4, moments=8),
    "fp8": TrainingBytes(weight=1, master=4, gradient=4, moments=4),      # the report's: FP8 products, bf16 moments
}


def training_bytes(config: ModelConfig, precision: str = "fp8") -> int:
    """Bytes of weights, master weights, gradients and moments, MTP included, over all GPUs together.

    "fp8" counts one byte for every weight, although embedding, head, router and norms stay in bf16.
    """
    if precision not in TRAINING_BYTES:
        raise ValueError(f"precision is {precision!r}; it must be one of {', '.join(TRAINING_BYTES)}")
    return TRAINING_BYTES[precision].total * parameters(config).total


def _require_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} is {value}; it must be positive")
