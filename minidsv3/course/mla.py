"""Chapter 01: what a token leaves behind, and the two orders in which one product can be taken.

Latent attention and its cache: report section 2.1.1. YaRN and the softmax scale: section 4.3 and the released code.
"""

import math
import random
from bisect import bisect_left
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .. import cost
from ..attention import MLA, LatentCache, make_context
from ..config import ModelConfig, YarnScaling
from ..kernels import rms_norm_reference, rope
from ..rope import rope_table, softmax_scale, temperature
from .exercise import Exercise, Mutants
from .overview import geometries
from .predict import Option, Question

EPS = 1e-6
Weights = dict[str, Tensor]             # of one attention, by hub name: "kv_b_proj.weight"


def normal(source: random.Random) -> Callable[..., Tensor]:
    """A function like `torch.randn` in float64 that draws from `source` and leaves torch's own numbers alone."""
    generator = torch.Generator().manual_seed(source.getrandbits(32))
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


# ---- 1.1 ------------------------------------------------------------------------------------------------------------


def cache_reference(config: ModelConfig) -> int:
    return cost.kv_cache_bytes(config)


def cache_solution(config):
    return config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim) * 2


def cache_without_rope_key(config):
    return config.num_hidden_layers * config.kv_lora_rank * 2


def cache_of_keys_and_values(config):
    return 2 * cache_solution(config)


def cache_times_heads(config):
    return config.num_attention_heads * cache_solution(config)


def cache_with_rope_key_per_head(config):
    values = config.kv_lora_rank + config.num_attention_heads * config.qk_rope_head_dim
    return config.num_hidden_layers * values * 2


def cache_with_mtp(config):
    return cache_solution(config) // config.num_hidden_layers * (
        config.num_hidden_layers + config.num_nextn_predict_layers)


CACHE = Exercise(
    id="1.1", title="Bytes of a token", stars=1, minutes=10,
    why="this number decides how many conversations fit on a GPU, and how many bytes each new token must read",
    statement="Return how many bytes the main model's latent cache takes for one token, in bf16, from a `ModelConfig`.",
    stub="""def cache_bytes(config):
    \"\"\"Bytes that all layers of the main model keep of one token, two bytes a number.\"\"\"
    raise NotImplementedError
""",
    hints=("Which two vectors come out of `kv_a_proj_with_mqa`, and has either of them a head index?",
           "In each layer the latent, `kv_lora_rank` numbers, and one rotary key, `qk_rope_head_dim` numbers. Keys and "
           "values of the heads are expanded from the latent: nothing else is kept."),
    reference=cache_reference, solution=cache_solution, cases=geometries,
    wrong={
        "rope key forgotten": (cache_without_rope_key, "This keeps the latent alone (62,464 bytes at full size). "
                               "Position does not fit into it: the rotary key is kept beside it."),
        "keys and values": (cache_of_keys_and_values, "This counts the latent twice, once for keys and once for values "
                            "(140,544 bytes at full size). Both are expanded from the same latent: that is the *joint* "
                            "in joint compression."),
        "times heads": (cache_times_heads, "This multiplies by the number of heads. The latent has no head index: all "
                        "heads are expanded from the same numbers."),
        "a rope key per head": (cache_with_rope_key_per_head, "This gives every head a rotary key of its own. All "
                                "heads share one, which is why it is called the shared key."),
        "the MTP layer too": (cache_with_mtp, "This counts the MTP module's layer as well (62 layers at full size). "
                              "The main model has `num_hidden_layers`."),
    })


# ---- 1.2 ------------------------------------------------------------------------------------------------------------


def logits_reference(q_nope: Tensor, q_rope: Tensor, k_nope: Tensor, k_rope: Tensor, config: ModelConfig) -> Tensor:
    return (q_nope @ k_nope.T + q_rope @ k_rope.T) * softmax_scale(config)


def logits_solution(q_nope, q_rope, k_nope, k_rope, config):
    query, key, yarn = torch.cat((q_nope, q_rope), -1), torch.cat((k_nope, k_rope), -1), config.rope_scaling
    t = 0.1 * yarn.mscale_all_dim * math.log(yarn.factor) + 1 if yarn else 1
    return query @ key.T * query.shape[-1] ** -0.5 * t ** 2


def yarn_temperature(config: ModelConfig) -> float:
    yarn = config.rope_scaling
    return temperature(yarn.factor, yarn.mscale_all_dim) if yarn else 1.0


