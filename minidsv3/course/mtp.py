"""Chapter 03: one token further, trained as a second lesson and used as a draft.

Modules and loss: report section 2.2, equations 21 to 25. Speculative decoding: sections 2.2 and 5.4.3.
"""

import random

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import cost
from ..attention import make_context
from ..generate import generate
from ..model import Transformer
from ..mtp import prediction_loss
from .capstone import CAPSTONE
from .exercise import Exercise, Mutants
from .predict import Option, Question
from .toys import Machine, table_model, uneven_model


def seeded(source: random.Random) -> torch.Generator:
    return torch.Generator().manual_seed(source.getrandbits(32))


# ---- 3.1 ------------------------------------------------------------------------------------------------------------


def align_reference(hidden: Tensor, tokens: Tensor, depth: int) -> tuple[Tensor, Tensor, Tensor]:
    """What `Transformer.loss` hands to module and loss; test_course_mtp.py listens to it."""
    length = tokens.shape[1] - 1
    return hidden[:, :length - depth], tokens[:, depth:length], tokens[:, depth + 1:]


def align_solution(hidden, tokens, depth):
    predictions = tokens.shape[1] - 1 - depth
    positions = torch.arange(predictions)
    return hidden[:, positions], tokens[:, positions + depth], tokens[:, positions + depth + 1]


def align_near_target(hidden, tokens, depth):
    hidden, ahead, _ = align_solution(hidden, tokens, depth)
    return hidden, ahead, ahead


def align_shift_by_two(hidden, tokens, depth):
    predictions = tokens.shape[1] - 2 - depth
    return hidden[:, :predictions], tokens[:, depth + 1:-1], tokens[:, depth + 2:]


def align_rolled(hidden, tokens, depth):
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    width = hidden.shape[1]
    return hidden, inputs.roll(-depth, 1)[:, :width], targets.roll(-depth, 1)[:, :width]


def align_own_token(hidden, tokens, depth):
    hidden, ahead, targets = align_solution(hidden, tokens, depth)
    return hidden, tokens[:, :ahead.shape[1]], targets


def align_wrong_end(hidden, tokens, depth):
    _, ahead, targets = align_solution(hidden, tokens, depth)
    return hidden[:, -ahead.shape[1]:], ahead, targets


def rows_of_tokens(source: random.Random) -> dict[str, tuple[Tensor, Tensor, int]]:
    cases = {}
    for depth in (1, 2, 3):
        batch, length, generator = source.randint(2, 3), source.randint(8, 12), seeded(source)
        hidden = torch.randn(batch, length - depth + 1, 2, dtype=torch.float64, generator=generator)
        tokens = torch.randint(1000, (batch, length + 1), generator=generator)
        cases[f"depth {depth} and T = {length}"] = (hidden, tokens, depth)
    return cases


ALIGN = Exercise(
    id="3.1", title="Who meets whom", stars=1, minutes=15,
    why="a shift by one in the wrong place trains without an error, and its loss looks good",
    statement="Module $k$ gets $h_i^{k-1}$, joins it with the embedding of $t_{i+k}$ and predicts $t_{i+k+1}$. Return "
              "three tensors that lie position by position over each other: the rows of `hidden` that are used, the "
              "tokens they are joined with, and the tokens they must predict. `tokens` holds $T$ inputs and one more, "
              "the last target; `hidden` comes from depth $k-1$ and has $T-k+1$ positions.",
    stub="""def align(hidden, tokens, depth):
    \"\"\"hidden [B, T-k+1, d], tokens [B, T+1], depth k >= 1 -> hidden [B, T-k, d], joined and targets [B, T-k].\"\"\"
    raise NotImplementedError
""",
    hints=("Write a row of eight tokens on paper, put your finger on position 2 and depth 2: which token is joined, "
           "which is the target?",
           "`T = tokens.shape[1] - 1`. There are T - k positions, all from the left end: `hidden[:, :T - k]`. The "
           "joined tokens start at k, the targets at k + 1."),
    reference=align_reference, solution=align_solution, cases=rows_of_tokens,
    wrong={
        "the target is the token just given": (align_near_target, "Target and joined token are the same here, so the "
                                               "module only has to copy its input: the shift is k for k + 1."),
        "shift by two": (align_shift_by_two, "This joins h_i with the token k + 1 further and asks for the one after: "
                         "one step too far. Between h_i and its target lie k tokens, and the module sees all of them."),
        "rolled": (align_rolled, "`roll` brings the first tokens of the row back as the targets of its last positions. "
                   "Positions without a target must be cut, not filled."),
        "the token's own embedding": (align_own_token, "This joins h_i with t_i, which h_i has read already. It needs "
                                      "the token that h_i has not seen: t_(i+k)."),
        "cut at the wrong end": (align_wrong_end, "The hidden states lost their first rows, not their last: h_i now "
                                 "meets tokens that it should not know, one position off."),
    })


