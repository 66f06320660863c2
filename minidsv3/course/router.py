"""Chapter 02: who is chosen, who decides how much, and what keeps experts busy (report section 2.1.2).

Gate and groups: equations 13 to 16. The bias: "auxiliary-loss-free". The sequence-wise loss: equations 17 to 20.
"""

import random
from fractions import Fraction
from math import comb

import torch
from torch import Tensor

from ..balance import sequence_balance_loss, update_biases
from ..config import ModelConfig
from ..kernels import route
from ..moe import Router
from .exercise import Exercise, Mutants
from .predict import Option, Question


def normal(source: random.Random, *shape: int) -> Tensor:
    """Float64 numbers from N(0, 1) that follow from `source`."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(source.getrandbits(32)), dtype=torch.float64)


def spread(values: Tensor, index: Tensor, experts: int) -> Tensor:
    """values [N, k] at the columns index [N, k], zeros elsewhere: [N, experts]. No order of the chosen matters."""
    return values.new_zeros(len(values), experts).scatter(1, index, values)


# ---- 2.1 ------------------------------------------------------------------------------------------------------------


def gate_reference(logits: Tensor, bias: Tensor, top_k: int, scale: float) -> Tensor:
    routing = route(logits, bias, n_group=1, topk_group=1, top_k=top_k, scaling_factor=scale)
    return spread(routing.weights, routing.experts, logits.shape[1])


def gate_solution(logits, bias, top_k, scale):
    scores = logits.sigmoid()
    chosen = (scores + bias).topk(top_k).indices
    weights = torch.zeros_like(scores).scatter(1, chosen, scores.gather(1, chosen))
    return weights / weights.sum(1, keepdim=True) * scale


def gate_with_leaking_bias(logits, bias, top_k, scale):
    best = (logits.sigmoid() + bias).topk(top_k)
    return spread(best.values / best.values.sum(1, keepdim=True) * scale, best.indices, logits.shape[1])


def gate_with_softmax(logits, bias, top_k, scale):
    return gate_solution(logits.softmax(1).logit(), bias, top_k, scale)


def gate_normalised_over_all(logits, bias, top_k, scale):
    scores = logits.sigmoid()
    chosen = (scores + bias).topk(top_k).indices
    return spread(scores.gather(1, chosen) / scores.sum(1, keepdim=True) * scale, chosen, logits.shape[1])


def gate_scaled_before(logits, bias, top_k, scale):
    return gate_solution(logits, bias, top_k, 1.0)


def gate_without_bias(logits, bias, top_k, scale):
    return gate_solution(logits, torch.zeros_like(bias), top_k, scale)


def gates(source: random.Random) -> dict[str, tuple]:
    """Biases of both signs, as large as the affinities' spread; a scale of 2.5 and another."""
    cases = {}
    for scale in (2.5, source.choice((0.7, 1.6, 3.0))):
        experts, top_k = source.randint(7, 12), source.randint(2, 4)
        words = f"12 tokens, {experts} experts, top {top_k}, scale {scale}"
        cases[words] = (normal(source, 12, experts), 0.2 * normal(source, experts), top_k, scale)
    return cases


GATE = Exercise(
    id="2.1", title="The gate: chosen with the bias, weighed without", stars=1, minutes=15,
    why="public routers written from scratch do let the bias into the weight, and training hides it well",
    statement="Return the weight of every expert for every token, `[N, experts]`, 0 for those not chosen: sigmoid, "
              "choose `top_k` with the bias, weigh without it, let the weights add up to `scale`. No groups yet.",
    stub="""def gate(logits, bias, top_k, scale):
    \"\"\"logits [N, experts], bias [experts]. Equations 13, 15 and 16, and the factor of the config.\"\"\"
    raise NotImplementedError
""",
    hints=("Two questions, two formulas: *who* uses s + b, *how much* uses s.",
           "`chosen = (s + bias).topk(top_k).indices`, then `s.gather(1, chosen)`, divide by its sum, times `scale`, "
           "and `scatter` back into zeros."),
    reference=gate_reference, solution=gate_solution, cases=gates, tol=1e-9,
    wrong={
        "bias leaks": (gate_with_leaking_bias,
            "The bias leaks into the weights. With s = 0.8 and 0.3 and b = -0.3 and +0.15 this gives .53/.47, where "
            ".73/.27 is right: b says who, s says how much."),
        "softmax": (gate_with_softmax,
            "This takes a softmax over the experts. V3's affinity is a sigmoid of each product alone (equation 15): "
            "raising one expert's does not lower the others'."),
        "normalised over all": (gate_normalised_over_all,
            "This divides by the sum over all experts. Equation 13 divides by the sum over the chosen ones, so that "
            "their weights add up to the scale."),
        "scaled before": (gate_scaled_before,
            "The scale is gone: multiplied before the division it cancels. First normalise, then multiply."),
        "no bias": (gate_without_bias,
            "The bias plays no part here. It must be added before top-k, where it decides who is chosen."),
    })