def logits_over_content_width(q_nope, q_rope, k_nope, k_rope, config):
    wrong = math.sqrt(config.qk_head_dim / config.qk_nope_head_dim)
    return logits_reference(q_nope, q_rope, k_nope, k_rope, config) * wrong


def logits_part_by_part(q_nope, q_rope, k_nope, k_rope, config):
    parts = q_nope @ k_nope.T / q_nope.shape[-1] ** 0.5 + q_rope @ k_rope.T / q_rope.shape[-1] ** 0.5
    return parts * yarn_temperature(config) ** 2


def logits_with_mscale_once(q_nope, q_rope, k_nope, k_rope, config):
    return logits_reference(q_nope, q_rope, k_nope, k_rope, config) / yarn_temperature(config)


def logits_without_mscale(q_nope, q_rope, k_nope, k_rope, config):
    return logits_reference(q_nope, q_rope, k_nope, k_rope, config) / yarn_temperature(config) ** 2


def logits_with_mscale_on_rope(q_nope, q_rope, k_nope, k_rope, config):
    t = yarn_temperature(config)
    return (q_nope @ k_nope.T + q_rope @ k_rope.T * t ** 2) * config.qk_head_dim ** -0.5


def logits_with_the_other_mscale(q_nope, q_rope, k_nope, k_rope, config):
    yarn = config.rope_scaling
    t = temperature(yarn.factor, yarn.mscale) if yarn else 1.0
    return logits_without_mscale(q_nope, q_rope, k_nope, k_rope, config) * t ** 2


def logit_cases(source: random.Random) -> dict[str, tuple]:
    """The published widths and YaRN, a YaRN whose two mscales differ, and a model without YaRN."""
    randn, full, nano = normal(source), ModelConfig.preset("full"), ModelConfig.preset("nano")
    yarn = YarnScaling(factor=source.randint(4, 30), original_max_position_embeddings=64, mscale=0.7,
                       mscale_all_dim=1.2)
    configs = {"the published config": full, f"nano with {yarn}": nano.replace(rope_scaling=yarn),
               "nano, which has no YaRN": nano}
    return {name: (*(randn(rows, width) for rows in (3, 4) for width in (c.qk_nope_head_dim, c.qk_rope_head_dim)), c)
            for name, c in configs.items()}


LOGITS = Exercise(
    id="1.2", title="The softmax scale", stars=2, minutes=15,
    why="a wrong scale raises no error and shifts every attention weight; released implementations have had it wrong",
    statement="Return the logits that enter the softmax of one head: queries `q_nope` [T, d] and rotated `q_rope` "
              "[T, r] with keys `k_nope` [S, d] and rotated `k_rope` [S, r]. `config.rope_scaling` is None or YaRN's "
              "settings; the released code then uses its `mscale_all_dim`, on the whole logit.",
    stub="""def scaled_logits(q_nope, q_rope, k_nope, k_rope, config):
    \"\"\"[T, S]: products of queries and keys, scaled as the released code scales them.\"\"\"
    raise NotImplementedError
""",
    hints=("The scale keeps the standard deviation of a sum of independent products at 1. How many products are "
           "summed?",
           "One dot product over 128 + 64 numbers, so 1/sqrt(192). With YaRN times t squared, where t = 0.1 * "
           "mscale_all_dim * ln(factor) + 1: once for the query's side and once for the key's."),
    reference=logits_reference, solution=logits_solution, cases=logit_cases, tol=1e-9,
    wrong={
        "content width": (logits_over_content_width, "This is what 1/sqrt(128) gives: the product runs over 128 + 64 "
                          "numbers."),
        "each part by its own root": (logits_part_by_part, "This scales content and position each by its own width. "
                                      "Each part then has standard deviation 1 and their sum 1.41: it is one dot "
                                      "product over 192 numbers."),
        "mscale once": (logits_with_mscale_once, "This multiplies by YaRN's factor once (0.0988 at full size). Query "
                        "and key both get it, so the logit gets its square: 0.1352."),
        "mscale missing": (logits_without_mscale, "This leaves YaRN's factor out (0.0722 at full size): right only "
                           "where `rope_scaling` is None."),
        "mscale on the rotary part": (logits_with_mscale_on_rope, "This scales the rotary part alone, as the report's "
                                      "sentence on YaRN suggests. The released code scales the whole logit."),
        "mscale for mscale_all_dim": (logits_with_the_other_mscale, "This takes `mscale`. The logit is scaled by "
                                      "`mscale_all_dim`; they are equal in the published config and need not be."),
    })


