"""Chapter 00: what 671 billion parameters are, what one token pays for, and which loss is worth beating.

Parameters: report section 4.2 and the published config. Hours and dollars: section 1. RMSNorm: section 2.1.
"""

import math
import random
from collections import Counter

import torch
from torch import Tensor

from .. import cost
from ..config import ModelConfig
from ..kernels import rms_norm_reference
from .exercise import Exercise, Mutants
from .predict import Option, Question


def geometries(source: random.Random) -> dict[str, tuple[ModelConfig]]:
    """The published model, nano, and two configurations that nobody has seen before."""
    cases = {"ModelConfig.preset('full')": (ModelConfig.preset("full"),),
             "ModelConfig.preset('nano')": (ModelConfig.preset("nano"),)}
    for _ in range(2):
        changes = dict(
            hidden_size=16 * source.randint(3, 20), num_attention_heads=source.randint(2, 9),
            q_lora_rank=source.randint(20, 90), kv_lora_rank=source.randint(20, 90), v_head_dim=source.randint(9, 40),
            n_shared_experts=source.randint(1, 3), num_experts_per_tok=source.randint(2, 6))
        overrides = ", ".join(f"{name}={value}" for name, value in changes.items())
        cases[f"ModelConfig.preset('nano', {overrides})"] = (ModelConfig.preset("nano", **changes),)
    return cases


# ---- 0.1 ------------------------------------------------------------------------------------------------------------


def attention_reference(config: ModelConfig) -> int:
    return sum(weight.size for weight in cost.attention_weights(config))


def attention_solution(config):
    d, heads = config.hidden_size, config.num_attention_heads
    nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    query = d * config.q_lora_rank + config.q_lora_rank + config.q_lora_rank * heads * (nope + rope)
    latent = d * (config.kv_lora_rank + rope) + config.kv_lora_rank
    expand = config.kv_lora_rank * heads * (nope + value)
    return query + latent + expand + heads * value * d


def attention_without_norms(config):
    return attention_solution(config) - config.q_lora_rank - config.kv_lora_rank


def attention_with_rope_key_per_head(config):
    return attention_solution(config) + config.hidden_size * config.qk_rope_head_dim * (config.num_attention_heads - 1)


def attention_without_rotary_query(config):
    return attention_solution(config) - config.q_lora_rank * config.num_attention_heads * config.qk_rope_head_dim


ATTENTION = Exercise(
    id="0.1", title="The parameters of one attention", stars=1, minutes=10,
    why="attention is 1.7 % of what is stored; only counting shows that it is 30 % of what a token works through",
    statement="Return the number of parameters of multi-head latent attention in one layer, from a `ModelConfig`. "
              "Count the seven tensors under `self_attn` (two of them are norms).",
    stub="""def attention_parameters(config):
    \"\"\"Parameters of one layer's attention: two down-projections, two norms, two up-projections, one output.\"\"\"
    raise NotImplementedError
""",
    hints=("Print the shapes: `{name: p.shape for name, p in model.model.layers[0].self_attn.named_parameters()}`.",
           "Queries: down to `q_lora_rank`, a norm, up to `heads * (nope + rope)`. Keys and values: down to "
           "`kv_lora_rank` and one rope key, a norm over the latent alone, up to `heads * (nope + value)`. Then the "
           "output."),
    reference=attention_reference, solution=attention_solution, cases=geometries,
    wrong={
        "norms forgotten": (attention_without_norms, "This leaves out the norms of the two latents. Their gains are "
                            "parameters too: q_lora_rank + kv_lora_rank of them."),
        "a rope key per head": (attention_with_rope_key_per_head, "This gives every head a rotary key of its own, as "
                                "ordinary attention does. In MLA all heads share one: W^KR has qk_rope_head_dim rows."),
        "no rotary query": (attention_without_rotary_query, "This leaves the rotary part out of the queries. The key "
                            "is shared by the heads, the query not: a head has qk_nope_head_dim + qk_rope_head_dim."),
    })


