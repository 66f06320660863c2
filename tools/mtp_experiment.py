"""Multi-token prediction at nano's size: without it, with it, and without it for as many FLOPs; pairs of equal seeds.

    python tools/mtp_experiment.py                        hours on one core; see the options for a GPU
    python tools/mtp_experiment.py --tokens 16384 --seeds 0 1 --held-out-tokens 4096

Every claim below was written before the runs, with its threshold. A pair is two variants with the same seed: the same
tokens in the same order, `plain_equal_flops` going on further. Drafts are judged beside two trivial drafters: a table
of the commonest next token, counted on the run's training tokens, and prompt lookup, which repeats what followed the
longest earlier match of the text's end. What is measured is measured in FP32 on the CPU, on documents that no run was
trained on.
"""

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from nano_runs import (KINDS, RESULTS, Claim, Objective, Options, command, held_out_loss, judge, machine, main,
                       mean, new_model, read_options, rounded, run_all, smoke, training, worse)
from torch import Tensor

from minidsv3 import ModelConfig, Transformer, cost, generate
from minidsv3.attention import make_context
from minidsv3.optim import Recipe

VARIANTS = {"plain": "MTP off", "mtp": "one module, lambda 0.3, then 0.1",
            "plain_equal_flops": "MTP off, more steps, as many training FLOPs as mtp"}
PROMPT, NEW = 32, 64           # tokens; prompts are beginnings of held-out rows

# ---- claims ---------------------------------------------------------------------------------------------------------


def accepted_share(runs: dict[str, dict], drafter: str, kinds: tuple[str, ...] = KINDS) -> float:
    return mean([runs["mtp"]["acceptance"][kind][drafter] for kind in kinds])


def agreement_share(runs: dict[str, dict], drafter: str) -> float:
    return mean([runs["mtp"]["agreement"][kind][drafter] for kind in KINDS])


CLAIMS = (
    Claim(id="better_at_equal_steps",
          claim="At equal steps the main head's held-out loss with MTP is at least 0.02 nats lower.",
          value=lambda runs: worse(runs, "plain", than="mtp"), least=0.02),
    Claim(id="better_at_equal_flops",
          claim="At equal training FLOPs the main head's held-out loss with MTP is at least 0.02 nats lower.",
          value=lambda runs: worse(runs, "plain_equal_flops", than="mtp"), least=0.02),
    Claim(id="acceptance_of_the_report",
          claim="At least 85 % of the drafts are accepted in greedy text, mean of the kinds (report: 85 to 90 %).",
          value=lambda runs: accepted_share(runs, "mtp"), least=0.85, directed=False),
    Claim(id="beats_bigram",
          claim="Of MTP's drafts at least 10 points more are accepted than of the bigram table's, mean of the kinds.",
          value=lambda runs: accepted_share(runs, "mtp") - accepted_share(runs, "bigram"), least=0.1),
    Claim(id="beats_lookup",
          claim="Of MTP's drafts at least 10 points more are accepted than of prompt lookup's, mean of the kinds.",
          value=lambda runs: accepted_share(runs, "mtp") - accepted_share(runs, "lookup"), least=0.1),
    Claim(id="beats_bigram_along_text",
          claim="Along held-out text MTP agrees with the main head at least 10 points more often than the bigram "
                "table.",
          value=lambda runs: agreement_share(runs, "mtp") - agreement_share(runs, "bigram"), least=0.1),
    Claim(id="a_chain",
          claim="It is a chain: without the token's embedding MTP agrees at least 30 points less with the main head.",
          value=lambda runs: agreement_share(runs, "mtp") - agreement_share(runs, "mtp_without_token"), least=0.3),
)

# ---- drafters -------------------------------------------------------------------------------------------------------
# A drafter's guesses are a tensor like the text: at i the guess for token i + 1 from tokens 0 .. i; -1 is none.


def bigram_table(rows: Tensor, vocab_size: int) -> Tensor:
    """[vocab] the commonest token after each in rows [.., T + 1], the lower id among equals; -1 where none was seen."""
    pairs = rows[..., :-1].long() * vocab_size + rows[..., 1:]
    followed = torch.bincount(pairs.flatten(), minlength=vocab_size**2).view(vocab_size, vocab_size)
    most, token = followed.max(1)
    return torch.where(most > 0, token, -1)