# ---- 1.3 ------------------------------------------------------------------------------------------------------------


def _package_layer(weights: Weights, config: ModelConfig) -> MLA:
    """The package's attention with these weights; what they do not name has no values."""
    with torch.device("meta"):
        layer = MLA(config, 0)
    layer.load_state_dict(weights, strict=False, assign=True)
    return layer


@torch.no_grad()
def absorbed_reference(q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, gain: Tensor, kv_b: Tensor,
                       scale: float) -> Tensor:
    heads, nope = q_nope.shape[1:]
    config = ModelConfig.preset("nano", num_attention_heads=heads, kv_lora_rank=latent.shape[1], qk_nope_head_dim=nope,
                                qk_rope_head_dim=k_rope.shape[1], v_head_dim=len(kv_b) // heads - nope)
    layer = _package_layer({"kv_b_proj.weight": kv_b}, config)
    layer.scale = scale
    cached = torch.cat((rms_norm_reference(latent, gain, EPS), k_rope), -1)
    everything = torch.ones(1, 1, len(q_nope), len(latent), dtype=torch.bool)
    return layer.absorbed(torch.cat((q_nope, q_rope), -1)[None], cached[None], everything)[0]


def absorbed_solution(q_nope, q_rope, latent, k_rope, gain, kv_b, scale):
    heads, nope = q_nope.shape[1:]
    c = latent / (latent.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain
    outputs = []
    for h, rows in enumerate(kv_b.chunk(heads)):
        w_uk, w_uv = rows[:nope], rows[nope:]
        logits = ((q_nope[:, h] @ w_uk) @ c.T + q_rope[:, h] @ k_rope.T) * scale
        outputs.append(logits.softmax(-1) @ c @ w_uv.T)
    return torch.stack(outputs, 1)


def norm(latent: Tensor, gain: Tensor) -> Tensor:
    return rms_norm_reference(latent, gain, EPS)


def no_norm(latent: Tensor, gain: Tensor) -> Tensor:
    return latent


def norm_twice(latent: Tensor, gain: Tensor) -> Tensor:
    return norm(norm(latent, gain), gain)


def split_by_head(kv: Tensor, heads: int, nope: int) -> tuple[Tensor, Tensor]:
    """[heads * (nope + v), ..] -> [heads, nope, ..] and [heads, v, ..]: each head's rows lie together."""
    by_head = kv.unflatten(0, (heads, -1))
    return by_head[:, :nope], by_head[:, nope:]


def split_keys_then_values(kv: Tensor, heads: int, nope: int) -> tuple[Tensor, Tensor]:
    return kv[:heads * nope].unflatten(0, (heads, -1)), kv[heads * nope:].unflatten(0, (heads, -1))


def faulty_absorbed(q_nope, q_rope, latent, k_rope, gain, kv_b, scale, *, normed=norm, split=split_by_head,
                    fold="thd,hdr->thr", key=lambda k_rope: k_rope):
    """Absorbed attention in which one step can be exchanged for a wrong one."""
    c = normed(latent, gain)
    w_uk, w_uv = split(kv_b, *q_nope.shape[1:])
    logits = torch.einsum("thr,sr->ths", torch.einsum(fold, q_nope, w_uk), c)
    p = ((logits + torch.einsum("thd,sd->ths", q_rope, key(k_rope))) * scale).softmax(-1)
    return torch.einsum("thr,hvr->thv", torch.einsum("ths,sr->thr", p, c), w_uv)


def absorbed_cases(source: random.Random) -> dict[str, tuple]:
    """Several heads, uneven gains and latents; a head's key is as wide as the latent, so that no shape gives a hint."""
    randn, cases = normal(source), {}
    for queries, tokens in ((1, 7), (3, 5)):
        heads, width = source.randint(2, 4), 2 * source.randint(2, 4)
        cases[f"{heads} heads, {queries} queries on {tokens} tokens"] = (
            randn(queries, heads, width), randn(queries, heads, 4), 0.3 * randn(tokens, width), randn(tokens, 4),
            1 + 0.4 * randn(width), randn(heads * (width + 3), width), 0.3)
    return cases


ABSORBED = Exercise(
    id="1.3", title="Absorb", stars=2, minutes=25,
    why="decoding speed of every DeepSeek model since V2 rests on these few products, and each has a plausible wrong "
        "twin",
    statement="Compute attention without ever making a key or a value of a head. `q_nope` [T, heads, d] and rotated "
              "`q_rope` [T, heads, r] ask; every query may look at all S tokens, of which the projection gave `latent` "
              "[S, rank], **not yet normed**, and `k_rope` [S, r], already rotated. `gain` [rank] is the norm's (eps "
              "1e-6), `kv_b` [heads * (d + v), rank] is `kv_b_proj.weight`, `scale` multiplies the logits. Return the "
              "heads' outputs [T, heads, v]. In these cases d = rank, so a wrong transpose raises no error.",
    stub="""def absorbed_attention(q_nope, q_rope, latent, k_rope, gain, kv_b, scale):
    \"\"\"[T, heads, v]: what the heads read, from latents alone.\"\"\"
    raise NotImplementedError
""",
    hints=("For one head: q · (W c) = (q W) · c. Which index of W^UK meets q, and which meets c?",
           "Norm the latents once. Rows of `kv_b` belong to heads, each first d key rows, then v value rows. Fold W^UK "
           "into the query (d becomes rank), take products with the latents, add the rotary products, scale, softmax, "
           "mix the *latents*, and only then apply W^UV."),
    reference=absorbed_reference, solution=absorbed_solution, cases=absorbed_cases, tol=1e-9,
    wrong={
        "keys, then values": (partial(faulty_absorbed, split=split_keys_then_values), "This reads `kv_b` as the keys "
                              "of all heads followed by the values of all heads. Its rows go head by head: d for the "
                              "key, then v for the value, then the next head."),
        "not transposed": (partial(faulty_absorbed, fold="thr,hdr->thd"), "This multiplies the query with W^UK from "
                           "the wrong side. W^UK is [d, rank] and the query meets its d rows: q W, not W q."),
        "not normed": (partial(faulty_absorbed, normed=no_norm), "This uses the latent as the projection gave it. "
                       "`kv_a_layernorm` stands between it and W^UK."),
        "normed twice": (partial(faulty_absorbed, normed=norm_twice), "This norms the latent twice. It is normed once, "
                         "before it is cached."),
        "rope key normed": (partial(faulty_absorbed, key=lambda k: norm(k, torch.ones_like(k[0]))), "This norms the "
                            "rotary key. The norm is on the latent alone; the key is rotated and kept as it is."),
    })


# ---- 1.4 ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def decode_reference(x: Tensor, cached: Tensor, w: Weights, config: ModelConfig) -> tuple[Tensor, Tensor]:
    held, end = len(cached), len(cached) + len(x)
    cache = LatentCache(config, 1, end, x.dtype)
    cache.values[0, 0, :held] = cached
    cache.lengths = torch.tensor([held])
    context = make_context(config, (1, len(x)), x.dtype, x.device, cache)
    return _package_layer(w, config)(x[None], context)[0], cache.values[0, 0]


def decode_solution(x, cached, w, config):
    heads, nope, rank = config.num_attention_heads, config.qk_nope_head_dim, config.kv_lora_rank
    cos, sin = rope_table(config, len(cached) + torch.arange(len(x))[None], x.dtype)
    q = norm(x @ w["q_a_proj.weight"].T, w["q_a_layernorm.weight"]) @ w["q_b_proj.weight"].T
    q = q.unflatten(-1, (heads, -1))
    q_rope = rope(q[None, ..., nope:], cos, sin)[0]
    latent, k_rope = (x @ w["kv_a_proj_with_mqa.weight"].T).split([rank, config.qk_rope_head_dim], -1)
    k_rope = rope(k_rope[None, :, None], cos, sin)[0, :, 0]
    cached = torch.cat((cached, torch.cat((norm(latent, w["kv_a_layernorm.weight"]), k_rope), -1)))
    seen = torch.ones(len(x), len(cached), dtype=torch.bool).tril(len(cached) - len(x))
    outputs = []
    for h, rows in enumerate(w["kv_b_proj.weight"].chunk(heads)):
        query = torch.cat((q[:, h, :nope] @ rows[:nope], q_rope[:, h]), -1)
        logits = (query @ cached.T * softmax_scale(config)).masked_fill(~seen, -math.inf)
        outputs.append(logits.softmax(-1) @ cached[:, :rank] @ rows[nope:].T)
    return torch.cat(outputs, -1) @ w["o_proj.weight"].T, cached


def turn(x: Tensor, positions: Tensor, config: ModelConfig) -> Tensor:
    """x [T, heads, d] with pairs of neighbouring channels rotated."""
    return rope(x[None], *rope_table(config, positions[None], x.dtype))[0]


def turn_halves(x: Tensor, positions: Tensor, config: ModelConfig) -> Tensor:
    cos, sin = (part.transpose(0, 1) for part in rope_table(config, positions[None], x.dtype))
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), -1)


