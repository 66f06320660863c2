"""Balancing experts at nano's size: no balancing, the bias, balance losses, V3's mixture; pairs of equal seeds.

    python tools/router_experiment.py                     hours on one core; see the options for a GPU
    python tools/router_experiment.py --tokens 32768 --seeds 0 1 --held-out-tokens 8192

Every claim below was written before the runs, with its threshold. A pair is two methods with the same seed: same
weights at the start, same tokens in the same order. MTP is off. What is measured at the end is measured in FP32 on the
CPU, on documents that no run was trained on.
"""

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from nano_runs import (KINDS, RESULTS, Claim, Options, command, forward, judge, machine, main, mean, new_model,
                       read_options, rounded, run_all, smoke, spread, training, worse, write)
from tokenizers import Tokenizer
from torch import Tensor

from minidsv3 import ModelConfig, Transformer
from minidsv3.balance import max_violation, routers, sequence_balance_loss
from minidsv3.data import encode
from minidsv3.kernels import Routing, route
from minidsv3.optim import Recipe

# ---- methods --------------------------------------------------------------------------------------------------------


def batch_balance_loss(logits: Tensor, top_k: int) -> Tensor:
    """Eqs. 17-20 with the whole batch as one sequence: logits [B, T, experts]; only the batch need be even."""
    return sequence_balance_loss(logits.flatten(0, 1)[None], top_k)


class Method(NamedTuple):
    words: str
    gamma: float = 0.0                                       # of the bias
    alpha: float = 0.0                                       # of the loss
    loss: Callable[[Tensor, int], Tensor] = sequence_balance_loss


METHODS = {
    "none": Method("no balancing"),
    "bias": Method("bias, gamma 0.01", gamma=0.01),
    "bias_slow": Method("bias, gamma 0.001", gamma=0.001),
    "sequence": Method("sequence-wise loss, alpha 0.01", alpha=0.01),
    "batch": Method("batch-wise loss, alpha 0.01", alpha=0.01, loss=batch_balance_loss),
    "v3": Method("bias, gamma 0.01, and sequence-wise loss, alpha 0.0001", gamma=0.01, alpha=1e-4),
}

# ---- claims ---------------------------------------------------------------------------------------------------------

Runs = dict[str, dict]         # of one seed, by method


