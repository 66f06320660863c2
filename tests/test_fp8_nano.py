"""The nano experiment in FP8: what it measures, on a tiny model; stored verdicts follow from the stored runs."""

import json
from pathlib import Path

import fp8_nano
import pytest
import torch
from nano_runs import RESULTS, judge
from tiny import tiny_model
from tokenizers import Tokenizer

from minidsv3.data import Document, encode, train_tokenizer

STORED = json.loads((RESULTS / "fp8_nano.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([Document("a.py", "def get(self, key):\n    return self.items[key]\n" * 40)], 280)


def test_verdicts_follow_from_the_runs():
    assert judge(fp8_nano.CLAIMS, STORED["runs"], list(fp8_nano.TRAINED)) == STORED["claims"]
    assert len(STORED["runs"]) == 5 * len(fp8_nano.TRAINED)


def test_runs_of_a_seed_begin_alike():
    """The same weights and the same first batch: BF16 and its control print the same loss, FP8 nearly so."""
    for seed in range(5):
        bf16, control, fp8 = (run["losses"][0] for run in STORED["runs"] if run["seed"] == seed)
        assert control == pytest.approx(bf16, abs=2e-3) and fp8 == pytest.approx(bf16, rel=2e-3)


def test_errors_of_the_gradient_are_ordered_as_formats_are(tokenizer):
    """In a tiny model, too: BF16 below FP8; the report's recipe is what `to_fp8` makes by default."""
    model = tiny_model(dtype=torch.float32, vocab_size=280)
    rows = torch.tensor([encode(tokenizer, fp8_nano.LINE * 3)[:17]])
    errors = fp8_nano.gradient_errors(model, rows)
    assert set(errors) == {"bf16", *fp8_nano.RECIPES} and 0 < 2 * errors["bf16"] < errors["fp8"]
    assert errors == fp8_nano.gradient_errors(model, rows)
    assert all(weight.grad is None for weight in model.parameters())


def test_activations_are_those_of_the_layer(tokenizer, monkeypatch):
    """`hidden` times the down-projection is the output whose gradient is `slope`; no gradient and no hook is left."""
    monkeypatch.setattr(fp8_nano, "SHOWN_LAYER", 1)
    model = tiny_model(dtype=torch.float32, vocab_size=280)
    expert, seen = model.model.layers[1].mlp.shared_experts, []
    hook = expert.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    shown = fp8_nano.activations(model, tokenizer)
    hook.remove()
    (norm, output), tokens = seen[0], len(shown["tokens"])
    assert "".join(shown["tokens"]) == fp8_nano.LINE and shown["layer"] == 1
    assert torch.allclose(torch.tensor(shown["norm"]), norm.flatten(0, -2), rtol=6e-3, atol=1e-6)
    again = torch.tensor(shown["hidden"]) @ expert.down_proj.weight.detach().T
    assert torch.allclose(again, output.flatten(0, -2), rtol=0, atol=1e-2 * output.abs().max().item())
    assert len(shown["norm"]) == tokens and len(shown["slope"]) == tokens - 1
    assert any(map(any, shown["slope"])) and all(weight.grad is None for weight in model.parameters())
    assert not expert.down_proj._forward_hooks and not expert.gate_proj._forward_pre_hooks


def test_the_stored_command_names_its_seeds():
    assert STORED["command"].startswith("python tools/fp8_nano.py ") and "--seeds 0 1 2 3 4" in STORED["command"]
    assert Path(RESULTS).name == "results" and not STORED["what"].startswith("A smoke run")