def one_key_for_all(k_rope: Tensor, heads: int) -> Tensor:
    return k_rope[:, None].expand(-1, heads, -1)


def a_key_per_head(k_rope: Tensor, heads: int) -> Tensor:
    return k_rope.repeat_interleave(heads, -1).unflatten(-1, (heads, -1))


def past_and_itself(queries: int, keys: int) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def from_the_top(queries: int, keys: int) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool).tril()


def everything(queries: int, keys: int) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool)


def faulty_decode(x, cached, w, config, *, restart=False, turned=turn, normed=norm, shared=one_key_for_all,
                  split=split_by_head, scale=softmax_scale, seen=past_and_itself):
    """Expanded attention behind a cache, in which one step can be exchanged for a wrong one."""
    heads, nope, rank = config.num_attention_heads, config.qk_nope_head_dim, config.kv_lora_rank
    positions = torch.arange(len(x)) + (0 if restart else len(cached))
    q = norm(x @ w["q_a_proj.weight"].T, w["q_a_layernorm.weight"]) @ w["q_b_proj.weight"].T
    q_nope, q_rope = q.unflatten(-1, (heads, -1)).tensor_split([nope], -1)
    latent, k_rope = (x @ w["kv_a_proj_with_mqa.weight"].T).tensor_split([rank], -1)
    k_rope = turned(k_rope[:, None], positions, config)[:, 0]
    cached = torch.cat((cached, torch.cat((normed(latent, w["kv_a_layernorm.weight"]), k_rope), -1)))
    k_nope, value = split(w["kv_b_proj.weight"] @ cached[:, :rank].T, heads, nope)      # [heads, .., S]
    logits = torch.einsum("thd,hds->hts", q_nope, k_nope)
    logits = logits + torch.einsum("thd,shd->hts", turned(q_rope, positions, config), shared(cached[:, rank:], heads))
    p = (logits * scale(config)).masked_fill(~seen(len(x), len(cached)), -math.inf).softmax(-1)
    return torch.einsum("hts,hvs->thv", p, value).flatten(1) @ w["o_proj.weight"].T, cached


