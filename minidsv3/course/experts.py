"""Chapter 06: experts on many GPUs, and tokens that travel to them (report sections 2.1.2, 3.2 and 3.4).

Dispatch and combine, node-limited routing in two hops, the gradients of experts, and EPLB, which places them.
"""

import random
from collections import Counter

import torch
from torch import Tensor

from ..parallel import traffic
from ..parallel.dispatch import Tokens, fan_in, fan_out
from ..parallel.placement import rebalance_experts
from ..parallel.traffic import Cluster
from .exercise import Exercise, Mutants
from .predict import Option, Question


def normal(source: random.Random, *shape: int) -> Tensor:
    """Float64 numbers from N(0, 1) that follow from `source`."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(source.getrandbits(32)), dtype=torch.float64)


def choices(source: random.Random, tokens: int, experts: int, chosen: int) -> Tensor:
    """Different ones of `experts` experts for each token, [tokens, chosen]."""
    picked = [source.sample(range(experts), chosen) for _ in range(tokens)]
    return torch.tensor(picked, dtype=torch.int64).view(tokens, chosen)


def weighted_sum(x: Tensor, experts: Tensor, weights: Tensor, expert) -> Tensor:
    """Equation 12's sum where nothing travels: x [N, d], experts and weights [N, k], expert(e, rows) -> [N, d]."""
    y = torch.zeros_like(x)
    for e in experts.unique().tolist():
        token, slot = (experts == e).nonzero(as_tuple=True)
        y.index_add_(0, token, weights[token, slot, None] * expert(e, x[token]))
    return y


# ---- 6.1 ------------------------------------------------------------------------------------------------------------