def lookup_guesses(text: Tensor) -> Tensor:
    """What followed the longest earlier match of the text's end, the latest among equals. text [B, T] -> [B, T]."""
    batch, length = text.shape
    guesses = torch.full_like(text, -1)
    match = torch.zeros(batch, length, dtype=torch.int64)      # at j: how many tokens before and at j end the text too
    for i in range(1, length):
        longer = torch.cat((torch.zeros(batch, 1, dtype=torch.int64), match[:, :-1]), 1) + 1
        match = torch.where(text == text[:, i:i + 1], longer, 0)
        best = (match[:, :i] * length + torch.arange(i)).argmax(1, keepdim=True)
        found = match.gather(1, best) > 0
        guesses[:, i:i + 1] = torch.where(found, text.gather(1, best + 1), -1)
    return guesses


@contextmanager
def without_token(model: Transformer) -> Iterator[None]:
    """Zeros the token's embedding, and nothing else, where the MTP module takes it in."""
    hook = model.mtp_modules[0].enorm.register_forward_hook(lambda module, inputs, out: torch.zeros_like(out))
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def main_and_mtp_guesses(model: Transformer, text: Tensor) -> tuple[Tensor, Tensor | None]:
    """Both heads' best next tokens along text [B, T]; MTP's at i comes from h_{i-1} and token i, so its first is -1."""
    hidden = model.hidden(text)
    main = model.lm_head(model.model.norm(hidden)).argmax(-1)
    if not model.mtp_modules:
        return main, None
    module, following = model.mtp_modules[0], text[:, 1:]
    context = make_context(model.config, following.shape, hidden.dtype, hidden.device)
    ahead = module(model.carried(hidden)[:, :-1], following, context)
    return main, torch.cat((torch.full_like(text[:, :1], -1), module.logits(ahead).argmax(-1)), 1)


def accepted_drafts(text: Tensor, guesses: Tensor, start: int) -> tuple[int, int]:
    """(drafted, accepted) when `guesses` draft greedy text [B, T] behind the prompt of `start` tokens.

    As in `minidsv3.generate`: the prompt's pass gives one token; every later pass checks one draft and gives one token
    more, two if the draft was right, so that the next draft stands one further on.
    """
    drafted = accepted = 0
    right = (guesses[:, :-1] == text[:, 1:]).tolist()           # at i: token i + 1 was guessed
    for row in right:
        position = start                                        # the newest known token
        while position < len(row):
            drafted += 1
            accepted += row[position]
            position += 1 + row[position]
    return drafted, accepted

# ---- what is measured -----------------------------------------------------------------------------------------------


def agreement(model: Transformer, rows: Tensor, bigram: Tensor) -> dict[str, float | None]:
    """How often each drafter's guess is the main head's, along held-out text."""
    matches: dict[str, list[Tensor]] = {}
    for text in rows[:, :-1].split(8):
        main, mtp = main_and_mtp_guesses(model, text)
        guesses = {"bigram": bigram[text], "lookup": lookup_guesses(text)}
        if mtp is not None:
            with without_token(model):
                guesses |= {"mtp": mtp, "mtp_without_token": main_and_mtp_guesses(model, text)[1]}
        for drafter, guess in guesses.items():
            matches.setdefault(drafter, []).append((guess == main)[:, 1:])
    shares = {drafter: round(torch.cat(hits).double().mean().item(), 4) for drafter, hits in matches.items()}
    return {drafter: shares.get(drafter) for drafter in ("mtp", "bigram", "lookup", "mtp_without_token")}


def acceptance(model: Transformer, rows: Tensor, bigram: Tensor) -> tuple[dict[str, float | int | None], float | None]:
    """Each drafter's share of accepted drafts while the model writes behind the rows' beginnings, and MTP's tokens a
    pass, the prompt's pass included. The text is the same for all: the model's greedy text."""
    speculative = len(model.mtp_modules) > 0
    new = min(NEW, model.config.max_position_embeddings - PROMPT)
    written = generate(model, rows[:, :PROMPT], new, speculative=speculative)
    shares: dict[str, float | int | None] = {"mtp": None, "n": len(rows) * new}
    tokens_a_pass = None
    if speculative:
        shares["mtp"] = round(written.accepted / written.drafted, 4)
        tokens_a_pass = round(len(rows) * new / (len(rows) + written.drafted), 4)
    for drafter, guesses in {"bigram": bigram[written.tokens], "lookup": lookup_guesses(written.tokens)}.items():
        drafted, accepted = accepted_drafts(written.tokens, guesses, PROMPT)
        shares[drafter] = round(accepted / drafted, 4)
    return shares, tokens_a_pass


