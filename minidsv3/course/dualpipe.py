"""Chapter 07: orders of a pipeline, what they cost, and what two copies of a stage owe each other (section 3.2.1).

Actions are written as in `parallel.schedule`: `Fa3` is the forward of micro-batch 3 of direction a, `Fa3&Bb1` a block.
"""

import random
from collections.abc import Callable

import torch
from torch import Tensor

from ..layers import Linear
from ..parallel import schedule
from ..parallel.schedule import Action, Overlapped
from ..parallel.simulate import simulate
from ..weight_gradients import defer_weight_gradients
from .exercise import Exercise, Mutants
from .predict import Option, Question


def normal(source: random.Random, *shape: int) -> Tensor:
    """Float64 numbers from N(0, 1) that follow from `source`."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(source.getrandbits(32)), dtype=torch.float64)


# ---- 7.1 ------------------------------------------------------------------------------------------------------------


def idle_reference(ranks: int, micro_batches: int, forward: float, backward: float) -> float:
    return simulate(schedule.one_f_one_b(ranks, micro_batches), forward, backward, 0).idle[0]


def idle_solution(ranks, micro_batches, forward, backward):
    return (ranks - 1) * (forward + backward)


def idle_as_share(ranks, micro_batches, forward, backward):
    return (ranks - 1) / (micro_batches + ranks - 1)


def idle_a_micro_batch(ranks, micro_batches, forward, backward):
    return (ranks - 1) * (forward + backward) * micro_batches


def idle_of_the_way_in(ranks, micro_batches, forward, backward):
    return (ranks - 1) * forward


def idle_of_every_rank(ranks, micro_batches, forward, backward):
    return ranks * (forward + backward)


def pipelines(source: random.Random) -> dict[str, tuple]:
    cases = {}
    for ranks in (4, source.randint(5, 9)):
        micro_batches = 2 * ranks + source.randint(1, 9)
        forward, backward = source.randint(10, 40) / 10, source.randint(50, 90) / 10
        words = f"{ranks} ranks, {micro_batches} micro-batches, F = {forward}, B = {backward}"
        cases[words] = (ranks, micro_batches, forward, backward)
    return cases


IDLE = Exercise(
    id="7.1", title="How long does a rank of 1F1B wait?", stars=1, minutes=15,
    why="the bubble is the price of a pipeline, and half of all talk about it confuses a time with a share",
    statement="Return how many units of **time** each rank of a 1F1B pipeline is idle during one step, from the first "
              "forward to the last backward. Handing over takes no time.",
    stub="""def idle(ranks, micro_batches, forward, backward):
    \"\"\"forward and backward: time of one micro-batch in one stage. Returns a time.\"\"\"
    raise NotImplementedError
""",
    hints=("Look at the last rank: when does its first forward begin, and what happens after its last backward?",
           "The first micro-batch passes P - 1 stages before the last rank can start. The last gradient passes P - 1 "
           "stages after the last rank is done. In between the last rank never waits."),
    reference=idle_reference, solution=idle_solution, cases=pipelines, tol=1e-9,
    wrong={
        "a share": (idle_as_share,
            "This is the share of the step that is idle, (P - 1) / (M + P - 1). Asked is the time: no M in it."),
        "times micro-batches": (idle_a_micro_batch,
            "This grows with the number of micro-batches. A pipeline fills once and drains once a step, not once a "
            "micro-batch: that is why more micro-batches make the share smaller."),
        "only the way in": (idle_of_the_way_in,
            "This counts the filling and forgets the draining: gradients have to come back through P - 1 stages."),
        "P for P - 1": (idle_of_every_rank,
            "This waits for P stages. The last rank waits for the P - 1 before it, not for itself."),
    })


# ---- 7.2 ------------------------------------------------------------------------------------------------------------


def order_reference(rank: int, ranks: int, micro_batches: int) -> list[str]:
    return list(map(str, schedule.one_f_one_b(ranks, micro_batches)[rank]))


def order_solution(rank, ranks, micro_batches, ahead=lambda rank, ranks: ranks - rank - 1):
    first = ahead(rank, ranks)
    order = [f"Fa{m}" for m in range(first)]
    for m in range(micro_batches - first):
        order += [f"Fa{first + m}", f"Ba{m}"]
    return order + [f"Ba{m}" for m in range(micro_batches - first, micro_batches)]


def order_one_ahead_more(rank, ranks, micro_batches):
    return order_solution(rank, ranks, micro_batches, lambda rank, ranks: ranks - rank)


def order_from_the_other_end(rank, ranks, micro_batches):
    return order_solution(rank, ranks, micro_batches, lambda rank, ranks: rank)


def order_all_forwards_first(rank, ranks, micro_batches):
    return order_solution(rank, ranks, micro_batches, lambda rank, ranks: micro_batches)


def order_last_gradient_first(rank, ranks, micro_batches):
    forwards = iter(range(micro_batches))
    backwards = iter(reversed(range(micro_batches)))
    return [f"Fa{next(forwards)}" if action[0] == "F" else f"Ba{next(backwards)}"
            for action in order_solution(rank, ranks, micro_batches)]


def places(source: random.Random) -> dict[str, tuple]:
    """A rank at the start, one in the middle that is not its own mirror image, and one near the end."""
    ranks = source.randint(5, 7)
    micro_batches = ranks + source.randint(2, 5)
    return {f"rank {rank} of {ranks}, {micro_batches} micro-batches": (rank, ranks, micro_batches)
            for rank in (0, 1, ranks - 2)}


ORDER = Exercise(
    id="7.2", title="Write 1F1B", stars=2, minutes=25,
    why="one forward too many is one micro-batch of activations too many, and no test of values ever sees it",
    statement="Return what a rank of 1F1B does, in order, as strings: `Fa3` for a forward, `Ba3` for a whole backward. "
              "Rank r runs as few forwards ahead as keep the last rank busy.",
    stub="""def order(rank, ranks, micro_batches):
    \"\"\"A list of strings, for example ["Fa0", "Ba0", "Fa1", "Ba1"] for the last rank and 2 micro-batches.\"\"\"
    raise NotImplementedError