# ---- 3.2 ------------------------------------------------------------------------------------------------------------


def loss_reference(main: Tensor, logits: list[Tensor], tokens: Tensor, weight: float) -> Tensor:
    """eq. 25 with the package's eq. 24, whose head is the identity here."""
    head = torch.eye(logits[0].shape[-1], dtype=torch.float64)
    losses = [prediction_loss(each, head, tokens, depth) for depth, each in enumerate(logits, start=1)]
    return main + weight * sum(losses) / len(losses)


def loss_of_depth(logits, tokens, depth):
    """The summed cross-entropy of a depth, and its number of terms."""
    targets = tokens[:, depth + 1:]
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"), targets.numel()


def loss_solution(main, logits, tokens, weight):
    positions = tokens[:, 1:].numel()
    losses = [loss_of_depth(each, tokens, k)[0] / positions for k, each in enumerate(logits, start=1)]
    return main + weight * sum(losses) / len(losses)


def loss_mean_of_terms(main, logits, tokens, weight):
    pairs = [loss_of_depth(each, tokens, k) for k, each in enumerate(logits, start=1)]
    return main + weight * sum(total / terms for total, terms in pairs) / len(pairs)


def loss_summed_over_depths(main, logits, tokens, weight):
    return main + len(logits) * (loss_solution(main, logits, tokens, weight) - main)


def loss_weight_on_main(main, logits, tokens, weight):
    return loss_solution(weight * main, logits, tokens, weight)


def loss_near_target(main, logits, tokens, weight):
    """The target of depth k is t_{i+k}."""
    return loss_solution(main, logits, tokens.roll(1, 1), weight)


def loss_without_weight(main, logits, tokens, weight):
    return loss_solution(main, logits, tokens, 1.0)


def several_depths(source: random.Random) -> dict[str, tuple]:
    cases = {}
    for depths in (1, 3):
        batch, length, words, generator = 2, source.randint(6, 9), source.randint(5, 9), seeded(source)
        logits = [torch.randn(batch, length - k, words, dtype=torch.float64, generator=generator)
                  for k in range(1, depths + 1)]
        tokens = torch.randint(words, (batch, length + 1), generator=generator)
        main = torch.tensor(source.uniform(2, 3), dtype=torch.float64)
        cases[f"D = {depths} and T = {length}"] = (main, logits, tokens, source.choice([0.1, 0.3]))
    return cases