# ---- 0.2 ------------------------------------------------------------------------------------------------------------


def active_reference(config: ModelConfig) -> int:
    return cost.active_parameters(config).multiplied


def active_solution(config):
    d, moe_layers = config.hidden_size, config.num_hidden_layers - config.first_k_dense_replace
    experts = config.n_shared_experts + config.num_experts_per_tok
    layer = attention_solution(config) + 2 * d
    dense = 3 * d * config.intermediate_size
    moe = 3 * d * config.moe_intermediate_size * experts + config.n_routed_experts * d
    head = config.vocab_size * d
    return (config.num_hidden_layers * layer + config.first_k_dense_replace * dense + moe_layers * moe + d + head)


def _experts(config: ModelConfig, count: int) -> int:
    """Parameters of `count` experts in every MoE layer."""
    layers = config.num_hidden_layers - config.first_k_dense_replace
    return layers * count * 3 * config.hidden_size * config.moe_intermediate_size


def active_with_all_experts(config):
    return active_solution(config) + _experts(config, config.n_routed_experts - config.num_experts_per_tok)


def active_without_shared_expert(config):
    return active_solution(config) - _experts(config, config.n_shared_experts)


def active_with_embedding(config):
    return active_solution(config) + config.vocab_size * config.hidden_size


ACTIVE = Exercise(
    id="0.2", title="What one token multiplies", stars=1, minutes=10,
    why="training cost follows these parameters, memory follows all of them: the whole idea of experts in two numbers",
    statement="Return how many parameters of the main model take part in the arithmetic of one token. The router and "
              "the norms do, its selection biases do not (they are no parameters), and neither does MTP.",
    stub="""def active_parameters(config):
    \"\"\"Parameters that one token is multiplied with, from embedding (a lookup) to head (a product).\"\"\"
    raise NotImplementedError
""",
    hints=("Which tensors does a token meet, and which of them does it meet only one row of?",
           "Every layer: attention and two norms. The first layers: a dense FFN of three matrices. The others: the "
           "router's rows for all experts, the shared experts and `num_experts_per_tok` routed ones. At the end a norm "
           "and the head. Your function of 0.1 helps."),
    reference=active_reference, solution=active_solution, cases=geometries,
    wrong={
        "all experts": (active_with_all_experts, "This counts every routed expert. They are stored, but a token goes "
                        "through num_experts_per_tok of them."),
        "no shared expert": (active_without_shared_expert, "This forgets the shared experts: no router chooses them, "
                             "every token goes through them."),
        "embedding multiplied": (active_with_embedding, "This counts the embedding. It is a lookup of one row: no "
                                 "product, no FLOPs. At full size 37.55 B becomes 36.63 B."),
    })


# ---- 0.3 ------------------------------------------------------------------------------------------------------------


def bill_reference(config: ModelConfig, tokens: float, utilisation: float, other_hours: float) -> float:
    pre_training = cost.hours(cost.training_flops(config, 4096).main, tokens, utilisation)
    return cost.dollars(pre_training + other_hours)


def bill_solution(config, tokens, utilisation, other_hours):
    flops = cost.training_flops(config, context=4096).main * tokens
    hours = flops / (utilisation * cost.H800_BF16_FLOPS) / 3600
    return (hours + other_hours) * cost.DOLLARS_PER_HOUR


def bill_of_all_parameters(config, tokens, utilisation, other_hours):
    flops = 6 * cost.parameters(config).learned * tokens
    return (flops / (utilisation * cost.H800_BF16_FLOPS) / 3600 + other_hours) * cost.DOLLARS_PER_HOUR


def bill_of_pre_training_alone(config, tokens, utilisation, other_hours):
    return bill_solution(config, tokens, utilisation, 0)


def bill_at_peak(config, tokens, utilisation, other_hours):
    return bill_solution(config, tokens, 1, other_hours)


