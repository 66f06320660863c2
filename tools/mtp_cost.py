"""What the MTP module costs and what it saves on a CPU: training steps, passes of decoding, speculative generation.

    python -m minidsv3 train --preset nano --tokens 400000
    python tools/mtp_cost.py                         about two minutes; nothing else should run

Times are medians of interleaved rounds. The same prompts of held-out text are continued one by one, in fours and all
eight together. What one pass costs is timed behind a cache of the length that these texts have on average: the main
model over one token and over two (the last token and its draft), and the module over two, as `generate` calls it.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch

from minidsv3 import Transformer, bench, cost, generate
from minidsv3.attention import LatentCache, make_context
from minidsv3.corpus import read_corpus
from minidsv3.data import encode
from minidsv3.train import load_run

OUT = Path(__file__).parents[1] / "results" / "mtp_cost.json"
COMMAND = "python -m minidsv3 train --preset nano --tokens {tokens}; python tools/mtp_cost.py --rounds {rounds}"
BATCHES, PROMPTS, PROMPT, NEW = (1, 4, 8), 8, 48, 64

# Written before the run. `found` is what main() measured; each claim reads its own numbers from it.
CLAIMS = {
    "training": ("a training step with MTP takes longer by the share that its FLOPs say, within 0.10",
                 lambda found: abs(found["training"]["time_ratio"] - found["training"]["flops_ratio"]) <= 0.10),
    "memory": ("MTP raises the peak memory of training by at most 20 %",
               lambda found: found["training"]["memory_ratio"] <= 1.20),
    "faster": ("one text at a time, speculative decoding is at least 1.05 times as fast",
               lambda found: found["decoding"]["1"]["measured"] >= 1.05),
    "formula": ("one text at a time, (1 + p) / (1 + c) with c counted from weights is within 10 % of what is measured",
                lambda found: abs(found["decoding"]["1"]["expected"] - found["decoding"]["1"]["measured"])
                <= 0.10 * found["decoding"]["1"]["measured"]),
    "batch": ("eight texts together gain less than one at a time, by at least 0.05",
              lambda found: found["decoding"]["1"]["measured"] - found["decoding"]["8"]["measured"] >= 0.05),
}


def milliseconds(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """`bench.medians`, as they are stored."""
    return {name: round(1000 * seconds, 3) for name, seconds in bench.medians(contenders, rounds).items()}


def training(rounds: int) -> dict:
    """A step of nano with and without MTP: milliseconds, FLOPs and peak memory, and their ratios."""
    plain, mtp = bench.OURS, bench.OURS_MTP
    builders = bench.training_builders(autocast=False)
    step = milliseconds({"plain": builders[plain](), "mtp": builders[mtp]()}, rounds)
    peak = {name: bench.in_fresh_process(bench._peak_of_training, who) for name, who in
            (("plain", plain), ("mtp", mtp))}
    flops = cost.training_flops(bench.nano(1), bench.LENGTH)
    return {"tokens_a_step": bench.BATCH * bench.LENGTH, "step_ms": step, "peak_mb": peak,
            "time_ratio": round(step["mtp"] / step["plain"], 3), "flops_ratio": round(flops.total / flops.main, 3),
            "memory_ratio": round(peak["mtp"] / peak["plain"], 3)}


@torch.no_grad()
def passes(model: Transformer, batch: int, rounds: int) -> dict[str, float]:
    """Milliseconds of one pass of `batch` rows behind a cache: main over one and over two tokens, module over two."""
    known = PROMPT + NEW // 2
    cache = LatentCache(model.config, batch, known + 2)
    tokens = torch.arange(2 * batch).view(batch, 2)
    hidden, start = torch.randn(batch, 2, model.config.hidden_size), cache.lengths + known
    module = model.mtp_modules[0]

    def main(length: int) -> None:
        cache.lengths = start
        model(tokens[:, :length], cache).argmax(-1)

    def draft() -> None:
        context = make_context(model.config, tokens.shape, hidden.dtype, hidden.device, cache, start)
        module.logits(module(model.carried(hidden), tokens, context)[:, -1]).argmax(-1)

    return milliseconds({"main": lambda: main(1), "main_of_two": lambda: main(2), "module": draft}, rounds)


def decoding(model: Transformer, prompts: list[list[int]], rounds: int) -> dict:
    """For each batch size: acceptance, the speed that was measured, and what three formulas expect: c counted from
    weights; c timed; passes timed as well, and counted until the last row of a batch is done."""
    groups = {batch: [prompts[i:i + batch] for i in range(0, len(prompts), batch)] for batch in BATCHES}

    def write(batch: int, speculative: bool) -> list:
        return [generate(model, group, NEW, speculative=speculative) for group in groups[batch]]

    contenders = {f"{'speculative' if speculative else 'plain'}, {batch}": lambda b=batch, s=speculative: write(b, s)
                  for batch in BATCHES for speculative in (False, True)}
    times, found = milliseconds(contenders, rounds), {}
    for batch in BATCHES:
        fast, one = write(batch, True), passes(model, batch, 15 * rounds)
        drafted, accepted = sum(each.drafted for each in fast), sum(each.accepted for each in fast)
        p, c = accepted / drafted, one["module"] / one["main"]
        plain, speculative = times[f"plain, {batch}"], times[f"speculative, {batch}"]
        waited = NEW * len(fast) / sum(each.passes for each in fast)
        found[str(batch)] = {
            "tokens": len(prompts) * NEW, "drafted": drafted, "accepted": accepted, "acceptance": round(p, 3),
            "tokens_a_pass": round(1 + p, 3), "tokens_a_pass_of_the_slowest": round(waited, 3), "pass_ms": one,
            "plain_ms": plain, "speculative_ms": speculative, "measured": round(plain / speculative, 3),
            "expected": round(cost.speculative_speed(p, cost.draft_cost(model.config)), 3),
            "expected_timed_module": round(cost.speculative_speed(p, c), 3),
            "expected_timed_passes": round(waited / (one["main_of_two"] / one["main"] + c), 3),
            "same_text": all(torch.equal(a, b) for mine, theirs in zip(fast, write(batch, False))
                             for a, b in zip(mine.tokens, theirs.tokens)),
            "near_ties": sum(each.near_ties for each in fast)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("runs/nano"), help="a finished run of `minidsv3 train`")
    parser.add_argument("--rounds", type=int, default=7, help="of every comparison; passes take 15 times as many")
    options = parser.parse_args()
    model, tokenizer = load_run(options.model)
    trained = json.loads((options.model / "result.json").read_text())
    texts = (encode(tokenizer, document.text) for document in read_corpus().held_out)
    prompts = [text[:PROMPT] for text in texts if len(text) >= 4 * PROMPT][:PROMPTS]
    found = {"command": COMMAND.format(tokens=trained["tokens"], rounds=options.rounds), "machine": bench.machine(),
             "what": f"nano in FP32; training {bench.BATCH} x {bench.LENGTH} tokens a step; greedy decoding of {NEW} "
                     f"tokens behind each of {PROMPTS} held-out prompts of {PROMPT}; medians of "
                     f"{options.rounds} interleaved rounds",
             "draft_cost": round(cost.draft_cost(model.config), 3), "training": training(options.rounds),
             "decoding": decoding(model.eval(), prompts, options.rounds)}
    found["claims"] = [{"id": name, "claim": claim, "holds": bool(holds(found))}
                       for name, (claim, holds) in CLAIMS.items()]
    OUT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