LOSS = Exercise(
    id="3.2", title="The loss of equations 24 and 25", stars=2, minutes=15,
    why="libraries divide by different numbers here; two runs with the same lambda then train differently",
    statement="Return the whole training loss: `main`, plus λ times the **mean** over depths of $L^k$. $L^k$ is the "
              "summed cross-entropy of the $T-k$ predictions of depth $k$, divided by $T$ (and by the batch).",
    stub="""def total_loss(main, logits, tokens, weight):
    \"\"\"main: a scalar. logits[k - 1] [B, T - k, V] for depths k = 1..D. tokens [B, T + 1]. weight: lambda.\"\"\"
    raise NotImplementedError
""",
    hints=("How many terms has depth 3, and by how many is it divided?",
           "For each k: `F.cross_entropy(logits.flatten(0, 1), tokens[:, k + 1:].flatten(), reduction='sum')`, divided "
           "by `tokens[:, 1:].numel()`. Then the mean of the depths, times lambda, plus main."),
    reference=loss_reference, solution=loss_solution, cases=several_depths, tol=1e-9,
    wrong={
        "mean over T - k": (loss_mean_of_terms, "This is the mean over the predictions that exist. Equation 24 divides "
                            "by T, also where only T - k terms are left: short sequences weigh a little less."),
        "sum over depths": (loss_summed_over_depths, "Equation 25 takes the mean of the depths, lambda / D; this is "
                            "their sum, so that D modules count D times."),
        "lambda on the main loss": (loss_weight_on_main, "Lambda weighs the MTP loss alone; the next token counts in "
                                    "full."),
        "target one too near": (loss_near_target, "The targets of depth k stand one too early: t_(i+k) is the token "
                                "that the module was given. It must predict t_(i+k+1)."),
        "no lambda": (loss_without_weight, "Lambda is missing: the MTP loss counts as much as the main one."),
    })


# ---- 3.3 ------------------------------------------------------------------------------------------------------------


def joints_reference(model: Transformer, hidden: Tensor, tokens: Tensor) -> Tensor:
    module = model.mtp_modules[0]
    return module.logits(module(hidden, tokens, make_context(model.config, tokens.shape, hidden.dtype, hidden.device)))


def joined(pair, model, norm):
    """Through M_k, the silent layer, a norm and the head."""
    return model.lm_head(norm(model.mtp_modules[0].eh_proj(torch.cat(pair, -1))))


def normed_pair(model, hidden, tokens):
    """Embedding, then hidden state, each behind its own norm."""
    module = model.mtp_modules[0]
    return [module.enorm(model.model.embed_tokens(tokens)), module.hnorm(hidden)]


def joints_solution(model, hidden, tokens):
    pair = normed_pair(model, hidden, tokens)
    if model.config.mtp_order == "hidden_first":
        pair.reverse()
    return joined(pair, model, model.mtp_modules[0].shared_head.norm)


def joints_swapped(model, hidden, tokens):
    pair = normed_pair(model, hidden, tokens)
    if model.config.mtp_order == "embedding_first":
        pair.reverse()
    return joined(pair, model, model.mtp_modules[0].shared_head.norm)


def joints_one_order(model, hidden, tokens):
    return joined(normed_pair(model, hidden, tokens), model, model.mtp_modules[0].shared_head.norm)


def joints_one_norm(model, hidden, tokens):
    module = model.mtp_modules[0]
    pair = [module.hnorm(model.model.embed_tokens(tokens)), module.hnorm(hidden)]
    return joined(_ordered(pair, model), model, module.shared_head.norm)


def joints_without_norms(model, hidden, tokens):
    pair = [model.model.embed_tokens(tokens), hidden]
    return joined(_ordered(pair, model), model, model.mtp_modules[0].shared_head.norm)


def joints_main_norm(model, hidden, tokens):
    return joined(_ordered(normed_pair(model, hidden, tokens), model), model, model.model.norm)


def _ordered(pair, model):
    return pair[::-1] if model.config.mtp_order == "hidden_first" else pair


@torch.no_grad()
def silent_layers(source: random.Random) -> dict[str, tuple]:
    """One model in each order of the halves; the module's own layer adds nothing."""
    cases = {}
    for order in ("embedding_first", "hidden_first"):
        model = uneven_model(source.getrandbits(32), mtp_order=order)
        for name, parameter in model.mtp_modules[0].named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
        hidden = torch.randn(2, 5, model.config.hidden_size, dtype=torch.float64, generator=seeded(source))
        tokens = torch.randint(model.config.vocab_size, (2, 5), generator=seeded(source))
        cases[f'mtp_order="{order}"'] = (model, hidden, tokens)
    return cases


