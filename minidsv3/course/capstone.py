"""The capstone: the reader's own attention, router and MTP module inside the package's model.

`install` puts three functions into a copy of the model by replacing `forward` of every attention, router and module.
Everything else stays the package's, and so do the weights. What copy and model then do must be the same: logits, the
cache after a prefill and further tokens, the load of every expert, drafts, and the text of speculative decoding.
"""

import copy
import inspect
import random
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..attention import MLA, Context, LatentCache, make_context
from ..block import Block
from ..config import YarnScaling
from ..generate import generate
from ..kernels import Routing
from ..model import Transformer
from ..moe import Router
from ..mtp import MTPModule
from ..rope import rope_table, softmax_scale
from .compare import difference
from .exercise import NOT_YET, Task, Verdict
from .toys import uneven_model

PIECES = (9, 2, 1)              # tokens of a prefill, and of the two passes behind it
NEW = 8                         # tokens that are written at the end
TOL = 1e-9


class Parts(NamedTuple):
    """Three functions, as the exercise describes them. None leaves the package's part in place."""

    attention: Callable | None = None
    router: Callable | None = None
    mtp: Callable | None = None


# ---- putting parts into the model -----------------------------------------------------------------------------------


def install(model: Transformer, parts: Parts) -> Transformer:
    """A copy of the model in which the parts that are given compute, with the copy's own weights."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, MLA) and parts.attention:
            module.forward = _attention_forward(module, parts.attention)
        elif isinstance(module, Router) and parts.router:
            module.forward = _router_forward(module, parts.router)
        elif isinstance(module, MTPModule) and parts.mtp:
            module.forward, module.logits = _mtp_forward(module, parts.mtp), lambda logits: logits
    return model


def weights_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """The module's weights by the hub's names, as `state_dict` has them."""
    return module.state_dict(keep_vars=True)


def _attention_forward(module: MLA, attention: Callable) -> Callable:
    """With a cache each row has a past of its own length, so rows are attended one by one."""
    weights, width = weights_of(module), module.config.kv_lora_rank + module.config.qk_rope_head_dim

    def forward(x: Tensor, context: Context) -> Tensor:
        if context.cache is None:
            return attention(x, x.new_zeros(len(x), 0, width), weights, module.config)[0]
        rows, values = [], context.cache[module.layer]
        for row, start in enumerate(context.positions[:, 0].tolist()):
            out, entries = attention(x[row:row + 1], values[row:row + 1, :start], weights, module.config)
            values[row, start:start + x.shape[1]] = entries[0]
            rows.append(out)
        return torch.cat(rows)
    return forward


def _router_forward(module: Router, router: Callable) -> Callable:
    config = module.config

    def forward(x: Tensor) -> Routing:
        logits = x @ module.weight.T
        dense = router(logits, module.e_score_correction_bias, config)
        weights, experts = dense.topk(config.num_experts_per_tok)
        return Routing(logits, experts, weights, (dense != 0).sum(0).float())
    return forward


def _mtp_forward(module: MTPModule, mtp: Callable) -> Callable:
    """The package hands over pairs (h_i, t_{i+1}) that are aligned; the reader's function aligns, so the row of tokens
    gets one in front and the row of states one behind."""
    weights = weights_of(module)

    def forward(hidden: Tensor, tokens: Tensor, context: Context, record: list | None = None) -> Tensor:
        row = torch.cat((tokens[:, :1], tokens), 1)
        states = torch.cat((hidden, hidden[:, -1:]), 1)
        return mtp(states, row, weights, lambda x: Block.forward(module, x, context, record), module.config)
    return forward


# ---- what must be equal ---------------------------------------------------------------------------------------------


@torch.no_grad()
def behaviour(model: Transformer, tokens: Tensor) -> Iterator[tuple[str, object]]:
    """What a model does with tokens [B, T], one thing after the other."""
    record: list[Routing] = []
    hidden = model.hidden(tokens, record=record)
    yield "logits", model.lm_head(model.model.norm(hidden))
    yield "the load of the experts", torch.stack([routing.load for routing in record])
    cache = LatentCache(model.config, len(tokens), sum(PIECES), torch.float64)
    yield "logits with the cache", torch.cat([model(piece, cache) for piece in
                                              tokens[:, :sum(PIECES)].split(PIECES, dim=1)], 1)
    yield "the latent cache", cache.values[:model.config.num_hidden_layers]
    module, ahead = model.mtp_modules[0], tokens[:, 1:]
    context = make_context(model.config, ahead.shape, hidden.dtype, hidden.device)
    yield "the drafts' logits", module.logits(module(model.carried(hidden)[:, :-1], ahead, context))
    written = generate(model, tokens[:, :PIECES[0]], NEW, speculative=True)
    yield "the text of speculative decoding", written.tokens
    yield "its passes and accepted drafts", (written.passes, written.accepted)


def fault(model: Transformer, tokens: Tensor, parts: Parts) -> str | None:
    """The first thing in which the model with these parts differs from the package's, or None."""
    reader = behaviour(install(model, parts), tokens)
    for name, want in behaviour(model, tokens):
        try:
            found = difference(next(reader)[1], want, TOL)
        except NotImplementedError:
            raise
        except Exception as error:      # whatever the reader's code raises is an answer too
            return f"{name}: your function raised {type(error).__name__}: {error}"
        if found is not None:
            return f"{name} differ: {found}"
    return None