def small_attention(source: random.Random) -> tuple[ModelConfig, Weights]:
    """An attention that hides nothing: several heads, gains other than 1, YaRN on, sizes that all differ."""
    yarn = YarnScaling(factor=source.randint(3, 9), original_max_position_embeddings=16)
    config = ModelConfig.preset(
        "nano", hidden_size=10, num_hidden_layers=1, num_attention_heads=source.randint(2, 4), q_lora_rank=7,
        kv_lora_rank=9, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5, rope_scaling=yarn)
    randn = normal(source)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in MLA(config, 0).named_parameters()}
    return config, {name: 1 + 0.4 * randn(*shape) if len(shape) == 1 else randn(*shape) * 2 * shape[-1] ** -0.5
                    for name, shape in shapes.items()}


def nothing_cached(config: ModelConfig) -> Tensor:
    return torch.zeros(0, config.kv_lora_rank + config.qk_rope_head_dim, dtype=torch.float64)


def decode_cases(source: random.Random) -> dict[str, tuple]:
    cases = {}
    for held, new in ((5, 1), (3, 2), (4, 3)):
        config, w = small_attention(source)
        x = normal(source)(held + new, config.hidden_size)
        cached = decode_reference(x[:held], nothing_cached(config), w, config)[1]
        cases[f"{new} new tokens behind {held} cached ones"] = (x[held:], cached, w, config)
    return cases