JOINTS = Exercise(
    id="3.3", title="The module's joints", stars=2, minutes=20,
    why="with the halves swapped every shape agrees and every number is wrong; engines have shipped it",
    statement="Return the logits of the first MTP module for `hidden` (what the main model hands over) and the "
              "`tokens` to join. Use the module's parts: `model.mtp_modules[0]` has `enorm`, `hnorm`, `eh_proj` and "
              "`shared_head.norm`; embedding and head are the main model's. `model.config.mtp_order` says which half "
              "`eh_proj` reads first: `\"embedding_first\"` as in the released weights, `\"hidden_first\"` as in "
              "equation 21. In these cases the module's own layer is silent (it adds 0): leave it out.",
    stub="""def draft_logits(model, hidden, tokens):
    \"\"\"hidden [B, T, d], tokens [B, T], already aligned -> logits [B, T, vocabulary].\"\"\"
    raise NotImplementedError
""",
    hints=("Three norms belong to the module. Which one reads what?",
           "`enorm` the embedding, `hnorm` the hidden state; concatenate in the config's order; `eh_proj`; "
           "`shared_head.norm`; `model.lm_head`."),
    reference=joints_reference, solution=joints_solution, cases=silent_layers, tol=1e-9,
    wrong={
        "halves swapped": (joints_swapped, "The halves are swapped. Both are d numbers wide, so every shape agrees; "
                           "each half of eh_proj now multiplies the wrong vector."),
        "one order for all": (joints_one_order, "This always puts the embedding first. That is right for the released "
                              "weights; a model with mtp_order=\"hidden_first\" reads [h ; embedding], as eq. 21."),
        "one norm for both": (joints_one_norm, "One norm serves both halves here. enorm and hnorm have gains of their "
                              "own, and the two vectors have unlike sizes in every channel."),
        "no norms": (joints_without_norms, "The halves enter without their norms: an embedding and a hidden state "
                     "differ in size, and the larger one would drown the other."),
        "main model's final norm": (joints_main_norm, "Before the head stands the main model's final norm here. The "
                                    "head is shared, the norm is not: the module has shared_head.norm."),
    })


# ---- 3.4 ------------------------------------------------------------------------------------------------------------


def speculate_reference(machine: Machine, prompt: list[int], new: int, eos: int | None) -> tuple[list[int], int]:
    written = generate(machine.model, [prompt], new, speculative=True, eos=eos)
    return written.tokens[0].tolist(), written.passes


def speculate_solution(machine, prompt, new, eos):
    text = list(prompt)
    fresh = machine.read(prompt)[-1:]
    guess = machine.draft(prompt[1:] + fresh)
    while True:
        for token in fresh:
            text.append(token)
            if token == eos or len(text) == len(prompt) + new:
                return text, machine.passes
        first, second = machine.read([text[-1], guess])
        fresh = [first, second] if first == guess else [first]
        machine.keep(len(text) + len(fresh) - 1)
        guess = machine.draft(fresh)


def speculate_with(step, machine, prompt, new, eos):
    """The solution's loop; `step(machine, text, guess)` reads, cuts and drafts, and returns new tokens and a guess."""
    text = list(prompt)
    fresh = machine.read(prompt)[-1:]
    guess = machine.draft(prompt[1:] + fresh)
    while True:
        for token in fresh:
            text.append(token)
            if token == eos or len(text) == len(prompt) + new:
                return text, machine.passes
        fresh, guess = step(machine, text, guess)


def speculate_unverified(machine, prompt, new, eos):
    def step(machine, text, guess):
        _, second = machine.read([text[-1], guess])
        return [guess, second], machine.draft([guess, second])
    return speculate_with(step, machine, prompt, new, eos)


def speculate_without_bonus(machine, prompt, new, eos):
    def step(machine, text, guess):
        first, _ = machine.read([text[-1], guess])
        machine.keep(len(text))
        return [first], machine.draft([first])
    return speculate_with(step, machine, prompt, new, eos)


def speculate_without_cut(machine, prompt, new, eos):
    def step(machine, text, guess):
        first, second = machine.read([text[-1], guess])
        fresh = [first, second] if first == guess else [first]
        return fresh, machine.draft(fresh)
    return speculate_with(step, machine, prompt, new, eos)