@dataclass(frozen=True, kw_only=True, repr=False)
class Capstone(Task):
    """Write three functions. Each is put into the model alone first, so that a refusal names the part.

    `solution` and the wrong answers return `Parts`; a wrong answer has its one wrong part and no other.
    """

    def judge(self, answer: Callable, seed: object) -> Verdict:
        """Runs the reader's parts on the cases that `seed` gives."""
        cases = self.cases(random.Random(f"{self.id} {seed}"))
        try:
            parts = _parts(answer)
            for name, part in parts._asdict().items():
                for case, (model, tokens) in cases.items():
                    if part and (found := fault(model, tokens, Parts(**{name: part}))):
                        return Verdict(False, True, self._sentence(name, case, found, model, tokens))
            together = [fault(model, tokens, parts) for model, tokens in cases.values()]
        except NotImplementedError:
            return NOT_YET
        except ValueError as error:
            return Verdict(False, True, str(error))
        missing = [name for name, part in parts._asdict().items() if not part]
        if missing or any(together):
            found = f"still the package's: {', '.join(missing)}" if missing else next(filter(None, together))
            return Verdict(False, True, f"no part of yours is wrong alone; {found}")
        return Verdict(True, True, "right: logits, loads, cache, drafts and text are the package's")

    def _sentence(self, name: str, case: str, found: str, model: Transformer, tokens: Tensor) -> str:
        """The sentence of the listed wrong answer that does the same, or what differs first."""
        for function, sentence in self.wrong.values():
            wrong = function()
            if getattr(wrong, name) and fault(model, tokens, wrong) == found:
                return sentence
        return f"your {name} is not the package's yet. With {case}, {found}"


def _parts(answer: Callable) -> Parts:
    parts = answer()
    if not isinstance(parts, tuple) or len(parts) != 3 or not all(part is None or callable(part) for part in parts):
        raise ValueError(f"your function returned {parts!r}; it must return (attention, router, mtp): three "
                         "functions, or None for what is still to come")
    return Parts(*parts)


def odd_models(source: random.Random) -> dict[str, tuple[Transformer, Tensor]]:
    """A model with YaRN and one without, and two rows of tokens."""
    yarn = YarnScaling(factor=4, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=1.0)
    cases = {}
    for name, scaling in (("plain RoPE", None), ("YaRN", yarn)):
        model = uneven_model(source.getrandbits(32), rope_scaling=scaling)
        generator = torch.Generator().manual_seed(source.getrandbits(32))
        cases[name] = model, torch.randint(model.config.vocab_size, (2, sum(PIECES) + 4), generator=generator)
    return cases


# ---- the exercise ---------------------------------------------------------------------------------------------------


