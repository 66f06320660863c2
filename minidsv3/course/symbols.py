"""The report's letters and where the code has them, with their sizes in the 671 B model and in nano.

Sizes are written out here, and a test holds each against the model on the meta device: `find` says where to look.
Letters that the report or the course uses twice are listed in `CLASHES`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .. import formats
from ..attention import LatentCache
from ..kernels import Routing, e5m6, quantize, route
from ..model import Transformer
from ..moe import MoE
from ..optim import Recipe
from ..parallel.schedule import dualpipe
from ..parallel.simulate import simulate
from ..parallel.stage import split

Size = tuple[int, ...] | float


@dataclass(frozen=True)
class Symbol:
    """One row. `find` takes the model and its recipe, and returns the tensor or number that the letter stands for."""

    report: str
    code: str
    full: Size              # shape or value in the 671 B model
    nano: Size
    watch_out: str
    chapters: tuple[str, ...]
    find: Callable[[Transformer, Recipe], torch.Tensor | float]


@dataclass(frozen=True)
class Table:
    """Rows as a notebook shows them."""

    rows: tuple[Symbol, ...]

    def _repr_markdown_(self) -> str:
        lines = ["| report | code | full | nano | watch out |", "|---|---|---|---|---|"]
        for row in self.rows:
            cells = (row.report, row.code, write_size(row.full), write_size(row.nano), row.watch_out)
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"{len(self.rows)} symbols"


def symbols(chapter: str | None = None) -> Table:
    """The rows of one chapter ("01"), or all of them. Raises ValueError for a chapter that has none."""
    rows = tuple(row for row in SYMBOLS if chapter is None or chapter in row.chapters)
    if not rows:
        known = sorted({name for row in SYMBOLS for name in row.chapters})
        raise ValueError(f"chapter {chapter!r} has no symbols; chapters are {', '.join(known)}")
    return Table(rows)


def write_size(size: Size) -> str:
    """`512 x 7168` for a shape, `0.001` for a value."""
    return " x ".join(str(n) for n in size) if isinstance(size, tuple) else f"{size:g}"


# ---- where things are -----------------------------------------------------------------------------------------------


def _attention(model: Transformer):
    return model.model.layers[0].self_attn


def _moe(model: Transformer) -> MoE:
    return model.model.layers[model.config.first_k_dense_replace].mlp


def _cache(model: Transformer) -> LatentCache:
    return LatentCache(model.config, batch=1, length=1)


def _routing(model: Transformer) -> Routing:
    c = model.config
    return route(torch.zeros(1, c.n_routed_experts), torch.zeros(c.n_routed_experts), n_group=c.n_group,
                 topk_group=c.topk_group, top_k=c.num_experts_per_tok)


def _by_head(weight: torch.Tensor, model: Transformer) -> torch.Tensor:
    """[heads * rows, columns] -> [heads, rows, columns]: what belongs to a head lies together."""
    return weight.unflatten(0, (model.config.num_attention_heads, -1))


def _stages(model: Transformer) -> int:
    """Stages of four things: layers of the main model, the embedding, the head, MTP modules."""
    return (model.config.num_hidden_layers + 2 + model.config.num_nextn_predict_layers) // 4


SYMBOLS = (
    Symbol("h_t, u_t", "`x`, the stream between layers", (7168,), (256,),
           "two letters, one stream: h_t enters attention, u_t the FFN", ("00", "01", "02", "07"),
           lambda m, r: m.model.norm.weight),
    Symbol("W^DKV", "`kv_a_proj_with_mqa`, first rows", (512, 7168), (64, 256),
           "one matrix with W^KR: the released name counts both", ("01",),
           lambda m, r: _attention(m).kv_a_proj_with_mqa.weight[:m.config.kv_lora_rank]),
    Symbol("W^KR", "`kv_a_proj_with_mqa`, last rows", (64, 7168), (16, 256),
           "no head index: all heads share one rotary key", ("01",),
           lambda m, r: _attention(m).kv_a_proj_with_mqa.weight[m.config.kv_lora_rank:]),
    Symbol("c^KV", "`LatentCache.latent`", (512,), (64,),
           "stored after its norm", ("00", "01"), lambda m, r: _cache(m).latent[0, 0, 0]),
    Symbol("k^R", "`LatentCache.rope_key`", (64,), (16,),
           "stored rotated, and never normed", ("00", "01"), lambda m, r: _cache(m).rope_key[0, 0, 0]),
    Symbol("W^UK", "`kv_b_proj`, first rows of each head", (128, 128, 512), (8, 32, 64),
           "by head: not all keys, then all values", ("01",),
           lambda m, r: _by_head(_attention(m).kv_b_proj.weight, m)[:, :m.config.qk_nope_head_dim]),
    Symbol("W^UV", "`kv_b_proj`, last rows of each head", (128, 128, 512), (8, 32, 64),
           "by head, as W^UK", ("01",),
           lambda m, r: _by_head(_attention(m).kv_b_proj.weight, m)[:, m.config.qk_nope_head_dim:]),
    Symbol("W^DQ", "`q_a_proj`", (1536, 7168), (96, 256),
           "queries are compressed too, for training's memory: they are not cached", ("01",),
           lambda m, r: _attention(m).q_a_proj.weight),
    Symbol("W^UQ", "`q_b_proj`, first rows of each head", (128, 128, 1536), (8, 32, 96),
           "by head", ("01",),
           lambda m, r: _by_head(_attention(m).q_b_proj.weight, m)[:, :m.config.qk_nope_head_dim]),
    Symbol("W^QR", "`q_b_proj`, last rows of each head", (128, 64, 1536), (8, 16, 96),
           "by head: the query has one rotary part a head, the key one for all", ("01",),
           lambda m, r: _by_head(_attention(m).q_b_proj.weight, m)[:, m.config.qk_nope_head_dim:]),
    Symbol("W^O", "`o_proj`", (7168, 16384), (256, 256),
           "heads x value width columns, not the hidden size", ("01", "05"), lambda m, r: _attention(m).o_proj.weight),
    Symbol("e_i", "row i of `mlp.gate.weight`", (256, 7168), (16, 256),
           "a row of the router, not an embedding", ("00", "02"), lambda m, r: _moe(m).gate.weight),
    Symbol("b_i", "`mlp.gate.e_score_correction_bias`", (256,), (16,),
           "no parameter: no gradient, no decay, FP32, and it never weighs an expert's output", ("00", "02"),
           lambda m, r: _moe(m).gate.e_score_correction_bias),
    Symbol("N_r", "`n_routed_experts`", 256, 16, "", ("00", "02", "06"), lambda m, r: m.config.n_routed_experts),
    Symbol("K_r", "`num_experts_per_tok`", 8, 4, "", ("00", "02", "06"),
           lambda m, r: m.config.num_experts_per_tok),
    Symbol("N_s", "`n_shared_experts`", 1, 1, "no router, no weight, no scaling factor", ("00", "02"),
           lambda m, r: m.config.n_shared_experts),
    Symbol("M", "`topk_group`", 4, 2, "a node is a group of experts", ("02", "06"),
           lambda m, r: m.config.topk_group),
    Symbol("g_i", "`Routing.weights`", (8,), (4,),
           "s of the chosen over their sum, times 2.5: that factor is in the config only", ("02", "06"),
           lambda m, r: _routing(m).weights[0]),
    Symbol("FFN_i^(r)", "`mlp.experts.gate_up_proj`, `down_proj`", (256, 4096, 7168), (16, 256, 256),
           "one tensor for all experts: of EP ranks each holds every EP-th part of it, 4 experts at full size", ("06",),
           lambda m, r: _moe(m).experts.gate_up_proj),
    Symbol("D", "`num_nextn_predict_layers`", 1, 1, "", ("00", "03"),
           lambda m, r: m.config.num_nextn_predict_layers),
    Symbol("M_k", "`eh_proj`", (7168, 14336), (256, 512),
           "columns [embedding ; hidden] in the weights, the other way round in eq. 21", ("03",),
           lambda m, r: m.mtp_modules[0].eh_proj.weight),
    Symbol("gamma", "`Recipe.gamma`", 1e-3, 1e-2,
           "a speed, not a constant: a run of a few hundred steps needs more", ("00", "02"), lambda m, r: r.gamma(0)),
    Symbol("alpha", "`Recipe.balance_weight`", 1e-4, 1e-4, "", ("02",), lambda m, r: r.balance_weight(0)),
    Symbol("lambda", "`Recipe.mtp_weight`", 0.3, 0.3, "falls to 0.1 when the learning rate leaves its peak",
           ("00", "03"), lambda m, r: r.mtp_weight(0)),
    Symbol("N_C", "`quantize.TILE`", 128, 128,
           "numbers along K that are summed before promotion, and that share a scale", ("04", "05"),
           lambda m, r: quantize.TILE),
    Symbol("scales of a token", "`quantize.quantize_tiles`", (128, 1), (2, 1),
           "of the input of W^O: [K / 128, M], so those of one step of K lie side by side", ("04", "05"),
           lambda m, r: quantize.quantize_tiles(torch.zeros(1, _attention(m).o_proj.weight.shape[1]))[1]),
    Symbol("scales of W^O", "`quantize.quantize_blocks`", (56, 128), (2, 2),
           "multipliers, although the checkpoint says `weight_scale_inv`", ("04", "05"),
           lambda m, r: quantize.quantize_blocks(_attention(m).o_proj.weight)[1]),
    Symbol("scales for Wgrad", "`quantize.quantize_columns`", (1, 16384), (1, 256),
           "of 128 tokens at the input of W^O: one a channel, since tokens are summed", ("04",),
           lambda m, r: quantize.quantize_columns(torch.zeros(128, _attention(m).o_proj.weight.shape[1]))[1]),
    Symbol("max of E4M3", "`formats.E4M3`", 448, 448,
           "the highest exponent is used for numbers: no infinity, one NaN of each sign", ("04",),
           lambda m, r: formats.E4M3.largest),
    Symbol("E5M6", "`e5m6.quantize_e5m6`", (24576,), (384,),
           "the cached input of W^O of a token, in bytes: two values in three", ("04",),
           lambda m, r: e5m6.quantize_e5m6(torch.zeros(1, _attention(m).o_proj.weight.shape[1]))[0][0]),
    Symbol("stages", "`stage.split`", 16, 2,
           "of four layers, if the embedding, the head and MTP count as one each; a V has two on a rank", ("07",),
           lambda m, r: len(split(m.config, _stages(m)))),
    Symbol("batch", "`Recipe.batch_size`", 15360, 8,
           "sequences at the end; one pipeline of 128 gets M = 120 micro-batches of one", ("07",),
           lambda m, r: r.batch_size(r.total_tokens)),
    Symbol("PP + 1", "`simulate.Timeline`, its most in flight", 17, 3,
           "chunks that a rank of DualPipe holds at most; not twice PP, although parameters are twice", ("07",),
           lambda m, r: simulate(dualpipe(_stages(m), 4 * _stages(m))).in_flight[0]),
)

CLASHES = {
    "M": "the node limit (`topk_group`), with an index the matrix M_k of MTP, the tokens of a product (chapter 05), "
         "and the micro-batches of a pipeline in one step (chapter 07)",
    "K": "numbers summed in a product, and with an index the experts of a token, K_r",
    "N": "rows of a weight, and with an index numbers of experts (N_r, N_s) or the promotion interval (N_C)",
    "W": "any weight; in schedules the backward pass for weights",
    "B": "the batch; in schedules a backward pass, whole or for the input alone",
    "P": "an expert's mean affinity (eq. 19), a probability (eq. 23), and the number of ranks",
    "T": "tokens of a sequence (eq. 18), tokens of a batch, and a trillion",
    "h": "the stream, and as n_h the number of heads",
}