@torch.no_grad()
def mtp_loss(model: Transformer, rows: Tensor) -> float | None:
    """Mean loss of the module's predictions in nats; eq. 24 divides T - 1 of them by T, here they are by T - 1."""
    if not model.mtp_modules:
        return None
    length = rows.shape[1] - 1
    total = sum(model.loss(part, mtp_weight=1.0).mtp.item() * len(part) for part in rows.split(8))
    return rounded(total / len(rows) * length / (length - 1))


def measure(model: Transformer, data: dict, bigram: Tensor) -> dict:
    """What a run's entry says about drafts and kinds. `model` is on the CPU."""
    written = {kind: acceptance(model, rows, bigram) for kind, rows in data["kinds"].items()}
    return {"held_out_by_kind": {kind: held_out_loss(model, rows) for kind, rows in data["kinds"].items()},
            "mtp_held_out": mtp_loss(model, data["held_out"]),
            "acceptance": {kind: shares for kind, (shares, _) in written.items()},
            "agreement": {kind: agreement(model, rows, bigram) for kind, rows in data["kinds"].items()},
            "tokens_per_pass": {kind: tokens for kind, (_, tokens) in written.items()}}


# ---- the experiment -------------------------------------------------------------------------------------------------

def flops_ratio(options: Options) -> float:
    """Training FLOPs of a token with MTP over those without."""
    flops = cost.training_flops(options.model, options.length)
    return flops.total / flops.main


def steps_of(variant: str, options: Options) -> int:
    return round(options.steps * flops_ratio(options)) if variant == "plain_equal_flops" else options.steps


def curve_steps(steps: int) -> list[int]:
    """Numbers of steps done at which the held-out loss is measured."""
    return [steps * part // 5 for part in range(1, 6)]


def objective_of(model: Transformer, recipe: Recipe) -> Objective:
    """The package's own training loss."""
    def objective(tokens: Tensor, documents: Tensor, seen: int) -> tuple[Tensor, Tensor]:
        losses = model.loss(tokens, documents, recipe.mtp_weight(seen), recipe.balance_weight(seen))
        return losses.total, losses.load
    return objective


def run(variant: str, seed: int, options: Options, data: dict) -> dict:
    """One training run and its entry in the result."""
    began, steps = time.perf_counter(), steps_of(variant, options)
    config = options.model if variant == "mtp" else options.model.replace(num_nextn_predict_layers=0)
    model, a_step = new_model(config, seed, options.device), options.sequences * options.length
    recipe = Recipe.preset("nano", steps * a_step)
    if variant != "mtp":
        recipe = replace(recipe, first_mtp_weight=0.0, last_mtp_weight=0.0)
    tokens, documents = data["train"][seed][:steps], data["documents"][seed][:steps]
    curve = []
    for done, _ in training(model, recipe, tokens, documents, objective_of(model, recipe), options.precision):
        if done in curve_steps(steps):
            curve.append([done * a_step, held_out_loss(copy.deepcopy(model).cpu(), data["held_out"])])
    return {"variant": variant, "seed": seed, "tokens": steps * a_step, "held_out": curve[-1][1],
            "curve": curve, **measure(model.cpu(), data, bigram_table(tokens, config.vocab_size)),
            "seconds": round(time.perf_counter() - began, 1)}


def experiment(options: Options) -> dict:
    """All runs; writes and returns the result."""
    config, most = options.model, steps_of("plain_equal_flops", options)
    header = {
        "command": command("mtp_experiment.py", options), "machine": machine(options.device),
        "what": f"{smoke(options)}width {config.hidden_size}, {config.num_hidden_layers} layers, {options.steps} steps "
                f"of {options.sequences} x {options.length} tokens, {most} for plain_equal_flops; the nano recipe "
                f"scaled to each run's tokens, {options.precision}; measured in fp32 on about "
                f"{options.held_out_tokens} held-out tokens; greedy text: {NEW} tokens behind prompts of {PROMPT}",
        "claims": [], "variants": VARIANTS, "seeds": [],
        "steps": {variant: steps_of(variant, options) for variant in VARIANTS},
        "flops_ratio": round(flops_ratio(options), 4)}

    def finish(found: dict) -> dict:
        return found | {"claims": judge(CLAIMS, found["runs"], list(VARIANTS), key="variant"),
                        "seeds": sorted({entry["seed"] for entry in found["runs"]})}

    return run_all(run, list(VARIANTS), options, most, header, finish, key="variant")


if __name__ == "__main__":
    main(experiment, read_options(__doc__, RESULTS / "mtp.json", ModelConfig.preset("nano"), tokens=1_638_400))