def my_parts_solution():
    def rms_norm(x, gain, eps):
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain

    def rotate(x, positions, c):
        cos, sin = rope_table(c, positions, x.dtype)
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)

    def attention(x, past, weights, c):
        w = lambda name: weights[f"{name}.weight"]
        start, new = past.shape[1], x.shape[1]
        positions = torch.arange(start, start + new)
        q = rms_norm(x @ w("q_a_proj").T, w("q_a_layernorm"), c.rms_norm_eps) @ w("q_b_proj").T
        q = q.unflatten(-1, (c.num_attention_heads, -1)).transpose(1, 2)
        q_nope, q_rope = q.split([c.qk_nope_head_dim, c.qk_rope_head_dim], -1)
        latent, k_rope = (x @ w("kv_a_proj_with_mqa").T).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        latent = rms_norm(latent, w("kv_a_layernorm"), c.rms_norm_eps)
        entries = torch.cat((latent, rotate(k_rope, positions, c)), -1)

        latent, k_rope = torch.cat((past, entries), 1).split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        kv = (latent @ w("kv_b_proj").T).unflatten(-1, (c.num_attention_heads, -1)).transpose(1, 2)
        k_nope, v = kv.split([c.qk_nope_head_dim, c.v_head_dim], -1)
        scores = q_nope @ k_nope.mT + rotate(q_rope, positions, c) @ k_rope[:, None].mT
        future = torch.ones(new, start + new, dtype=torch.bool).triu(start + 1)
        p = (scores * softmax_scale(c)).masked_fill(future, -torch.inf).softmax(-1)
        return (p @ v).transpose(1, 2).flatten(-2) @ w("o_proj").T, entries

    def router(logits, bias, c):
        s = logits.sigmoid()
        choice = (s + bias).unflatten(-1, (c.n_group, -1))
        kept = choice.topk(2).values.sum(-1).topk(c.topk_group).indices[..., None].expand(-1, -1, choice.shape[-1])
        allowed = torch.full_like(choice, -torch.inf).scatter(1, kept, choice.gather(1, kept))
        chosen = allowed.flatten(1).topk(c.num_experts_per_tok).indices
        weights = torch.zeros_like(s).scatter(1, chosen, s.gather(1, chosen))
        return weights / weights.sum(-1, keepdim=True) * c.routed_scaling_factor

    def mtp(hidden, tokens, weights, layer, c):
        w = lambda name: weights[f"{name}.weight"]
        embedded = rms_norm(w("embed_tokens")[tokens[:, 1:]], w("enorm"), c.rms_norm_eps)
        before = rms_norm(hidden[:, :-1], w("hnorm"), c.rms_norm_eps)
        h = layer(torch.cat((embedded, before), -1) @ w("eh_proj").T)
        return rms_norm(h, w("shared_head.norm"), c.rms_norm_eps) @ w("shared_head.head").T

    return attention, router, mtp


def spoilt(part: str, *changes: tuple[str, str]) -> Callable[[], Parts]:
    """A wrong answer: one part of the solution, with some of its source changed."""
    source = textwrap.dedent(inspect.getsource(my_parts_solution))
    for right, wrong in changes:
        if source.count(right) != 1:
            raise ValueError(f"{right!r} stands {source.count(right)} times in the solution; it must stand there once")
        source = source.replace(right, wrong)
    scope = dict(globals())
    exec(compile(source, f"<{part}, spoilt>", "exec"), scope)

    def answer() -> Parts:
        return Parts(**{part: getattr(Parts(*scope["my_parts_solution"]()), part)})
    return answer


KV_NORM = 'rms_norm(latent, w("kv_a_layernorm"), c.rms_norm_eps)'

