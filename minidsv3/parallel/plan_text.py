"""A plan as text: aligned columns, units, and where each number comes from.

    report       printed in DeepSeek-V3's report                derived     computed here, from shapes, orders or rates
    published    by its authors elsewhere: arXiv 2505.09343     built       counted on the objects that would train
"""

from collections.abc import Iterable, Sequence

from ..cost import parameters
from .layout import NODE
from .memory import BITS
from .plan import Plan
from .schedule import Overlapped
from .step_time import PUBLISHED, TABLE_4, TRACE_BLOCK, TRACE_EXCHANGE, TRACE_HIDDEN, TRACE_LAYERS, rates

LABEL, COLUMN = 46, 17


def plan_lines(plan: Plan) -> list[str]:
    """All of it, at most 120 columns wide."""
    return [*layout_lines(plan), "", *memory_lines(plan), *notes(plan), "",
            *link_lines(plan), "", *step_lines(plan), "", *open_lines(plan)]


def row(label: str, values: Iterable[object], mark: str = "") -> str:
    return f"{label:{LABEL}}" + "".join(f"{value!s:>{COLUMN}}" for value in values) + f"   {mark}".rstrip()


# ---- layout and memory ----------------------------------------------------------------------------------------------

def layout_lines(plan: Plan) -> list[str]:
    layout, whole = plan.layout, parameters(plan.layout.config)
    sizes = " ".join(str(len(piece.layers)) for piece in layout.pieces)
    nodes = "one node" if layout.nodes == 1 else f"{layout.nodes} nodes"
    return [
        f"{layout.gpus:,} GPUs = pp {layout.pp} x dp {layout.dp}, dp = edp {layout.edp} x ep {layout.ep}; ep stands on "
        f"{nodes} of {NODE} GPUs",
        f"{layout.schedule}, {plan.precision}, {layout.micro_batches} micro-batches of one sequence of "
        f"{layout.sequence:,} tokens in each of {layout.dp} pipelines: {layout.tokens:,} tokens a step",
        f"layers of the stages: {sizes}",
        "the first has the embedding too, the last the head and MTP; the report does not say where it cuts",
        f"all pipeline ranks hold {whole.main:,} values of the main model and {whole.mtp:,} of MTP",
        *(f"  and {values:,} once more: {what}" for what, values in layout.copies)]


def memory_lines(plan: Plan) -> list[str]:
    """The table of bytes on one GPU for each kind of rank."""
    kinds, precision = plan.ranks, plan.precision
    ours, built = [kind.memory[precision] for kind in kinds], [kind.built for kind in kinds]
    large = max(memory.total for memory in ours) > 1e9
    unit, scale = ("GB (10^9 bytes)", 1e9) if large else ("MB (10^6 bytes)", 1e6)

    def sizes(label: str, values: Iterable[int], mark: str = "derived") -> str:
        return row(label, (f"{value / scale:.2f}" for value in values), mark)

    def each(name: str) -> list[int]:
        return [getattr(memory, name) for memory in ours]

    return [
        row(f"{unit} on one GPU, {precision}", (ranks_of(kind.ranks) for kind in kinds)),
        row("stages", (", ".join(str(piece.stage) for piece in plan.layout.held(kind.ranks[0])) for kind in kinds)),
        row("GPU that was built", (count.gpu for count in built)),
        row("values held", (f"{count.parameters:,}" for count in built), "built"),
        row("  of them in routed experts", (f"{count.experts:,}" for count in built), "built"),
        sizes("weights" + ", FP8 twice" * (precision == "fp8"), each("weights")),
        sizes("gradients, FP32", each("gradients")),
        sizes("optimiser: FP32 masters and moments, sharded", (c.masters + c.moments for c in built), "built"),
        sizes("activations, with recomputation", each("activations")),
        row("  micro-batches in flight", each("in_flight"), "derived"),
        sizes("buffers: receiving, experts' rows", each("buffers")),
        sizes("sum, as the report does it" + " (H800: 80)" * large, each("total")),
        *(sizes(f"  in {name}", (kind.memory[name].total for kind in kinds)) for name in BITS if name != precision),
        *(() if precision != "fp8" else (
            sizes("ours adds: FSDP gathers weights in FP32", each("gathered")),
            sizes("ours adds: the residual stream is FP32", each("stream")),
            sizes("sum, as our engine does it", each("ours")))),
        row("actions of torch's schedule in a step", (count.actions for count in built), "built")]


def notes(plan: Plan) -> list[str]:
    """What the table's words hide."""
    same = all(kind.agrees(plan.precision) for kind in plan.ranks)
    return [
        "built: with tensors that hold nothing, on a process group in name only. Values and optimiser " + (
            "are what shapes say" if same else "ARE NOT what shapes say"),
        "activations: our modules keep that in FP8 (tests/test_recompute.py); else they recompute nothing, keep more",
        "not counted: CUDA context, NCCL, fragmentation, workspace of the layer being computed"]


def ranks_of(ranks: Sequence[int]) -> str:
    """"rank 0", "ranks 0, 15", "ranks 1-14"."""
    if len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]}-{ranks[-1]}"
    return ("ranks " if len(ranks) > 1 else "rank ") + ", ".join(map(str, ranks))


# ---- time -----------------------------------------------------------------------------------------------------------