def budgets(source: random.Random) -> dict[str, tuple]:
    """The published run, and one of another size."""
    tokens, hours = source.randint(1, 9) * 10**11, source.randint(1, 99) * 100
    return {"full, 14.8e12 tokens, 0.39, 124,000 hours": (ModelConfig.preset("full"), 14.8e12, 0.39, 124_000),
            f"mini, {tokens:,} tokens, 0.25, {hours:,} hours": (ModelConfig.preset("mini"), tokens, 0.25, hours)}


BILL = Exercise(
    id="0.3", title="The bill", stars=2, minutes=15,
    why="the most quoted number of the report is a product of four factors; whoever can compute it can also doubt it",
    statement="Return the dollars of a training run on H800 GPUs: pre-training on `tokens` tokens in sequences of "
              "4,096, at the fraction `utilisation` of the bf16 peak (989e12 FLOP a second), and `other_hours` for "
              "what follows it (context extension, post-training). An hour of one GPU costs 2 dollars. Leave MTP out.",
    stub="""def bill(config, tokens, utilisation, other_hours):
    \"\"\"Dollars of a run. cost.training_flops(config, context=4096).main is what one token costs.\"\"\"
    raise NotImplementedError
""",
    hints=("A run of 2,664,000 hours is not a number of the model: it follows from FLOPs and from what a GPU reaches.",
           "FLOPs of a token, times tokens, over the FLOPs that one GPU really does in an hour; add the other hours; "
           "then the price."),
    reference=bill_reference, solution=bill_solution, cases=budgets, tol=1e-9,
    wrong={
        "six times all parameters": (bill_of_all_parameters, "This is 6 x all stored parameters, as for a dense model "
                                     "of 671 B. A token pays for its active parameters (and for attention) only."),
        "pre-training alone": (bill_of_pre_training_alone, "This stops at pre-training. Extending the context and "
                               "post-training cost 124,000 hours more: 5.328 M become 5.576 M dollars."),
        "at the peak": (bill_at_peak, "This takes the GPUs at their peak. No run reaches it: divide by `utilisation`, "
                        "which is 0.39 for the published run (derived)."),
    })


# ---- 0.4 ------------------------------------------------------------------------------------------------------------


def unigram_reference(train: list[list[int]], held_out: list[list[int]], vocab_size: int) -> float:
    """`data.unigram_entropy` on token ids that are already there: counts plus one, nats, mean over held-out tokens."""
    counts = torch.ones(vocab_size, dtype=torch.float64)
    for file in train:
        counts += torch.bincount(torch.tensor(file), minlength=vocab_size)
    price = -(counts / counts.sum()).log()
    return price[torch.tensor([token for file in held_out for token in file])].mean().item()


def unigram_solution(train, held_out, vocab_size):
    counts = Counter(token for file in train for token in file)
    total = counts.total() + vocab_size
    tokens = [token for file in held_out for token in file]
    return sum(-math.log((counts[token] + 1) / total) for token in tokens) / len(tokens)


def unigram_in_bits(train, held_out, vocab_size):
    return unigram_solution(train, held_out, vocab_size) / math.log(2)


def unigram_counted_on_held_out(train, held_out, vocab_size):
    return unigram_solution(held_out, held_out, vocab_size)


def unigram_mean_over_files(train, held_out, vocab_size):
    return sum(unigram_solution(train, [file], vocab_size) for file in held_out) / len(held_out)


def unigram_without_plus_one(train, held_out, vocab_size):
    counts = Counter(token for file in train for token in file)
    tokens = [token for file in held_out for token in file]
    prices = [-math.log(counts[token] / counts.total()) if counts[token] else math.inf for token in tokens]
    return sum(prices) / len(tokens)


