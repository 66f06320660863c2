"""Training in FP8 beside BF16 on a CPU, at nano's width: several seeds, a control, the gradient's error by recipe.

    python tools/fp8_nano.py                        an hour on one core
    python tools/fp8_nano.py --seeds 0 --tokens 20480 --held-out-tokens 4096 --out build/fp8_nano.json

Every claim below was written before the runs, with its threshold. Runs of one seed begin with the same weights and see
the same batches. The control is BF16 with first weights changed by one part in a million. What a run of 120 steps
cannot show is a divergence after thousands; so the gradient's error is measured as well, for the report's recipe and
for what it advises against, at the weights that BF16 ends with. The GPU's longer runs are in fp8_experiment.py.
"""

import copy
import math
import time
from dataclasses import replace

import torch
from fp8_experiment import METHODS, apart, gradient_error, prepared
from nano_runs import (RESULTS, Claim, Options, forward, held_out_loss, judge, machine, main, new_model, read_options,
                       run_all, smoke, training)
from tokenizers import Tokenizer
from torch import Tensor

from minidsv3 import ModelConfig, Transformer
from minidsv3.data import encode
from minidsv3.optim import Recipe
from minidsv3.train import autocast

TRAINED = ("bf16", "control", "fp8")
RECIPES = {name: method for name, method in METHODS["small"].items() if method.recipe}
LINE = "return self.items[key]\n"           # the course's running example
SHOWN_LAYER, SHOWN_SEED = 2, 0              # whose activations are stored

# ---- claims ---------------------------------------------------------------------------------------------------------


def doublings(runs: dict[str, dict], recipe: str, than: str = "fp8") -> float:
    """log2 of one recipe's error of the gradient over another's, at the weights that BF16 ended with. Where a result
    has "rows", a scale for each row, this is what its unpromoted recipe is with promotion."""
    errors = runs["bf16"]["gradient_errors"]
    than = "rows" if recipe == "unpromoted" and "rows" in errors else than
    return math.log2(errors[recipe] / errors[than])


def coarser(recipe: str, factor: float, words: str, than: str = "fp8", other: str = "the report's recipe") -> Claim:
    return Claim(id=f"{recipe}_coarser", value=lambda runs: doublings(runs, recipe, than), least=math.log2(factor),
                 claim=f"{words} makes the error of the gradient at least {factor} times that of {other}.")


CLAIMS = (
    Claim(id="follows", value=lambda runs: apart(runs, "fp8"), most=0.25,
          claim="FP8's loss stays within 0.25 % of BF16's (smoothed, mean over the last half; report, section 3.3)."),
    Claim(id="within_noise", value=lambda runs: apart(runs, "control") - apart(runs, "fp8"),
          claim="FP8 is no farther from BF16 than the control is."),
    Claim(id="ends_as_low", least=-0.25,
          value=lambda runs: 100 * (1 - runs["fp8"]["held_out"] / runs["bf16"]["held_out"]),
          claim="On held-out text FP8 ends at most 0.25 % above BF16."),
    coarser("e5m2", 1.3, "E5M2 for gradients of activations"),
    coarser("blocks", 1.1, "Blocks of 128 x 128 for gradients of activations"),
    coarser("tensor", 1.1, "One scale a tensor"),
    coarser("unpromoted", 1.1, "Leaving out promotion", than="tensor", other="the same with promotion"),
)

# ---- the experiment -------------------------------------------------------------------------------------------------