def at_the_end(run: dict) -> float:
    """MaxVio, mean over layers and the last tenth of the sampled steps."""
    sampled = run["max_violation"]
    return mean([mean(layers) for layers in sampled[-max(1, len(sampled) // 10):]])


def sampled_until_even(run: dict) -> int:
    """How many sampled steps pass before MaxVio, mean over layers, is below 0.5; all of them if it never is."""
    below = [mean(layers) < 0.5 for layers in run["max_violation"]]
    return below.index(True) if True in below else len(below)


def doublings(more: float, less: float, smallest: float) -> float:
    """log2(more / less), neither of them taken to be less than `smallest`, which noise cannot tell from 0."""
    return math.log2(max(more, smallest) / max(less, smallest))


def kind_bits(run: dict) -> float:
    return mean(run["mi_kind"])


def dead(run: dict) -> int:
    """Experts that got less than 5 % of their layer's mean load on held-out text."""
    return sum(20 * count * len(layer) < sum(layer) for layer in run["held_out_load"] for count in layer)


BITS = 0.001                   # mutual information below this counts as this much

CLAIMS = (
    Claim(id="bias_below_sequence",
          claim="The bias ends at a held-out loss at least 0.005 nats below the sequence-wise loss's, the report's "
                "distance at 1 B parameters.",
          value=lambda runs: worse(runs, "sequence", than="bias"), least=0.005),
    Claim(id="batch_equals_bias",
          claim="Batch-wise loss and bias end within 0.005 nats of each other.",
          value=lambda runs: worse(runs, "batch", than="bias"), most=0.005),
    Claim(id="no_quality_lost",
          claim="Balancing costs no quality: with the bias the held-out loss is at most 0.005 nats above that without "
                "balancing.",
          value=lambda runs: worse(runs, "none", than="bias"), least=-0.005),
    Claim(id="uneven_without",
          claim="Without balancing the load stays uneven: MaxVio at the end is at least 0.5 above that with the bias.",
          value=lambda runs: at_the_end(runs["none"]) - at_the_end(runs["bias"]), least=0.5),
    Claim(id="expert_dies",
          claim="Without balancing at least one expert dies: less than 5 % of its layer's mean load on held-out text.",
          value=lambda runs: dead(runs["none"]), least=1),
    Claim(id="specialised",
          claim="The bias lets experts specialise: they tell at least twice as many bits about the kind of text as "
                "with the sequence-wise loss.",
          value=lambda runs: doublings(kind_bits(runs["bias"]), kind_bits(runs["sequence"]), BITS), least=1.0),
    Claim(id="v3_keeps_specialisation",
          claim="V3's small sequence-wise loss leaves at least half of the bias's bits about the kind of text.",
          value=lambda runs: doublings(kind_bits(runs["v3"]), kind_bits(runs["bias"]), BITS), least=-1.0),
    Claim(id="token_tells_more",
          claim="With the bias, an expert tells at least five times as many bits about the token as about the kind.",
          value=lambda runs: doublings(mean(runs["bias"]["mi_token"]), kind_bits(runs["bias"]), BITS),
          least=math.log2(5)),
    Claim(id="even_in_a_sequence",
          claim="The sequence-wise loss evens single sequences: MaxVio in one is at least 0.1 below that with the "
                "bias.",
          value=lambda runs: runs["bias"]["sequence_violation"] - runs["sequence"]["sequence_violation"], least=0.1),
    Claim(id="gamma_is_a_speed",
          claim="gamma 0.001 takes at least twice as long as 0.01 until MaxVio is below 0.5.",
          value=lambda runs: doublings(sampled_until_even(runs["bias_slow"]), sampled_until_even(runs["bias"]), 1),
          least=1.0),
)

# ---- what is measured -----------------------------------------------------------------------------------------------


def mutual_information(table: Tensor) -> float:
    """Bits that rows and columns of a table of counts tell about each other.

    The plug-in estimate is too high by about (rows - 1)(columns - 1) / (2 n ln 2) when both are independent (Miller
    1955); that is taken off, so small values may come out below 0. Empty rows and columns do not count.
    """
    table = table.double()
    table = table[table.sum(1) > 0][:, table.sum(0) > 0]
    n = table.sum()
    p = table / n
    independent = p.sum(1, keepdim=True) * p.sum(0, keepdim=True)
    bits = torch.where(p > 0, p * (p / independent).log2(), 0.0).sum()
    return (bits - (len(table) - 1) * (table.shape[1] - 1) / (2 * n * math.log(2))).item()


FREQUENT = 20                  # only tokens seen this often enter the table of tokens and experts


def counts(index: Tensor, experts: Tensor, size: int, n_experts: int) -> Tensor:
    """[size, n_experts]: how often index[n] met each of experts[n, k]."""
    flat = index[:, None] * n_experts + experts
    return torch.bincount(flat.flatten(), minlength=size * n_experts).view(size, n_experts)


@torch.no_grad()
def choices(model: Transformer, rows: Tensor) -> tuple[float, Tensor]:
    """Mean loss of rows [B, T + 1] and the chosen experts [layers, B * T, k]."""
    total, chosen = 0.0, []
    for part in rows.split(8):
        loss, record = forward(model, part)
        total += loss.item() * len(part)
        chosen.append(torch.stack([routing.experts for routing in record]))
    return rounded(total / len(rows)), torch.cat(chosen, 1)


def measure(model: Transformer, data: dict) -> dict:
    """The held-out part of a run's entry. `model` is on the CPU."""
    config, rows = model.config, data["held_out"]
    n_experts, length = config.n_routed_experts, rows.shape[1] - 1
    loss, chosen = choices(model, rows)
    sequence = torch.arange(len(rows)).repeat_interleave(length)
    token, one = rows[:, :-1].flatten(), torch.zeros(rows[:, 1:].numel(), dtype=torch.int64)
    inside = [max_violation(counts(sequence, experts, len(rows), n_experts).double()).mean().item()
              for experts in chosen]
    by_token = [counts(token, experts, config.vocab_size, n_experts) for experts in chosen]
    losses, loads = {}, {}
    for kind in KINDS:
        losses[kind], experts = choices(model, data["kinds"][kind])
        loads[kind] = torch.stack([layer.flatten().bincount(minlength=n_experts) for layer in experts])
    often = config.num_experts_per_tok * FREQUENT
    return {"held_out": loss, "held_out_by_kind": losses,
            "held_out_load": [counts(one, experts, 1, n_experts)[0].tolist() for experts in chosen],
            "load_by_kind": {kind: load.tolist() for kind, load in loads.items()},
            "sequence_violation": round(mean(inside), 3),
            "mi_kind": [round(mutual_information(torch.stack(layer)), 5) for layer in zip(*loads.values())],
            "mi_token": [round(mutual_information(table[table.sum(1) >= often]), 4) for table in by_token]}


def floor(config: ModelConfig, tokens: int, simulations: int) -> float:
    """MaxVio of routing at random scores, where no expert is preferred, for so many tokens at once; mean."""
    generator, bias = torch.Generator().manual_seed(0), torch.zeros(config.n_routed_experts)
    loads = [route(torch.randn(tokens, config.n_routed_experts, generator=generator), bias, n_group=config.n_group,
                   topk_group=config.topk_group, top_k=config.num_experts_per_tok).load for _ in range(simulations)]
    return round(max_violation(torch.stack(loads)).mean().item(), 4)


# ---- snapshots for the routing explorer -----------------------------------------------------------------------------

SNAPSHOT_METHODS = ("none", "sequence", "bias")
SNAPSHOT_SEED = 0
SNAPSHOT_TOKENS = 20              # of a text, at most: the file is in git
TEXTS = {
    "code": "def get(self, key):\n    return self.items[key]\n",
    "prose": "The value of the expression is the result of the call, if there is one.",
    "comment": "# Return the value of the key, or None if it is not in the list.",
}


@torch.no_grad()
def snapshot(model: Transformer, data: dict) -> dict:
    """Scores and biases in thousandths, and the loads of a held-out batch, all integers. `model` is on the CPU."""
    def record(tokens: Tensor) -> list[Routing]:
        routings: list[Routing] = []
        model.hidden(tokens, record=routings)
        return routings

    return {"scores": {name: [thousandths(routing.logits.sigmoid()) for routing in record(ids[None])]
                       for name, ids in snapshot_ids(data).items()},
            "bias": [thousandths(router.e_score_correction_bias) for router in routers(model)],
            "load": [routing.load.int().tolist() for routing in record(snapshot_batch(data))]}


def snapshot_ids(data: dict) -> dict[str, Tensor]:
    tokenizer = Tokenizer.from_str(data["tokenizer"])
    return {name: torch.tensor(encode(tokenizer, text)[:SNAPSHOT_TOKENS]) for name, text in TEXTS.items()}


def snapshot_batch(data: dict) -> Tensor:
    return spread(data["held_out"], 8)[:, :-1]


def thousandths(values: Tensor) -> list:
    return (values * 1000).round().int().tolist()


def store_snapshots(out: Path, entry: dict) -> None:
    """Moves a run's snapshots, if it has any, out of its entry into the file beside the result."""
    taken = entry.pop("snapshots", None)
    if taken is None:
        return
    path = out.with_name(f"{out.stem}_snapshots.json")
    method, by_step = entry["method"], taken.pop("by_step")
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if any(stored.get(name) != value for name, value in taken.items()):      # none yet, or another experiment's
        stored = taken | {"methods": [], "scores": {}, "bias": {}, "load": {}}
    for name in ("scores", "bias", "load"):
        stored[name][method] = {str(step): state[name] for step, state in by_step.items()}
    stored["methods"] = [name for name in SNAPSHOT_METHODS if name in stored["scores"]]
    write(out=path, result=stored)


# ---- the experiment -------------------------------------------------------------------------------------------------

def sampled_steps(steps: int) -> list[int]:
    """About eighty of the steps, evenly, the last one among them."""
    return sorted({*range(0, steps, max(1, steps // 80)), steps - 1})


def shown_steps(steps: int) -> list[int]:
    """Numbers of steps done at which biases and snapshots are kept: more of them early, where most happens."""
    return sorted({0, steps // 16, steps // 8, steps // 2, steps})


def recipe_of(method: Method, options: Options) -> Recipe:
    return replace(Recipe.preset("nano", options.tokens), bias_speed=method.gamma, sequence_balance=method.alpha,
                   sequence_length=options.length, first_batch=options.sequences, last_batch=options.sequences)


def run(name: str, seed: int, options: Options, data: dict) -> dict:
    """One training run and its entry in the result."""
    began, method = time.perf_counter(), METHODS[name]
    model, recipe = new_model(options.model, seed, options.device), recipe_of(method, options)
    top_k, sampled, shown = options.model.num_experts_per_tok, sampled_steps(options.steps), shown_steps(options.steps)

    def objective(tokens: Tensor, documents: Tensor, seen: int) -> tuple[Tensor, Tensor]:
        loss, record = forward(model, tokens)
        if method.alpha:
            loss = loss + recipe.balance_weight(seen) * sum(
                method.loss(routing.logits.unflatten(0, (len(tokens), -1)), top_k) for routing in record)
        return loss, torch.stack([routing.load for routing in record])

    loads, biases, snapshots = [], [], {}
    steps = training(model, recipe, data["train"][seed], data["documents"][seed], objective, options.precision)
    for done, load in steps:
        if done - 1 in sampled:
            loads.append(load)
        if done in shown:
            biases.append(torch.stack([router.e_score_correction_bias for router in routers(model)]).cpu())
            if name in SNAPSHOT_METHODS and seed == SNAPSHOT_SEED:
                snapshots[done] = snapshot(copy.deepcopy(model).cpu(), data)
    entry = {"method": name, "seed": seed, **measure(model.cpu(), data),
             "max_violation": [[round(value, 3) for value in layers]
                               for layers in max_violation(torch.stack(loads)).tolist()],
             "bias": [[[round(value, 3) for value in layer] for layer in layers.tolist()] for layers in biases],
             "bias_steps": shown, "seconds": round(time.perf_counter() - began, 1)}
    if snapshots:
        tokenizer = Tokenizer.from_str(data["tokenizer"])
        entry["snapshots"] = {
            "texts": {text: [tokenizer.decode([i]) for i in ids.tolist()] for text, ids in snapshot_ids(data).items()},
            "steps": shown, "load_tokens": snapshot_batch(data).numel(), "by_step": snapshots}
    return entry


def experiment(options: Options) -> dict:
    """All runs; writes and returns the result."""
    config = options.model
    header = {
        "command": command("router_experiment.py", options), "machine": machine(options.device),
        "what": f"{smoke(options)}width {config.hidden_size}, {config.num_hidden_layers} layers, MTP off, "
                f"{config.n_routed_experts} experts, {config.num_experts_per_tok} a token from {config.topk_group} of "
                f"{config.n_group} groups; {options.steps} steps of {options.sequences} x {options.length} tokens; "
                f"the nano recipe scaled to {options.tokens} tokens, {options.precision}, gamma 0 after 97 % of them; "
                f"measured in fp32 on about {options.held_out_tokens} held-out tokens",
        "claims": [], "methods": {name: method.words for name, method in METHODS.items()}, "seeds": [],
        "steps": sampled_steps(options.steps),
        "floor": floor(config, options.sequences * options.length, 200), "floor_simulations": 200,
        "sequence_floor": floor(config, options.length, 200)}

    def finish(found: dict) -> dict:
        return found | {"claims": judge(CLAIMS, found["runs"], list(METHODS)),
                        "seeds": sorted({entry["seed"] for entry in found["runs"]})}

    return run_all(run, list(METHODS), options, options.steps, header, finish,
                   keep=lambda entry: store_snapshots(options.out, entry))


if __name__ == "__main__":
    main(experiment, read_options(__doc__, RESULTS / "router.json",
                                  ModelConfig.preset("nano", num_nextn_predict_layers=0), tokens=1_638_400))
