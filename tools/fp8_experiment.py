"""Does training in FP8 follow training in BF16? mini in both, beside a control; and, smaller, what the report warns of.

    python tools/fp8_experiment.py --device cuda --seconds 540      on one GPU or more; again, until every run is done
    python tools/fp8_experiment.py --smoke                          a minute on a CPU: shows only that the script runs

Every claim below was written before the runs, with its threshold. Runs of one size and seed begin with the same weights
and see the same batches in the same order. The control is BF16 once more, its first weights changed by one part in a
million: how far it drifts away is what rounding alone does. Curves are compared smoothed, e = 0.9 e + 0.1 loss, as in
the report's appendix B. That a recipe does not diverge in so few tokens is no evidence for it.
"""

import argparse
import math
import sys
import time
import zlib
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from long_runs import Text, go_on, read_text, spread
from nano_runs import RESULTS, Claim, judge, machine, mean, new_model, resume, write
from torch import Tensor

from minidsv3 import ModelConfig, Transformer
from minidsv3.data import Batch
from minidsv3.fp8 import FP8Recipe, to_fp8
from minidsv3.kernels import use_kernels
from minidsv3.optim import AdamW, Recipe, parameter_groups
from minidsv3.train import accumulate as accumulate_gradients
from minidsv3.train import evaluate

# ---- runs -----------------------------------------------------------------------------------------------------------


class Size(NamedTuple):
    """A model, and how many steps of how many sequences it is trained for."""

    model: ModelConfig
    steps: int
    sequences: int = 8
    length: int = 2048             # tokens of a sequence

    @property
    def tokens(self) -> int:
        return self.steps * self.sequences * self.length


MINI = ModelConfig.preset("mini")
SMALL = ModelConfig.preset(
    "mini", hidden_size=512, num_hidden_layers=6, intermediate_size=1408, num_attention_heads=8, q_lora_rank=256,
    kv_lora_rank=128, n_routed_experts=32, moe_intermediate_size=256, num_nextn_predict_layers=0)
TINY = replace(SMALL, vocab_size=384, hidden_size=64, num_hidden_layers=2, intermediate_size=96, q_lora_rank=48,
               kv_lora_rank=32, num_attention_heads=2, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16,
               n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=2, moe_intermediate_size=32,
               init_std=None)

SIZES = {"mini": Size(MINI, 1832), "small": Size(SMALL, 600)}                                # 30.0 M and 9.8 M tokens
SMOKE = {"mini": Size(replace(TINY, num_nextn_predict_layers=1), 6, 2, 32), "small": Size(TINY, 4, 2, 32)}


class Method(NamedTuple):
    words: str
    recipe: FP8Recipe | None = None      # None: BF16
    disturbed: float = 0.0               # relative change of the first weights


BF16 = Method("BF16")
CONTROL = Method("BF16, first weights times 1 + 1e-6 N(0, 1)", disturbed=1e-6)
FP8 = Method("FP8 as in the report", FP8Recipe())
METHODS = {
    "mini": {"bf16": BF16, "control": CONTROL, "fp8": FP8},
    "small": {
        "bf16": BF16, "control": CONTROL, "fp8": FP8,
        "e5m2": Method("gradients of activations in E5M2", FP8Recipe(gradient="e5m2")),
        "blocks": Method("gradients of activations in blocks of 128 x 128", FP8Recipe(gradient_blocks=True)),
        "tensor": Method("one scale a tensor", FP8Recipe(scales="tensor")),
        "unpromoted": Method("one scale a tensor, without promotion", FP8Recipe(scales="tensor", promote=False)),
    },
}

# ---- claims ---------------------------------------------------------------------------------------------------------

Runs = dict[str, dict]         # of one size and seed, by method


def smoothed(losses: list[float], keep: float = 0.9) -> list[float]:
    """The report's exponential moving average, beginning at the first loss."""
    return list(accumulate(losses, lambda average, loss: keep * average + (1 - keep) * loss))


