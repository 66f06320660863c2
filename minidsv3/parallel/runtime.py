"""Orders of `schedule.py` on torch's pipeline runtime: also DualPipe's, where two chains share the ranks.

torch.distributed.pipelining has no bidirectional schedule, but its runtime does whatever actions it is given, F&B among
them. So an order is translated, and the stages of both directions get numbers that torch takes for two chains
(`torch_stage.py`).
"""

from collections.abc import Callable

from torch.distributed.pipelining.schedules import (BACKWARD_INPUT, BACKWARD_WEIGHT, FORWARD, FULL_BACKWARD,
                                                    OVERLAP_F_B, RECV_B, RECV_F, _Action, _add_reduce_grad,
                                                    _add_send_recv, _add_unshard_reshard, _PipelineScheduleRuntime)

from .places import Chains, Place
from .schedule import Action, Orders, Overlapped
from .torch_stage import TorchStage, number

KINDS = {"F": FORWARD, "B": FULL_BACKWARD, "I": BACKWARD_INPUT, "W": BACKWARD_WEIGHT}


class ScheduleOrders(_PipelineScheduleRuntime):
    """Runs orders of `schedule.py` on torch's runtime: one chain of stages, or the two of `dualpipe`.

    `stages` are this rank's, `micro_batches` those of each chain; `loss` is as in torch, and nothing is divided by the
    number of micro-batches.
    """

    def __init__(self, stages: list[TorchStage], chains: Chains, micro_batches: int, loss: Callable, orders: Orders):
        super().__init__(stages, micro_batches, loss, scale_grads=False)
        last = chains.length - 1
        self.stage_index_to_group_rank = {number(Place("a", rank), chains): rank for rank in range(chains.length)}
        if chains.count == 2:
            self.stage_index_to_group_rank |= {number(Place("b", last - rank), chains): rank
                                               for rank in range(chains.length)}
            self.stage_index_to_group_rank[chains.length] = last          # number P, in neither chain
        for stage in stages:
            stage.stage_index_to_group_rank = self.stage_index_to_group_rank
        self.pipeline_order_with_comms = self._with_messages([lower(order, chains) for order in orders])

    def _with_messages(self, orders: list[list[_Action]]) -> dict[int, list[_Action]]:
        """Lets torch put in all other actions: sending, receiving, and what FSDP needs."""
        last, chunks = len(orders) - 1, self._n_microbatches
        full = {rank: _add_reduce_grad(_add_unshard_reshard(order), chunks) for rank, order in enumerate(orders)}
        # Chain a ends and chain b begins on the last rank. torch waits there for messages from number P: say they came.
        came = [_Action(stage, kind, chunk) for stage, kind in ((last, RECV_B), (last + 2, RECV_F))
                for chunk in range(chunks)]
        full[last] = came + full[last]
        full = _add_send_recv(full, self.stage_index_to_group_rank.__getitem__, self._num_stages)
        return full | {last: [action for action in full[last] if action not in came]}


def lower(order: list[Action | Overlapped], chains: Chains) -> list[_Action]:
    """An order in torch's words."""
    lowered = []
    for action in order:
        parts = tuple(_Action(number(Place(part.direction, part.stage), chains), KINDS[part.kind], part.micro_batch)
                      for part in action.parts)
        lowered.append(parts[0] if len(parts) == 1 else _Action(-1, OVERLAP_F_B, None, parts))
    return lowered