def sizes_reference(experts: Tensor, rank: int, ranks: int, total: int) -> list[int]:
    zeros = torch.zeros(experts.shape, dtype=torch.float64)
    _, order = fan_out(Tokens(zeros[:, :1], experts, zeros), ranks, total // ranks)
    return order.ends[:-1].diff(prepend=order.ends.new_zeros(1)).tolist()


def sizes_solution(experts, rank, ranks, total):
    hosts = experts // (total // ranks)                    # [N, k]: the rank of each choice
    return [int((hosts == member).any(1).sum()) for member in range(ranks)]


def sizes_by_choice(experts, rank, ranks, total):
    return (experts // (total // ranks)).flatten().bincount(minlength=ranks).tolist()


def sizes_by_expert(experts, rank, ranks, total):
    return experts.flatten().bincount(minlength=total).tolist()


def sizes_without_own(experts, rank, ranks, total):
    return [0 if member == rank else size for member, size in enumerate(sizes_solution(experts, rank, ranks, total))]


def sizes_without_empty(experts, rank, ranks, total):
    return [size for size in sizes_solution(experts, rank, ranks, total) if size]


def sizes_dealt_out(experts, rank, ranks, total):
    return sizes_solution(experts % ranks * (total // ranks), rank, ranks, total)


def crowds(source: random.Random) -> dict[str, tuple]:
    """One rank, never the own one, hosts nobody's expert."""
    cases = {}
    for ranks, here in ((4, source.randint(3, 5)), (3, source.randint(4, 6))):
        empty, own = source.sample(range(ranks), 2)
        experts = choices(source, source.randint(9, 14), (ranks - 1) * here, 3)
        experts = torch.where(experts // here >= empty, experts + here, experts)
        cases[f"{len(experts)} tokens, {ranks} ranks of {here} experts"] = (experts, own, ranks, ranks * here)
    return cases


SIZES = Exercise(
    id="6.1", title="Split sizes: how many rows for whom", stars=1, minutes=20,
    why="these few numbers are what an all-to-all with uneven shares needs, and a wrong one hangs the whole cluster",
    statement="`experts` `[N, k]` holds the experts that the tokens of rank `rank` chose. The `total` experts lie on "
              "`ranks` ranks, in order, equally many on each. One copy of a token goes to each rank that hosts "
              "**any** of its experts. Return a list: how many rows go to each rank. What stays at home counts too: "
              "an all-to-all has a share for its own rank.",
    stub="""def split_sizes(experts, rank, ranks, total):
    \"\"\"experts [N, k] int64, ids from 0 to total - 1. Returns `ranks` whole numbers.\"\"\"
    raise NotImplementedError
""",
    hints=("From an expert to its rank is one division. A token with two experts on a rank sends one copy there.",
           "`hosts = experts // (total // ranks)`; for each rank count the rows in which `hosts == rank` at least "
           "once: `.any(1).sum()`."),
    reference=sizes_reference, solution=sizes_solution, cases=crowds,
    wrong={
        "a row a choice": (sizes_by_choice,
            "This sends a row for each choice. Two experts on one rank share a copy of the token: the rank can use "
            "it twice."),
        "per expert": (sizes_by_expert,
            "This counts for each expert. Sizes are for ranks, which is where the wires go; which expert of the rank "
            "is meant travels with the row."),
        "own rank left out": (sizes_without_own,
            "The own rank is missing. Its share crosses no wire, but it is a share of the exchange: its rows stay "
            "in the list and come back with the others."),
        "empty ranks left out": (sizes_without_empty,
            "A rank that gets nothing is missing here, so all shares behind it go to the wrong rank. Its size is 0."),
        "dealt out": (sizes_dealt_out,
            "This takes experts as dealt out in turn (expert % ranks). They lie in order: rank 0 has the first ones."),
    })


# ---- 6.2 ------------------------------------------------------------------------------------------------------------


class Ranks:
    """What the ranks make of rows that were sent to them: an expert is a matrix, and a rank knows only its own."""

    def __init__(self, matrices: Tensor, here: int):
        self.matrices, self.here = matrices, here

    def __repr__(self) -> str:
        return f"{len(self.matrices) // self.here} ranks with {self.here} experts each, {self.matrices.sum():.6f}"

    def __call__(self, rows: Tensor, experts: Tensor, weights: Tensor, sizes: list[int]) -> Tensor:
        """rows [R, d] with their choices [R, k] and weights [R, k], the first sizes[0] of them for rank 0 and so on.

        Returns one row for each: the weighted sum over those of its choices that the rank hosts.
        """
        host = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes, dtype=torch.int64))[:len(rows)]
        made = torch.zeros_like(rows)
        for row, (rank, chosen, weight) in enumerate(zip(host.tolist(), experts.tolist(), weights.tolist())):
            for e, w in zip(chosen, weight):
                if e // self.here == rank:
                    made[row] += w * (self.matrices[e] @ rows[row])
        return made


def return_reference(x: Tensor, experts: Tensor, weights: Tensor, ranks: int, here: int, work: Ranks) -> Tensor:
    copies, order = fan_out(Tokens(x, experts, weights), ranks, here)
    sizes = order.ends[:-1].diff(prepend=order.ends.new_zeros(1)).tolist()
    host = torch.arange(ranks).repeat_interleave(torch.tensor(sizes))[:, None]
    return fan_in(work(copies.x, copies.experts + host * here, copies.weights, sizes), order)


def return_solution(x, experts, weights, ranks, here, work):
    hosts = experts // here
    token = [(hosts == rank).any(1).nonzero().flatten() for rank in range(ranks)]
    sizes, token = [len(part) for part in token], torch.cat(token)
    made = work(x[token], experts[token], weights[token], sizes)
    return torch.zeros_like(x).index_add(0, token, made)


def return_weighed_twice(x, experts, weights, ranks, here, work):
    return return_solution(x, experts, weights ** 2, ranks, here, work)


def return_in_sent_order(x, experts, weights, ranks, here, work):
    hosts = experts // here
    token = [(hosts == rank).any(1).nonzero().flatten() for rank in range(ranks)]
    sizes, token = [len(part) for part in token], torch.cat(token)
    made = work(x[token], experts[token], weights[token], sizes)
    return torch.zeros_like(x).index_add(0, token.sort().values, made)


def return_by_choice(x, experts, weights, ranks, here, work):
    hosts, order = (experts // here).flatten().sort(stable=True)
    token = order // experts.shape[1]
    made = work(x[token], experts[token], weights[token], hosts.bincount(minlength=ranks).tolist())
    return torch.zeros_like(x).index_add(0, token, made)


def return_without_empty(x, experts, weights, ranks, here, work):
    def skipping(rows, chosen, weight, sizes):
        return work(rows, chosen, weight, [size for size in sizes if size])
    return return_solution(x, experts, weights, ranks, here, skipping)


def return_mean(x, experts, weights, ranks, here, work):
    visited = torch.stack([(experts // here == rank).any(1) for rank in range(ranks)]).sum(0)
    return return_solution(x, experts, weights, ranks, here, work) / visited[:, None]


def journeys(source: random.Random) -> dict[str, tuple]:
    """Several choices on one rank, one rank that nobody wants, weights that do not add up to 1."""
    cases = {}
    for ranks, here, empty in ((4, 3, 1), (3, 4, 0)):
        total, tokens = ranks * here, source.randint(7, 11)
        wanted = torch.tensor([e for e in range(total) if e // here != empty])
        experts = wanted[choices(source, tokens, len(wanted), 4)]
        cases[f"{tokens} tokens, {ranks} ranks of {here} experts, none for rank {empty}"] = (
            normal(source, tokens, 5), experts, 0.2 + normal(source, tokens, 4).abs(), ranks, here,
            Ranks(normal(source, total, 5, 5), here))
    return cases


RETURN = Exercise(
    id="6.2", title="There and back", stars=2, minutes=30,
    why="combine must undo what dispatch did, row by row; a mistake here trains, slowly, to a worse model",
    statement="Send tokens to the ranks of their experts and add up what comes back. "
              "`work(rows, experts, weights, sizes)` is the cluster: it takes rows sorted by rank (`sizes[r]` of them "
              "for rank r), each with all its choices and weights, and returns one row for each, the **weighted** sum "
              "over the choices that the rank hosts. Return `y` `[N, d]`.",
    stub="""def there_and_back(x, experts, weights, ranks, here, work):
    \"\"\"x [N, d], experts and weights [N, k]; rank r hosts the experts from r * here on. Returns [N, d].\"\"\"
    raise NotImplementedError
""",
    hints=("Which token does each sent row belong to? Keep that list: it is all that the way back needs.",
           "For each rank the tokens with any choice there; `torch.cat` them to `token`; send `x[token]`; "
           "`zeros.index_add(0, token, made)`."),
    reference=return_reference, solution=return_solution, cases=journeys, tol=1e-9,
    wrong={
        "weighed twice": (return_weighed_twice,
            "Each weight counts twice here. The ranks have weighed already: what comes back is only added up."),
        "order lost": (return_in_sent_order,
            "The rows come back in the order in which they were sent, sorted by rank; here they are added as if "
            "sorted by token."),
        "a row a choice": (return_by_choice,
            "A token with two experts on a rank is sent there twice here, and each copy brings the sum of both: they "
            "count double. One copy for each rank."),
        "empty rank skipped": (return_without_empty,
            "The rank that gets no rows has no size here, so the rows behind it go to ranks that do not have their "
            "experts."),
        "mean": (return_mean,
            "This takes the mean over the ranks. Equation 12 adds: the weights already add up to what they should."),
    })


# ---- 6.3 ------------------------------------------------------------------------------------------------------------


class Matrices:
    """Experts as matrices: `expert(e, rows)`."""

    def __init__(self, matrices: Tensor):
        self.matrices = matrices

    def __repr__(self) -> str:
        return f"{len(self.matrices)} experts, {self.matrices.sum():.6f}"

    def __call__(self, e: int, rows: Tensor) -> Tensor:
        return rows @ self.matrices[e].T


def hops_reference(x: Tensor, experts: Tensor, weights: Tensor, nodes: int, here: int, expert: Matrices):
    home = torch.zeros(len(x), dtype=torch.int64)
    crossing = traffic.by_node(home, experts // here, Cluster(nodes, 1)).between[0].tolist()
    return weighted_sum(x, experts, weights, expert), crossing, crossing


def hops_solution(x, experts, weights, nodes, here, expert):
    y, there, back = torch.zeros_like(x), [0] * nodes, [0] * nodes
    for node in range(nodes):
        token = (experts // here == node).any(1).nonzero().flatten()
        rows, chosen, weight = x[token], experts[token], weights[token]         # hop 1: one row for each token
        made = torch.zeros_like(rows)
        for e in range(node * here, (node + 1) * here):                          # hop 2, inside the node
            row, slot = (chosen == e).nonzero(as_tuple=True)
            made.index_add_(0, row, weight[row, slot, None] * expert(e, rows[row]))
        y.index_add_(0, token, made)                                             # one row for each token comes back
        there[node] = back[node] = len(token) if node else 0
    return y, there, back


def _choices_by_node(experts, nodes, here):
    return [int((experts // here == node).sum()) if node else 0 for node in range(nodes)]


def hops_by_choice(x, experts, weights, nodes, here, expert):
    y, there, back = hops_solution(x, experts, weights, nodes, here, expert)
    return y, _choices_by_node(experts, nodes, here), back


def hops_without_sum(x, experts, weights, nodes, here, expert):
    y, there, back = hops_solution(x, experts, weights, nodes, here, expert)
    return y, there, _choices_by_node(experts, nodes, here)


def hops_with_own_node(x, experts, weights, nodes, here, expert):
    y, there, back = hops_solution(x, experts, weights, nodes, here, expert)
    own = int((experts < here).any(1).sum())
    return y, [own, *there[1:]], [own, *back[1:]]


def hops_weighed_at_home(x, experts, weights, nodes, here, expert):
    _, there, back = hops_solution(x, experts, weights, nodes, here, expert)
    y = torch.zeros_like(x)
    for node in range(nodes):
        hosted = (experts // here == node).double()
        part, _, _ = hops_solution(x, experts, hosted, nodes, here, expert)
        y += (weights * hosted).sum(1, keepdim=True) * part
    return y, there, back


def hops_with_one_choice(x, experts, weights, nodes, here, expert):
    _, there, back = hops_solution(x, experts, weights, nodes, here, expert)
    host = experts // here
    first = torch.stack([(host[:, :j] != host[:, j:j + 1]).all(1) for j in range(experts.shape[1])], 1)
    y, _, _ = hops_solution(x, experts, weights * first, nodes, here, expert)
    return y, there, back


def routes(source: random.Random) -> dict[str, tuple]:
    """Tokens with several experts on a node, on the home node too."""
    cases = {}
    for nodes, here in ((4, source.randint(4, 6)), (3, source.randint(5, 7))):
        tokens = source.randint(10, 15)
        cases[f"{tokens} tokens, {nodes} nodes of {here} experts, top 5"] = (
            normal(source, tokens, 4), choices(source, tokens, nodes * here, 5), 0.2 + normal(source, tokens, 5).abs(),
            nodes, here, Matrices(normal(source, nodes * here, 4, 4)))
    return cases


HOPS = Exercise(
    id="6.3", title="Two hops", stars=3, minutes=40,
    why="this is what node-limited routing is for: without it the limit bounds nothing that a wire can feel",
    statement="All tokens sit on node 0. A token goes **once** to each node that hosts any of its experts; inside the "
              "node every expert gets it; the weighted results are added up **inside the node**, and one row "
              "returns. Return `(y, there, back)`: the output `[N, d]`, and for each node the rows that cross to it "
              "and back from it (0 for node 0, whose rows cross nothing).",
    stub="""def two_hops(x, experts, weights, nodes, here, expert):
    \"\"\"x [N, d], experts and weights [N, k]; node n hosts experts from n * here on; expert(e, rows) -> rows.\"\"\"
    raise NotImplementedError
""",
    hints=("Take one node at a time. What crosses to it? What happens inside? What is left to cross back?",
           "`token`: those with any choice on the node. `rows = x[token]` crosses. Add `weight * expert(e, rows)` of "
           "all its experts into `made`, as long as `rows`; that crosses back; `y.index_add_(0, token, made)`."),
    reference=hops_reference, solution=hops_solution, cases=routes, tol=1e-9,
    wrong={
        "a row a choice": (hops_by_choice,
            "A row crosses for each chosen expert here. Two experts on one node can share a copy: they are "
            "neighbours."),
        "sum at home": (hops_without_sum,
            "The results cross back one for each expert. Add them up inside the node first: a sum needs no more "
            "room than one of its terms."),
        "own node": (hops_with_own_node,
            "This counts rows on the token's own node. They cross no wire between nodes."),
        "weighed at home": (hops_weighed_at_home,
            "The weights come too late: the sum of a node is unweighted here, and no weight at home can repair it. "
            "Each result is weighed before it is added."),
        "one choice a node": (hops_with_one_choice,
            "The copies are merged, but so are the choices: only one expert of each node works for a token here."),
    })


# ---- 6.4 ------------------------------------------------------------------------------------------------------------


def gradient_reference(grads: Tensor) -> Tensor:
    replicas, ranks = grads.shape[:2]
    return torch.cat([sum(grads[i, j] for i in range(replicas)) for j in range(ranks)]) / (replicas * ranks)


def gradient_solution(grads):
    return grads.mean(0).flatten(0, 1) / grads.shape[1]


def gradient_over_replicas(grads):
    return grads.mean(0).flatten(0, 1)


def gradient_summed(grads):
    return grads.sum(0).flatten(0, 1)


def gradient_over_all(grads):
    return grads.mean((0, 1)).repeat(grads.shape[1], 1)


def gradient_undivided_by_replicas(grads):
    return grads.sum(0).flatten(0, 1) / grads.shape[1]


def slopes(source: random.Random) -> dict[str, tuple]:
    cases = {}
    for replicas, ranks in ((2, 4), (3, source.choice((2, 5)))):
        here = source.randint(2, 3)
        cases[f"{replicas} replicas of {ranks} ranks, {here} experts on each"] = (
            normal(source, replicas, ranks, here, 4),)
    return cases


GRADIENT = Exercise(
    id="6.4", title="The gradient of an expert", stars=2, minutes=25,
    why="averaged like every other parameter, the experts' gradients are EP times too large, and nothing fails",
    statement="Data-parallel training on `replicas` x `ep` ranks. Every rank has its own tokens, and the loss is the "
              "**mean of the losses of all ranks**. Each replica holds all experts once, rank j of it `here` of them. "
              "`grads[i, j]` is what the backward pass leaves on rank j of replica i for its experts: combine's "
              "backward has brought it the slopes of **all** ranks of its replica, each from its own loss. Return the "
              "gradient of the mean loss for every expert, `[ep * here, d]`.",
    stub="""def expert_gradient(grads):
    \"\"\"grads [replicas, ep, here, d]. Returns [ep * here, d], experts in order.\"\"\"
    raise NotImplementedError
""",
    hints=("Over how many losses is the mean taken? How many of them does `grads[i, j]` already hold, added up?",
           "`grads[i, j]` is a sum over the ep losses of its replica. Add the replicas, divide by all "
           "replicas * ep losses, and put the ranks' experts behind each other."),
    reference=gradient_reference, solution=gradient_solution, cases=slopes, tol=1e-9,
    wrong={
        "mean over replicas": (gradient_over_replicas,
            "This is EP times too large. The mean over replicas divides by the ranks that hold the expert; the loss "
            "is a mean over all ranks that sent it tokens."),
        "sum": (gradient_summed,
            "Nothing is divided here: this is the gradient of the sum of all losses, not of their mean."),
        "mean over all ranks": (gradient_over_all,
            "This averages over the ranks of a replica too. They hold different experts, which must not be mixed."),
        "divided by EP alone": (gradient_undivided_by_replicas,
            "Divided by the ranks of a replica, but not by the number of replicas: each of them adds as many losses."),
    })


# ---- 6.5 ------------------------------------------------------------------------------------------------------------


def place_reference(load: list[int], slots: int, gpus: int) -> list[list[int]]:
    placed = rebalance_experts(torch.tensor([load]), slots, groups=1, nodes=1, gpus=gpus)
    return [sorted(held) for held in placed.phy2log[0].view(gpus, -1).tolist()]


def replicate(load, slots, worth):
    """Copies of each expert: one, and the others one by one to whoever `worth(load, copies)` finds largest."""
    copies = [1] * len(load)
    while sum(copies) < slots:
        copies[max(range(len(load)), key=lambda e: worth(load[e], copies[e]))] += 1
    return copies


def pack(weights, copies, gpus, room):
    """From the heaviest slot on, each to the lightest GPU with fewer than `room`; weights of one slot."""
    held, carried = [[] for _ in range(gpus)], [0.0] * gpus
    slots = [e for e, count in enumerate(copies) for _ in range(count)]
    for e in sorted(slots, key=lambda e: -weights[e]):
        gpu = min((g for g in range(gpus) if len(held[g]) < room), key=lambda g: carried[g])
        held[gpu].append(e)
        carried[gpu] += weights[e]
    return [sorted(part) for part in held]


def place_solution(load, slots, gpus, worth=lambda weight, copies: weight / copies):
    copies = replicate(load, slots, worth)
    return pack([weight / count for weight, count in zip(load, copies)], copies, gpus, slots // gpus)


def place_by_largest_load(load, slots, gpus):
    return place_solution(load, slots, gpus, lambda weight, copies: weight)


def place_by_next_share(load, slots, gpus):
    return place_solution(load, slots, gpus, lambda weight, copies: weight / (copies + 1))


def place_unequal_counts(load, slots, gpus):
    copies = replicate(load, slots, lambda weight, count: weight / count)
    return pack([weight / count for weight, count in zip(load, copies)], copies, gpus, slots)


def place_whole_loads(load, slots, gpus):
    copies = replicate(load, slots, lambda weight, count: weight / count)
    return pack(load, copies, gpus, slots // gpus)


def place_in_turn(load, slots, gpus):
    copies = replicate(load, slots, lambda weight, count: weight / count)
    held = [e for e, count in enumerate(copies) for _ in range(count)]
    order = sorted(held, key=lambda e: -load[e] / copies[e])
    return [sorted(order[gpu::gpus]) for gpu in range(gpus)]


def crowded_loads(source: random.Random) -> dict[str, tuple]:
    """From hardly wanted to wanted by most: each expert gets about 1.7 times the load of the one before."""
    cases = {}
    for experts, slots, gpus in ((10, 18, 3), (13, 24, 4)):
        load = [round(20 * 1.7 ** i * source.uniform(0.8, 1.2)) for i in range(experts)]
        source.shuffle(load)
        cases[f"{experts} experts in {slots} slots on {gpus} GPUs"] = (load, slots, gpus)
    return cases


PLACE = Exercise(
    id="6.5", title="EPLB: copy greedily, pack greedily", stars=2, minutes=25,
    why="two loops of four lines keep the fullest GPU of a serving unit within a few per cent of the mean",
    statement="Place experts on `gpus` GPUs with `slots` slots, equally many on each. (1) Every expert has a slot. "
              "Give the other slots away one by one, each to the expert whose load **for each copy that it has** is "
              "largest. (2) A copy carries its share of the expert's load. From the heaviest copy to the lightest, "
              "put each on the GPU that carries least so far and still has a free slot. Ties go to the lower number. "
              "Return for each GPU the sorted list of its experts.",
    stub="""def place(load, slots, gpus):
    \"\"\"load: a list of whole numbers, one an expert. Returns `gpus` sorted lists of expert ids.\"\"\"
    raise NotImplementedError
""",
    hints=("Which number says who suffers most *now*: the load, the load over the copies it has, or over one more?",
           "`max(range(E), key=lambda e: load[e] / copies[e])` until the slots are gone. Then sort the slots by "
           "`-load[e] / copies[e]` and use `min` over the GPUs with fewer than `slots // gpus`."),
    reference=place_reference, solution=place_solution, cases=crowded_loads,
    wrong={
        "largest load": (place_by_largest_load,
            "All copies go to the expert with the largest load, however many share it already. Look at the load for "
            "each copy."),
        "next share": (place_by_next_share,
            "This asks who would have most **after** one more copy. The fullest GPU hurts now: divide by the copies "
            "that there are."),
        "unequal counts": (place_unequal_counts,
            "GPUs hold different numbers of experts here. Each has the same number of slots: memory is shared out "
            "before load."),
        "whole loads": (place_whole_loads,
            "A copy is packed with the whole load of its expert here. Its copies share that load."),
        "in turn": (place_in_turn,
            "The copies are dealt out in turn, whatever the GPUs carry already. Take the lightest."),
    })


# ---- 6.6 ------------------------------------------------------------------------------------------------------------


def most_reference(limit: int, between: float, inside: float) -> float:
    return limit * inside / between


def most_solution(limit, between, inside):
    return limit * (inside / between)


def most_for_one_node(limit, between, inside):
    return inside / between


def most_upside_down(limit, between, inside):
    return limit * between / inside


def most_added(limit, between, inside):
    return limit + inside / between


def most_rows(limit, between, inside):
    return float(limit)


def wires(source: random.Random) -> dict[str, tuple]:
    """The report's wires, and two others."""
    cases = {"4 nodes, 50 and 160 GB/s": (4, 50e9, 160e9)}
    for _ in range(2):
        limit, between, ratio = source.randint(2, 7), source.randint(20, 120), source.choice((2.5, 3.5, 5.25))
        cases[f"{limit} nodes, {between} and {between * ratio:g} GB/s"] = (limit, between * 1e9, between * ratio * 1e9)
    return cases


MOST = Exercise(
    id="6.6", title="Thirteen experts for the price of eight", stars=1, minutes=10,
    why="the report says that V3 could use up to 13 experts a token without more communication; here is its reason",
    statement="A token may visit `limit` nodes. It crosses once to each, over wires of `between` bytes a second, and "
              "is handed on inside each node over wires of `inside` bytes a second, a row for each expert. How many "
              "experts can a token use before the wires inside take longer than those between? Return the exact "
              "number, without rounding.",
    stub="""def most_experts(limit, between, inside):
    \"\"\"limit: a whole number; between, inside: bytes a second. Returns a float.\"\"\"
    raise NotImplementedError
""",
    hints=("While one row crosses, how many can be handed on?", "inside / between of them, in each of `limit` nodes."),
    reference=most_reference, solution=most_solution, cases=wires, tol=1e-9,
    wrong={
        "one node": (most_for_one_node, "This is the number for one node. A token may visit `limit` of them."),
        "upside down": (most_upside_down,
            "The ratio is upside down: wires inside are the faster ones, so more rows fit there, not fewer."),
        "added": (most_added, "The ratio holds in each node, so the two numbers are multiplied, not added."),
        "one each": (most_rows,
            "This hands on one row for each that arrives. Wires inside are faster: several fit into the time of one."),
    })


# ---- 6.7 ------------------------------------------------------------------------------------------------------------


def exchange_reference(x, experts, weights, here, expert):
    return [weighted_sum(*of_a_rank, expert) for of_a_rank in zip(x, experts, weights, strict=True)]


def _exchange_with(change):
    """The right exchange after `change(x, experts, weights, here)` has spoilt the weights."""
    def exchange(x, experts, weights, here, expert):
        return exchange_reference(x, experts, change(x, experts, weights, here), here, expert)
    return exchange


def _without_own_rank(x, experts, weights, here):
    return [w * (chosen // here != rank) for rank, (chosen, w) in enumerate(zip(experts, weights))]


def _twice(x, experts, weights, here):
    return [w ** 2 for w in weights]


def _one_choice_a_rank(x, experts, weights, here):
    host = [chosen // here for chosen in experts]
    return [w * torch.stack([(h[:, :j] != h[:, j:j + 1]).all(1) for j in range(h.shape[1])], 1)
            for h, w in zip(host, weights)]


def _choices_count_again(x, experts, weights, here):
    host = [chosen // here for chosen in experts]
    return [w * (h[:, :, None] == h[:, None]).sum(2) for h, w in zip(host, weights)]


def _capacity(x, experts, weights, here):
    """Drops what comes after twice the mean load of an expert, as layers with a capacity factor of 2 do."""
    flat = torch.cat([chosen.flatten() for chosen in experts])
    total = int(flat.max()) + 1
    seen, kept = Counter(), []
    for e in flat.tolist():
        kept.append(seen[e] < 2 * len(flat) / total)
        seen[e] += 1
    masks = torch.tensor(kept).split([chosen.numel() for chosen in experts])
    return [w * mask.view(w.shape) for w, mask in zip(weights, masks)]


def _as_many_as_rank_0(x, experts, weights, here):
    return [w * (torch.arange(len(w)) < len(x[0]))[:, None] for w in weights]


exchange_without_own_rank = _exchange_with(_without_own_rank)
exchange_weighed_twice = _exchange_with(_twice)
exchange_one_choice_a_rank = _exchange_with(_one_choice_a_rank)
exchange_counting_again = _exchange_with(_choices_count_again)
exchange_with_capacity = _exchange_with(_capacity)
exchange_equal_counts = _exchange_with(_as_many_as_rank_0)


def exchange_in_sent_order(x, experts, weights, here, expert):
    """Rows come back sorted by the rank of an expert, here the last one, and nobody sorts them back."""
    right = exchange_reference(x, experts, weights, here, expert)
    return [y[(chosen[:, -1] // here).argsort(stable=True)] for y, chosen in zip(right, experts)]


def exchanges(source: random.Random) -> dict[str, tuple]:
    """Ranks with different numbers of tokens, a popular expert, several choices on one rank."""
    cases = {}
    for counts in ((6, 9, 0, 12), (5, 11)):
        here = source.randint(3, 4)
        total = here * len(counts)
        experts = [choices(source, count, total, 3) for count in counts]
        for chosen in experts:
            popular = (chosen != 1).all(1)
            chosen[popular, 0] = 1
        cases[f"{counts} tokens, {here} experts on each rank"] = (
            [normal(source, count, 4) for count in counts], experts,
            [0.2 + normal(source, count, 3).abs() for count in counts], here, Matrices(normal(source, total, 4, 4)))
    return cases


def exchange_test(exchange):
    torch.manual_seed(6)
    ranks, here, d, k = 3, 4, 5, 4
    matrices = torch.randn(ranks * here, d, d, dtype=torch.float64)
    counts = (4, 9, 7)
    x = [torch.randn(count, d, dtype=torch.float64) for count in counts]
    experts = [torch.stack([torch.randperm(ranks * here)[:k] for _ in range(count)]) for count in counts]
    for chosen in experts:
        chosen[(chosen != 2).all(1), 0] = 2
    weights = [0.1 + torch.rand(count, k, dtype=torch.float64) for count in counts]
    got = exchange(x, experts, weights, here, lambda e, rows: rows @ matrices[e].T)
    for rows, chosen, weight, y in zip(x, experts, weights, got, strict=True):
        for i in range(len(rows)):
            want = sum(weight[i, j] * (matrices[chosen[i, j]] @ rows[i]) for j in range(k))
            assert torch.allclose(y[i], want, rtol=0, atol=1e-10)


EXCHANGES = Mutants(
    id="6.7", title="Kill the mutants: seven exchanges", stars=2, minutes=20,
    why="each of these returns rows of the right shape; a test with even loads and equal ranks passes most of them",
    statement="Write a test for `exchange(x, experts, weights, here, expert)`. `x`, `experts` and `weights` are lists "
              "with an entry for each rank: `[N_r, d]`, `[N_r, k]`, `[N_r, k]`. Rank r hosts the experts from "
              "r * `here` on; `expert(e, rows)` is expert e. It returns a list: for each rank the weighted sums "
              "`[N_r, d]` of its tokens. Your test is run against the right one and seven wrong ones.",
    stub="""def exchange_test(exchange):
    \"\"\"Asserts that exchange(x, experts, weights, here, expert) is right.\"\"\"
    raise NotImplementedError
""",
    hints=("What would hide a fault? One token a rank, one expert a token, equal weights, even loads, experts that "
           "all do the same.",
           "Different numbers of tokens on the ranks, 3 or 4 choices, an expert that everybody wants, weights that "
           "are not 1, a matrix for each expert. Compute what is right token by token."),
    reference=exchange_reference, solution=exchange_test, cases=exchanges,
    wrong={
        "own rank left out": (exchange_without_own_rank,
            "It forgets what need not travel: experts on the token's own rank. Let tokens choose at home too."),
        "weighed twice": (exchange_weighed_twice,
            "It weighs on the way out and on the way back: weights of 0 or 1 cannot show that."),
        "order lost": (exchange_in_sent_order,
            "Its rows come back in the order of the ranks they visited: only several tokens on a rank, each with its "
            "own value, can show that."),
        "one choice a rank": (exchange_one_choice_a_rank,
            "It merges copies and choices: a token with two experts on one rank gets only the first."),
        "counted again": (exchange_counting_again,
            "It sends a copy for each choice, and each brings the whole sum of its rank: again two experts on one "
            "rank are needed."),
        "capacity": (exchange_with_capacity,
            "It drops tokens beyond twice an expert's mean load. V3 drops none; an expert that everybody wants "
            "shows it."),
        "equal counts": (exchange_equal_counts,
            "It believes that every rank has as many tokens as rank 0."),
    })


EXERCISES = (SIZES, RETURN, HOPS, GRADIENT, PLACE, MOST, EXCHANGES)


# ---- questions ------------------------------------------------------------------------------------------------------


QUESTIONS = {
    "06.limit": Question(
        "The router lets a token choose 8 experts on at most 4 of 8 nodes. How many rows does a token send to other "
        "nodes, if nothing else is changed?",
        (Option("at most 4", "the limit is on nodes. A dispatch that sends a row for each expert still sends 7.0."),
         Option("3.5 on average", "that needs a dispatch that merges: one row a node, handed on inside."),
         Option("7 on average, as before",
                "the limit alone changes where experts are, not how many rows are sent: 6.99 counted.")), 2),
    "06.sum": Question(
        "Two hops: three experts of a node have worked for a token. What crosses back?",
        (Option("three rows, weighed at home", "they can be weighed and added before they cross: a sum is one row."),
         Option("one row: their weighted sum",
                "the weights travel with the token, so the node can add before it answers."),
         Option("one row: their mean", "equation 12 is a sum; the weights are already normalised.")), 1),
    "06.ranks": Question(
        "The same layer is spread over 64 GPUs instead of 8. What happens to the bytes that a token sends?",
        (Option("they fall, because the work is shared by more", "the work is; the token has as many experts."),
         Option("they rise, until every expert is elsewhere",
                "the more GPUs, the fewer of a token's experts are at home, and the fewer share a GPU."),
         Option("they stay", "only once nearly every expert is elsewhere anyway.")), 1),
    "06.fullest": Question(
        "64 GPUs share a layer. One of them gets twice the mean number of rows. How long do the experts take?",
        (Option("1/64 longer", "all others wait for that GPU at the next exchange."),
         Option("twice as long as with even loads", "a step takes as long as its fullest GPU."),
         Option("as long as with even loads, the sum is the same", "the sum is; the wait is not.")), 1),
    "06.copies": Question(
        "One of 256 experts gets 16 % of all choices; 64 GPUs hold 4 experts each. Is rearranging enough?",
        (Option("yes, the greedy packing finds a GPU for it",
                "whatever else that GPU holds, this expert alone is ten times a GPU's share of 1.6 %."),
         Option("no, it needs copies", "no placement of single experts is better than its largest expert."),
         Option("no placement helps", "copies on other GPUs share its load.")), 1),
    "06.training": Question(
        "The bias of chapter 02 has balanced the experts in training. Does serving need EPLB?",
        (Option("no, loads are even", "even over the batches of training. A text is about something."),
         Option("yes, because users' texts are no sample of training",
                "section 6: nano's experts, balanced in training, load the fullest of 8 GPUs with up to 2 times the "
                "mean on one kind of text."),
         Option("yes, because inference has no bias", "the bias is stored and still chooses.")), 1),
    "06.gradient": Question(
        "Experts lie on EP = 64 ranks, with 2 replicas. The loss is the mean over 128 ranks. What divides the sum of "
        "an expert's gradients over its 2 replicas?",
        (Option("2, the ranks that hold it",
                "then it is 64 times too large: each replica adds the slopes of 64 losses."),
         Option("64", "that forgets that the two replicas add as well."),
         Option("128, the ranks whose losses are averaged",
                "who computes does not matter, only over what the mean is.")), 2),
    "06.decode": Question(
        "In V3's decoding unit each GPU has one expert. If arithmetic and exchange overlap fully, what limits the "
        "tokens a second of one request?",
        (Option("the arithmetic of 37 B parameters",
                "it is spread over 320 GPUs and takes less time than the exchange."),
         Option("the wires: 61 layers, there and back",
                "120.96 us a layer and micro-batch at 50 GB/s, so 14.76 ms a token: 67 a second at most."),
         Option("the router", "a product with 256 rows, for 32 tokens.")), 1),
}