DECODE = Exercise(
    id="1.4", title="One step on the latent cache", stars=3, minutes=35,
    why="a cache that is off by one position still writes fluent text; only equality with the full pass shows it",
    statement="Decode. `x` [T, hidden] are the new tokens' inputs to attention, `cached` [n, rank + r] holds the "
              "normed latent and the rotated key of the n tokens before them. `w` maps hub names to weights, as "
              "`w[\"q_a_proj.weight\"]`. Return the outputs [T, hidden] and the cache of all n + T tokens. "
              "You may use `minidsv3.rope.rope_table`, `minidsv3.rope.softmax_scale` and `minidsv3.kernels.rope`. T "
              "may be more than 1: speculative decoding asks for two tokens at once.",
    stub="""def decode(x, cached, w, config):
    \"\"\"(outputs [T, hidden], cache [n + T, rank + r]) of T tokens that follow n cached ones.\"\"\"
    raise NotImplementedError
""",
    hints=("Which position does the first new token have? Which of the new tokens may it look at?",
           "Positions n to n + T - 1. Queries: down, norm, up, rotate the last r channels of each head. New cache "
           "rows: norm the latent, rotate the key. Append. Attend in either form; new token i sees n + i + 1 rows. "
           "Then `o_proj`. With the functions of the package: `cos, sin = rope_table(config, positions[None], "
           "x.dtype)`, then `rope(q_rope[None], cos, sin)[0]` for q_rope [T, heads, r]."),
    reference=decode_reference, solution=decode_solution, cases=decode_cases, tol=1e-9,
    wrong={
        "position restarts": (partial(faulty_decode, restart=True), "This counts positions from 0 again. The new "
                              "tokens stand behind the cached ones: the first has position n."),
        "half layout": (partial(faulty_decode, turned=turn_halves), "This rotates channel i with channel i + r/2. "
                        "DeepSeek's pairs are neighbours, 2i and 2i + 1."),
        "a rope key per head": (partial(faulty_decode, shared=a_key_per_head), "Here every head sees another rotary "
                                "key. All heads share the same one: `expand` it, or `repeat` it; `repeat_interleave` "
                                "mixes its channels."),
        "no mask": (partial(faulty_decode, seen=everything), "Here the first of several new tokens looks at the ones "
                    "after it. One new token needs no mask, two do."),
        "mask from the top": (partial(faulty_decode, seen=from_the_top), "This mask is a triangle that begins at the "
                              "first cached token, so new tokens miss most of the cache. Shift it: "
                              "`tril(keys - queries)`."),
    })


# ---- 1.5 ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def attention_reference(x: Tensor, w: Weights, config: ModelConfig) -> Tensor:
    context = make_context(config, (1, len(x)), x.dtype, x.device)
    return _package_layer(w, config)(x[None], context)[0]


def faulty_attention(x, w, config, **fault):
    return faulty_decode(x, nothing_cached(config), w, config, **fault)[0]


def scale_without_mscale(config: ModelConfig) -> float:
    return config.qk_head_dim ** -0.5


def attention_test(attention):
    yarn = YarnScaling(factor=4, original_max_position_embeddings=8)
    config = ModelConfig.preset("nano", rope_scaling=yarn)          # 8 heads
    layer = MLA(config, 0).double()
    with torch.no_grad():
        layer.kv_a_layernorm.weight.uniform_(0.5, 1.5)
        layer.q_a_layernorm.weight.uniform_(0.5, 1.5)
        x = torch.randn(6, config.hidden_size, dtype=torch.float64)
        want = layer(x[None], make_context(config, (1, 6), x.dtype, x.device))[0]
        got = attention(x, dict(layer.state_dict()), config)
    assert torch.allclose(got, want, rtol=0, atol=1e-9)


def attention_cases(source: random.Random) -> dict[str, tuple]:
    """An attention on which no two of the mutants agree."""
    config, w = small_attention(source)
    return {"six tokens": (normal(source)(6, config.hidden_size), w, config)}


