"""`python -m minidsv3 plan`: whether a layout fits, how long a step takes, and what training costs, before any GPU runs.

    shapes           -> bytes on each GPU                     memory.py
    real objects     -> the same, counted                     built.py
    published times  -> the schedule's makespan, a step       step_time.py

Every figure that the report or its authors published stands beside ours, and what stays unexplained is said
(`plan_text.py`).
"""

from dataclasses import dataclass
from itertools import groupby

from ..config import ModelConfig
from .built import Built, build
from .layout import Layout
from .memory import BITS, Memory, memory
from .step_time import (TABLE_4, Links, Step, estimate, from_table_4, from_trace, heaviest_rank, links,
                        optimiser_seconds)

REPORT = Layout(config=ModelConfig.preset("full"), gpus=2048, pp=16, ep=64, micro_batches=120)


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """Pipeline ranks whose GPUs hold the same: computed from shapes for each precision, and counted on one of them."""

    ranks: list[int]
    memory: dict[str, Memory]
    built: Built

    def agrees(self, precision: str) -> bool:
        """Whether the built objects hold as many values and bytes of optimiser state as the shapes say.

        A GPU that is not the first of its data ranks may hold less: FSDP's last shards are shorter.
        """
        computed = self.memory[precision]
        return ((self.built.parameters, self.built.experts) == (computed.parameters, computed.experts)
                and self.built.masters + self.built.moments == computed.optimiser)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What `plan` found out. Bytes and seconds."""

    layout: Layout
    precision: str
    ranks: list[RankPlan]
    links: Links
    steps: list[Step]               # one for each source of durations
    heaviest: float                 # work of the pipeline rank that has most, over the mean


def plan(layout: Layout, precision: str = "fp8", gpu: int | None = None) -> Plan:
    """Plans a layout; `ranks` are the kinds of pipeline ranks, at most the edges, the second and a middle one, or the
    one of GPU number `gpu` alone.

    Table 4's durations are of the report's layout and are used for no other. Raises ValueError for an unknown precision
    and for a GPU that does not exist, `Layout` for what cannot be laid out.
    """
    chosen = kinds(layout, precision) if gpu is None else [[gpu // layout.dp]]
    optimiser = optimiser_seconds(layout)
    steps = [estimate(layout, from_trace(layout, precision), optimiser)]
    if layout == REPORT and precision == "fp8":
        steps.append(estimate(layout, from_table_4(layout), TABLE_4["optimiser"]))
    return Plan(
        layout=layout, precision=precision, links=links(layout, precision), steps=steps,
        heaviest=heaviest_rank(layout), ranks=[
            RankPlan(ranks=ranks, built=build(layout, ranks[0] * layout.dp if gpu is None else gpu, precision),
                     memory={name: memory(layout, ranks[0], name) for name in BITS}) for ranks in chosen])


def kinds(layout: Layout, precision: str) -> list[list[int]]:
    """Pipeline ranks that hold the same, in groups; of more than four groups the first, second, middle and last."""
    held = {rank: memory(layout, rank, precision) for rank in range(layout.pp)}
    groups = [[rank for rank in held if held[rank] == held[first]] for first in held]
    shown = {ranks[0]: ranks for ranks in (groups[rank] for rank in (0, min(1, layout.pp - 1), layout.pp // 2, -1))}
    return list(shown.values())
