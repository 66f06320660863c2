"""Runs a function on several ranks: real processes on this machine that talk through gloo. For tests and notebooks.

    def total(x):                                   # in a module that can be imported
        x = torch.tensor([x + dist.get_rank()])
        dist.all_reduce(x)
        return x

    run(total, 4, 10)                               # [tensor([46]), tensor([46]), tensor([46]), tensor([46])]
"""

import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# A fork server imports torch once and forks every rank, which takes 0.1 s instead of the 4 s of an import each.
_FORKS = "forkserver" in multiprocessing.get_all_start_methods()
_CONTEXT = multiprocessing.get_context("forkserver" if _FORKS else "spawn")
if _FORKS:
    _CONTEXT.set_forkserver_preload(["torch.distributed.pipelining", "torch.distributed.fsdp", "minidsv3"])


class RankFailed(RuntimeError):
    """A rank raised, died or did not end in time; the message has its traceback. All ranks are gone by then."""


def run(function: Callable[..., Any], ranks: int, *arguments: Any, timeout: float = 60) -> list[Any]:
    """What `function(*arguments)` returns on each of `ranks` ranks of one gloo process group, by rank.

    Results are tensors, numbers, strings, and lists, tuples and dicts of them. Every rank has one thread.
    Raises RankFailed, with the first failing rank's traceback, once a rank fails or `timeout` seconds have passed.
    """
    with tempfile.TemporaryDirectory() as folder:    # the rendezvous is a file: no port can clash
        processes = [_CONTEXT.Process(target=_rank, args=(rank, ranks, folder, timeout, function, arguments),
                                      daemon=True) for rank in range(ranks)]
        try:
            for process in processes:
                process.start()
            _wait(processes, Path(folder), timeout)
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()
                    process.join()
        return [torch.load(Path(folder) / f"result-{rank}", weights_only=True) for rank in range(ranks)]


def _wait(processes: list[BaseProcess], folder: Path, timeout: float) -> None:
    running, until = dict(enumerate(processes)), time.monotonic() + timeout
    while running:
        wait([process.sentinel for process in running.values()], timeout=max(0.0, until - time.monotonic()))
        ended = [rank for rank, process in running.items() if not process.is_alive()]
        if not ended:
            raise RankFailed(f"ranks {list(running)} did not end within {timeout} seconds")
        for rank in ended:
            code = running.pop(rank).exitcode
            if code:
                raise RankFailed(f"rank {rank} ended with code {code}\n{_first_traceback(folder)}")


def _first_traceback(folder: Path) -> str:
    """The failure that came first: the other ranks then fail too, for want of an answer."""
    failures = sorted(folder.glob("failure-*"), key=lambda path: path.stat().st_mtime_ns)
    return failures[0].read_text(encoding="utf-8") if failures else "(it left no traceback)"


def _rank(rank: int, ranks: int, folder: str, timeout: float, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", ranks), rank=rank, world_size=ranks,
                                timeout=timedelta(seconds=timeout))
        torch.save(function(*arguments), f"{folder}/result-{rank}")
        dist.barrier()                               # nobody hangs up while another still asks
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"failure-{rank}").write_text(f"rank {rank}\n{traceback.format_exc()}", encoding="utf-8")
        raise SystemExit(1)