ATTENTION = Mutants(
    id="1.5", title="Kill the mutants: attention", stars=2, minutes=20,
    why="a comparison on easy inputs proves little: fresh weights, one head or one token hide these faults",
    statement="Write a test for `attention(x, w, config)`, causal latent attention of one sequence: `x` [T, hidden] in "
              "float64 to [T, hidden], weights `w` by hub name. You may compare with the package's `MLA`, whose "
              "`state_dict()` is such a `w`. The test is run against the right attention, which it must spare, and "
              "against six wrong ones. **The work is the choice of inputs.**",
    stub="""def attention_test(attention):
    \"\"\"Asserts that attention(x, w, config) is right. x is [T, hidden], w maps hub names to float64 weights.\"\"\"
    raise NotImplementedError
""",
    hints=("Gains of 1 hide one mutant from all but the strictest tolerance, one head hides two, one token four, and a "
           "config without YaRN one.",
           "`layer = MLA(config, 0).double()`, with a config that has YaRN and several heads; make the gains of both "
           "norms uneven; a few tokens; `make_context(config, (1, T), x.dtype, x.device)`; compare to 1e-9."),
    reference=attention_reference, solution=attention_test, cases=attention_cases,
    wrong={
        "latent normed twice": (partial(faulty_attention, normed=norm_twice), "It norms the latent twice: with gains "
                                "of 1 the second time changes the seventh digit."),
        "a rope key per head": (partial(faulty_attention, shared=a_key_per_head), "It gives each head another rotary "
                                "key: one head cannot show that."),
        "half layout": (partial(faulty_attention, turned=turn_halves), "It rotates channel i with channel i + r/2: at "
                        "position 0 nothing turns."),
        "no mscale": (partial(faulty_attention, scale=scale_without_mscale), "It leaves YaRN's factor out of the "
                      "softmax scale: nano has no YaRN."),
        "keys, then values": (partial(faulty_attention, split=split_keys_then_values), "It reads `kv_b_proj` as all "
                              "keys, then all values: with one head that is right."),
        "future seen": (partial(faulty_attention, seen=everything), "It has no mask: one token has no future, and the "
                        "last of several neither. Compare all of them."),
    })


# ---- 1.6 ------------------------------------------------------------------------------------------------------------


def chunk_reference(config: ModelConfig, contexts: list[int]) -> list[int]:
    with torch.device("meta"):
        layer = MLA(config, 0)

    def expanding_wins(keys: int) -> Callable[[int], bool]:
        return lambda queries: not layer.absorbing_is_cheaper(queries, keys)

    return [bisect_left(range(1, keys + 1), True, key=expanding_wins(keys)) for keys in contexts]


def chunk_solution(config, contexts):
    rank, both = config.kv_lora_rank, config.qk_nope_head_dim + config.v_head_dim
    largest = []
    for keys in contexts:
        expand, more = 2 * rank * both, 2 * keys * (2 * rank - both)     # FLOPs: one expansion; absorbed minus expanded
        crossing = keys * expand / (expand + more)
        largest.append(min(keys, math.ceil(crossing) - 1))
    return largest


def chunk_always_absorbed(config, contexts):
    return list(contexts)


def chunk_without_context(config, contexts):
    both = config.qk_nope_head_dim + config.v_head_dim
    limit = config.kv_lora_rank * both / (2 * config.kv_lora_rank - both)
    return [min(keys, math.ceil(limit) - 1) for keys in contexts]


def chunk_of_one(config, contexts):
    return [1 for _ in contexts]


def chunk_expanding_new_tokens_only(config, contexts):
    """T expansions in either form: then the form with the cheaper pairs always wins."""
    cheaper_pairs = 2 * config.kv_lora_rank < config.qk_nope_head_dim + config.v_head_dim
    return [keys if cheaper_pairs else 0 for keys in contexts]


def chunk_cases(source: random.Random) -> dict[str, tuple]:
    """The published widths, and others; contexts from short to long."""
    contexts = [128, 16 * source.randint(20, 200), 4096, 131_072]
    changes = dict(kv_lora_rank=32 * source.randint(5, 12), qk_nope_head_dim=8 * source.randint(4, 9),
                   v_head_dim=8 * source.randint(4, 9))
    overrides = ", ".join(f"{name}={value}" for name, value in changes.items())
    return {f"ModelConfig.preset('full') and contexts {contexts}": (ModelConfig.preset("full"), contexts),
            f"ModelConfig.preset('full', {overrides})": (ModelConfig.preset("full", **changes), contexts)}


