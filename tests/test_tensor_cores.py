"""The probes tell every candidate adder from the others, and the model is the one that the GPU was found to be."""

import itertools
import json

import pytest
import tensor_cores
import torch
from tensor_cores import CLAIMS, OUT, Adder, direction, errors, operands, power, probe

from minidsv3.accumulate import accumulate

STORED = json.loads(OUT.read_text())
CUTS = ("towards zero", "downwards", "to nearest")
CANDIDATES = [Adder(*choice) for choice in itertools.product((13, 14), (16, 32), (True, False), CUTS, (True, False))]


def model(a, b):
    return accumulate(a, b, promote_every=None)


@pytest.mark.parametrize("adder", [*CANDIDATES, Adder(bits=24), Adder(step=64)], ids=str)
def test_probes_find_every_candidate(adder):
    found = probe(adder, "cpu")
    assert found["bits_beside_product"] == found["bits_beside_sum"] == found["bits_of_result"] == adder.bits
    assert found["products_of_a_step"] == adder.step and found["lost_at"] == list(range(2, adder.step))
    assert found["sum_so_far_is_aligned"] == adder.aligns_sum
    assert found["products_are_cut"] == found["result_is_cut"] == adder.cut
    assert found["exponent_of_a_product"] == ("its own" if adder.normalised else "of its factors, added")


def test_the_model_is_one_of_the_candidates():
    """To the last bit, and no other candidate is."""
    a, b = (x[:24] for x in operands("normal", 1024, "cpu"))
    same = [adder for adder in CANDIDATES if torch.equal(adder(a, b), model(a, b))]
    assert same == [Adder(14, 32, True, "towards zero", False)]


def test_an_exact_adder_keeps_all_that_the_probes_ask_for():
    found = probe(lambda a, b: (a.double() @ b.double().T).float(), "cpu")
    assert found["bits_beside_product"] == found["bits_beside_sum"] == 27 and not found["sum_so_far_is_aligned"]


def test_a_cut_of_the_result_that_is_none_of_the_three_is_shown_as_it_is():
    assert direction(0.75, -0.75) == "0.75 and -0.75 last bits" and direction(1, 0) == "upwards"


@pytest.mark.parametrize("n", range(-12, 15))
@pytest.mark.parametrize("mantissa", [1.0, 1.5])
def test_factors_are_numbers_of_e4m3(n, mantissa):
    factors = torch.tensor(power(n, -1, mantissa))
    assert factors.prod() == -mantissa * 2.0 ** n and torch.equal(factors.to(torch.float8_e4m3fn).float(), factors)


def test_rows_are_repeated_and_the_corner_comes_back(monkeypatch):
    """What the hardware is called with; `_scaled_mm` of a CPU adds in FP32."""
    monkeypatch.setattr(tensor_cores, "SIDE", 64)
    a, b = (torch.randint(-8, 9, (rows, 32)).float() for rows in (3, 48))
    called = []

    def multiply(x, y, **options):
        called.append((x.shape, y.shape, x.dtype, options["use_fast_accum"], options["out_dtype"]))
        return x.float() @ y.float() * options["scale_a"] * options["scale_b"]
    monkeypatch.setattr(torch, "_scaled_mm", multiply)
    assert torch.equal(tensor_cores.tensor_core(a, b), a @ b.T)
    assert called == [((64, 32), (32, 64), torch.float8_e4m3fn, True, torch.float32)]


def test_errors_compare_with_the_exact_product_and_the_model():
    row = errors(model, "uniform", 512, "cpu")
    assert row["K"] == 512 and row["equal_to_model"] == 1 and row["tensor_core"] == row["model"]
    assert row["fp8_gemm"]["norm"] < 1e-6 < row["model_promoted"]["norm"] < row["model"]["norm"]
    assert row["model"]["mean"] == pytest.approx(-row["model"]["norm"], rel=0.01)       # all errors are downwards
    other = errors(Adder(bits=13), "uniform", 512, "cpu")
    assert other["equal_to_model"] < 0.05 and other["tensor_core"]["norm"] > 1.8 * row["model"]["norm"]


# ---- claims ---------------------------------------------------------------------------------------------------------

def found_by(adder) -> dict:
    return {"probes": probe(adder, "cpu"),
            "errors": {"uniform": [errors(adder, "uniform", K, "cpu") for K in (128, 4096)]}}


def test_claims_hold_of_the_model():
    found = found_by(model)
    assert all(holds(found) for _, holds in CLAIMS.values())


@pytest.mark.parametrize("adder, fails", [
    (Adder(bits=13), {"bits", "bit for bit", "error"}), (Adder(step=16), {"step", "bit for bit"}),
    (Adder(aligns_sum=False), {"sum so far", "bit for bit", "error"}), (Adder(normalised=True), {"bit for bit"}),
    (Adder(cut="downwards"), {"cut"}), (Adder(cut="to nearest"), {"cut", "bit for bit", "error"})],
    ids=["13 bits", "steps of 16", "the sum apart", "normalised", "downwards", "to nearest"])
def test_every_claim_can_fail(adder, fails):
    found = found_by(adder)
    assert {name for name, (_, holds) in CLAIMS.items() if not holds(found)} == fails


def test_stored_claims_follow_from_stored_numbers():
    for claim in STORED["claims"]:
        words, holds = CLAIMS[claim["id"]]
        assert claim["claim"] == words and claim["holds"] == holds(STORED)
    assert [claim["id"] for claim in STORED["claims"]] == list(CLAIMS)


# ---- the hardware ---------------------------------------------------------------------------------------------------

def test_the_model_still_is_what_the_hardware_was():
    """Its probes, and its errors of the very numbers that the GPU added: sums that differ would show in them."""
    assert probe(model, "cpu") == STORED["probes"]
    for kind, rows in STORED["errors"].items():
        for row in rows[:4]:
            ours = errors(model, kind, row["K"], "cpu")
            assert row["tensor_core"] == row["model"] == ours["model"]
            assert row["fp8_gemm"] == row["model_promoted"] == ours["model_promoted"]
            assert row["equal_to_model"] == row["fp8_gemm_equal_to_model"] == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_the_hardware_adds_as_the_model_does(kind):
    row = errors(tensor_cores.tensor_core, kind, 1024, "cuda")
    assert row["equal_to_model"] == row["fp8_gemm_equal_to_model"] == 1
