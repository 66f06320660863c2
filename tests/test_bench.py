"""The benchmark's arithmetic; its numbers are taken by hand on a quiet machine (`python -m minidsv3 bench cpu`)."""

import time

import pytest

from minidsv3.bench import advantage, interleave, nano, peer, training_builders
from minidsv3.model import Transformer


def test_interleaved_rounds_take_contenders_in_turn_after_one_warm_up():
    calls = []
    interleave({name: lambda name=name: calls.append(name) for name in "ab"}, tokens=1, rounds=2)
    assert "".join(calls) == "ab" + "abab"


def test_a_rate_is_tokens_over_the_median_of_seconds():
    naps = iter([0.0, 0.02, 0.02, 0.3])     # warm-up and three rounds, one of them disturbed
    rate = interleave({"nap": lambda: time.sleep(next(naps))}, tokens=10, rounds=3)["nap"]
    assert 250 < rate <= 500


def test_the_advantage_is_over_the_fastest_peer_and_leaves_mtp_out():
    rates = {"minidsv3": 30.0, "minidsv3, with MTP": 90.0, "transformers, a": 10.0, "transformers, b, compiled": 20.0}
    assert advantage(rates) == pytest.approx(1.5)


def test_both_sides_have_the_same_parameters_and_no_mtp():
    ours, theirs = Transformer(nano()), peer("sdpa", "eager")
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    assert not ours.mtp_modules
    assert {"minidsv3", "minidsv3, with MTP"} < set(training_builders(autocast=False))