CHUNK = Exercise(
    id="1.6", title="Which bracket for a chunk?", stars=2, minutes=20,
    why="a server prefills long prompts in chunks and verifies drafts in twos and fours: it must choose a form each "
        "time",
    statement="A pass brings T new tokens; with them the cache holds n tokens (T is at most n). For each n in "
              "`contexts` return the largest T for which the absorbed form costs fewer FLOPs than expanding all n "
              "latents and attending with them. Every new token counts n keys; the rotary part is the same on both "
              "sides.",
    stub="""def largest_chunk(config, contexts):
    \"\"\"For each number n of cached tokens, new ones included, the largest T that is better absorbed.\"\"\"
    raise NotImplementedError
""",
    hints=("Write the FLOPs of one head as a straight line in T, once for each form. Which one starts higher, and "
           "which one is steeper?",
           "With A = 2 r (d_k + d_v): expanded n A + 2 T n (d_k + d_v), absorbed T A + 4 T n r. They meet at "
           "T* = n A / (A + 2 n (2 r - d_k - d_v)). The largest whole T strictly below it."),
    reference=chunk_reference, solution=chunk_solution, cases=chunk_cases,
    wrong={
        "absorbed always": (chunk_always_absorbed, "This absorbs whatever T is. An absorbed product of a query and a "
                            "key runs over the rank, not over a head's width: many queries are better expanded."),
        "T* without n": (chunk_without_context, "This is the limit for infinitely many cached tokens. With few of them "
                         "there is less to expand, so expanding pays sooner: 73 for n = 128, where the limit is 170."),
        "one token only": (chunk_of_one, "This absorbs for single tokens only. Absorbing wins for as long as its extra "
                           "work on T n pairs stays below one expansion of n latents."),
        "old tokens for free": (chunk_expanding_new_tokens_only, "This expands the new tokens only. Keys and values of "
                                "the old ones are not kept: the cache holds latents, and all n must be expanded "
                                "again."),
    })


EXERCISES = (CACHE, LOGITS, ABSORBED, DECODE, ATTENTION, CHUNK)


# ---- questions ------------------------------------------------------------------------------------------------------


QUESTIONS = {
    "01.cached": Question(
        "What does a layer of the 671 B model keep of a token?",
        (Option("512 numbers: the latent", "position would be lost: the rotary key's 64 numbers are kept beside it."),
         Option("128 x 576 numbers: a latent and a rotary key a head", "neither has a head index; heads differ in "
                "W^UK, W^UV and in their queries."),
         Option("576 numbers: the normed latent and one rotated key", "1,152 bytes in bf16, 70,272 in 61 "
                "layers.")), 2),
    "01.exact": Question(
        "What is lost when decoding with the absorbed form?",
        (Option("nothing: it is the same product in another order", "associativity: equal to 1e-12 in float64, values "
                "and gradients."),
         Option("precision: it approximates attention", "what is limited is the rank of keys and values, and that is "
                "so in both forms."),
         Option("the per-head keys: all heads share one, as in MQA", "heads differ still: their W^UK is folded into "
                "their queries.")), 0),
    "01.rotate": Question(
        "Why is the latent not simply rotated by its position?",
        (Option("rotation would change the latent's length", "a rotation changes no length, and "
                "the norm stays what it was."),
         Option("W^UQ and W^UK would have a rotation between them that depends on both positions",
                "the folded matrix would be another one for each distance: nothing could be absorbed."),
         Option("the latent has an odd width", "it has 512 numbers. The matter is the order of the products.")), 1),
    "01.form": Question(
        "A prompt of 4,096 tokens must be read at once, at full size. Which form?",
        (Option("absorbed: it is the fast one", "2,176 FLOPs instead of 640 for each query, key and head: 3.0 times "
                "the work here."),
         Option("expanded: each latent is expanded once and serves 4,096 queries", "expanding pays from about 164 "
                "queries on at this length."),
         Option("they cost the same: it is the same product", "the numbers are equal, the work is not: order decides "
                "how large the intermediate results are.")), 1),
    "01.merge": Question(
        "W^UQ and W^UK of a head stand side by side. Should one multiply them once and for all?",
        (Option("yes: one matrix less to read", "its 1,536 x 512 numbers a head are three times as many as the two "
                "factors have together."),
         Option("no: it would change the result", "it would not: the product is the same. It is larger."),
         Option("no: 100.7 M numbers would replace 33.6 M in each layer", "a product of low rank is cheapest as "
                "its factors; decoding waits for bytes.")), 2),
    "01.mqa": Question(
        "In bytes, which grouped-query attention does V3's cache equal (heads of 128)?",
        (Option("one group: all heads share a key, so it is MQA", "MQA keeps 256 numbers, MLA 576; and the heads' "
                "keys differ in MLA."),
         Option("2.25 groups", "576 numbers over 2 x 128 a group; yet each head has keys and values of its own."),
         Option("8 groups, as in LLaMA and Qwen", "8 groups keep 2,048 numbers, 3.6 times as many.")), 1),
}