""",
    hints=("How many forwards has rank 0 done when the first micro-batch reaches the last rank? And rank r?",
           "P - r - 1 forwards ahead. Then one forward and one backward in turn, until forwards run out. Then the "
           "backwards that are left. Both are numbered from 0."),
    reference=order_reference, solution=order_solution, cases=places,
    wrong={
        "one ahead more": (order_one_ahead_more,
            "This runs P - r forwards ahead. The next action is a forward anyway, so P - r - 1 are enough; with one "
            "more every rank holds the activations of one micro-batch more, and nothing gets faster."),
        "from the other end": (order_from_the_other_end,
            "This runs r forwards ahead. It is the first rank that has most to send before anything comes back."),
        "all forwards first": (order_all_forwards_first,
            "This runs all forwards and then all backwards (GPipe). It takes the same time and holds all M "
            "micro-batches at once; 1F1B frees each as early as it can."),
        "last gradient first": (order_last_gradient_first,
            "Backwards come last in, first out here. Micro-batches keep their order in a pipeline: the one that "
            "entered first is the first whose loss is known."),
    })


# ---- 7.3 ------------------------------------------------------------------------------------------------------------


def starts_reference(orders: list[list[str]], forward: int, backward: int) -> list[list[int]]:
    """The package's simulator; the whole backward counts as one for the input."""
    actions = [[Action(name[0], "a", int(name[2:]), rank) for name in order] for rank, order in enumerate(orders)]
    return [[span.start for span in rank] for rank in simulate(actions, forward, backward, 0).spans]


def _starts(backward_waits: bool = True, for_end: bool = True, own_rank: bool = True) -> Callable:
    def starts(orders, forward, backward):
        length = {"F": forward, "B": backward}
        began, times = {}, [[] for _ in orders]
        while any(len(done) < len(order) for done, order in zip(times, orders)):
            for rank, order in enumerate(orders):
                if len(times[rank]) == len(order):
                    continue
                name = order[len(times[rank])]
                source = rank - 1 if name[0] == "F" else rank + 1
                needs = [(source, name)] if 0 <= source < len(orders) and (name[0] == "F" or backward_waits) else []
                if own_rank and times[rank]:
                    needs.append((rank, order[len(times[rank]) - 1]))
                if name[0] == "B":
                    needs.append((rank, "F" + name[1:]))
                if all(need in began for need in needs):
                    ready = [began[need] + (length[need[1][0]] if for_end or need[0] == rank else 0) for need in needs]
                    began[rank, name] = max(ready, default=0)
                    times[rank].append(began[rank, name])
        return times
    return starts


def starts_solution(orders, forward, backward):
    length, end, starts = {"F": forward, "B": backward}, {}, [[] for _ in orders]
    while sum(map(len, starts)) < sum(map(len, orders)):
        for rank, order in enumerate(orders):
            if len(starts[rank]) == len(order):
                continue
            action = order[len(starts[rank])]
            needs = [(rank, before) for before in order[:len(starts[rank])]]       # the rank itself must be free
            source = rank - 1 if action[0] == "F" else rank + 1
            if 0 <= source < len(orders):
                needs.append((source, action))
            if all(need in end for need in needs):
                start = max((end[need] for need in needs), default=0)
                starts[rank].append(start)
                end[rank, action] = start + length[action[0]]
    return starts