# ---- 2.2 ------------------------------------------------------------------------------------------------------------


def choose_reference(scores: Tensor, bias: Tensor, n_group: int, topk_group: int, top_k: int) -> Tensor:
    chosen = route(scores.logit(), bias, n_group=n_group, topk_group=topk_group, top_k=top_k).experts
    return spread(torch.ones_like(chosen, dtype=scores.dtype), chosen, scores.shape[1])


def choose_solution(scores, bias, n_group, topk_group, top_k, group_score=lambda g: g.topk(2).values.sum(-1),
                    mask=float("-inf")):
    choice = (scores + bias).unflatten(1, (n_group, -1))
    kept = group_score(choice).topk(topk_group).indices
    allowed = torch.zeros(choice.shape[:2], dtype=torch.bool).scatter(1, kept, True)
    chosen = choice.masked_fill(~allowed[..., None], mask).flatten(1).topk(top_k).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, chosen, True)


def choose_with_mask_of_zero(scores, bias, n_group, topk_group, top_k):
    return choose_solution(scores, bias, n_group, topk_group, top_k, mask=0.0)


def choose_by_best_of_group(scores, bias, n_group, topk_group, top_k):
    return choose_solution(scores, bias, n_group, topk_group, top_k, lambda g: g.amax(-1))


def choose_by_mean_of_group(scores, bias, n_group, topk_group, top_k):
    return choose_solution(scores, bias, n_group, topk_group, top_k, lambda g: g.mean(-1))


