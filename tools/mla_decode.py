"""What latent attention saves on a CPU: time of one decoded token in one layer, four ways, and bytes of their caches.

    python tools/mla_decode.py                       about four minutes; nothing else should run

The layer is the package's `MLA` with random weights in FP32, batch 1. Behind n tokens one more is decoded:

    absorbed   the latent cache, heads read it directly
    expanded   the latent cache, keys and values of all n tokens expanded again for each new one
    full       a cache of the expanded keys and values: what multi-head attention keeps
    none       no cache: the layer runs over all n + 1 tokens

All four give the same numbers, which is checked before anything is timed. Times of one process agree to a few percent
and those of two processes need not, so five are started one after the other; what counts is the median of the five.
"""

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from mtp_cost import milliseconds
from torch import Tensor

from minidsv3 import ModelConfig, bench
from minidsv3.attention import MLA, Context, LatentCache, make_context

OUT = Path(__file__).parents[1] / "results" / "mla_decode.json"
CONTEXTS, PREFILL = (256, 1024, 4096), 1024
PROCESSES, FAST_ROUNDS, SLOW_ROUNDS = 5, 15, 3
GEOMETRIES = {
    "nano": ModelConfig.preset("nano", num_hidden_layers=1, num_nextn_predict_layers=0),
    "wide": ModelConfig(num_hidden_layers=1, num_nextn_predict_layers=0, hidden_size=2048, num_attention_heads=16,
                        first_k_dense_replace=1, rope_scaling=None),     # V3's heads and ranks, 16 heads for 128
}

Times = dict[str, dict]         # of one geometry: milliseconds by context and form


def ratio(times: Times, slow: str, fast: str, context: int = CONTEXTS[-1]) -> float:
    return times["decode_ms"][str(context)][slow] / times["decode_ms"][str(context)][fast]


# Written before the run. `found` is what main() measured, by geometry; each claim reads its own numbers from it.
CLAIMS = {
    "cache_pays": ("behind 4,096 tokens a latent cache makes a token at least 20 times as fast as no cache, at both "
                   "sizes",
                   lambda found: min(ratio(found[name], "none", "absorbed") for name in found) >= 20),
    "absorbing_pays": ("behind 4,096 tokens absorbing is at least 5 times as fast as expanding again, at both sizes",
                       lambda found: min(ratio(found[name], "expanded", "absorbed") for name in found) >= 5),
    "beats_full_wide": ("behind 4,096 tokens, wide: reading the latent is at least 1.2 times as fast as reading full "
                        "keys and values, which are 8.9 times the bytes",
                        lambda found: ratio(found["wide"], "full", "absorbed") >= 1.2),
    "beats_full_nano": ("behind 4,096 tokens, nano: reading the latent is no slower than reading full keys and values",
                        lambda found: ratio(found["nano"], "full", "absorbed") >= 1),
    "prefill": ("over a prompt of 1,024 tokens expanding is at least 1.5 times as fast as absorbing, at both sizes",
                lambda found: min(found[name]["prefill_ms"]["absorbed"] / found[name]["prefill_ms"]["expanded"]
                                  for name in found) >= 1.5),
}


class FullCache:
    """Keys [1, heads, length, 128 + 64] and values [1, heads, length, 128] of every token: what MLA does not keep."""

    def __init__(self, layer: MLA, length: int):
        c, self.layer = layer.config, layer
        self.keys = torch.zeros(1, c.num_attention_heads, length, c.qk_head_dim)
        self.values = torch.zeros(1, c.num_attention_heads, length, c.v_head_dim)

    @property
    def bytes(self) -> int:
        return sum(each.numel() * each.element_size() for each in (self.keys, self.values))

    def write(self, cached: Tensor, start: int) -> None:
        """Expands and keeps the tokens whose latents and rotary keys are cached [1, T, 576]."""
        c, end = self.layer.config, start + cached.shape[1]
        latent, k_rope = cached.split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        kv = self.layer.kv_b_proj(latent).unflatten(-1, (c.num_attention_heads, -1)).transpose(1, 2)
        k_nope, value = kv.split([c.qk_nope_head_dim, c.v_head_dim], -1)
        self.keys[:, :, start:end, :c.qk_nope_head_dim] = k_nope
        self.keys[:, :, start:end, c.qk_nope_head_dim:] = k_rope[:, None]
        self.values[:, :, start:end] = value

    def decode(self, x: Tensor, context: Context, position: int) -> Tensor:
        """The layer's output for one token x [1, 1, hidden] at `position`, which is kept as well."""
        self.write(self.layer.compress(x, context), position)
        query, end = self.layer.query(x, context).transpose(1, 2), position + 1
        out = F.scaled_dot_product_attention(query, self.keys[:, :, :end], self.values[:, :, :end],
                                             scale=self.layer.scale)
        return self.layer.o_proj(out.transpose(1, 2).flatten(-2))