def speculate_cut_short(machine, prompt, new, eos):
    def step(machine, text, guess):
        first, second = machine.read([text[-1], guess])
        fresh = [first, second] if first == guess else [first]
        machine.keep(len(text))
        return fresh, machine.draft(fresh)
    return speculate_with(step, machine, prompt, new, eos)


def speculate_from_refused(machine, prompt, new, eos):
    def step(machine, text, guess):
        first, second = machine.read([text[-1], guess])
        fresh = [first, second] if first == guess else [first]
        machine.keep(len(text) + len(fresh) - 1)
        return fresh, machine.draft([guess, second])
    return speculate_with(step, machine, prompt, new, eos)


def speculate_past_the_end(machine, prompt, new, eos):
    text = list(prompt)
    fresh = machine.read(prompt)[-1:]
    guess = machine.draft(prompt[1:] + fresh)
    text += fresh
    while text[-1] != eos and len(text) < len(prompt) + new:
        first, second = machine.read([text[-1], guess])
        fresh = [first, second] if first == guess else [first]
        machine.keep(len(text) + len(fresh) - 1)
        guess = machine.draft(fresh)
        text += fresh
    return text, machine.passes


NEW = 16


def machines(source: random.Random) -> dict[str, tuple]:
    """Drafts that are all right, all wrong and right for two words in three, and ends at known places.

    Each word hangs on the one three positions back, so that a cache out of step changes the text. The text goes round
    in a cycle of 8 words; wrong drafts come from another cycle, so that whoever goes on from one never finds back.
    """
    words = source.sample(range(14), 14)
    text, junk = words[:8], words[8:]
    after = {word: cycle[(i + 3) % len(cycle)] for cycle in (text, junk) for i, word in enumerate(cycle)}
    right = {word: cycle[(i + 1) % len(cycle)] for cycle in (text, junk) for i, word in enumerate(cycle)}
    wrong = right | {word: source.choice(junk) for word in text}
    mixed = right | {word: source.choice(junk) for word in text[::3]}

    def case(drafts: dict[int, int], known: int, eos: int | None = None) -> tuple:
        model = table_model(*([table[word] for word in range(14)] for table in (after, drafts)), back=3)
        return Machine(model, capacity=known + 2 * NEW + 4), text[:known], NEW, eos

    known = source.randint(3, 4)
    return {"drafts that are always right": case(right, known), "drafts that are always wrong": case(wrong, known),
            **{f"row {row} of a batch of three": case(mixed, known + row) for row in range(3)},
            "an end token that is a draft": case(right, known, eos=text[(known + 3) % 8]),
            "an end token behind a draft": case(right, known, eos=text[(known + 4) % 8])}