WRONG = {
    "scale by the wrong root": (
        spoilt("attention", ("softmax_scale(c)", "c.qk_nope_head_dim ** -0.5")),
        "attention: this scales by the root of d_h alone. The product runs over d_h + d_h^R numbers, and YaRN adds a "
        "factor of its own: softmax_scale has both."),
    "a rope key for each head": (
        spoilt("attention", ("k_rope[:, None].mT", "torch.stack([k_rope.roll(2 * head, -1) for head in "
                                                   "range(c.num_attention_heads)], 1).mT")),
        "attention: each head has a rotary key of its own here. There is one for all of them: k^R has no head index."),
    "half-layout RoPE": (
        spoilt("attention", ("x[..., 0::2], x[..., 1::2]", "x.chunk(2, -1)")),
        "attention: this turns channel i with channel i + d/2. The released weights turn neighbours, 2i and 2i + 1."),
    "positions from 0": (
        spoilt("attention", ("torch.arange(start, start + new)", "torch.arange(new)")),
        "attention: new tokens are rotated as if they were the first ones. Behind S cached tokens they start at S."),
    "mask without the past": (
        spoilt("attention", ("triu(start + 1)", "triu(1)")),
        "attention: behind a cache the mask hides too much. New token j sees all S cached tokens and j + 1 new ones."),
    "latent cached before its norm": (
        spoilt("attention", (f"        latent = {KV_NORM}\n", ""),
               ('(latent @ w("kv_b_proj").T)', f'({KV_NORM} @ w("kv_b_proj").T)')),
        "attention: the output is right, but the cache holds the latent before its norm. The norm comes first, once."),
    "the bias leaks into the gate": (
        spoilt("router", ("chosen, s.gather(1, chosen)", "chosen, (s + bias).gather(1, chosen)")),
        "router: the bias leaks into the weights. It decides who is chosen; the weights come from s alone."),
    "0 for minus infinity": (
        spoilt("router", ("torch.full_like(choice, -torch.inf)", "torch.zeros_like(choice)")),
        "router: experts of dropped groups are masked with 0. Where s + b is below 0, they win: use minus infinity."),
    "groups by their best": (
        spoilt("router", ("choice.topk(2).values.sum(-1)", "choice.amax(-1)")),
        "router: a group is worth the sum of its two best experts, not its best one alone."),
    "softmax for sigmoid": (
        spoilt("router", ("logits.sigmoid()", "logits.softmax(-1)")),
        "router: affinities are sigmoids, each expert for itself; in a softmax they compete before they are chosen."),
    "shift by two": (
        spoilt("mtp", ("tokens[:, 1:]", "tokens[:, 2:]"), ("hidden[:, :-1]", "hidden[:, :-2]")),
        "mtp: a shift by two. h_i meets t_(i+1), the token it has not read, and there are T - 1 such pairs."),
    "the token's own embedding": (
        spoilt("mtp", ("tokens[:, 1:]", "tokens[:, :-1]")),
        "mtp: h_i is joined with t_i, which it has read already. It must meet t_(i+1)."),
    "halves swapped": (
        spoilt("mtp", ("(embedded, before)", "(before, embedded)")),
        "mtp: the halves are swapped. The released eh_proj reads the embedding first."),
    "one norm for both": (
        spoilt("mtp", ('w("enorm")', 'w("hnorm")')),
        "mtp: one norm serves both halves. The embedding has enorm, the hidden state hnorm."),
}

CAPSTONE = Capstone(
    id="3.6", title="Capstone: your parts in the model", stars=3, minutes=40,
    why="who has written these three has written what is new in DeepSeek-V3's architecture",
    statement="Write attention, router and MTP module, from chapters 01 to 03. They are put into a copy of the "
              "package's model, with the package's weights, in float64, each alone and then together. Logits, the load "
              "of the experts, the latent cache, drafts and the text of speculative decoding must be the same.\n"
              "- `attention(x, past, weights, config)`: x [B, T, d], already normed; `past` [B, S, latent + rope] is "
              "what the cache holds of the S tokens before (S may be 0). Returns the output [B, T, d] and the new "
              "cache entries [B, T, latent + rope]. Use `rope_table` and `softmax_scale` from `minidsv3.rope`: one of "
              "the two models has YaRN.\n"
              "- `router(logits, bias, config)`: logits [N, experts] -> weights [N, experts], 0 where not chosen.\n"
              "- `mtp(hidden, tokens, weights, layer, config)`: hidden [B, T, d] as the main model hands it over, "
              "tokens [B, T] of the same positions -> the drafts' logits [B, T - 1, vocabulary]. `layer(x)` runs the "
              "module's own layer. The embedding comes first, as in the released weights.\n\n"
              "`weights` has the hub's names inside the module: `weights[\"q_a_proj.weight\"]`. Return None for a "
              "part that is still to come.",
    stub="""def my_parts():
    \"\"\"Returns (attention, router, mtp): three functions, or None for a part that is still to come.\"\"\"
    raise NotImplementedError
""",
    hints=("One part at a time: return (attention, None, None) first. Chapter 00 has a page with all three, without "
           "cache.",
           "Attention: compress x to entries, join them with `past`, expand keys and values from both; queries stand "
           "at positions S to S + T - 1. Router: choose on s + bias, groups by their two best, the others at minus "
           "infinity, weights from s alone. MTP: hidden[:, :-1] meets tokens[:, 1:]."),
    reference=my_parts_solution, solution=my_parts_solution, cases=odd_models,
    wrong=WRONG)