def choose_by_share_of_group(scores, bias, n_group, topk_group, top_k):
    return choose_solution(scores, bias, n_group, topk_group, top_k,
                           lambda g: g.topk(top_k // topk_group).values.sum(-1))


def choose_then_mask(scores, bias, n_group, topk_group, top_k):
    kept = choose_solution(scores, bias, n_group, topk_group, scores.shape[1] // n_group * topk_group)
    return choose_solution(scores, bias, 1, 1, top_k, lambda g: g.amax(-1)) & kept


def choose_groups_without_bias(scores, bias, n_group, topk_group, top_k):
    kept = choose_solution(scores, torch.zeros_like(bias), n_group, topk_group,
                           scores.shape[1] // n_group * topk_group)
    chosen = (scores + bias).masked_fill(~kept, float("-inf")).topk(top_k).indices
    return torch.zeros_like(kept).scatter(1, chosen, True)


def grouped_scores(source: random.Random) -> dict[str, tuple]:
    """Biases below zero, of both signs, above zero; top_k / topk_group is 3, so that it is no other name for two."""
    cases = {}
    for name, offset in (("negative", -1.0), ("mixed", 0.0), ("positive", 1.0)):
        size, groups = source.randint(4, 6), source.randint(4, 5)
        scores = (0.6 * normal(source, 40, size * groups)).sigmoid()
        bias = offset + 0.15 * normal(source, size * groups)
        cases[f"{name} biases, top 6 of {size * groups} experts, 2 of {groups} groups"] = (scores, bias, groups, 2, 6)
    return cases


GROUPS = Exercise(
    id="2.2", title="Few groups: node-limited top-k", stars=2, minutes=25,
    why="a mask of 0 stood in public code until someone tried biases below zero; positive ones hide it",
    statement="Return who is chosen, `[N, experts]`: 1 (or True) for chosen, 0 for not. Experts lie in `n_group` "
              "groups, one after the other. A group is worth the sum of its **two** best s + b; the best `topk_group` "
              "groups stay, and `top_k` experts are chosen in them by s + b.",
    stub="""def choose(scores, bias, n_group, topk_group, top_k):
    \"\"\"scores [N, experts] after the sigmoid, bias [experts] of any sign.\"\"\"
    raise NotImplementedError
""",
    hints=("What must a forbidden expert look like, so that it loses against **every** allowed one, also a negative "
           "one?",
           "`unflatten(1, (n_group, -1))`; `topk(2).values.sum(-1)` a group; keep the best groups; `masked_fill` the "
           "others with -inf; `flatten(1).topk(top_k)`."),
    reference=choose_reference, solution=choose_solution, cases=grouped_scores,
    wrong={
        "mask 0": (choose_with_mask_of_zero,
            "A forbidden expert is masked with 0 here. As soon as s + b of an allowed expert is negative, 0 beats "
            "it: mask with -inf."),
        "best alone": (choose_by_best_of_group,
            "A group is judged by its best expert alone. The released code adds its two best."),
        "mean": (choose_by_mean_of_group,
            "A group is judged by all its experts (mean or sum). Only its two best count: the others would not be "
            "chosen anyway."),
        "K/M best": (choose_by_share_of_group,
            "A group is judged by its top_k / topk_group best, as the report writes. The released code always adds "
            "two; both agree at full size (8 / 4), not here."),
        "masked after top-k": (choose_then_mask,
            "This takes top-k first and then strikes out forbidden experts, so that tokens end up with fewer than "
            "top_k. Mask first."),
        "groups without bias": (choose_groups_without_bias,
            "Groups are ranked by s here and experts by s + b. The bias belongs to both choices."),
    })


# ---- 2.3 ------------------------------------------------------------------------------------------------------------


def update_reference(bias: Tensor, load: Tensor, gamma: float) -> Tensor:
    experts = len(bias)
    router = Router(ModelConfig.preset("nano", n_routed_experts=experts, n_group=1, topk_group=1)).double()
    router.e_score_correction_bias.copy_(bias)
    update_biases(router, load.sum(0)[None], gamma)
    return router.e_score_correction_bias


def update_solution(bias, load, gamma):
    total = load.sum(0).double()
    return bias + gamma * torch.sign(total.mean() - total)


def update_with_flipped_sign(bias, load, gamma):
    return update_solution(bias, load, -gamma)


def update_in_proportion(bias, load, gamma):
    total = load.sum(0).double()
    return bias + gamma * (total.mean() - total) / total.mean()


def update_per_micro_batch(bias, load, gamma):
    for part in load:
        bias = update_solution(bias, part[None], gamma)
    return bias


def update_centred(bias, load, gamma):
    step = update_solution(bias, load, gamma) - bias
    return bias + step - step.mean()


def update_at_equality(bias, load, gamma):
    total = load.sum(0).double()
    return bias + torch.where(total > total.mean(), -gamma, gamma)


def loads(source: random.Random) -> dict[str, tuple]:
    """Counts of three micro-batches whose signs disagree with their sum's; one expert exactly at the mean."""
    cases = {}
    for experts in (6, 8):                                 # even, so that ups and downs are never as many
        load = torch.tensor([[source.randint(0, 60) for _ in range(experts)] for _ in range(3)])
        load[:, 1] += 40                                    # far above the mean, so that most are below it
        load[:, -1] = 0
        load[2, 0] += -load.sum() % (experts - 1)           # the others' mean is a whole number ...
        load[1, -1] = load.sum() // (experts - 1)           # ... and the last expert has it
        gamma = source.choice((0.001, 0.01, 0.05))
        cases[f"{experts} experts, 3 micro-batches, gamma {gamma}"] = (normal(source, experts), load, gamma)
    return cases


UPDATE = Exercise(
    id="2.3", title="The bias takes a step", stars=1, minutes=15,
    why="this line is all that stands between V3 and crowded experts, and frameworks still differ in it",
    statement="Return the biases after one optimiser step. `load` `[micro-batches, experts]` counts the tokens that "
              "each expert got in every micro-batch of the step. An expert above the mean goes down by `gamma`, one "
              "below goes up by `gamma`, one exactly at the mean stays.",
    stub="""def update(bias, load, gamma):
    \"\"\"bias [experts] float64, load [micro-batches, experts] int64.\"\"\"
    raise NotImplementedError
""",
    hints=("One step of the optimiser, one step of the bias. `torch.sign` knows three answers.",
           "Add the micro-batches first. Turn counts into floats before you take their mean. "
           "`bias + gamma * torch.sign(mean - total)`."),
    reference=update_reference, solution=update_solution, cases=loads, tol=1e-12,
    wrong={
        "sign flipped": (update_with_flipped_sign,
            "The sign is flipped: crowded experts become more attractive, and a few steps later everybody is there."),
        "in proportion": (update_in_proportion,
            "The step grows with the violation here. The report's does not: gamma up or gamma down, however far "
            "from the mean."),
        "per micro-batch": (update_per_micro_batch,
            "The bias moves after every micro-batch here. It moves once an optimiser step, on the load of the whole "
            "batch."),
        "centred": (update_centred,
            "The steps are centred here (their mean subtracted), as one framework does. The report does not, and so "
            "the mean of the biases drifts."),
        "moves at equality": (update_at_equality,
            "An expert exactly at the mean moves here. It should stay: sign(0) is 0."),
    })


# ---- 2.4 ------------------------------------------------------------------------------------------------------------


def balance_reference(logits: Tensor, bias: Tensor, top_k: int) -> Tensor:
    return sequence_balance_loss(logits, top_k)


def balance_solution(logits, bias, top_k):
    scores, experts = logits.sigmoid(), logits.shape[-1]
    chosen = torch.zeros_like(scores).scatter(-1, scores.topk(top_k).indices, 1.0)
    f = chosen.mean(1) * experts / top_k
    p = (scores / scores.sum(-1, keepdim=True)).mean(1)
    return (f * p).sum(-1).mean()


def balance_with_bias(logits, bias, top_k):
    scores, experts = logits.sigmoid(), logits.shape[-1]
    chosen = torch.zeros_like(scores).scatter(-1, (scores + bias).topk(top_k).indices, 1.0)
    share = (scores / scores.sum(-1, keepdim=True)).mean(1)
    return (chosen.mean(1) * experts / top_k * share).sum(-1).mean()


def balance_with_softmax(logits, bias, top_k):
    experts = logits.shape[-1]
    chosen = torch.zeros_like(logits).scatter(-1, logits.topk(top_k).indices, 1.0)
    return (chosen.mean(1) * experts / top_k * logits.softmax(-1).mean(1)).sum(-1).mean()


def balance_with_gate_weights(logits, bias, top_k):
    scores, experts = logits.sigmoid(), logits.shape[-1]
    chosen = torch.zeros_like(scores).scatter(-1, scores.topk(top_k).indices, 1.0)
    weights = scores * chosen / (scores * chosen).sum(-1, keepdim=True)
    return (chosen.mean(1) * experts / top_k * weights.mean(1)).sum(-1).mean()


def balance_of_whole_batch(logits, bias, top_k):
    return balance_solution(logits.flatten(0, 1)[None], bias, top_k)


def balance_without_factor(logits, bias, top_k):
    return balance_solution(logits, bias, top_k) * top_k / logits.shape[-1]


def sequences(source: random.Random) -> dict[str, tuple]:
    """Sequences that each lean to other experts, and biases that change the choice."""
    cases = {}
    for _ in range(2):
        experts, top_k = source.randint(6, 11), source.randint(2, 3)
        logits = normal(source, 3, 14, experts) + 1.5 * normal(source, 3, 1, experts)
        cases[f"3 sequences of 14 tokens, top {top_k} of {experts}"] = (logits, 0.4 * normal(source, experts), top_k)
    return cases


BALANCE = Exercise(
    id="2.4", title="The sequence-wise loss", stars=2, minutes=25,
    why="several frameworks had to repair theirs: a wrong factor never crashes, it only teaches something else",
    statement="Return equations 17 to 20 without alpha, mean over the sequences. With a perfectly even load the "
              "result is 1. The bias is handed to you: decide whether it belongs here.",
    stub="""def balance_loss(logits, bias, top_k):
    \"\"\"logits [sequences, tokens, experts], bias [experts]. Returns one number.\"\"\"
    raise NotImplementedError
""",
    hints=("Read the indicator of equation 18: TopK of what? And P in equation 20: of the chosen, or of all?",
           "f: mean over the tokens of 1 for the top_k largest s, times experts / top_k. P: mean over the tokens of s "
           "over the sum of all s. Sum f * P over the experts for each sequence, then the mean."),
    reference=balance_reference, solution=balance_solution, cases=sequences, tol=1e-9,
    wrong={
        "chosen with bias": (balance_with_bias,
            "f counts the choice on s + b here. Equation 18 takes TopK of s alone: the loss must see what the bias "
            "has covered up."),
        "softmax": (balance_with_softmax,
            "P is a softmax here. Equation 19 divides the sigmoids by their sum over all experts."),
        "gate weights": (balance_with_gate_weights,
            "P is made from the gate's weights here, zero for those not chosen. Equation 20 takes the share of "
            "every expert among all affinities."),
        "whole batch": (balance_of_whole_batch,
            "This takes the batch as one sequence. That is the batch-wise loss: it lets one sequence be all code as "
            "long as another is all prose."),
        "no factor": (balance_without_factor,
            "The factor N_r / K_r of equation 18 is missing: an even load should give 1."),
    })


# ---- 2.5 ------------------------------------------------------------------------------------------------------------


def copies_reference(experts: int, nodes: int, top_k: int) -> float:
    """Expected nodes other than the token's own that hold at least one of top_k different experts chosen at random."""
    elsewhere = Fraction(comb(experts - experts // nodes, top_k), comb(experts, top_k))
    return float((nodes - 1) * (1 - elsewhere))


def copies_solution(experts, nodes, top_k):
    missed = 1.0
    for drawn in range(top_k):
        missed *= (experts - experts / nodes - drawn) / (experts - drawn)
    return (nodes - 1) * (1 - missed)


def copies_with_replacement(experts, nodes, top_k):
    return (nodes - 1) * (1 - (1 - 1 / nodes) ** top_k)


def copies_with_own_node(experts, nodes, top_k):
    return nodes * copies_solution(experts, nodes, top_k) / (nodes - 1)


def copies_per_expert(experts, nodes, top_k):
    return top_k * (nodes - 1) / nodes


def copies_at_most(experts, nodes, top_k):
    return float(min(top_k, nodes - 1))


def clusters(source: random.Random) -> dict[str, tuple]:
    """The published model, and two others."""
    cases = {"256 experts on 8 nodes, top 8": (256, 8, 8)}
    for nodes, size in ((4, source.randint(4, 9)), (6, source.randint(10, 15))):
        cases[f"{nodes * size} experts on {nodes} nodes, top 5"] = (nodes * size, nodes, 5)
    return cases


COPIES = Exercise(
    id="2.5", title="How many nodes does a token visit?", stars=2, minutes=20,
    why="copies between nodes are what expert parallelism pays for; chapter 06 turns this number into time",
    statement="A token sits on one of `nodes` nodes, which share `experts` experts evenly, and chooses `top_k` "
              "different experts at random. It is sent once to each node that holds at least one of them; its own "
              "node costs nothing. Return the expected number of copies sent.",
    stub="""def copies(experts, nodes, top_k):
    \"\"\"Expected copies of one token over the wires between nodes, without any node limit.\"\"\"
    raise NotImplementedError
""",
    hints=("Expectations add up: what is the chance that one particular other node is visited?",
           "The chance that a node is *not* visited is C(experts - experts of a node, top_k) / C(experts, top_k). "
           "`math.comb` counts."),
    reference=copies_reference, solution=copies_solution, cases=clusters, tol=1e-9,
    wrong={
        "with replacement": (copies_with_replacement,
            "This draws with replacement (4.59 at full size). The experts of a token are different ones, which "
            "spreads them a little more: 4.63."),
        "own node counted": (copies_with_own_node,
            "This counts the token's own node too (5.29 at full size). What is on the same node does not cross a "
            "wire between nodes."),
        "a copy an expert": (copies_per_expert,
            "This sends a copy for each expert (7.00 at full size), even if two of them are on one node."),
        "the most there can be": (copies_at_most, "This is the largest number there can be, not the expected one."),
    })


# ---- 2.6 ------------------------------------------------------------------------------------------------------------


def route_reference(logits: Tensor, bias: Tensor, n_group: int, topk_group: int, top_k: int, scale: float) -> Tensor:
    """The package's router as dense weights [N, experts]."""
    routing = route(logits, bias, n_group=n_group, topk_group=topk_group, top_k=top_k, scaling_factor=scale)
    return spread(routing.weights, routing.experts, logits.shape[1])


def weigh(scores: Tensor, chosen: Tensor, scale: float) -> Tensor:
    """scores of the chosen (a bool [N, experts]) over their sum, times scale."""
    return scores * chosen / (scores * chosen).sum(1, keepdim=True) * scale


def _with_choice(choose):
    """A router that weighs rightly and chooses by `choose`."""
    def router(logits, bias, n_group, topk_group, top_k, scale):
        return weigh(logits.sigmoid(), choose(logits.sigmoid(), bias, n_group, topk_group, top_k), scale)
    return router


def route_with_leaking_bias(logits, bias, n_group, topk_group, top_k, scale):
    scores = logits.sigmoid()
    return weigh(scores + bias, choose_solution(scores, bias, n_group, topk_group, top_k), scale)


def route_with_softmax(logits, bias, n_group, topk_group, top_k, scale):
    return route_reference(logits.softmax(1).logit(), bias, n_group, topk_group, top_k, scale)


def route_without_normalising(logits, bias, n_group, topk_group, top_k, scale):
    return logits.sigmoid() * (route_reference(logits, bias, n_group, topk_group, top_k, scale) > 0) * scale


route_with_mask_of_zero = _with_choice(choose_with_mask_of_zero)
route_by_best_of_group = _with_choice(choose_by_best_of_group)
route_groups_without_bias = _with_choice(choose_groups_without_bias)
route_without_groups = _with_choice(lambda scores, bias, n_group, topk_group, top_k: choose_solution(
    scores, bias, 1, 1, top_k, lambda g: g.amax(-1)))
route_without_bias = _with_choice(lambda scores, bias, n_group, topk_group, top_k: choose_solution(
    scores, torch.zeros_like(bias), n_group, topk_group, top_k))


def routed_batch(source: random.Random) -> dict[str, tuple]:
    """Batches on which no two routers agree: biases mostly below -1, and a second with both signs."""
    return {name: (normal(source, 40, 20), offset + 0.3 * normal(source, 20), 5, 2, 4, 2.5)
            for name, offset in (("negative biases", -1.0), ("both signs", 0.0))}


def router_test(route):
    torch.manual_seed(2)
    n_group, topk_group, top_k, scale = 4, 2, 3, 1.7
    for offset in (-1.2, 0.0):
        logits, bias = torch.randn(60, 16, dtype=torch.float64), offset + 0.3 * torch.randn(16, dtype=torch.float64)
        for row, got in zip(logits.sigmoid(), route(logits, bias, n_group, topk_group, top_k, scale)):
            choice = [(row[i] + bias[i]).item() for i in range(16)]
            worth = {g: sum(sorted(choice[4 * g:4 * g + 4])[-2:]) for g in range(n_group)}
            kept = sorted(worth, key=worth.get)[-topk_group:]
            chosen = sorted((i for i in range(16) if i // 4 in kept), key=lambda i: choice[i])[-top_k:]
            total = sum(row[i] for i in chosen)
            want = torch.stack([row[i] / total * scale if i in chosen else torch.zeros_like(total) for i in range(16)])
            assert torch.allclose(got, want, rtol=0, atol=1e-12)


ROUTERS = Mutants(
    id="2.6", title="Kill the mutants: eight routers", stars=2, minutes=15,
    why="a model with any of these routers runs, trains and looks reasonable; only inputs chosen on purpose tell",
    statement="Write a test for `route(logits, bias, n_group, topk_group, top_k, scale)`, which returns the weights "
              "`[N, experts]`, 0 for those not chosen. It is run against the package's router, which it must spare, "
              "and against eight wrong ones, which it should kill.",
    stub="""def router_test(route):
    \"\"\"Asserts that route(logits, bias, n_group, topk_group, top_k, scale) is right. logits [N, experts].\"\"\"
    raise NotImplementedError
""",
    hints=("Which inputs hide a fault? A bias of 0, a positive bias, one group, a scale of 1, a single token.",
           "Many tokens in float64; biases well below zero and biases of both signs; more groups than may be used. "
           "Compute what is right token by token, with plain Python: sort, sum, divide."),
    reference=route_reference, solution=router_test, cases=routed_batch,
    wrong={
        "bias leaks": (route_with_leaking_bias, "It weighs by s + b: a bias of 0 cannot show that."),
        "mask 0": (route_with_mask_of_zero,
            "It masks forbidden experts with 0: only a negative s + b can show that."),
        "best of group": (route_by_best_of_group,
            "It ranks groups by their best expert alone: use enough tokens for a group with one star and one with "
            "two good experts to meet."),
        "groups without bias": (route_groups_without_bias,
            "It ranks groups by s, experts by s + b: only biases that differ between groups can show that."),
        "no bias": (route_without_bias, "It never looks at the bias."),
        "no groups": (route_without_groups,
            "It takes the best experts wherever they are: allow fewer groups than there are."),
        "softmax": (route_with_softmax, "It takes a softmax for the sigmoid: the order stays, the weights do not."),
        "not normalised": (route_without_normalising,
            "It does not divide by the sum of the chosen: look at the weights, not only at who is chosen."),
    })


EXERCISES = (GATE, GROUPS, UPDATE, BALANCE, COPIES, ROUTERS)


# ---- questions ------------------------------------------------------------------------------------------------------


QUESTIONS = {
    "02.bias": Question(
        "The bias of an expert rises from 0 to 0.1. A token chose it before and chooses it still. What happens to "
        "its weight?",
        (Option("it rises, because s + b rises", "the weight is made from s alone; s + b only decides who is chosen."),
         Option("it falls, because the sum grows", "the sum of equation 13 is over s of the chosen; no b is in it."),
         Option("nothing, if the same experts stay chosen", "b says who, s says how much.")), 2),
    "02.free": Question(
        "DeepSeek-V3 balances \"auxiliary-loss-free\". Which auxiliary balance loss does it train with?",
        (Option("none at all", "that is the name, not the recipe: the sequence-wise loss stays, at alpha = 0.0001."),
         Option("a sequence-wise one with weight 0.0001",
                "a safety net against extremes inside one sequence; the bias does the work."),
         Option("the usual one with weight 0.01", "that strength is what the bias replaces.")), 1),
    "02.dead": Question(
        "Nano (top 4 of 16, sigmoid) learns text for 800 steps without any balancing. What becomes of its 80 experts?",
        (Option("all die but four in each layer", "that would be a collapse: MaxVio 3. Measured were about 1.9."),
         Option("some die, and the load stays uneven",
                "5 to 11 of 80 got less than a twentieth of the mean, and the loss hardly noticed."),
         Option("none dies: the main loss wants all of them",
                "the main loss improves those that are chosen; the others get no gradient and stay bad.")), 1),
    "02.one": Question(
        "The sequence-wise loss (without alpha) is 1.000. Is the load even?",
        (Option("yes, 1 is its smallest value and means balance",
                "with flat affinities it is 1 even if all tokens choose the same four experts; and it can go below "
                "1."),
         Option("not necessarily",
                "f * P is 1 for any f when all P are alike: look at the load, not at the loss.")), 1),
    "02.floor": Question(
        "Balancing works perfectly. Where does MaxVio of a step end?",
        (Option("at 0", "only if loads were dealt out; random choices of equal chance still differ in number."),
         Option("at the floor of chance, which depends on the tokens of the step",
                "tokens that choose at random leave a MaxVio too; the fewer they are, the larger."),
         Option("at 1, as the loss", "1 would mean an expert with twice the mean.")), 1),
    "02.offset": Question(
        "Someone adds 5 to the biases of all experts of a layer. What changes?",
        (Option("the weights", "b is in no weight."),
         Option("the choice", "an order does not change if everything moves by the same amount."),
         Option("nothing, if forbidden groups are masked with -inf",
                "with a mask of 0 it can even hide the fault, because everything allowed is then positive.")), 2),
    "02.sequence": Question(
        "Over the whole batch every expert gets the same load. And inside one text?",
        (Option("the same, by the law of large numbers",
                "a text is about one thing, and its tokens are not a random sample."),
         Option("far less even", "the measured MaxVio inside one sequence is several times that of the batch."),
         Option("that is impossible to say", "it was measured: section 8.")), 1),
    "02.subjects": Question(
        "What tells you most about which expert a token takes?",
        (Option("the subject of the text: experts are specialists for code, prose, law ...",
                "kind of text says something, and under a sequence loss next to nothing."),
         Option("which token it is", "its identity tells many times more than the kind of text it stands in."),
         Option("its position", "not measured here; the bias and the loss do not know it.")), 1),
    "02.nodes": Question(
        "What does the limit to 4 of 8 nodes cost, and what does it bring, at random affinities?",
        (Option("nothing, and a little traffic", "some of the choices are replaced by the next best in a kept group."),
         Option("some choices change, and a token crosses to about half as many nodes as experts would send it",
                "7.00 copies, one for each expert elsewhere, become 3.47 with one copy a node and the limit."),
         Option("half of the experts become useless",
                "each token keeps other groups; over many tokens all are used.")), 1),
}