SPECULATE = Exercise(
    id="3.4", title="Draft and verify", stars=3, minutes=40,
    why="the text must not change by a token; three caches' worth of bookkeeping stand between you and that",
    statement="Continue `prompt` greedily by `new` tokens, or up to and with the first `eos`, and save passes by "
              "drafting. The `machine` has a cache and three methods:\n"
              "- `machine.read(tokens)`: one pass of the main model over new tokens. Returns, for each of them, the "
              "token it writes behind it. All of them are cached then.\n"
              "- `machine.draft(following)`: the MTP module joins the tokens read last with the tokens that follow "
              "each of them, and guesses one further: the token behind `following[-1]`.\n"
              "- `machine.keep(n)`: cuts the cache to its first n tokens.\n\n"
              "Return the text (prompt included) and `machine.passes`. Both must be those of "
              "`generate(..., speculative=True)`. A batch does this for each row, with a length of its own.",
    stub="""def speculate(machine, prompt, new, eos):
    \"\"\"prompt: a list of token ids. Returns (text, machine.passes).\"\"\"
    raise NotImplementedError
""",
    hints=("A pass reads two tokens: the last of the text, and its draft. What does the first answer say about the "
           "second?",
           "Read the prompt; its last answer is the first new token; draft from `prompt[1:] + [that]`. Then repeat: "
           "`first, second = machine.read([text[-1], guess])`. If `first == guess` both are new, else `first` alone. "
           "Keep one token fewer than the text will have, and draft from the new tokens only. Mind the end: append "
           "token by token."),
    reference=speculate_reference, solution=speculate_solution, cases=machines,
    wrong={
        "unverified": (speculate_unverified, "The draft goes into the text without being verified: where the main "
                       "model would have written another token, your text is the module's."),
        "bonus token lost": (speculate_without_bonus, "The text is right, but every pass gives one token: behind an "
                             "accepted draft the same pass has already answered with one more."),
        "cache not cut back": (speculate_without_cut, "After a refusal the refused draft stays in the cache, and the "
                               "model goes on as if it had been written. Call `keep`."),
        "accepted draft forgotten": (speculate_cut_short, "After an accepted draft the cache is cut as if it had been "
                                     "refused: its entry is lost and the next tokens stand one position too early."),
        "module fed with a refused position": (speculate_from_refused, "After a refusal the module is fed with the "
                                               "refused draft and what came behind it. The text survives, for the main "
                                               "model verifies; the drafts get worse. Draft from the new tokens only."),
        "past the end": (speculate_past_the_end, "A pass can give two tokens, and the first may be the end, or the "
                         "last that was asked for: the second must not be appended then."),
    })


# ---- 3.5 ------------------------------------------------------------------------------------------------------------


def expected_solution(acceptance, depth):
    if acceptance == 1:
        return depth + 1
    return (1 - acceptance ** (depth + 1)) / (1 - acceptance)


def expected_acceptance(acceptance, depth):
    return acceptance + 0 * depth


def expected_without_end(acceptance, depth):
    return 1 / (1 - acceptance) if acceptance < 1 else depth + 1


def expected_independent(acceptance, depth):
    return 1 + depth * acceptance


def expected_without_own_token(acceptance, depth):
    return expected_solution(acceptance, depth) - 1


def expected_all_or_nothing(acceptance, depth):
    return 1 + depth * acceptance ** depth


def acceptances(source: random.Random) -> dict[str, tuple[float, int]]:
    cases = {f"p = {p:.2f} and D = {depth}": (p, depth) for depth in (1, 2, 4)
             for p in (round(source.uniform(0.1, 0.9), 2),)}
    return cases | {"p = 1 and D = 3": (1.0, 3)}


EXPECTED = Exercise(
    id="3.5", title="Tokens a pass", stars=1, minutes=10,
    why="it is the numerator of every claimed speed-up",
    statement="A pass verifies D drafts. Each is accepted with probability `p`, if all before it were. Return the "
              "expected number of tokens that the pass adds to the text: accepted drafts, and the one token that the "
              "main model always writes itself.",
    stub="""def expected_tokens(p, depth):
    \"\"\"p from 0 to 1, depth D >= 1.\"\"\"
    raise NotImplementedError
""",
    hints=("With D = 1 it is 1 + p. What must happen for a third token?",
           "The j-th draft counts with probability p to the j. Sum 1 + p + ... + p^D; as a fraction, mind p = 1."),
    reference=cost.tokens_per_pass, solution=expected_solution, cases=acceptances, tol=1e-9,
    wrong={
        "p": (expected_acceptance, "This is the chance of the first draft. The main model writes one token itself, in "
              "every pass, and later drafts count too."),
        "1 / (1 - p)": (expected_without_end, "This is the sum without an end: a module that drafts for ever. With D "
                        "drafts a pass gives at most D + 1 tokens."),
        "1 + D p": (expected_independent, "This counts drafts that stand behind a refused one. The first refusal ends "
                    "the pass: the j-th draft counts with probability p to the j."),
        "own token forgotten": (expected_without_own_token, "The token that the main model writes itself is missing: "
                                "even with p = 0 a pass adds one."),
        "all or nothing": (expected_all_or_nothing, "This keeps drafts only if all of them are accepted. Those before "
                           "the first refusal stay."),
    })