def link_lines(plan: Plan) -> list[str]:
    links = plan.links

    def both(label: str, between: float, inside: float, digits: int) -> str:
        return row(label, (f"{between:.{digits}f}", f"{inside:.{digits}f}"), "derived")

    return [
        row("exchange between experts, one MoE layer", ("InfiniBand", "NVLink")),
        both("rows a token sends (balanced random choices)", links.between_rows, links.inside_rows, 2),
        both("MB, dispatch and combine", links.between_bytes / 1e6, links.inside_bytes / 1e6, 1),
        both("ms at 50 and 160 GB/s", links.between_seconds * 1e3, links.inside_seconds * 1e3, 3)]


CHUNK = {"one chunk, ms: F": "forward", "  I, backward for the input": "backward_input",
         "  W, backward for the weights": "backward_weight", "  F&B block": "overlapped",
         "  exchange that a lone F or I waits for": "communication"}
MEASURED_MAKESPAN = sum(TABLE_4.values()) - TABLE_4["optimiser"]
RATES = [
    ("step_seconds", "step, s", "{:.4g}", 1, "published"),
    ("tokens_per_day", "10^9 tokens a day", "{:,.1f}", 1e9, "published"),
    ("hours_per_trillion", "GPU hours for 10^12 tokens", "{:,.0f}", 1, "report"),
    ("days_per_trillion", "days for 10^12 tokens", "{:,.1f}", 1, "report"),
    ("tflops", "TFLOPS of a GPU, attention counted causal", "{:.0f}", 1, "published"),
    ("tflops_not_causal", "  not causal", "{:.0f}", 1, "published"),
    ("mfu", "MFU, share of the BF16 peak, causal", "{:.1%}", 1, "published"),
    ("mfu_not_causal", "  not causal", "{:.1%}", 1, "published"),
]


def step_lines(plan: Plan) -> list[str]:
    """What each source of durations makes of a chunk, of the schedule and of a step, beside the published figures."""
    steps, published = plan.steps, is_published(plan)
    lines = [row("durations from", ["public trace", "table 4", "published"][:len(steps) + published])]

    def add(label: str, values: Iterable[str], known: str = "", mark: str = "published") -> None:
        lines.append(row(label, [*values, known] if published else values,
                         f"derived; {mark}" if published and known else "derived"))

    for label, name in CHUNK.items():
        add(label, (f"{1e3 * getattr(step.durations, name):.4g}" for step in steps))
    spans = [(min(step.timeline.idle), max(step.timeline.idle)) for step in steps]
    add("all micro-batches, s", (f"{step.timeline.makespan:.4g}" for step in steps), f"{MEASURED_MAKESPAN:.4g}")
    add("  of it bubble, on the ranks", (f"{least:.3g} to {most:.3g}" for least, most in spans), str(TABLE_4["bubble"]))
    add("optimiser, s", (f"{step.optimiser:.3g}" for step in steps), str(TABLE_4["optimiser"]))
    found = [rates(plan.layout, step.seconds) for step in steps]
    for name, label, form, scale, mark in RATES:
        values = [form.format(getattr(rate, name) / scale) for rate in [*found, PUBLISHED]]
        add(label, values[:-1], values[-1], mark)
    return lines


def is_published(plan: Plan) -> bool:
    """Whether the layout is the one of which figures were published."""
    return len(plan.steps) > 1


# ---- what the numbers cannot say ------------------------------------------------------------------------------------

def open_lines(plan: Plan) -> list[str]:
    """Where durations come from, and what stays unexplained."""
    if is_published(plan):
        return ["what stays unexplained", *unexplained(plan)]
    (unequal,) = plan.unequal
    return ["- durations are those of a public trace of the full model in FP8 on H800s, scaled by FLOPs (a product",
            "  in BF16 counts twice, in FP32 four times); smaller products take longer than that",
            f"- with stages in the ratio of their FLOPs, {times(plan)} the mean, a step takes {unequal.seconds:.4g} s"]


def times(plan: Plan) -> str:
    return f"{min(plan.stages):.2f} to {max(plan.stages):.2f} times"


def unexplained(plan: Plan) -> list[str]:
    """Of the published step, in this layout."""
    idle, unequal = (steps[1].timeline.idle for steps in (plan.steps, plan.unequal))
    blocks = [sum(isinstance(action, Overlapped) for action in order) for order in plan.layout.orders]
    fewest, most = min(blocks), max(blocks)
    exchange = 2 * TRACE_LAYERS * plan.links.seconds
    return [
        f"- with table 4's own durations the order leaves {TABLE_4['bubble'] - max(idle):.2f} to "
        f"{TABLE_4['bubble'] - min(idle):.2f} s of the published bubble of {TABLE_4['bubble']} s open",
        f"- unequal stages could be that: in the ratio of our split's FLOPs, {times(plan)} the mean, ranks idle",
        f"  {min(unequal):.2f} to {max(unequal):.2f} s and a step takes {plan.unequal[1].seconds:.4g} s. "
        "But the real split is not published, and unbalanced",
        "  routing and sends between ranks are not simulated: nothing here says which it is",
        f"- table 4 gives an F&B block {1e3 * TABLE_4['F&B'] / most:.0f} to {1e3 * TABLE_4['F&B'] / fewest:.0f} ms "
        f"({fewest} to {most} a rank); the trace shows one of {1e3 * TRACE_BLOCK:.0f} ms,",
        "  with balanced routing and without sends between ranks",
        f"- at full link speed the exchanges of that block take {1e3 * exchange:.0f} ms; in the trace they take "
        f"{1e3 * TRACE_EXCHANGE:.0f} ms, {TRACE_HIDDEN:.0%} hidden behind work"]
