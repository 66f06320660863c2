"""Loss of three attentions with equal parameters at nano's size: multi-head, grouped-query and latent, in paired runs.

    python tools/attention_variants.py                     hours on one core; see the options for a GPU
    python tools/attention_variants.py --tokens 32768 --seeds 0 1 --held-out-tokens 8192

Only attention differs: runs of one seed share every other weight at the start, and the tokens in their order. Heads and
widths are chosen so that each layer's attention has the same number of weights, within the gains of MLA's two norms.
Every claim below was written before the runs, with its threshold. MTP is off.
"""

import time
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from nano_runs import (RESULTS, Claim, Options, command, forward, held_out_loss, judge, machine, main, new_model,
                       read_options, run_all, training, worse)
from torch import Tensor, nn

from minidsv3 import ModelConfig, Transformer
from minidsv3.attention import MLA, Context
from minidsv3.kernels import rope
from minidsv3.optim import Recipe
from minidsv3.rope import rope_table

# ---- methods --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heads:
    """Ordinary attention: `groups` keys and values for `heads` queries, all channels rotated."""

    words: str
    heads: int
    groups: int
    width: int


METHODS = {
    "mha": Heads("8 heads of 22, each with its key and value", heads=8, groups=8, width=22),
    "gqa": Heads("12 heads of 22 on 4 keys and values", heads=12, groups=4, width=22),
    "mla": None,                   # the package's, as nano has it
}


class GroupedAttention(nn.Module):
    """Grouped-query attention, multi-head where groups = heads, in the place of `MLA`: x [B, T, hidden] to its like."""

    def __init__(self, config: ModelConfig, method: Heads):
        super().__init__()
        self.method, d = method, config.hidden_size
        self.q_proj = nn.Linear(d, method.heads * method.width, bias=False)
        self.kv_proj = nn.Linear(d, 2 * method.groups * method.width, bias=False)
        self.o_proj = nn.Linear(method.heads * method.width, d, bias=False)
        positions = torch.arange(config.max_position_embeddings)[None]
        cos, sin = rope_table(config.replace(qk_rope_head_dim=method.width), positions, torch.float32)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for linear in (self.q_proj, self.kv_proj, self.o_proj):
            nn.init.normal_(linear.weight, 0.0, config.init_std)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        m, length = self.method, x.shape[1]
        cos, sin = self.cos[:, :length], self.sin[:, :length]
        query = rope(self.q_proj(x).unflatten(-1, (m.heads, m.width)), cos, sin)
        key, value = self.kv_proj(x).unflatten(-1, (2 * m.groups, m.width)).chunk(2, 2)
        key, value = (each.repeat_interleave(m.heads // m.groups, 2) for each in (rope(key, cos, sin), value))
        out = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2),
                                             is_causal=True)
        return self.o_proj(out.transpose(1, 2).flatten(-2))


def build(name: str, config: ModelConfig, seed: int) -> Transformer:
    """The model of `seed` on the CPU; for an ordinary attention each layer's is drawn after everything else."""
    model, method = new_model(config, seed, "cpu"), METHODS[name]
    for block in model.blocks:
        if method is not None:
            block.self_attn = GroupedAttention(config, method)
    return model


def cached_values(name: str, config: ModelConfig) -> int:
    """Numbers that decoding keeps of a token in one layer."""
    method = METHODS[name]
    return 2 * method.groups * method.width if method else config.kv_lora_rank + config.qk_rope_head_dim


def weights_of_attention(name: str, config: ModelConfig) -> int:
    """Parameters of one layer's attention."""
    method = METHODS[name]
    with torch.device("meta"):
        attention = GroupedAttention(config, method) if method else MLA(config, 0)
    return sum(parameter.numel() for parameter in attention.parameters())


# ---- claims ---------------------------------------------------------------------------------------------------------

CLAIMS = (
    Claim(id="mla_below_mha",
          claim="Latent attention ends at a held-out loss at least 0.005 nats below multi-head attention's, as "
                "DeepSeek-V2's report found at larger sizes.",
          value=lambda runs: worse(runs, "mha", than="mla"), least=0.005),
    Claim(id="mla_costs_nothing",
          claim="Latent attention costs no quality: its held-out loss is at most 0.005 nats above multi-head "
                "attention's, from a cache 4.4 times smaller.",
          value=lambda runs: worse(runs, "mha", than="mla"), least=-0.005),
    Claim(id="gqa_above_mha",
          claim="Sharing keys and values costs quality: grouped-query attention ends at least 0.005 nats above "
                "multi-head attention.",
          value=lambda runs: worse(runs, "gqa", than="mha"), least=0.005),
    Claim(id="mla_below_gqa",
          claim="Latent attention ends at least 0.005 nats below grouped-query attention, from a smaller cache.",
          value=lambda runs: worse(runs, "gqa", than="mla"), least=0.005),
)

# ---- the experiment -------------------------------------------------------------------------------------------------


def run(name: str, seed: int, options: Options, data: dict) -> dict:
    """One training run and its entry in the result."""
    began = time.perf_counter()
    recipe = replace(Recipe.preset("nano", options.tokens), sequence_length=options.length,
                     first_batch=options.sequences, last_batch=options.sequences)
    model, losses = build(name, options.model, seed).to(options.device), []

    def objective(tokens: Tensor, documents: Tensor, seen: int) -> tuple[Tensor, Tensor]:
        loss, record = forward(model, tokens)
        losses.append(loss.detach())
        return loss, torch.stack([routing.load for routing in record])

    for _ in training(model, recipe, data["train"][seed], data["documents"][seed], objective, options.precision):
        pass
    last = torch.stack(losses[-max(1, len(losses) // 10):]).float().mean().item()
    return {"method": name, "seed": seed, "held_out": held_out_loss(model.cpu(), data["held_out"]),
            "training": round(last, 4), "seconds": round(time.perf_counter() - began, 1)}


def experiment(options: Options) -> dict:
    """All runs; writes and returns the result."""
    config, methods = options.model, list(METHODS)
    header = {
        "command": command("attention_variants.py", options), "machine": machine(options.device),
        "what": f"width {config.hidden_size}, {config.num_hidden_layers} layers, MTP off; {options.steps} steps of "
                f"{options.sequences} x {options.length} tokens; the nano recipe scaled to {options.tokens} tokens, "
                f"{options.precision}; no balance loss; measured in fp32 on about {options.held_out_tokens} "
                "held-out tokens",
        "claims": [],
        "methods": {name: method.words if method else "the package's" for name, method in METHODS.items()},
        "attention_parameters": {name: weights_of_attention(name, config) for name in methods},
        "cached_values": {name: cached_values(name, config) for name in methods}}

    def finish(found: dict) -> dict:
        return found | {"claims": judge(CLAIMS, found["runs"], methods)}

    return run_all(run, methods, options, options.steps, header, finish)


if __name__ == "__main__":
    main(experiment, read_options(__doc__, RESULTS / "attention_variants.json",
                                  ModelConfig.preset("nano", num_nextn_predict_layers=0), tokens=819_200))