starts_without_gradient = _starts(backward_waits=False)
starts_before_the_end = _starts(for_end=False)
starts_on_busy_ranks = _starts(own_rank=False)


def starts_in_step(orders, forward, backward):
    """Every slot as long as the longest action."""
    slot = max(forward, backward)
    return [[slot * start for start in rank] for rank in starts_solution(orders, 1, 1)]


def small_pipelines(source: random.Random) -> dict[str, tuple]:
    """F and B of different lengths, in 1F1B and with all forwards first."""
    cases = {}
    for name, make in (("1F1B", order_solution), ("all forwards first", order_all_forwards_first)):
        ranks, micro_batches = source.randint(3, 4), source.randint(5, 7)
        forward, backward = source.randint(2, 4), source.randint(5, 9)
        orders = [make(rank, ranks, micro_batches) for rank in range(ranks)]
        cases[f"{name}, {ranks} ranks, F = {forward}, B = {backward}"] = (orders, forward, backward)
    return cases


STARTS = Exercise(
    id="7.3", title="From orders to a timeline", stars=3, minutes=30,
    why="whoever can compute a timeline never has to believe a picture of one",
    statement="Each rank does its own list of actions, one at a time and in its order, each as early as it can. Stage "
              "r is on rank r. Return when each action starts: one list a rank. `Fa3` needs `Fa3` of the rank before, "
              "`Ba3` needs `Ba3` of the rank behind, and the last rank's `Ba3` its own `Fa3`.",
    stub="""def starts(orders, forward, backward):
    \"\"\"orders: one list of strings a rank, as in 7.2. Returns lists of numbers of the same lengths.\"\"\"
    raise NotImplementedError
""",
    hints=("Go round the ranks. Which actions can be placed now? When nothing is left, you are done.",
           "Keep a dictionary (rank, action) -> end. A rank's next action can be placed if everything that it needs "
           "has an end; it starts at the largest of those ends and of the rank's own last end."),
    reference=starts_reference, solution=starts_solution, cases=small_pipelines, tol=1e-9,
    wrong={
        "no gradient from behind": (starts_without_gradient,
            "Backwards start here without the gradient of the rank behind. Only the last rank has the loss."),
        "before the end": (starts_before_the_end,
            "An action starts here as soon as the one it needs has *started* on the other rank. It needs its result, "
            "so it waits for the end."),
        "a rank that does two things": (starts_on_busy_ranks,
            "A rank does several things at once here: an action must also wait for the one before it in its order."),
        "in step": (starts_in_step,
            "All ranks go in step here, in slots as long as the longest action. Nobody rings a bell: a rank goes on as "
            "soon as its input is there."),
    })


# ---- 7.4 ------------------------------------------------------------------------------------------------------------


def counts_reference(rank: int, ranks: int, micro_batches: int) -> tuple[int, int]:
    order = schedule.dualpipe(ranks, micro_batches)[rank]
    own = order[0].direction
    alone = next(i for i, action in enumerate(order) if action.direction != own) - 1
    return alone, sum(isinstance(action, Overlapped) for action in order)


def counts_solution(rank, ranks, micro_batches):
    outside, inside = min(rank, ranks - 1 - rank), ranks // 2 - 1 - min(rank, ranks - 1 - rank)
    main = micro_batches // 2 - ranks + outside + 1
    return 2 * inside, 2 * main - (inside == 0) + inside


def counts_of_rank_0(rank, ranks, micro_batches):
    return counts_solution(0, ranks, micro_batches)


