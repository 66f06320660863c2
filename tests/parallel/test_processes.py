"""The helper that starts ranks: results by rank, failures told, nothing left behind."""

import multiprocessing
import os
import time

import pytest
import torch
import torch.distributed as dist

from minidsv3.parallel.processes import RankFailed, run


def total(x: int) -> tuple[torch.Tensor, int, int]:
    summed = torch.tensor([x + dist.get_rank()])
    dist.all_reduce(summed)
    return summed, dist.get_rank(), torch.get_num_threads()


def fail(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError("this rank does not want to")
    dist.barrier()


def vanish() -> None:
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


def sleep() -> None:
    time.sleep(60)


def test_results_come_by_rank():
    assert run(total, 3, 10) == [(torch.tensor([33]), rank, 1) for rank in range(3)]
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_failure_is_told_with_the_rank_that_failed_first(rank):
    with pytest.raises(RankFailed, match=f"(?s)rank {rank}\n.*this rank does not want to"):
        run(fail, 2, rank)
    assert not multiprocessing.active_children()


def test_a_rank_that_dies_ends_the_run():
    began = time.monotonic()
    with pytest.raises(RankFailed, match="rank 1 ended with code 7|Connection closed by peer"):
        run(vanish, 2)
    assert time.monotonic() - began < 20


def test_a_rank_that_hangs_is_ended():
    with pytest.raises(RankFailed, match=r"ranks \[0, 1\] did not end within 4 seconds"):
        run(sleep, 2, timeout=4)
    assert not multiprocessing.active_children()
