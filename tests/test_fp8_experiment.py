"""The FP8 experiment on a CPU: runs that stop and go on, text, claims, and a whole smoke run."""

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import fp8_experiment
import long_runs
import pytest
import torch
from fp8_experiment import CLAIMS, METHODS, SMOKE, Options, apart, experiment, judged, run, smoothed
from long_runs import Taken, go_on, packed, python_sources, read_text, spread
from nano_runs import RESULTS
from test_experiments import SOURCE
from tiny import tiny_config, tiny_tokens

from minidsv3 import Transformer
from minidsv3.data import EOS, Batch, train_tokenizer
from minidsv3.fp8 import to_fp8
from minidsv3.optim import AdamW, Recipe, parameter_groups

STORED = RESULTS / "fp8_training.json"

# ---- one run --------------------------------------------------------------------------------------------------------


def take(folder: Path, precision: str, stops: tuple[int, ...], monkeypatch) -> tuple[Taken, Transformer]:
    """Twelve steps in sittings that end before the step numbers `stops`."""
    recipe = replace(Recipe.preset("nano", 12 * 40), sequence_length=20, bias_speed=0.01)
    batches = [Batch(tiny_tokens(2, 21, seed), torch.zeros(2, 21, dtype=torch.int64)) for seed in range(12)]
    for stop in (*stops, 99):
        torch.manual_seed(0)
        model = Transformer(tiny_config())
        model = to_fp8(model) if precision == "fp8" else model
        optimizer = AdamW(parameter_groups(model, 0.1), betas=recipe.betas, eps=recipe.eps, moments=torch.bfloat16)
        clock = iter(range(1000))                 # go_on asks twice a step: before it and after it
        monkeypatch.setattr(long_runs, "time", SimpleNamespace(time=lambda: next(clock)))
        taken = go_on(folder, model, optimizer, recipe, batches, precision, until=2 * stop)
    return taken, model


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_run_in_three_sittings_is_the_unbroken_run(tmp_path, precision, monkeypatch):
    whole, model = take(tmp_path / "whole", precision, (), monkeypatch)
    parts, resumed = take(tmp_path / "parts", precision, (3, 4), monkeypatch)
    assert whole.losses == parts.losses and len(whole.losses) == 12
    assert all(value.equal(resumed.state_dict()[name]) for name, value in model.state_dict().items())
    assert whole.losses[-1] < whole.losses[0] and not (tmp_path / "whole").exists()


def test_a_forgotten_optimiser_is_noticed(tmp_path, monkeypatch):
    whole, _ = take(tmp_path / "whole", "bf16", (), monkeypatch)
    monkeypatch.setattr(AdamW, "load_state_dict", lambda self, state: None)
    parts, _ = take(tmp_path / "parts", "bf16", (3,), monkeypatch)
    assert whole.losses[:4] == parts.losses[:4] and whole.losses != parts.losses


def test_a_run_that_diverges_ends_there(tmp_path, monkeypatch):
    def diverge(*arguments, taken=[], **options):
        taken.append(None)
        if len(taken) == 3:
            raise long_runs.Diverged("loss nan")
        return train_step(*arguments, **options)

    train_step = long_runs.train_step
    monkeypatch.setattr(long_runs, "train_step", diverge)
    taken, _ = take(tmp_path / "x", "bf16", (), monkeypatch)
    assert len(taken.losses) == 2 and taken.diverged == "loss nan"


# ---- text and processes ---------------------------------------------------------------------------------------------

@pytest.fixture
def corpus(tmp_path) -> Path:
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    for number in range(6):
        (folder / "deep" / f"{number}.py").write_text(f"# number {number}\n{SOURCE * 4}")
    (folder / "copy.py").write_text(f"# number 1\n{SOURCE * 4}")
    (folder / "latin.py").write_bytes("# caf\xe9".encode("latin-1"))
    (folder / "notes.txt").write_text("no source")
    return folder


def test_sources_are_different_and_python(corpus, tmp_path):
    names = [document.name for document in python_sources(corpus)]
    assert len(names) == 6 and all(name.endswith(".py") for name in names)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds 0 Python sources with text; at least 2 are needed"):
        python_sources(tmp_path / "empty")


