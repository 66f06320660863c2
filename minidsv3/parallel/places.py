"""Which rank of a pipeline holds which stages, and which weights stand twice (report sections 3.2.1 and 3.2.3).

    1f1b, zb1p         one chain          rank r: stage r
    zbv, dualpipev     one chain, folded  rank r: stages r and 2P-1-r, so that rank 0 has the first and the last
    dualpipe           two chains         rank r: stage r of direction a and stage P-1-r of direction b
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from ..shards import BIAS
from .stage import Stage, split

SCHEDULES = ("1f1b", "zb1p", "zbv", "dualpipev", "dualpipe")


class Chains(NamedTuple):
    """The form of a pipeline: `count` chains of `length` stages."""

    length: int
    count: int


class Place(NamedTuple):
    """Where a stage stands: in which direction's chain, and at which position of it.

    A folded chain is one chain, of direction a. (Orders call its second half b: see `schedule.Seat`.)
    """

    direction: str
    position: int


def chains(schedule: str, ranks: int) -> Chains:
    """The form of a schedule. Raises ValueError for an unknown one."""
    match schedule:
        case "1f1b" | "zb1p":
            return Chains(ranks, 1)
        case "zbv" | "dualpipev":
            return Chains(2 * ranks, 1)
        case "dualpipe":
            return Chains(ranks, 2)
    raise ValueError(f"schedule is {schedule!r}; it must be one of {', '.join(SCHEDULES)}")


def places(schedule: str, ranks: int, rank: int) -> list[Place]:
    """The places of a rank's stages; direction a's first, and on a folded chain the lower position."""
    length, count = chains(schedule, ranks)
    own, mirrored = Place("a", rank), Place("ab"[count - 1], length - 1 - rank)
    return [own] if length == ranks and count == 1 else [own, mirrored]


def build_stages(config: ModelConfig, schedule: str, ranks: int, rank: int, precision: str = "fp32") -> list[Stage]:
    """A rank's stages, in the order of `places`; if they are the first and the last, they share one embedding."""
    layers = split(config, chains(schedule, ranks).length)
    built: dict[Place, Stage] = {}
    embedding = None
    for place in sorted(places(schedule, ranks, rank), key=lambda place: place.position):
        built[place] = Stage(config, layers[place.position], embedding, precision)
        embedding = built[place].model["embed_tokens"] if built[place].first else None
    return [built[place] for place in places(schedule, ranks, rank)]


def named_weights(stages: list[Stage]) -> dict[str, nn.Parameter]:
    """Parameters by name, each once."""
    return {name: parameter for stage in stages for name, parameter in stage.named_parameters()}


def named_biases(stages: Iterable[nn.Module]) -> dict[str, Tensor]:
    """The routers' biases by name, of stages or of whole models."""
    return {name: bias for stage in stages for name, bias in stage.named_buffers() if name.endswith(BIAS)}


def copied_weights(config: ModelConfig, schedule: str, ranks: int) -> dict[str, tuple[int, int]]:
    """Every weight that two pipeline ranks hold, and these ranks, the lower first.

    DualPipe: all of them, on ranks r and P - 1 - r. 1F1B and ZB1P: the embedding, if MTP reads it. Folded chains: none.
    """
    holders: dict[str, list[int]] = {}
    with torch.device("meta"):
        for rank in range(ranks):
            for name in named_weights(build_stages(config, schedule, ranks, rank)):
                holders.setdefault(name, []).append(rank)
    return {name: (found[0], found[1]) for name, found in holders.items() if len(found) > 1}