def counts_without_mirror(rank, ranks, micro_batches):
    inside = ranks // 2 - 1 - rank
    return 2 * max(inside, 0), 2 * (micro_batches // 2 - ranks + rank + 1) - (inside == 0) + max(inside, 0)


def counts_with_the_middle_pair(rank, ranks, micro_batches):
    alone, blocks = counts_solution(rank, ranks, micro_batches)
    return alone, blocks + (alone == 0)


def counts_without_step_5(rank, ranks, micro_batches):
    alone, blocks = counts_solution(rank, ranks, micro_batches)
    return alone, blocks - alone // 2


def counts_of_all_micro_batches(rank, ranks, micro_batches):
    return counts_solution(rank, ranks, 2 * micro_batches)


def dualpipes(source: random.Random) -> dict[str, tuple]:
    """An outer rank of each half, a middle one, and one between."""
    ranks = source.choice((8, 10, 12))
    micro_batches = 2 * ranks + 2 * source.randint(1, 6)
    return {f"rank {rank} of {ranks}, {micro_batches} micro-batches": (rank, ranks, micro_batches)
            for rank in (0, 1, ranks // 2, ranks - 1)}


COUNTS = Exercise(
    id="7.4", title="DualPipe: who overlaps how often", stars=3, minutes=30,
    why="blocks are what the exchange hides in, and what an outer rank cannot hide the inner ones wait for",
    statement="Return two counts for one rank of DualPipe: how many forwards of its own direction it runs before it "
              "alternates between both directions (step 1), and how many F&B blocks it has in all (steps 4 and 5). "
              "With h = min(r, P-1-r) and n = P/2, step 1 has 2(n-h-1) forwards, step 4 has M/2-P+h+1 turns of two "
              "blocks, step 5 has n-h-1 of one; in the middle (h = n-1) the very first pair of step 4 is not "
              "overlapped.",
    stub="""def counts(rank, ranks, micro_batches):
    \"\"\"micro_batches: over both directions. Returns (forwards of step 1, blocks).\"\"\"
    raise NotImplementedError
""",
    hints=("Ranks r and P-1-r do the same. Count for h, the distance from the outside.",
           "(2 (n-h-1), 2 (M/2-P+h+1) + (n-h-1)), and one block less if h = n-1. Figure 5 has 8 ranks and 20 "
           "micro-batches: 9, 10, 11, 11, 11, 11, 10, 9 blocks."),
    reference=counts_reference, solution=counts_solution, cases=dualpipes,
    wrong={
        "all as rank 0": (counts_of_rank_0,
            "All ranks have rank 0's counts here. In figure 5 they have 9, 10, 11, 11, 11, 11, 10, 9 blocks: the "
            "further inside, the sooner both directions are at hand."),
        "no mirror": (counts_without_mirror,
            "The second half is not mirrored here: for direction b rank P-1 is the first. Use h = min(r, P-1-r)."),
        "the middle overlaps all": (counts_with_the_middle_pair,
            "The middle ranks overlap their first pair here. They run it as F and then B: the backward comes late if "
            "I > F, and the forward need not wait for it."),
        "without step 5": (counts_without_step_5,
            "Step 5 is missing: when no new micro-batch enters, the other direction's forwards still meet backwards."),
        "M a direction": (counts_of_all_micro_batches,
            "This takes M for each direction. M is the total; each direction has half."),
    })


# ---- 7.5 ------------------------------------------------------------------------------------------------------------


def deferred_reference(order: list[str], weight: Tensor, x: Tensor, slope: Tensor) -> list[Tensor]:
    """The package's store, driven as a pipeline's stage drives it."""
    layer = Linear(weight.shape[1], weight.shape[0]).double()
    layer.weight.data.copy_(weight)
    store, outputs = defer_weight_gradients(layer), [layer(part) for part in x]
    waiting, seen = [], []
    for action in order:
        if action[0] == "I":
            chunk = int(action[1:])
            outputs[chunk].backward(slope[chunk])
            waiting.append(store.take())
        else:
            waiting.pop(0)()
            seen.append(layer.weight.grad.clone())
    return seen


def deferred_solution(order, weight, x, slope, take=0, drop=False, twice=False):
    waiting, gradient, seen = [], torch.zeros_like(weight), []
    for action in order:
        if action[0] == "I":
            chunk = int(action[1:])
            waiting.append(chunk)
            if twice:
                gradient = gradient + slope[chunk].T @ x[chunk]
        else:
            chunk = waiting.pop(take)
            if not (drop and not waiting):
                gradient = gradient + slope[chunk].T @ x[chunk]
            seen.append(gradient)
    return seen


def deferred_last_in_first_out(order, weight, x, slope):
    return deferred_solution(order, weight, x, slope, take=-1)


def deferred_one_dropped(order, weight, x, slope):
    return deferred_solution(order, weight, x, slope, drop=True)


def deferred_twice(order, weight, x, slope):
    return deferred_solution(order, weight, x, slope, twice=True)


def deferred_not_added(order, weight, x, slope):
    total = deferred_solution(order, weight, x, slope)
    return [after - before for before, after in zip([torch.zeros_like(weight), *total], total)]


def deferred_of_the_input(order, weight, x, slope):
    return deferred_solution(order, weight, slope @ weight, slope)


def deferring_orders(source: random.Random) -> dict[str, tuple]:
    """The tail of a DualPipe rank: backwards for the input first, then weights, also in turn."""
    cases = {}
    for waiting in (2, source.randint(3, 4)):
        chunks = waiting + source.randint(2, 3)
        order = [f"I{m}" for m in range(waiting)]
        for m in range(waiting, chunks):
            order += ["W", f"I{m}"]
        order += ["W"] * waiting
        tensors = normal(source, 5, 4), normal(source, chunks, 6, 4), normal(source, chunks, 6, 5)
        cases[f"{chunks} chunks, at most {waiting} waiting"] = (order, *tensors)
    return cases


DEFERRED = Exercise(
    id="7.5", title="Weight gradients that wait", stars=2, minutes=20,
    why="zero-bubble lives from this store, and one forgotten entry is a gradient that is a little too small for ever",
    statement="A stage is one matrix: y = x W^T. Its order has `I3` (backward for the input of chunk 3) and `W` "
              "(backward for the weights of the chunk that waits **longest**). Return the weight's accumulated "
              "gradient after every `W`.",
    stub="""def deferred(order, weight, x, slope):
    \"\"\"weight [out, in], x [chunks, tokens, in], slope = dloss/dy [chunks, tokens, out].
    Returns a list of [out, in], one for each "W" of the order.\"\"\"
    raise NotImplementedError
""",
    hints=("What does W need that I has? x and dloss/dy: keep them, or the chunk's number, until it comes.",
           "At `I3` put 3 into a list. At `W` take the first one out, add slope[m].T @ x[m], and note the sum."),
    reference=deferred_reference, solution=deferred_solution, cases=deferring_orders, tol=1e-9,
    wrong={
        "last in, first out": (deferred_last_in_first_out,
            "This takes the newest chunk. The sum at the end is right; the oldest chunk's activations stay in memory "
            "longer than anyone planned."),
        "one dropped": (deferred_one_dropped,
            "The last chunk's weights never get their gradient. Count: as many W as I."),
        "twice": (deferred_twice,
            "The weight gradient is computed in I, and again in W: whoever splits a backward in two must take it out "
            "of the first half."),
        "not added": (deferred_not_added,
            "Each W replaces the gradient here. Micro-batches of one step add up."),
        "of the input": (deferred_of_the_input,
            "This multiplies the slope with dx instead of x. dW needs what went in, not what comes back."),
    })


# ---- 7.6 ------------------------------------------------------------------------------------------------------------


def copies_reference(weight: Tensor, at_first: tuple, at_last: tuple, lr: float) -> tuple[Tensor, Tensor]:
    """One process, one copy, the whole batch."""
    x, y = (torch.cat(parts) for parts in zip(at_first, at_last))
    learned = weight.clone().requires_grad_()
    sum((row @ learned.T - target).square().mean() for row, target in zip(x, y)).div(len(x)).backward()
    with torch.no_grad():
        stepped = learned - lr * learned.grad
    return stepped, stepped


def copies_solution(weight, at_first, at_last, lr, join=lambda a, b: (a + b, a + b), swap=True):
    (x_a, labels_a), (x_b, labels_b) = at_first, at_last
    batch = len(x_a) + len(x_b)
    if not swap:
        labels_a, labels_b = labels_b, labels_a

    def gradient(x, y):
        return sum(2 * (row @ weight.T - target).T @ row / target.numel() for row, target in zip(x, y)) / batch

    on_last, on_first = gradient(x_a, labels_a), gradient(x_b, labels_b)       # each chain ends at the other end
    for_first, for_last = join(on_first, on_last)
    return weight - lr * for_first, weight - lr * for_last


def copies_averaged(weight, at_first, at_last, lr):
    return copies_solution(weight, at_first, at_last, lr, join=lambda a, b: ((a + b) / 2, (a + b) / 2))


def copies_apart(weight, at_first, at_last, lr):
    return copies_solution(weight, at_first, at_last, lr, join=lambda a, b: (a, b))


def copies_with_own_labels(weight, at_first, at_last, lr):
    return copies_solution(weight, at_first, at_last, lr, swap=False)


def copies_divided_by_half(weight, at_first, at_last, lr):
    return copies_solution(weight, at_first, at_last, lr, join=lambda a, b: (2 * (a + b), 2 * (a + b)))


def two_ends(source: random.Random) -> dict[str, tuple]:
    cases = {}
    for half in (2, source.randint(3, 5)):
        weight = normal(source, 3, 4)
        ends = [(normal(source, half, 5, 4), normal(source, half, 5, 3)) for _ in range(2)]
        cases[f"{half} micro-batches from each end"] = (weight, *ends, source.choice((0.1, 0.3)))
    return cases


COPIES = Exercise(
    id="7.6", title="Two copies of the last stage", stars=2, minutes=20,
    why="the copies start equal, and nothing but this sum keeps them so; the released code leaves it to its caller",
    statement="The last stage is one matrix, y = x W^T, with a copy on rank 0 and one on the last rank. Micro-batches "
              "that enter at rank 0 reach the copy on the **last** rank, and the other way round. The loss is the mean "
              "over all micro-batches (of both ends) of the mean square error. Return both copies after one step of "
              "SGD: (on rank 0, on the last rank).",
    stub="""def copies(weight, at_first, at_last, lr):
    \"\"\"weight [out, in]. at_first = (x, labels) of the micro-batches that enter at rank 0: [half, tokens, in] as they
    reach the last stage, and [half, tokens, out]; at_last the same for those that enter at the last rank.\"\"\"
    raise NotImplementedError
""",
    hints=("Both copies must be what one process with the whole batch would have. Which gradients does that need?",
           "The gradient of one copy: the sum over its micro-batches of 2 (x W^T - y)^T x / y.numel(), over the number "
           "of all micro-batches. Add both copies' gradients, step both with the sum."),
    reference=copies_reference, solution=copies_solution, cases=two_ends, tol=1e-9,
    wrong={
        "mean for sum": (copies_averaged,
            "The gradients are averaged here. Each is already divided by the number of all micro-batches: add them."),
        "one optimiser each": (copies_apart,
            "Each copy steps with its own half of the batch. After one step they are two different models."),
        "labels not swapped": (copies_with_own_labels,
            "Each rank compares with the labels of its own inputs. What arrives at rank 0 entered at the last rank, so "
            "rank 0 needs *those* labels."),
        "divided by half": (copies_divided_by_half,
            "Each copy divides by its own half of the micro-batches. The loss is a mean over all of them."),
    })


# ---- 7.7 ------------------------------------------------------------------------------------------------------------


def refused_reference(batches: list[int], pipelines: int, ranks: int) -> list[int]:
    def refuses(batch: int) -> bool:
        try:
            schedule.dualpipe(ranks, batch // pipelines)
        except ValueError:
            return True
        return False
    return [batch for batch in batches if refuses(batch)]


def refused_solution(batches, pipelines, ranks, least=2):
    return [b for b in batches if b // pipelines < least * ranks or b // pipelines % 2]


def refused_by_the_report(batches, pipelines, ranks):
    return [batch for batch in batches if batch // pipelines % 2]


def refused_by_size_alone(batches, pipelines, ranks):
    return [batch for batch in batches if batch // pipelines < 2 * ranks]


def refused_a_direction(batches, pipelines, ranks):
    return refused_solution(batches, pipelines, ranks, least=4)


def refused_below_p(batches, pipelines, ranks):
    return refused_solution(batches, pipelines, ranks, least=1)


def refused_without_pipelines(batches, pipelines, ranks):
    return refused_solution(batches, 1, ranks)


def ramps(source: random.Random) -> dict[str, tuple]:
    """V3's ramp in steps of 1,536 sequences with steps between that leave odd numbers, and a smaller cluster's."""
    cases = {"3,072 to 15,360 sequences, 128 pipelines of 16 ranks": (
        [*range(3072, 15361, 1536), 128 * (2 * source.randint(20, 50) + 1)], 128, 16)}
    pipelines, ranks = source.randint(3, 9), source.choice((4, 6))
    counts = [ranks - 2, ranks, 2 * ranks - 2, 2 * ranks, 2 * ranks + 1, 4 * ranks - 2, 4 * ranks, 4 * ranks + 3]
    cases[f"{pipelines} pipelines of {ranks} ranks"] = ([count * pipelines for count in counts], pipelines, ranks)
    return cases


REFUSED = Exercise(
    id="7.7", title="Which batches of the ramp are refused?", stars=1, minutes=10,
    why="V3's batch grows from 3,072 to 15,360 sequences, and the schedule that trained it does not take them all",
    statement="A batch is shared evenly by `pipelines` pipelines, one sequence a micro-batch. Return those batch sizes "
              "that the released DualPipe refuses: it wants an even number of micro-batches, at least 2 P.",
    stub="""def refused(batches, pipelines, ranks):
    \"\"\"batches: a list of numbers of sequences, each a multiple of pipelines. Returns the list of refused ones.\"\"\"
    raise NotImplementedError
""",
    hints=("How many micro-batches does one pipeline get from 3,072 sequences, when there are 128 pipelines?",
           "M = batch // pipelines. Refused if M is odd or M < 2 * ranks."),
    reference=refused_reference, solution=refused_solution, cases=ramps,
    wrong={
        "even is enough": (refused_by_the_report,
            "Even is all that the report asks for. The released code also needs M >= 2 P: with 24 micro-batches for 16 "
            "ranks its main part would have a negative number of turns on the outer ranks."),
        "size is enough": (refused_by_size_alone, "An odd number of micro-batches cannot be halved: refused, too."),
        "M a direction": (refused_a_direction, "This wants 2 P from each end. It is 2 P over both directions."),
        "P is enough": (refused_below_p, "P micro-batches fill the pipeline once. DualPipe needs twice as many."),
        "one pipeline": (refused_without_pipelines,
            "This gives the whole batch to one pipeline. There are 2048 / 16 = 128 of them in V3's run."),
    })


# ---- 7.8 ------------------------------------------------------------------------------------------------------------


def actions(orders: list[list[str]]) -> schedule.Orders:
    """Strings of a DualPipe as `simulate` takes them: rank r has stage r of direction a and stage P-1-r of b."""
    def action(name: str, rank: int) -> Action:
        return Action(name[0], name[1], int(name[2:]), rank if name[1] == "a" else len(orders) - 1 - rank)

    def both(name: str, rank: int) -> Action | Overlapped:
        parts = [action(part, rank) for part in name.split("&")]
        return Overlapped(*parts) if len(parts) == 2 else parts[0]

    return [[both(name, rank) for name in order] for rank, order in enumerate(orders)]


def dualpipe_reference(ranks: int, micro_batches: int) -> list[list[str]]:
    return [list(map(str, order)) for order in schedule.dualpipe(ranks, micro_batches)]


def _changed(change: Callable[[list[str], bool, bool], list[str]]) -> Callable:
    """DualPipe with change(order, first, middle) for each rank's order: is it rank 0's, is it a middle rank's?"""
    return lambda ranks, micro_batches: [
        change(order, rank == 0, rank in (ranks // 2 - 1, ranks // 2))
        for rank, order in enumerate(dualpipe_reference(ranks, micro_batches))]


def _newest_weights_first(order: list[str], first: bool, middle: bool) -> list[str]:
    tail = next(i for i in range(len(order), 0, -1) if order[i - 1][0] != "W")
    return order[:tail] + order[tail:][::-1]


def _middle_overlaps_all(order: list[str], first: bool, middle: bool) -> list[str]:
    at = next(i for i, action in enumerate(order) if action[0] == "B") if middle else len(order)
    return order[:at - 1] + [f"{order[at - 1]}&{order[at]}"] + order[at + 1:] if middle else order


def _one_backward_late(order: list[str], first: bool, middle: bool) -> list[str]:
    """Rank 0 runs one forward more before its first backward."""
    at = next(i for i, action in enumerate(order) if action[0] == "I")
    return order[:at] + [order[at + 2], order[at], order[at + 1]] + order[at + 3:] if first else order


dualpipe_without_a_weight = _changed(lambda order, first, middle: order[:-1] if first else order)
dualpipe_newest_weights_first = _changed(_newest_weights_first)
dualpipe_nothing_overlapped = _changed(lambda order, first, middle: "&".join(order).split("&"))
dualpipe_weights_at_once = _changed(lambda order, first, middle: [
    action.replace("I", "B") for action in order if action[0] != "W"])
dualpipe_middle_overlaps_all = _changed(_middle_overlaps_all)
dualpipe_one_backward_late = _changed(_one_backward_late)


def dualpipe_without_mirror(ranks, micro_batches):
    half = dualpipe_reference(ranks, micro_batches)[:ranks // 2]
    return half + half[::-1]


def dualpipe_test(dualpipe):
    orders = dualpipe(8, 20)
    for order in orders:
        parts = [part for action in order for part in action.split("&")]
        did = sorted(kind + part[1:] for part in parts for kind in part[0].replace("B", "IW"))
        assert did == sorted(f"{kind}{way}{m}" for kind in "FIW" for way in "ab" for m in range(10))
        waited = {kind: [part[1:] for part in parts if part[0] == kind] for kind in "IW"}
        assert waited["I"] == waited["W"]
    assert [sum("&" in action for action in order) for order in orders] == [9, 10, 11, 11, 11, 11, 10, 9]
    timeline = simulate(actions(orders))
    assert timeline.makespan == 66 and timeline.in_flight == [9] * 8


ORDERS = Mutants(
    id="7.8", title="Kill the mutants: seven DualPipes", stars=2, minutes=20,
    why="five of these seven give the right gradients; they cost memory or time, which no loss curve shows",
    statement="Write a test for `dualpipe(ranks, micro_batches)`, which returns one list of strings a rank, as in 7.2 "
              "with blocks like `Fa3&Bb1`. It is run against the package's, which it must spare, and against seven "
              "wrong ones. `minidsv3.course.dualpipe.actions` turns the strings into what `simulate` takes.",
    stub="""def dualpipe_test(dualpipe):
    \"\"\"Asserts that dualpipe(ranks, micro_batches) is right; simulate(actions(orders)) gives a timeline.\"\"\"
    raise NotImplementedError
""",
    hints=("What must be there exactly once? How long must it take? How many chunks may be in flight?",
           "For 8 ranks and 20 micro-batches: every F, I and W of both directions once on every rank (B is I and W), W "
           "in the order of I, blocks 9, 10, 11, 11, 11, 11, 10, 9, makespan 66, at most 9 chunks in flight."),
    reference=dualpipe_reference, solution=dualpipe_test,
    cases=lambda source: {"8 ranks, 20": (8, 20), "a small one": (4, 2 * source.randint(4, 8))},
    wrong={
        "a weight missing": (dualpipe_without_a_weight, "Its rank 0 forgets the last W: count the actions."),
        "newest weights first": (dualpipe_newest_weights_first,
            "Its W come last in, first out at the end: compare their order with that of I."),
        "nothing overlapped": (dualpipe_nothing_overlapped,
            "It has no blocks, and nothing to hide an exchange in: count them."),
        "weights at once": (dualpipe_weights_at_once,
            "It never splits a backward: complete, and slower. Look at the makespan."),
        "the middle overlaps all": (dualpipe_middle_overlaps_all,
            "Its middle ranks overlap their first pair too, which costs time if I > F: count blocks."),
        "one backward late": (dualpipe_one_backward_late,
            "Its rank 0 runs one forward more before its first backward: look at the makespan."),
        "no mirror": (dualpipe_without_mirror,
            "The second half works as the first, so both ends wait for each other: run it through `simulate`."),
    })


EXERCISES = (IDLE, ORDER, STARTS, COUNTS, DEFERRED, COPIES, REFUSED, ORDERS)


# ---- questions ------------------------------------------------------------------------------------------------------


QUESTIONS = {
    "07.share": Question(
        "You double the number of micro-batches of 1F1B. What happens to the time that each rank is idle in a step?",
        (Option("it stays as it is", "(P - 1)(F + B): the pipeline fills and drains once, whatever M is."),
         Option("it halves", "the *share* of the step that is idle roughly halves, because the step gets longer."),
         Option("it doubles", "nothing is filled twice.")), 0),
    "07.bubble": Question(
        "8 ranks, 20 micro-batches, all of F, I, W one unit. What is the best reason to take DualPipe instead of ZB1P?",
        (Option("its bubble is much smaller", "67 against 66 units without communication: a quarrel about one slot."),
         Option("its exchange between experts hides",
                "with one unit of exchange in every F and I: 121 against 87. That is what the second direction buys."),
         Option("it needs less memory", "parameters twice, and one chunk more in flight.")), 1),
    "07.law": Question(
        "When is (PP/2 - 1)(F&B + B - 3W) exactly the idle time?",
        (Option("always, it is a count", "with F, I, W = 2, 1, 1 and 8 ranks it says 9, and the timeline 12."),
         Option("if there are enough micro-batches", "the number of micro-batches does not enter."),
         Option("if F = I >= W, on the innermost ranks", "and on all ranks if, besides, F&B = F + B.")), 2),
    "07.b": Question(
        "Table 2 writes F + B - 2W for ZB1P, the zero-bubble paper F + B - W. Is one of them a typing error?",
        (Option("yes, the report's", "both give 1 for F = I = W = 1, if you insert each paper's own B."),
         Option("no, B is not the same", "in table 2 B is the whole backward, I + W; in the paper it is I alone."),
         Option("no, they are two schedules", "it is the same one, the paper's H1.")), 1),
    "07.memory": Question(
        "What does DualPipe need twice?",
        (Option("parameters", "each rank holds two stages; with experts shared out over 64 GPUs that is bearable."),
         Option("everything", "activations of PP + 1 chunks against PP: one more, not twice."),
         Option("micro-batches in flight", "the other direction's replace one's own: PP + 1 together.")), 0),
    "07.directions": Question(
        "A block needs a forward and a backward on one rank. Does that need two directions and two copies?",
        (Option("yes: otherwise no rank has both", "1F1B has both all the time; what it lacks is two that are ready."),
         Option("no: one chain folded into a V has both",
                "DualPipeV: rank r holds stages r and 2P-1-r of one model.")), 1),
    "07.free": Question(
        "96.3 % of the exchange hides in DeepSeek's public trace of a block. What did it cost?",
        (Option("nothing", "20 of an H800's 132 processors do nothing but move data, and cannot multiply meanwhile."),
         Option("96.3 % of the time", "the block took 129.0 ms for 237.7 ms of both."),
         Option("20 of 132 processors", "so the work itself takes longer than it would alone.")), 2),
    "07.laptop": Question(
        "Four processes on your two cores run DualPipe and take longer than one process. What follows?",
        (Option("DualPipe does not pay", "two cores can do two things at once, however many processes you start."),
         Option("there is a bug", "the gradients say whether there is one, not the clock."),
         Option("nothing about its speed",
                "here processes prove gradients and order; time comes from the simulator.")), 2),
}