def test_documents_are_packed_end_to_end_and_again_from_the_start(corpus):
    documents = python_sources(corpus)
    tokenizer = train_tokenizer(documents, 300)
    size = sum(len(tokenizer.encode(document.text).ids) + 1 for document in documents)
    tokens, numbers = packed(documents, tokenizer, 50, size // 50 + 10)
    stream = torch.cat([tokens[0], tokens[1:, 1:].flatten()])
    assert (tokens[1:, 0] == tokens[:-1, -1]).all() and len(stream) > size
    assert stream[size:].equal(stream[:len(stream) - size])
    assert tokenizer.decode(stream[:size].tolist()) == "".join(document.text for document in documents)
    ends = stream == tokenizer.token_to_id(EOS)
    assert (torch.cat([numbers[0], numbers[1:, 1:].flatten()]).diff() == ends[:-1].int()).all()


def test_text_is_made_once_and_holds_out_documents(corpus, tmp_path):
    text = read_text(tmp_path / "text", corpus, 300, 50, 30, 4)
    assert text["tokens"].shape == text["documents"].shape == (30, 51) and text["held_out"].shape == (4, 51)
    held, *train = python_sources(corpus)
    tokenizer = train_tokenizer(train, 300)
    assert tokenizer.decode(text["held_out"][0].tolist()).startswith(held.text.splitlines()[0])
    seen = "".join(map(tokenizer.decode, text["tokens"].tolist()))
    assert held.text.splitlines()[0] not in seen and train[0].text.splitlines()[1] in seen
    again = read_text(tmp_path / "text", None, 0, 0, 0, 0)
    assert all(tensor.equal(again[name]) for name, tensor in text.items())


def halve(name: str, device: str) -> dict | None:
    return {"half": int(name) // 2, "device": device} if name != "0" else None


def test_runs_are_spread_over_devices_and_a_failure_stops_no_other():
    results = dict(spread(halve, ["0", "4", "six", "8"], ["a", "b"]))
    assert results["0"] is None and results["4"]["half"] == 2 and results["8"]["half"] == 4
    assert isinstance(results["six"], ValueError) and {results["4"]["device"], results["8"]["device"]} <= {"a", "b"}


# ---- claims ---------------------------------------------------------------------------------------------------------

def runs_of(**losses: list[float]) -> dict:
    return {method: {"losses": values, "diverged": None} for method, values in losses.items()}


def test_curves_are_compared_smoothed_over_the_last_half():
    assert smoothed([1.0, 2.0, 0.0]) == pytest.approx([1.0, 1.1, 0.99])
    assert apart(runs_of(bf16=[2.0] * 8, fp8=[9.0] + [2.0] * 7), "fp8") == pytest.approx(
        100 * 3.5 * sum(0.9**step for step in range(4, 8)) / 4)
    assert apart(runs_of(bf16=[2.0] * 8, fp8=[2.0] * 4 + [2.0, 2.0, 2.2, 1.8]), "fp8") == pytest.approx(
        100 * (0.01 + 0.001) / 4)
    diverged = {"bf16": {"losses": [2.0], "diverged": None}, "fp8": {"losses": [], "diverged": "loss nan"}}
    assert apart(diverged, "fp8") == 100


def entry(size: str, method: str, loss: float, error: float, diverged: str | None = None) -> dict:
    return {"size": size, "method": method, "seed": 0, "losses": [loss] * 8, "held_out": loss, "diverged": diverged,
            "gradient_error": {"start": error, "end": error}}


def test_claims_are_judged_by_size_once_their_runs_are_complete():
    mini = [entry("mini", "bf16", 2.0, 0.01), entry("mini", "control", 2.002, 0.01), entry("mini", "fp8", 2.004, 0.1)]
    assert judged(mini[:2]) == []
    verdicts = {claim["id"]: claim["verdict"] for claim in judged(mini)}
    assert verdicts == {"follows": "reproduces in size", "within_noise": "shows the opposite",
                        "ends_as_low": "reproduces in size"}
    small = [entry("small", method, 2.0 + 0.001 * i, 0.1 * 1.05**i, "loss nan" if method == "blocks" else None)
             for i, method in enumerate(METHODS["small"])]
    verdicts = {claim["id"]: claim["verdict"] for claim in judged(small)}
    assert len(verdicts) == len(CLAIMS["small"]) and verdicts["blocks_diverge"] == "reproduces in size"
    assert verdicts["e5m2_errs"] == "reproduces in direction" and verdicts["blocks_drifts"] == "reproduces in size"


# ---- whole runs -----------------------------------------------------------------------------------------------------

@pytest.fixture
def options(corpus, tmp_path) -> Options:
    return Options(out=tmp_path / "found.json", runs=tmp_path / "runs", corpus=corpus, device="cpu", sizes=SMOKE,
                   held_out=4, only=("mini",))


def test_the_experiment_stops_goes_on_and_writes(options, tmp_path, capsys):
    assert experiment(replace(options, until=time.time()))["runs"] == []
    assert "mini fp8 0: waits for the next call" in capsys.readouterr().out
    found = experiment(options)
    assert json.loads(options.out.read_text()) == found and found["what"].startswith("A smoke run")
    assert [entry["method"] for entry in found["runs"]] == ["bf16", "control", "fp8"]
    assert found["claims"] == judged(found["runs"]) and len(found["claims"]) == 3
    bf16, control, fp8 = found["runs"]
    for each in found["runs"]:
        assert len(each["losses"]) == 6 and each["diverged"] is None and each["held_out"] < math.log(384)
    assert 0 < abs(control["losses"][0] - bf16["losses"][0]) < 0.01
    assert bf16["gradient_error"]["start"] < 0.15 < fp8["gradient_error"]["start"] < 0.6
    written = options.out.read_text()
    experiment(options)                               # everything is there already
    assert options.out.read_text() == written
    with pytest.raises(ValueError, match="holds another experiment"):
        experiment(replace(options, held_out=8))


@pytest.mark.parametrize("method", METHODS["small"])
def test_every_ablation_trains(options, method):
    options.runs.mkdir()
    found = run(options, f"small {method} 0", "cpu")
    assert len(found["losses"]) == 4 and abs(found["losses"][-1] - math.log(384)) < 0.5
    assert found["gradient_error"]["end"] < 0.6 and found["peak_memory_gb"] is None


def test_stored_results_are_what_the_script_writes():
    """Every stored claim is judged again from the stored runs."""
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    assert stored["claims"] == judged(stored["runs"]) and not stored["what"].startswith("A smoke run")


def test_mini_sees_thirty_million_tokens_and_no_sequence_is_too_long():
    sizes = fp8_experiment.SIZES
    assert sizes["mini"].tokens >= 30_000_000 and sizes["mini"].model.hidden_size == 1024
    for size in (*sizes.values(), *SMOKE.values()):
        assert size.length <= size.model.max_position_embeddings
