"""Runs on several ranks: the steps of one process, saved by all ranks, resumed by any number of them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from minidsv3 import train as single
from minidsv3.data import read_corpus, train_tokenizer
from minidsv3.parallel.processes import run
from minidsv3.parallel.saves import latest_facts
from minidsv3.parallel.train import ParallelRun, Spread, alone, largest_micro_batch
from tiny_run import run_config, write_corpus

LAYOUTS = {"2 ranks, 1f1b": (2, Spread(pp=2, schedule="1f1b")),
           "4 ranks, dualpipe": (4, Spread(pp=2, ep=2, schedule="dualpipe")),
           "4 ranks, data": (4, Spread(ep=2, schedule="1f1b"))}


def config(corpus: str) -> single.TrainConfig:
    """Twelve steps of 16 sequences on a model of 4 layers, with every schedule in motion."""
    small = run_config(Path(corpus))
    recipe = replace(small.recipe, total_tokens=16 * 32 * 12, first_batch=16, last_batch=16)
    return replace(small, recipe=recipe, model=small.model.replace(num_hidden_layers=4))


def start(corpus: str, make=single.Run) -> single.Run:
    settings, text = config(corpus), read_corpus(corpus)
    return make(settings, text, train_tokenizer(text.train, settings.model.vocab_size))


def take_steps(corpus: str, spread: Spread, out: str, steps: int, resume: bool) -> list[dict]:
    """On each rank: the log's lines of some steps of a run that is new or goes on from `out`, where it is then saved."""
    mine = start(corpus, lambda *parts: ParallelRun(*parts, spread))
    if resume:
        mine.load(*latest_facts(Path(out)))
    lines = [mine.advance() for _ in range(steps)]
    mine.save(Path(out))
    return lines


def assert_same_lines(got: list[dict], want: list[dict], tolerance: float) -> None:
    for mine, theirs in zip(got, want, strict=True):
        assert mine.get("load") == theirs.get("load")
        for name in ("step", "tokens", "sequences", "lr", "gamma", "mtp_weight"):
            assert mine[name] == theirs[name]
        for name in ("loss", "mtp", "balance", "grad_norm"):
            assert mine[name] == pytest.approx(theirs[name], rel=tolerance), (name, mine["step"])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return str(write_corpus(tmp_path_factory.mktemp("text") / "corpus"))


@pytest.fixture(scope="module")
def lines_of_one(corpus) -> list[dict]:
    """Six steps of one process."""
    one = start(corpus)
    return [one.advance() for _ in range(6)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_steps_are_those_of_one_process(name, corpus, lines_of_one, tmp_path):
    ranks, spread = LAYOUTS[name]
    for lines in run(take_steps, ranks, corpus, spread, str(tmp_path), 3, False, timeout=100):
        assert_same_lines(lines, lines_of_one[:3], 1e-5)


def test_a_run_goes_on_with_other_ranks_and_as_one_process(corpus, lines_of_one, tmp_path):
    """Two steps on one layout, two on the next, the last two alone."""
    (four, dualpipe), (two, one_f_one_b) = LAYOUTS["4 ranks, dualpipe"], LAYOUTS["2 ranks, 1f1b"]
    run(take_steps, four, corpus, dualpipe, str(tmp_path), 2, False, timeout=100)
    lines = run(take_steps, two, corpus, one_f_one_b, str(tmp_path), 2, True, timeout=100)[0]
    assert_same_lines(lines, lines_of_one[2:4], 1e-4)
    one = alone(tmp_path)
    assert_same_lines([one.advance() for _ in range(2)], lines_of_one[4:], 1e-4)