# ---- 3.7 ------------------------------------------------------------------------------------------------------------


def depth_loss(logits: Tensor, tokens: Tensor, depth: int, documents: Tensor) -> Tensor:
    return prediction_loss(logits, torch.eye(logits.shape[-1], dtype=torch.float64), tokens, depth, documents)


def _terms(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each prediction, [B, T - k]."""
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")


def depth_loss_of_terms(logits, tokens, depth, documents):
    length = tokens.shape[1] - 1
    return depth_loss(logits, tokens, depth, documents) * length / (length - depth)


def depth_loss_of_kept(logits, tokens, depth, documents):
    kept = documents[:, :logits.shape[1]] == documents[:, depth + 1:]
    return (_terms(logits, tokens[:, depth + 1:]) * kept).sum() / kept.sum().clamp(min=1)


def depth_loss_across_documents(logits, tokens, depth, documents):
    return depth_loss(logits, tokens, depth, torch.zeros_like(documents))


def depth_loss_by_joined_token(logits, tokens, depth, documents):
    kept = documents[:, :logits.shape[1]] == documents[:, depth:-1]
    return (_terms(logits, tokens[:, depth + 1:]) * kept).mean() * logits.shape[1] / (tokens.shape[1] - 1)


def depth_loss_near(logits, tokens, depth, documents):
    return depth_loss(logits, torch.cat((tokens[:, :1], tokens[:, :-1]), 1), depth, documents)


def depth_loss_summed_over_rows(logits, tokens, depth, documents):
    return depth_loss(logits, tokens, depth, documents) * len(tokens)


def packed_rows(source: random.Random) -> dict[str, tuple]:
    """Two rows of packed documents, at a depth where the joined token and the target can lie in different ones."""
    length, words, depth = 9, 5, 2
    logits = torch.randn(2, length - depth, words, dtype=torch.float64, generator=seeded(source))
    tokens = torch.randint(words, (2, length + 1), generator=seeded(source))
    documents = torch.tensor([[0] * 4 + [1] * 6, [2] * 7 + [3] * 3])
    return {"two rows of two documents": (logits, tokens, depth, documents)}


def depth_loss_test(depth_loss):
    torch.manual_seed(1)
    B, T, k, V = 3, 8, 2, 6
    logits, tokens = torch.randn(B, T - k, V, dtype=torch.float64), torch.randint(V, (B, T + 1))
    documents = torch.tensor([[0] * 9, [1] * 4 + [2] * 5, [3] * 7 + [4] * 2])
    want = 0.0
    for row in range(B):
        for i in range(T - k):
            if documents[row, i] == documents[row, i + k + 1]:
                want -= logits[row, i].log_softmax(-1)[tokens[row, i + k + 1]].item()
    assert abs(depth_loss(logits, tokens, k, documents).item() - want / (B * T)) < 1e-9


MUTANTS = Mutants(
    id="3.7", title="Kill the mutants: the loss of one depth", stars=2, minutes=20,
    why="each of these six trains, and its curve falls; only a test tells them from the right one",
    statement="Write a test for `depth_loss(logits, tokens, depth, documents)`, equation 24 for packed text: the "
              "summed cross-entropy of the T - k predictions, divided by B T. Predictions drop out of the sum where "
              "the target lies in another document than token i; the divisor stays. Your test is a function that gets "
              "an implementation, calls it and asserts. It must spare the package's and should kill six wrong ones.",
    stub="""def depth_loss_test(depth_loss):
    \"\"\"logits [B, T - k, V], tokens [B, T + 1], depth k, documents [B, T + 1] (numbers of documents).\"\"\"
    raise NotImplementedError
""",
    hints=("Which inputs make wrong ones look right? One row, one document, depth 1, a long sequence.",
           "Three rows, depth 2, float64, T below 10, a document that ends inside a row. Compute what is right in two "
           "loops."),
    reference=depth_loss, solution=depth_loss_test, cases=packed_rows,
    wrong={
        "divides by T - k": (depth_loss_of_terms, "It divides by the number of predictions, T - k, not by T: a long "
                             "sequence with a wide tolerance cannot show that."),
        "divides by what is kept": (depth_loss_of_kept, "It divides by the predictions that are left after the "
                                    "document ends are cut out: only a row with two documents shows that."),
        "crosses documents": (depth_loss_across_documents, "It ignores documents: put the end of one inside a row."),
        "looks at the joined token": (depth_loss_by_joined_token, "It asks whether t_(i+k) lies in the same document, "
                                      "not the target t_(i+k+1): one prediction a boundary differs."),
        "target one too near": (depth_loss_near, "Its target is t_(i+k), the token that the module was given: compare "
                                "with values, not with `loss > 0`."),
        "sum over rows": (depth_loss_summed_over_rows, "It sums over the batch: one row cannot show that."),
    })


EXERCISES = (ALIGN, LOSS, JOINTS, SPECULATE, EXPECTED, CAPSTONE, MUTANTS)


# ---- questions ------------------------------------------------------------------------------------------------------


QUESTIONS = {
    "03.chain": Question(
        "The module predicts t_(i+2). What does it know of t_(i+1)?",
        (Option("nothing: both tokens are guessed from h_i at once",
                "that is parallel prediction (Gloeckle et al.). Here the embedding of t_(i+1) enters; with it zeroed, "
                "most drafts are lost."),
         Option("the token itself: the real one in training, the written one in use",
                "it is a chain: each depth sees one token more and predicts one token further."),
         Option("the main model's probabilities for it",
                "no distribution enters, only the embedding of one token.")), 1),
    "03.target": Question(
        "At depth 1, position i: which token is joined with h_i, and which is the target?",
        (Option("t_(i+1) is joined, t_(i+2) is the target", "one token that h_i has not read, and the one behind it."),
         Option("t_i is joined, t_(i+1) is the target", "h_i has read t_i already, and t_(i+1) is the main model's "
                                                        "own task."),
         Option("t_(i+1) is joined, t_(i+1) is the target",
                "then the module copies its input, and its loss falls below the entropy of the text.")), 0),
    "03.text": Question(
        "You switch on speculative decoding at temperature 0. What happens to the text?",
        (Option("it gets a little worse, since a small module wrote part of it",
                "a draft stays only if the main model would have written the same token."),
         Option("it becomes a mixture of both models", "that would be without verification."),
         Option("it stays the same, token for token, up to rounding",
                "equal by test in float64; in low precision a pass over two tokens rounds unlike a pass over one, so a "
                "near-tie may fall the other way.")), 2),
    "03.better": Question(
        "Does training with MTP make the main model better?",
        (Option("yes, always", "at small scale and equal FLOPs the same run without MTP, but longer, was better here."),
         Option("no: its gradient goes into the module", "the gradient runs through h into every layer of the main "
                                                         "model, embedding and head included."),
         Option("ask at equal steps or at equal FLOPs: the answers may differ",
                "MTP costs a third more of each step on nano, and 4 % at full size.")), 2),
    "03.acceptance": Question(
        "A drafter reaches 70 % acceptance on greedy text. What have you learnt about it?",
        (Option("little, until a bigram table and a look-up in the prompt have been tried on the same text",
                "greedy text of small models repeats itself, and anything drafts repetition well."),
         Option("that the model is good", "easy text is easy to draft, whoever writes it."),
         Option("that decoding is 1.7 times as fast", "the drafts cost time too: (1 + p) / (1 + c).")), 0),
    "03.speed": Question(
        "85 % of the drafts are accepted. How much faster is decoding?",
        (Option("1.85 times on every model", "1.85 is the tokens a pass; a pass with a draft takes longer."),
         Option("6.7 times: 1 / (1 - 0.85)", "that is the sum without an end; one draft gives at most two tokens."),
         Option("(1 + 0.85) / (1 + c): 1.77 at full size, 1.36 on nano",
                "c is the module's share of a pass: 0.044 there, 0.357 here.")), 2),
}
