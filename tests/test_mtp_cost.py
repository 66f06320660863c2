"""The measurement of chapter 03: stored claims follow from stored numbers, and its parts measure what they say."""

import json
from pathlib import Path

import mtp_cost
import pytest
import torch

from minidsv3 import cost
from tiny import tiny_model

STORED = json.loads((Path(__file__).parents[1] / "results" / "mtp_cost.json").read_text())


def test_stored_claims_follow_from_stored_numbers():
    for claim in STORED["claims"]:
        words, holds = mtp_cost.CLAIMS[claim["id"]]
        assert claim["claim"] == words and claim["holds"] == holds(STORED)
    assert [claim["id"] for claim in STORED["claims"]] == list(mtp_cost.CLAIMS)


@pytest.mark.parametrize("id, path, value", [
    ("training", ("training", "time_ratio"), 9.0), ("memory", ("training", "memory_ratio"), 9.0),
    ("faster", ("decoding", "1", "measured"), 0.5), ("formula", ("decoding", "1", "expected"), 9.0),
    ("batch", ("decoding", "8", "measured"), 9.0)])
def test_every_claim_can_fail(id, path, value):
    found = json.loads(json.dumps(STORED))
    *way, last = path
    place = found
    for key in way:
        place = place[key]
    place[last] = value
    assert not mtp_cost.CLAIMS[id][1](found)


def test_stored_numbers_agree_with_each_other():
    assert STORED["training"]["flops_ratio"] == pytest.approx(1.34, abs=0.005)
    for found in STORED["decoding"].values():
        p, one = found["accepted"] / found["drafted"], found["pass_ms"]
        assert found["acceptance"] == round(p, 3) and found["same_text"]
        assert found["expected"] == pytest.approx(cost.speculative_speed(p, STORED["draft_cost"]), abs=2e-3)
        assert found["measured"] == pytest.approx(found["plain_ms"] / found["speculative_ms"], abs=1e-3)
        timed = found["tokens_a_pass_of_the_slowest"] / (one["main_of_two"] / one["main"] + one["module"] / one["main"])
        assert found["expected_timed_passes"] == pytest.approx(timed, abs=5e-3)


def test_decoding_measures_every_batch(monkeypatch):
    monkeypatch.setattr(mtp_cost, "NEW", 6)
    model = tiny_model(dtype=torch.float32, max_position_embeddings=128)
    found = mtp_cost.decoding(model, [[i, 5, 9] for i in range(8)], rounds=1)
    assert list(found) == ["1", "4", "8"]
    for each in found.values():
        assert each["tokens"] == 48 and each["same_text"] and 0 <= each["accepted"] <= each["drafted"]
        assert 1 <= each["tokens_a_pass_of_the_slowest"] <= each["tokens_a_pass"] + 1
        assert min(each["pass_ms"].values()) > 0
    assert found["1"]["drafted"] == found["8"]["drafted"]


def test_milliseconds_take_the_contenders_in_turn():
    calls = []
    times = mtp_cost.milliseconds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2)
    assert calls == ["a", "b"] * 3 and times.keys() == {"a", "b"}
