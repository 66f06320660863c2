"""A stage in torch's pipeline runtime, with its number there, and messages that leave memory when they have done.

Numbered like this, two chains over the same ranks are two chains for torch as well: it sends from each number to the
one more and the one less, and nobody is number P.

    rank            0      1     ..    P-1
    direction a     0      1     ..    P-1        tokens enter at rank 0
    direction b     2P     2P-1  ..    P+1        tokens enter at rank P-1
"""

from collections import deque
from collections.abc import Callable

import torch
from torch.distributed import P2POp, ProcessGroup, Work, isend
from torch.distributed.pipelining import PipelineStage

from .places import Chains, Place
from .stage import Stage


def number(place: Place, chains: Chains) -> int:
    """torch's number of a stage."""
    return place.position + (chains.length + 1) * (place.direction == "b")


class TorchStage(PipelineStage):
    """A `Stage` as torch's runtime takes it. `dw_builder`: see `weight_gradients.py`.

    Shapes of what comes in and goes out are given, for `micro_batch` sequences of `length` tokens. Else torch would
    run the stage once to learn them, and tokens that nobody sent would be counted.

    torch makes a receive buffer for every micro-batch and keeps it for good, and keeps what it sends until the step
    ends: at full size 28 GB each, with DualPipeV and 120 micro-batches. Here a buffer lives from its receive to the
    backward pass that reads it last, so that there are as many as micro-batches in flight. Of what a stage sends, at
    most `chains.length` messages are on their way; the next one waits for the oldest.
    """

    def __init__(self, stage: Stage, place: Place, chains: Chains, micro_batch: int, length: int, device: torch.device,
                 group: ProcessGroup | None, dw_builder: Callable[[], Callable[[], None]]):
        self.position, self.chain_length = place.position, chains.length
        self._sent: deque[Work] = deque()
        tokens = torch.empty(micro_batch, length + 1, dtype=torch.int64, device="meta")
        hidden = torch.empty(micro_batch, length, stage.config.hidden_size, dtype=next(stage.parameters()).dtype,
                             device="meta", requires_grad=True)
        super().__init__(stage, number(place, chains), chains.count * (chains.length + 1) - 1, device, group=group,
                         dw_builder=dw_builder,
                         input_args=tokens if stage.first else hidden,
                         output_args=hidden.sum() if stage.last else hidden)

    @property
    def is_first(self) -> bool:
        return self.position == 0

    @property
    def is_last(self) -> bool:
        return self.position == self.chain_length - 1

    def _prepare_forward_infra(self, *args, **kwargs):
        return self._without_memory(super()._prepare_forward_infra, *args, **kwargs)

    def _prepare_backward_infra(self, *args, **kwargs):
        return self._without_memory(super()._prepare_backward_infra, *args, **kwargs)

    def _without_memory(self, prepare: Callable, *args, **kwargs):
        """Calls one of torch's functions that make all receive buffers, and lets them be made without memory."""
        device, self.device = self.device, torch.device("meta")
        try:
            return prepare(*args, **kwargs)
        finally:
            self.device = device

    def _get_init_p2p_neighbors_ops(self) -> list[P2POp]:
        """torch before 2.13 greets both neighbours before the first step; gloo has no wire from a rank to itself."""
        return [message for message in super()._get_init_p2p_neighbors_ops() if message.group_peer != self.group_rank]

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[P2POp]:
        return self._send(super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[P2POp]:
        return self._send(super().get_bwd_send_ops(bwd_chunk_id))

    def _send(self, messages: list[P2POp]) -> list[P2POp]:
        """Sends; leaves nothing to do for torch, which would keep what is sent.

        Waiting cannot lock up: orders list a receive where its message is sent, so that whoever receives the oldest
        message needs none that comes after it.
        """
        for message in messages:
            self._sent.append(isend(message.tensor, group=message.group, group_dst=message.group_peer))
        self.wait_for_messages(self.chain_length)
        return []

    def wait_for_messages(self, on_their_way: int = 0) -> None:
        """Waits until at most so many messages have not arrived."""
        while len(self._sent) > on_their_way:
            self._sent.popleft().wait()

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[P2POp]:
        self._place_buffers(self.args_recv_info[fwd_chunk_id], self.device)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[P2POp]:
        self._place_buffers(self.grad_recv_info[bwd_chunk_id], self.device)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def backward_one_chunk(self, bwd_chunk_id: int, *args, **kwargs) -> None:
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        for infos in (self.args_recv_info, self.grad_recv_info):
            self._place_buffers(infos[bwd_chunk_id], torch.device("meta"))

    @staticmethod
    def _place_buffers(infos: tuple, device: torch.device) -> None:
        """New receive buffers on `device`; on meta they take no memory."""
        for info in infos:
            if getattr(info, "buffer", None) is not None:         # tokens are given, not received
                gradient = info.buffer.requires_grad              # torch before 2.13 says so here, and only once
                info.buffer = torch.empty_like(info.buffer, device=device).requires_grad_(gradient)