def small_corpora(source: random.Random) -> dict[str, tuple]:
    """Files of unequal length, held-out text of another mixture, and a token that training never saw."""
    def file(length: int, weights: list[int]) -> list[int]:
        return source.choices(range(len(weights)), weights, k=length)
    cases = {}
    for vocab_size in (6, 11):
        seen = [source.randint(1, 9) for _ in range(vocab_size - 1)] + [0]
        later = [source.randint(1, 9) for _ in range(vocab_size)]
        train = [file(source.randint(5, 60), seen) for _ in range(4)]
        held_out = [file(length, later) + [vocab_size - 1] for length in (3, 40)]
        cases[f"a vocabulary of {vocab_size}"] = (train, held_out, vocab_size)
    return cases


UNIGRAM = Exercise(
    id="0.4", title="The loss to beat", stars=2, minutes=15,
    why="a loss of 4 is neither good nor bad until you know what a model without any context would reach",
    statement="A model that knows only how frequent each token is has the smallest loss that needs no context. Return "
              "that loss in nats a token: frequencies counted on the training files, one added to each token's count "
              "so that none has probability 0, and the mean over all tokens of the held-out files.",
    stub="""def unigram_loss(train, held_out, vocab_size):
    \"\"\"train and held_out are lists of files, each a list of token ids below vocab_size.\"\"\"
    raise NotImplementedError
""",
    hints=("Two texts play two parts: one is counted, the other is priced.",
           "Count the training tokens, add one for each of the `vocab_size` tokens, divide by the new total. Then the "
           "mean of `-math.log(p[token])` over all held-out tokens together."),
    reference=unigram_reference, solution=unigram_solution, cases=small_corpora, tol=1e-9,
    wrong={
        "bits": (unigram_in_bits, "These are bits. The training loss uses the natural logarithm: multiply by ln 2, or "
                 "call math.log with one argument."),
        "counted on the held-out text": (unigram_counted_on_held_out, "This counts the held-out text itself: it knows "
                                         "the answers. Frequencies must come from the training files."),
        "mean over files": (unigram_mean_over_files, "This is the mean of the files' means, so that a short file "
                            "weighs as much as a long one. Take the mean over tokens."),
        "no plus one": (unigram_without_plus_one, "A token that training never saw has probability 0 here and costs "
                        "infinitely much. Add one to every count."),
    })


# ---- 0.5 ------------------------------------------------------------------------------------------------------------


