"""Kills a process that saves states in a loop, at random moments: `kill_saves.py FOLDER KILLS`, report in JSON.

The child is forked, so that a kill costs milliseconds, and tells through a pipe which step it has saved. After each
kill the latest state must load without a warning, be complete, and be no older than the last step that was told.
"""

import itertools
import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import torch

from minidsv3.run_state import load_latest, save_state


def state_of(step: int) -> dict:
    return {"model": torch.full((5000,), step), "optimizer": {"moment": torch.full((700,), float(step))}, "data": step}


def save_forever(folder: Path, first: int, told: int) -> None:
    for step in itertools.count(first):
        save_state(folder, step, state_of(step))
        os.write(told, step.to_bytes(8))


def kill_one(folder: Path, first: int, seconds: float) -> list[int]:
    """The steps that a child told to have saved before it was killed."""
    hear, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            save_forever(folder, first, tell)
        finally:
            os._exit(1)     # an error must not let the child go on as a second parent
    os.close(tell)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(hear, "rb") as pipe:
        return [int.from_bytes(told) for told in iter(lambda: pipe.read(8), b"")]


def whole(step: int, state: dict) -> bool:
    wanted = state_of(step)
    return (state["data"] == step and torch.equal(state["model"], wanted["model"])
            and torch.equal(state["optimizer"]["moment"], wanted["optimizer"]["moment"]))


def timed_save(folder: Path, step: int) -> float:
    begin = time.perf_counter()
    save_state(folder, step, state_of(step))
    return time.perf_counter() - begin


def main(folder: Path, kills: int) -> dict:
    report = {"kills": 0, "saves": 0, "amid a save": 0, "lost": []}
    rng, latest = random.Random(0), 0
    for _ in range(kills):
        pace = timed_save(folder, latest + 1)    # how long a save takes on this disk just now
        told = [latest + 1, *kill_one(folder, latest + 2, rng.uniform(0, 4 * pace))]
        report["kills"] += 1
        report["saves"] += len(told) - 1
        report["amid a save"] += bool(list(folder.glob(".step-*.tmp")))
        saved = load_latest(folder)
        if saved.step < max(told) or not whole(saved.step, saved.state):
            report["lost"].append({"told": told, "found": saved.step})
        latest = saved.step
    return report


if __name__ == "__main__":
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))