def run(name: str, seed: int, options: Options, data: dict) -> dict:
    """One training run and its entry in the result."""
    began, method = time.perf_counter(), METHODS["small"][name]
    precision = "fp8" if method.recipe else "bf16"
    model = prepared(new_model(options.model, seed, options.device), method, seed)
    recipe = replace(Recipe.preset("nano", options.tokens), sequence_length=options.length,
                     first_batch=options.sequences, last_batch=options.sequences)
    losses = []

    def objective(tokens: Tensor, documents: Tensor, seen: int) -> tuple[Tensor, Tensor]:
        loss, record = forward(model, tokens)
        losses.append(loss.detach())
        return loss, torch.stack([routing.load for routing in record])

    for _ in training(model, recipe, data["train"][seed], data["documents"][seed], objective, precision):
        pass
    with autocast(torch.device(options.device), precision):
        held_out = held_out_loss(model, data["held_out"])
    entry = {"method": name, "seed": seed, "diverged": None, "held_out": held_out,
             "losses": [round(loss.item(), 4) for loss in losses]}
    if name == "bf16":
        entry["gradient_errors"] = gradient_errors(model, data["held_out"][:2])
        if seed == SHOWN_SEED:
            entry["activations"] = activations(model, Tokenizer.from_str(data["tokenizer"]))
    return entry | {"seconds": round(time.perf_counter() - began, 1)}


def gradient_errors(model: Transformer, rows: Tensor) -> dict[str, float]:
    """|g - g'| / |g'| for every recipe and for BF16, where g' is the gradient in FP32."""
    errors = {"bf16": gradient_error(model, "bf16", rows)}
    for name, method in RECIPES.items():
        errors[name] = gradient_error(prepared(copy.deepcopy(model), method, seed=0), "fp8", rows)
    return errors


def activations(model: Transformer, tokenizer: Tokenizer) -> dict:
    """What goes into the dense matrices of one layer's shared expert and what comes back, for the running example.

    `norm` is the input of gate and up, `hidden` that of down, `slope` the gradient of its output: [tokens][channels],
    three digits.
    """
    ids = torch.tensor([encode(tokenizer, LINE)])
    expert, seen = model.model.layers[SHOWN_LAYER].mlp.shared_experts, {}

    def see(name: str, value: Tensor) -> None:
        seen[name] = [[float(f"{x:.3g}") for x in row] for row in value.flatten(0, -2).tolist()]

    def of_output(module, inputs: tuple, output: Tensor) -> None:
        output.register_hook(lambda slope: see("slope", slope[..., :-1, :]))

    hooks = [expert.gate_proj.register_forward_pre_hook(lambda module, inputs: see("norm", inputs[0])),
             expert.down_proj.register_forward_pre_hook(lambda module, inputs: see("hidden", inputs[0])),
             expert.down_proj.register_forward_hook(of_output)]
    forward(model, torch.cat([ids, ids[:, :1]], 1))[0].backward()
    model.zero_grad()
    for hook in hooks:
        hook.remove()
    return {"line": LINE, "layer": SHOWN_LAYER, "tokens": [tokenizer.decode([i]) for i in ids[0].tolist()], **seen}


def experiment(options: Options) -> dict:
    """All runs; writes and returns the result."""
    config, seeds = options.model, " ".join(map(str, options.seeds))
    header = {
        "command": f"python tools/fp8_nano.py --tokens {options.tokens} --seeds {seeds} "
                   f"--held-out-tokens {options.held_out_tokens}",
        "machine": machine(options.device),
        "what": f"{smoke(options)}width {config.hidden_size}, {config.num_hidden_layers} layers, "
                f"{config.n_routed_experts} experts, vocabulary {config.vocab_size}; {options.steps} steps of "
                f"{options.sequences} x {options.length} tokens; the nano recipe scaled to {options.tokens} tokens; "
                f"about {options.held_out_tokens} held-out tokens, each method in its own precision",
        "claims": [], "methods": {name: METHODS["small"][name].words for name in TRAINED},
        "recipes": {"bf16": "BF16"} | {name: method.words for name, method in RECIPES.items()}}

    def finish(found: dict) -> dict:
        return found | {"claims": judge(CLAIMS, found["runs"], list(TRAINED))}

    return run_all(run, list(TRAINED), options, options.steps, header, finish)


if __name__ == "__main__":
    main(experiment, read_options(__doc__, RESULTS / "fp8_nano.json", ModelConfig.preset(
        "nano", vocab_size=1024, num_hidden_layers=4, num_nextn_predict_layers=0, max_position_embeddings=128,
        rope_scaling=None), tokens=122_880))