def norm_without_gain(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norm_reference(x, torch.ones_like(weight), eps)


def norm_with_gain_plus_one(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norm_reference(x, 1 + weight, eps)


def norm_of_centred(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norm_reference(x - x.mean(-1, keepdim=True), weight, eps)


def norm_over_everything(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean() + eps) * weight


def norm_with_eps_outside(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True).sqrt() + eps) * weight


def norm_by_length(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps) * weight


def uneven_rows(source: random.Random) -> dict[str, tuple]:
    """A batch on which no two of the norms agree: rows with a mean, uneven gains, an eps that matters."""
    generator = torch.Generator().manual_seed(source.getrandbits(32))
    x, weight = torch.randn(3, 5, generator=generator).double() + 0.5, torch.randn(5, generator=generator).double()
    return {"three rows": (x, weight, 0.1)}


def norm_test(rms_norm):
    torch.manual_seed(1)
    x = torch.randn(3, 5, dtype=torch.float64) * torch.tensor([[0.01], [1.0], [30.0]], dtype=torch.float64) + 0.2
    weight, eps = torch.tensor([0.5, 2.0, -1.0, 3.0, 1.5], dtype=torch.float64), 0.1
    for row, y in zip(x, rms_norm(x, weight, eps)):
        want = row / (sum(value ** 2 for value in row) / 5 + eps) ** 0.5 * weight
        assert torch.allclose(y, want, rtol=0, atol=1e-12)


NORM = Mutants(
    id="0.5", title="Kill the mutants: RMSNorm", stars=2, minutes=20,
    why="a test that cannot fail proves nothing; all six of these have been written, by people who tested them",
    statement="Write a test for `rms_norm(x, weight, eps)`, which returns x / sqrt(mean(x²) + eps) * weight over the "
              "last dimension: a function that gets an implementation, calls it and asserts. It is run against the "
              "package's RMSNorm, which it must spare, and against six wrong ones, which it should kill.",
    stub="""def norm_test(rms_norm):
    \"\"\"Asserts that rms_norm(x, weight, eps) is right. x is [rows, d], weight is [d].\"\"\"
    raise NotImplementedError
""",
    hints=("Which inputs make a wrong implementation look right? One row, gains of 1, eps far below x.",
           "Several rows of unlike size, each with a mean; gains that differ; an eps that matters; float64 and a small "
           "tolerance. Compute what is right by hand, row by row."),
    reference=rms_norm_reference, solution=norm_test, cases=uneven_rows,
    wrong={
        "no gain": (norm_without_gain, "It leaves out the weight: gains of 1 cannot show that."),
        "gain plus one": (norm_with_gain_plus_one, "It multiplies by 1 + weight, as some models do: no test "
                          "that only looks at signs or order sees it."),
        "centred first": (norm_of_centred, "It subtracts the mean, as LayerNorm does: give the rows a mean."),
        "mean over everything": (norm_over_everything, "It takes one mean for all rows: a single row, or rows of like "
                                                       "size, cannot show that."),
        "eps outside the root": (norm_with_eps_outside, "It adds eps to the root, not under it: make eps large enough "
                                                        "to matter."),
        "length for mean": (norm_by_length, "It divides by the length of the row, not by its root mean square: compare "
                                            "values, not directions."),
    })


EXERCISES = (ATTENTION, ACTIVE, BILL, UNIGRAM, NORM)


# ---- questions ------------------------------------------------------------------------------------------------------


QUESTIONS = {
    "00.memory": Question(
        "37 B of 671 B parameters are active for a token. How much memory do the weights need to serve the model?",
        (Option("that of a 37 B model", "which 37 B they are changes with each token, so all must be at hand."),
         Option("that of a 671 B model", "every expert is some token's choice: 641 GiB as released, in FP8."),
         Option("between the two, since experts are shared by a batch",
                "the tokens of a batch choose differently, so it needs more experts than one of them, not fewer.")), 1),
    "00.work": Question(
        "How much arithmetic does one training token cost, compared with a dense model of 671 B?",
        (Option("as much: 4,026 GFLOP", "that is 6 x 671 B. Experts that a token does not choose compute nothing."),
         Option("a sixteenth: about 250 GFLOP", "6 for each active parameter, and attention over the context."),
         Option("a thirty-second, since 8 of 256 experts work",
                "attention, shared experts, the first layers and the head work for every token as well.")), 1),
    "00.attention": Question(
        "Attention is 1.7 % of the stored parameters. What is its share of the parameters a token uses?",
        (Option("1.7 % as well", "storage is mostly experts, and nearly all of these rest while a token passes."),
         Option("about 30 %", "attention has no experts: it is used whole, while 8 of 256 experts are."),
         Option("more than half", "eight experts and a shared one in each of 58 layers still outweigh it.")), 1),
    "00.dollars": Question(
        "What do the $5.576 M of the report pay for?",
        (Option("the development of DeepSeek-V3", "the report itself leaves out earlier research and experiments."),
         Option("the GPU hours of the final runs, rented at $2",
                "2,788,000 H800 hours x $2: no people, data, failed runs or machines bought."),
         Option("pre-training alone", "pre-training is 2,664,000 of the 2,788,000 hours.")), 1),
    "00.loss": Question(
        "A model has a loss of 4.0 nats a token. Is it good?",
        (Option("no: good models are near 2", "losses compare only for one tokenizer and one text."),
         Option("yes: it is far below ln(vocabulary)", "counting tokens already gets far below that, without context."),
         Option("that depends on the unigram entropy of the text",
                "below it the model uses context, and only what is below it has been learnt from order.")), 2),
}