def with_form(layer: MLA, form: str, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`run` while the layer attends in one form, whatever is cheaper."""
    def chosen() -> Tensor:
        layer.absorbing_is_cheaper = lambda queries, keys: form == "absorbed"
        return run()
    return chosen


def decoders(layer: MLA, n: int) -> tuple[dict[str, Callable[[], Tensor]], dict[str, int]]:
    """A function a form that decodes one token behind n others, and the bytes of a cache for n tokens."""
    x = torch.randn(1, n + 1, layer.config.hidden_size)
    latent, full = LatentCache(layer.config, 1, n + 1), FullCache(layer, n + 1)
    before = make_context(layer.config, (1, n), torch.float32, "cpu", latent)
    layer(x[:, :n], before)
    full.write(latent.values[0, :, :n], 0)
    latent.advance(n)
    context = make_context(layer.config, (1, 1), torch.float32, "cpu", latent)
    whole = make_context(layer.config, (1, n + 1), torch.float32, "cpu")
    forms = {form: with_form(layer, form, lambda: layer(x[:, n:], context)) for form in ("absorbed", "expanded")}
    forms["full"] = lambda: full.decode(x[:, n:], context, n)
    forms["none"] = with_form(layer, "expanded", lambda: layer(x, whole)[:, -1:])
    row = latent.values.numel() * latent.values.element_size() // (n + 1)
    return forms, {"latent": row * n, "full": full.bytes // (n + 1) * n}


def check(forms: dict[str, Callable[[], Tensor]]) -> None:
    """Raises AssertionError unless all forms give one result."""
    want = forms["none"]()
    for run in forms.values():
        torch.testing.assert_close(run(), want, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def measure(config: ModelConfig) -> dict:
    """Milliseconds and bytes of one layer at every context, and of a prompt in both forms."""
    torch.manual_seed(0)
    layer = MLA(config, 0)
    found: dict = {"decode_ms": {}, "cache_bytes": {}}
    for n in CONTEXTS:
        forms, found["cache_bytes"][str(n)] = decoders(layer, n)
        check(forms)
        slow = {"none": forms.pop("none")}
        found["decode_ms"][str(n)] = milliseconds(forms, FAST_ROUNDS) | milliseconds(slow, SLOW_ROUNDS)
    x = torch.randn(1, PREFILL, config.hidden_size)
    context = make_context(config, (1, PREFILL), torch.float32, "cpu")
    prompt = {form: with_form(layer, form, lambda: layer(x, context)) for form in ("expanded", "absorbed")}
    return found | {"prefill_ms": milliseconds(prompt, SLOW_ROUNDS)}


def measure_all() -> dict:
    return {name: measure(config) for name, config in GEOMETRIES.items()}


def middle(runs: list) -> dict | float:
    """The median, number by number, of results of one shape."""
    if isinstance(runs[0], dict):
        return {key: middle([run[key] for run in runs]) for key in runs[0]}
    return statistics.median(runs)


def judged(runs: list[dict]) -> list[dict]:
    """Each claim: whether it holds for the medians, and in how many of the processes."""
    found = middle(runs)
    return [{"id": name, "claim": claim, "holds": bool(holds(found)), "processes": sum(map(bool, map(holds, runs)))}
            for name, (claim, holds) in CLAIMS.items()]


def main() -> None:
    runs = [bench.in_fresh_process(measure_all) for _ in range(PROCESSES)]
    found = middle(runs)
    for name in found:
        found[name]["full_over_absorbed"] = [round(ratio(run[name], "full", "absorbed"), 2) for run in runs]
        found[name]["expanded_over_absorbed"] = [round(ratio(run[name], "expanded", "absorbed"), 2) for run in runs]
    shapes = {name: f"hidden {c.hidden_size}, {c.num_attention_heads} heads of {c.qk_nope_head_dim} + "
                    f"{c.qk_rope_head_dim} / {c.v_head_dim}, ranks {c.q_lora_rank} and {c.kv_lora_rank}"
              for name, c in GEOMETRIES.items()}
    OUT.write_text(json.dumps({
        "command": "python tools/mla_decode.py", "machine": bench.machine(),
        "what": f"one layer, FP32, batch 1; medians of {PROCESSES} processes, in each the median of {FAST_ROUNDS} "
                f"interleaved rounds, {SLOW_ROUNDS} without a cache and for the prompt of {PREFILL} tokens; the two "
                f"lists are ratios behind {CONTEXTS[-1]} tokens in each process",
        "processes": PROCESSES, "shapes": shapes, "claims": judged(runs), **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
