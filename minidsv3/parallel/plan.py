"""`python -m minidsv3 plan`: whether a layout fits, how long a step takes, what training costs, without any GPU.

    shapes           -> bytes on each GPU                     memory.py
    real objects     -> the same, counted                     built.py
    published times  -> the schedule's makespan, a step       step_time.py

Every figure that the report or its authors published stands beside ours, and what stays unexplained is said
(`plan_text.py`).
"""

from dataclasses import dataclass

from ..config import ModelConfig
from .built import Built, build
from .layout import Layout
from .memory import BITS, Memory, memory
from .step_time import TABLE_4, Links, Step, estimate, from_table_4, from_trace, links, optimiser_seconds, stage_work

REPORT = Layout(config=ModelConfig.preset("full"), gpus=2048, pp=16, ep=64, micro_batches=120)


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """Pipeline ranks whose GPUs hold the same: computed from shapes for each precision, and counted on one GPU."""

    ranks: list[int]
    memory: dict[str, Memory]
    built: Built

    def agrees(self, precision: str) -> bool:
        """Whether the built objects hold as many values, and as many bytes of optimiser state, as the shapes say."""
        computed, built = self.memory[precision], self.built
        return ((built.parameters, built.experts, built.masters + built.moments)
                == (computed.parameters, computed.experts, computed.optimiser))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `plan` found out. Bytes and seconds."""

    layout: Layout
    precision: str
    ranks: list[RankPlan]
    links: Links
    steps: list[Step]               # one for each source of durations, with stages that are equally long
    stages: list[float]             # FLOPs of each stage over the mean
    unequal: list[Step]             # `steps`, if stages take time in that ratio


def plan(layout: Layout, precision: str = "fp8", gpu: int | None = None) -> Plan:
    """Plans a layout. `ranks` has the kinds of pipeline ranks (see `kinds`), or that of GPU number `gpu` alone.

    Table 4's durations are of the report's layout and are used for no other. Raises ValueError for an unknown precision
    and for a GPU that does not exist; `Layout` refuses what cannot be laid out.
    """
    if precision not in BITS:
        raise ValueError(f"precision is {precision!r}; it must be one of {', '.join(BITS)}")
    if gpu is not None and not 0 <= gpu < layout.gpus:
        raise ValueError(f"there is no GPU {gpu}; the layout has GPUs 0 to {layout.gpus - 1}")
    chosen = {ranks[0] * layout.dp: ranks for ranks in kinds(layout)} if gpu is None else {gpu: [gpu // layout.dp]}
    stages = stage_work(layout)
    sources = [(from_trace(layout, precision), optimiser_seconds(layout))]
    if layout == REPORT and precision == "fp8":
        sources.append((from_table_4(layout), TABLE_4["optimiser"]))
    return Plan(layout=layout, precision=precision, links=links(layout, precision), stages=stages,
                steps=[estimate(layout, *source) for source in sources],
                unequal=[estimate(layout, *source, stages) for source in sources],
                ranks=[rank_plan(layout, precision, number, ranks) for number, ranks in chosen.items()])


def rank_plan(layout: Layout, precision: str, gpu: int, ranks: list[int]) -> RankPlan:
    rank, data_rank = divmod(gpu, layout.dp)
    return RankPlan(ranks=ranks, built=build(layout, gpu, precision),
                    memory={name: memory(layout, rank, name, data_rank) for name in BITS})


def kinds(layout: Layout) -> list[list[int]]:
    """Pipeline ranks that hold the same, in groups: those of the first, the second, a middle and the last rank."""
    held = [memory(layout, rank) for rank in range(layout.pp)]
    first = [held.index(each) for each in held]
    shown = sorted({first[rank] for rank in (0, min(1, layout.pp - 1), layout.pp // 2, -1)})
    return [[rank for rank in range(layout.pp) if first[rank] == kind] for kind in shown]