def apart(runs: Runs, method: str) -> float:
    """How far a smoothed curve is from BF16's, in percent of it: mean distance over the last half of the steps. A run
    that diverged is 100 % away."""
    if runs[method]["diverged"]:
        return 100.0
    curves = zip(smoothed(runs[method]["losses"]), smoothed(runs["bf16"]["losses"]))
    distances = [abs(ours / theirs - 1) for ours, theirs in curves]
    return 100 * mean(distances[len(distances) // 2:])


def higher(runs: Runs, method: str) -> float:
    """By how many percent its loss on held-out text ends above BF16's; a run that diverged by 100."""
    return 100 * (runs[method]["held_out"] / runs["bf16"]["held_out"] - 1) if not runs[method]["diverged"] else 100.0


def coarser(runs: Runs, method: str, than: str) -> float:
    """How many doublings the error of one method's first gradient lies above another's."""
    return math.log2(runs[method]["gradient_error"]["start"] / runs[than]["gradient_error"]["start"])


def drifts(method: str, than: str, words: str) -> Claim:
    return Claim(id=f"{method}_drifts", claim=f"{words} takes the loss farther from BF16's than {than} does.",
                 value=lambda runs: apart(runs, method) - apart(runs, than))


def errs(method: str, than: str, factor: float, words: str) -> Claim:
    return Claim(id=f"{method}_errs", value=lambda runs: coarser(runs, method, than), least=math.log2(factor),
                 claim=f"{words} makes the error of the first gradient at least {factor} times that of {than}.")


CLAIMS = {
    "mini": (
        Claim(id="follows", value=lambda runs: apart(runs, "fp8"), most=0.25,
              claim="FP8's loss stays within 0.25 % of BF16's (smoothed, mean over the last half; report, 3.3)."),
        Claim(id="within_noise", value=lambda runs: apart(runs, "control") - apart(runs, "fp8"),
              claim="FP8 is no farther from BF16 than the control is."),
        Claim(id="ends_as_low", value=lambda runs: -higher(runs, "fp8"), least=-0.25,
              claim="On held-out text FP8 ends at most 0.25 % above BF16."),
    ),
    "small": (
        Claim(id="follows", value=lambda runs: apart(runs, "fp8"), most=0.25,
              claim="FP8's loss stays within 0.25 % of BF16's (smoothed, mean over the last half)."),
        Claim(id="blocks_diverge", value=lambda runs: float(runs["blocks"]["diverged"] is not None), least=1,
              claim="Gradients of activations in blocks of 128 x 128 diverge (report, B.2, at 16 B and 300 B tokens)."),
        errs("e5m2", "fp8", 1.3, "E5M2 for gradients"), drifts("e5m2", "fp8", "E5M2 for gradients"),
        errs("blocks", "fp8", 1.1, "Blocks of 128 x 128 for gradients"),
        drifts("blocks", "fp8", "Blocks of 128 x 128 for gradients"),
        errs("tensor", "fp8", 1.1, "One scale a tensor"), drifts("tensor", "fp8", "One scale a tensor"),
        errs("unpromoted", "tensor", 1.1, "Leaving out promotion"),
        drifts("unpromoted", "tensor", "Leaving out promotion"),
    ),
}

# ---- one run --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Options:
    """How the experiment is run."""

    out: Path
    runs: Path                         # where unfinished runs wait
    corpus: Path | None = None         # a folder of Python sources; None: the interpreter's, with what is installed
    seeds: tuple[int, ...] = (0,)
    device: str = "cpu"
    until: float = math.inf            # time.time() at which to stop
    only: tuple[str, ...] = tuple(METHODS)
    sizes: dict[str, Size] = field(default_factory=SIZES.copy)
    held_out: int = 32                 # rows
    each: int = 1                      # runs at once on a GPU


def text_of(options: Options) -> Text:
    """Rows enough for every size; they share vocabulary and length."""
    sizes = options.sizes.values()
    (vocabulary, length), = {(size.model.vocab_size, size.length) for size in sizes}
    return read_text(options.runs / "text.safetensors", options.corpus, vocabulary, length,
                     max(size.steps * size.sequences for size in sizes), options.held_out)


def batches_of(text: Text, size: Size, seed: int) -> list[Batch]:
    """The first rows of the text in an order that the seed decides."""
    rows = size.steps * size.sequences
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).split(size.sequences)
    return [Batch(text["tokens"][some].long(), text["documents"][some].long()) for some in order]


def prepared(model: Transformer, method: Method, seed: int) -> Transformer:
    """A fresh model as the method begins with it."""
    if method.disturbed:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                noise = torch.randn(weight.shape, generator=generator)
                weight.mul_(1 + method.disturbed * noise.to(weight.device))
    return to_fp8(model, method.recipe) if method.recipe else model


def run(options: Options, name: str, device: str) -> dict | None:
    """Trains the run `size method seed` until it is done, and returns its entry, or until the time is up."""
    if time.time() >= options.until:
        return None
    if on_gpu := device.startswith("cuda"):
        torch.cuda.set_device(device)
    size_name, method_name, seed = name.split()
    size, method, seed = options.sizes[size_name], METHODS[size_name][method_name], int(seed)
    precision = "fp8" if method.recipe else "bf16"
    text = text_of(options)
    held_out = text["held_out"].long()

    model = prepared(new_model(size.model, seed, device), method, seed)
    first = gradient_error(model, precision, held_out[:2])
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    recipe = replace(Recipe.preset("mini", size.tokens), sequence_length=size.length, first_batch=size.sequences,
                     last_batch=size.sequences)
    optimizer = AdamW(parameter_groups(model, recipe.weight_decay), betas=recipe.betas, eps=recipe.eps,
                      moments=torch.bfloat16)
    # Products of E5M2 ask the GPU where experts' rows end: that is no graph.
    taken = go_on(options.runs / name.replace(" ", "-"), model, optimizer, recipe, batches_of(text, size, seed),
                  precision, options.until, graphed=on_gpu and (not method.recipe or method.recipe.gradient == "e4m3"))
    if len(taken.losses) < size.steps and not taken.diverged:
        return None
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    del optimizer                           # room for a second model
    held_out_loss = evaluate(model, [Batch(rows, rows) for rows in held_out.split(4)], precision)
    return {"size": size_name, "method": method_name, "seed": seed, "diverged": taken.diverged,
            "losses": [round(loss, 5) for loss in taken.losses], "held_out": finite(held_out_loss),
            "gradient_error": {"start": first, "end": gradient_error(model, precision, held_out[:2])},
            "tokens_a_second": taken.seconds_a_step and round(size.tokens / size.steps / taken.seconds_a_step),
            "peak_memory_gb": peak and round(peak / 1e9, 1)}


def gradient_error(model: Transformer, precision: str, rows: Tensor) -> float | None:
    """|g - g'| / |g'| of the matrices that FP8 multiplies, together, for the loss of `rows` [B, T + 1]; g' is the
    gradient of the same weights in FP32, by the definitions."""
    exact = Transformer(model.config).to(model.lm_head.weight.device)
    exact.load_state_dict(model.state_dict())
    with use_kernels("torch"):
        right = gradient(exact, "fp32", rows)
    found = gradient(model, precision, rows)
    wrong = sum((a - b).square().sum() for a, b in zip(found, right, strict=True))
    error = finite(math.sqrt(wrong / sum(b.square().sum() for b in right)))
    del exact, right, found
    torch.cuda.empty_cache()                # for the run, and others on the same GPU
    return error


def gradient(model: Transformer, precision: str, rows: Tensor) -> list[Tensor]:
    """Of the next-token loss, taken out of the model again."""
    recipe = Recipe(sequence_balance=0.0, first_mtp_weight=0.0)
    accumulate_gradients(model, recipe, Batch(rows, rows), 0, len(rows), precision)
    found = [weight.grad for name, weight in model.named_parameters()
             if "_proj" in name and "eh_proj" not in name and weight.grad is not None]      # MTP has none
    model.zero_grad()
    return found


def finite(value: float) -> float | None:
    """Five digits for the file, which has no word for infinity."""
    return round(value, 5) if math.isfinite(value) else None


# ---- the experiment -------------------------------------------------------------------------------------------------


def experiment(options: Options) -> dict:
    """Goes on with every run that `options.out` does not hold; writes and returns the result so far."""
    header = {"command": " ".join(["python", *sys.argv]), "machine": machine(options.device.partition(":")[0]),
              "what": described(options), "runs_at_once_on_a_gpu": options.each, "claims": [],
              "methods": {size: {name: method.words for name, method in METHODS[size].items()} for size in METHODS}}
    options = replace(options, runs=options.runs / f"{zlib.crc32(header['what'].encode()):08x}")    # of this experiment
    found = resume(options.out, header)
    there = {(entry["size"], entry["method"], entry["seed"]) for entry in found["runs"]}
    wanted = [f"{size} {method} {seed}" for size in options.only for seed in options.seeds for method in METHODS[size]
              if (size, method, seed) not in there]
    text_of(options)
    for name, entry in spread(partial(run, options), wanted, devices(options.device, options.each)):
        if isinstance(entry, dict):
            found = resume(options.out, header)          # another call may have added runs of another size
            found["runs"].append(entry)
            found["runs"].sort(key=lambda entry: (entry["size"], entry["seed"], [*METHODS[entry["size"]]].index(
                entry["method"])))
            found["claims"] = judged(found["runs"])
            write(options.out, found)
            entry = f"done, held out {entry['held_out']}, {entry['tokens_a_second']} tokens a second"
        print(f"{name}: {entry or 'waits for the next call'}", flush=True)
    return found


def judged(runs: list[dict]) -> list[dict]:
    """Every size's claims, where the runs of a seed are complete."""
    return [{"size": size} | verdict for size, claims in CLAIMS.items()
            for verdict in judge(claims, [entry for entry in runs if entry["size"] == size], list(METHODS[size]))]


def described(options: Options) -> str:
    parts = [f"{name}: width {size.model.hidden_size}, {size.model.num_hidden_layers} layers, "
             f"{size.model.n_routed_experts} experts, {size.steps} steps of {size.sequences} x {size.length} tokens"
             for name, size in options.sizes.items()]
    smoke = "" if options.sizes == SIZES else "A smoke run, far too short for any claim: "
    return (f"{smoke}{'; '.join(parts)}; the mini recipe scaled to each, FP32 master weights, BF16 moments; Python "
            f"sources under {options.corpus or 'the interpreter'}, {options.held_out} rows held out")


def devices(device: str, each: int = 1) -> list[str]:
    """Every GPU `each` times, or the CPU once."""
    return [f"cuda:{i}" for i in range(torch.cuda.device_count())] * each if device == "cuda" else [device]


def read_options() -> Options:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "fp8_training.json")
    parser.add_argument("--runs", type=Path, default=Path("runs/fp8_experiment"), help="where unfinished runs wait")
    parser.add_argument("--corpus", type=Path, help="folder of Python sources; else the interpreter's and what is "
                                                    "installed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device", default="cpu", help="cpu, or cuda for every GPU there is")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which runs are saved to go on later")
    parser.add_argument("--only", nargs="+", choices=tuple(METHODS), default=[*METHODS], help="sizes to run")
    parser.add_argument("--each", type=int, default=1, help="runs at once on a GPU: small kernels leave it room, and "
                                                            "tokens a second are then no measure")
    parser.add_argument("--smoke", action="store_true", help="tiny models, a few steps")
    given = vars(parser.parse_args())
    until, sizes = time.time() + given.pop("seconds"), SMOKE if given.pop("smoke") else SIZES
    given |= {name: tuple(given[name]) for name in ("seeds", "only")}
    return Options(**given, until=until, sizes=sizes)


if __name__ == "__main__":
    result = experiment(read_options())
    for claim in result["claims"]:
        print(f"{claim['size']}, {claim['holds']}: {claim['claim']} -> {claim['verdict']}", flush=True)
