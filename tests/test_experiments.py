"""The experiments behind chapters 02 and 03 measure what they say: kinds, bits, losses, drafts, verdicts, files."""

import json
import math
from dataclasses import replace
from pathlib import Path

import mtp_experiment
import nano_runs
import pytest
import router_experiment
import torch
from mtp_experiment import accepted_drafts, bigram_table, lookup_guesses, main_and_mtp_guesses, without_token
from nano_runs import KINDS, Claim, Options, forward, new_model, split_source, training
from router_experiment import METHODS, batch_balance_loss, mutual_information
from tiny import tiny_config, tiny_model, tiny_tokens

from minidsv3 import generate
from minidsv3.balance import sequence_balance_loss
from minidsv3.corpus import HELD_OUT_SHARE, Document, _share
from minidsv3.data import Batch
from minidsv3.optim import AdamW, Recipe, parameter_groups
from minidsv3.train import train_step

SOURCE = '''"""What this module is."""
import os  # for paths

# A comment of its own.
def name(path):
    """Two lines
    of docstring."""
    text = """not a docstring"""
    return os.path.basename(path) + "#" + text
'''


# ---- kinds of text --------------------------------------------------------------------------------------------------

def test_a_source_is_split_into_code_and_comments():
    code, comments = split_source(SOURCE)
    assert code.split("\n") == [
        "import os  ", "", "def name(path):", '    text = """not a docstring"""',
        '    return os.path.basename(path) + "#" + text', ""]
    assert comments == '"""What this module is."""\n# for paths\n# A comment of its own.\n' \
                       '"""Two lines\n    of docstring."""\n'


def test_code_before_and_behind_a_removed_string_stays():
    code, comments = split_source('class A: "doc"; x = 1\n')
    assert comments == "\n" and code == 'class A: "doc"; x = 1\n'      # not a statement on a line of its own
    assert split_source('def f():\n    "doc"  # why\n    return 1\n') == ("def f():\n    return 1\n", '"doc"\n# why\n')


def test_a_source_that_is_none_is_left_out():
    assert split_source("x = (1,\n") is None
    kinds = nano_runs.by_kind([Document("a.py", SOURCE), Document("b.py", "x = (1,\n"), Document("topic", "Words.")])
    assert [len(kinds[kind]) for kind in KINDS] == [1, 1, 1]
    assert kinds["prose"] == [Document("topic", "Words.")]


def test_rows_are_spread_from_first_to_last():
    rows = torch.arange(10)[:, None]
    assert nano_runs.spread(rows, 4).flatten().tolist() == [0, 3, 6, 9]
    assert nano_runs.spread(rows, 20).equal(rows)


# ---- bits -----------------------------------------------------------------------------------------------------------

def test_rows_that_say_nothing_about_columns_have_no_bits():
    assert mutual_information(torch.full((2, 2), 10**6)) == pytest.approx(0, abs=1e-5)
    assert mutual_information(torch.outer(torch.tensor([1, 3, 0]), torch.tensor([2, 5, 7, 0])) * 10**5) \
        == pytest.approx(0, abs=1e-5)


def test_rows_that_decide_columns_have_all_bits():
    assert mutual_information(torch.eye(2) * 10**6) == pytest.approx(1, abs=1e-5)
    assert mutual_information(torch.eye(8) * 10**6) == pytest.approx(3, abs=1e-4)


def test_empty_rows_and_columns_do_not_count():
    wide = torch.zeros(50, 90)
    wide[3, 7], wide[4, 2] = 30, 30
    assert mutual_information(wide) == mutual_information(torch.eye(2) * 30)


def test_the_bias_of_small_samples_is_taken_off():
    drawn = [torch.multinomial(torch.ones(48), 500, replacement=True).bincount(minlength=48).view(3, 16)
             for _ in range(200)]
    corrected = sum(map(mutual_information, drawn)) / 200
    bias = 2 * 15 / (2 * 500 * math.log(2))
    assert abs(corrected) < bias / 10


# ---- losses and the step --------------------------------------------------------------------------------------------

def test_batch_wise_loss_of_one_sequence_is_the_sequence_wise_one():
    logits = torch.randn(1, 20, 16, dtype=torch.float64)
    assert batch_balance_loss(logits, 4).equal(sequence_balance_loss(logits, 4))


def test_batch_wise_loss_asks_for_balance_in_the_batch_alone():
    """Two sequences, each on half of the experts: even together, uneven apart."""
    half = torch.tensor([8.0] * 8 + [-8.0] * 8) + torch.randn(2, 400, 16) * 1e-3
    half[1] = half[1].flip(-1)
    assert batch_balance_loss(half, 8).item() == pytest.approx(1, abs=1e-3)
    assert sequence_balance_loss(half, 8).item() == pytest.approx(2, abs=1e-2)


@pytest.mark.parametrize("broken", [False, True])
def test_a_step_is_the_packages_step(broken):
    """Bit for bit the same weights as `train_step`; a forgotten balance loss is seen."""
    config = tiny_config(num_nextn_predict_layers=0)
    recipe = replace(Recipe.preset("nano", 800), sequence_length=20, sequence_balance=0.0 if broken else 1e-2,
                     bias_speed=0.01)
    batches = [Batch(tiny_tokens(4, 21, seed), torch.zeros(4, 21, dtype=torch.int64)) for seed in range(8)]
    theirs = new_model(config, 3, "cpu")
    optimizer = AdamW(parameter_groups(theirs, recipe.weight_decay), betas=recipe.betas, eps=recipe.eps)
    for step, batch in enumerate(batches):
        train_step(theirs, optimizer, replace(recipe, sequence_balance=1e-2), batch, step * 80)
    ours = new_model(config, 3, "cpu")

    def objective(tokens, documents, seen):
        losses = ours.loss(tokens, documents, 0.0, recipe.balance_weight(seen))
        return losses.total, losses.load

    tokens, documents = (torch.stack(part) for part in zip(*batches))
    done = [done for done, _ in training(ours, recipe, tokens, documents, objective, "fp32")]
    assert done == list(range(9))
    same = all(value.equal(theirs.state_dict()[name]) for name, value in ours.state_dict().items())
    assert same != broken


def test_forward_is_the_packages_loss():
    model, rows = tiny_model(num_nextn_predict_layers=0), tiny_tokens(3, 17)
    loss, record = forward(model, rows)
    assert loss.equal(model.loss(rows).main) and len(record) == 2
    assert nano_runs.held_out_loss(model, rows.repeat(5, 1)) == pytest.approx(loss.item(), abs=1e-4)
    with pytest.raises(ValueError, match="diverged"):
        nano_runs.rounded(math.nan)


def test_the_floor_falls_with_the_root_of_the_tokens():
    few, many = (router_experiment.floor(tiny_config(), tokens, 50) for tokens in (64, 1024))
    assert few / many == pytest.approx(4, rel=0.25)


# ---- drafters -------------------------------------------------------------------------------------------------------

def test_bigram_table_holds_the_commonest_next_token():
    assert bigram_table(torch.tensor([[[0, 1, 0, 2, 0, 2, 1, 0]]]), 4).tolist() == [2, 0, 0, -1]


@pytest.mark.parametrize("text, guess", [
    ([1, 2, 3], -1),                              # nothing came before
    ([7, 8, 9, 7], 8),
    ([7, 8, 7, 9, 7], 9),                         # the latest among equals
    ([5, 7, 8, 6, 7, 9, 5, 7], 8),                # two tokens match: longer wins over later
    ([4, 4, 4], 4),
])
def test_lookup_repeats_what_followed_the_longest_match(text, guess):
    assert lookup_guesses(torch.tensor([text, text]))[:, -1].tolist() == [guess, guess]


def test_lookup_looks_back_only():
    text = tiny_tokens(4, 60, vocab_size=6)
    cut = text.clone()
    cut[:, 40:] = 0
    assert lookup_guesses(text)[:, :40].equal(lookup_guesses(cut)[:, :40])


@pytest.mark.parametrize("seed", range(3))
def test_drafts_are_counted_as_in_generate(seed):
    """MTP's guesses along the finished text, walked through here, give generate's own counts."""
    model = tiny_model(seed)
    written = generate(model, tiny_tokens(6, 8, seed), 40, speculative=True)
    guesses = main_and_mtp_guesses(model, written.tokens)[1]
    assert accepted_drafts(written.tokens, guesses, 8) == (written.drafted, written.accepted)


@pytest.mark.parametrize("right, counted", [(True, (10, 10)), (False, (19, 0))])
def test_a_drafter_that_is_always_or_never_right(right, counted):
    text = tiny_tokens(1, 25)
    guesses = torch.cat((text[:, 1:], text[:, :1]), 1) if right else torch.full_like(text, -1)
    assert accepted_drafts(text, guesses, 5) == counted


def test_without_token_zeroes_the_embedding_and_nothing_else():
    model, text = tiny_model(), tiny_tokens(2, 12)
    before = main_and_mtp_guesses(model, text)
    with without_token(model):
        main, blind = main_and_mtp_guesses(model, text)
    assert main.equal(before[0]) and not blind.equal(before[1])
    half = model.mtp_modules[0].eh_proj.weight[:, :model.config.hidden_size]
    half.data.zero_()                             # the same by another way
    assert main_and_mtp_guesses(model, text)[1].equal(blind)
    assert main_and_mtp_guesses(model, text)[0].equal(before[0])


# ---- claims ---------------------------------------------------------------------------------------------------------

LARGER = Claim(id="larger", claim="b is 2 above a", value=lambda runs: runs["b"]["x"] - runs["a"]["x"], least=2)
EQUAL = replace(LARGER, id="equal", most=0.5)
MARK = replace(LARGER, id="mark", directed=False)


@pytest.mark.parametrize("claim, values, verdict", [
    (LARGER, [2, 3, 4, 5, -1], "reproduces in size"),
    (LARGER, [2, 3, 4, 1, 1], "reproduces in direction"),
    (LARGER, [1, 1, 1, 1, -1], "reproduces in direction"),
    (LARGER, [1, 1, 1, -1, -1], "does not show at this scale"),
    (LARGER, [0, 0, 0, 0, 0], "does not show at this scale"),
    (LARGER, [-1, -1, -3, -1, 5], "shows the opposite"),
    (EQUAL, [0.5, -0.5, 0, 0.1, 9], "reproduces in size"),
    (EQUAL, [-1, -1, -1, -1, -1], "does not show at this scale"),
    (EQUAL, [0.6, -0.6, 1, 1, 1], "does not show at this scale"),
    (MARK, [2, 3, 4, 5, 1], "reproduces in size"),
    (MARK, [1, 1, 1, 1, 1], "does not show at this scale"),
    (MARK, [-1, -1, -1, -1, -1], "does not show at this scale"),
])
def test_verdicts(claim, values, verdict):
    runs = [{"method": method, "seed": seed, "x": value if method == "b" else 0}
            for seed, value in enumerate(values) for method in ("a", "b")]
    judged = nano_runs.judge((claim,), runs, ["a", "b"])[0]
    assert judged["verdict"] == verdict and judged["values"] == values
    assert judged["holds"] == f"{sum(map(claim.holds, values))} of 5 pairs"


def test_incomplete_seeds_are_not_judged():
    runs = [{"method": "a", "seed": 0, "x": 0}, {"method": "b", "seed": 0, "x": 9}, {"method": "a", "seed": 1, "x": 0}]
    assert nano_runs.judge((LARGER,), runs, ["a", "b"])[0]["holds"] == "1 of 1 pairs"
    assert nano_runs.judge((LARGER,), runs[:1], ["a", "b"]) == []


def test_a_run_counts_as_even_from_the_first_sampled_step_below_a_half():
    run = {"max_violation": [[2.0, 1.0], [0.9, 0.2], [0.6, 0.3], [0.9, 0.9]]}
    assert router_experiment.sampled_until_even(run) == 2
    assert router_experiment.sampled_until_even({"max_violation": [[2.0], [1.0]]}) == 2
    assert router_experiment.at_the_end(run) == pytest.approx(0.9)
    assert router_experiment.dead({"held_out_load": [[100, 100, 2, 0], [1, 1, 1, 1]]}) == 2


# ---- whole runs -----------------------------------------------------------------------------------------------------

def write_sources(folder: Path) -> Path:
    """Some sources and texts, of which at least one each is held out by its name."""
    folder.mkdir()
    names = {suffix: [f"{number}{suffix}" for number in range(400)] for suffix in (".py", ".txt")}
    for suffix, text in ((".py", SOURCE * 8), (".txt", "The names of all items are read in order. " * 20)):
        held = [name for name in names[suffix] if _share(Document(name, "")) < HELD_OUT_SHARE][:2]
        kept = [name for name in names[suffix] if _share(Document(name, "")) >= HELD_OUT_SHARE][:4]
        for name in held + kept:
            (folder / name).write_text(f"# {name}\n{text}" if suffix == ".py" else f"{name} {text}")
    return folder


@pytest.fixture
def options(tmp_path) -> Options:
    model = tiny_config(vocab_size=300, num_nextn_predict_layers=1)
    return Options(out=tmp_path / "found.json", model=model, tokens=640, seeds=(0,), workers=2, precision="bf16",
                   held_out_tokens=256, source=str(write_sources(tmp_path / "corpus")), sequences=2)


def shape(value) -> list[int]:
    return list(torch.tensor(value).shape)


def test_router_experiment_writes_what_the_chapter_reads(options, capsys):
    options = replace(options, model=options.model.replace(num_nextn_predict_layers=0))
    found = router_experiment.experiment(options)
    assert json.loads(options.out.read_text()) == found
    assert found["what"].startswith("A smoke run") and found["seeds"] == [0] and found["steps"] == [0, 1, 2, 3, 4]
    assert [run["method"] for run in found["runs"]] == list(METHODS)
    assert all(claim["holds"].endswith("of 1 pairs") for claim in found["claims"])
    for run in found["runs"]:
        assert shape(run["max_violation"]) == [5, 2] and shape(run["held_out_load"]) == [2, 16]
        assert shape(run["bias"]) == [len(run["bias_steps"]), 2, 16] and run["bias_steps"][-1] == 5
        assert {kind: shape(load) for kind, load in run["load_by_kind"].items()} == dict.fromkeys(KINDS, [2, 16])
        assert len({sum(load[0]) for load in run["load_by_kind"].values()}) == 1      # as many tokens of each kind
        assert sum(run["held_out_load"][0]) == 256 * 4
        assert len(run["mi_kind"]) == len(run["mi_token"]) == 2
        moved = max(abs(bias) for layer in run["bias"][-1] for bias in layer)
        assert moved == pytest.approx(5 * METHODS[run["method"]].gamma, abs=1e-3)
    check_snapshots(json.loads(options.out.with_name("found_snapshots.json").read_text()), found)
    kept = options.out.read_text()
    router_experiment.experiment(options)                                             # everything is there already
    assert options.out.read_text() == kept
    with pytest.raises(ValueError, match="holds another experiment"):
        router_experiment.experiment(replace(options, tokens=1280))


def check_snapshots(stored: dict, found: dict) -> None:
    assert stored["methods"] == ["none", "sequence", "bias"]
    assert [str(step) for step in stored["steps"]] == list(stored["scores"]["bias"])
    assert "".join(stored["texts"]["code"]).startswith("def ")
    for method in stored["methods"]:
        bias = next(run for run in found["runs"] if run["method"] == method)["bias"]
        for step, expected in zip(stored["steps"], bias):
            for text, tokens in stored["texts"].items():
                scores = torch.tensor(stored["scores"][method][str(step)][text])
                assert list(scores.shape) == [2, len(tokens), 16] and 0 <= scores.min() and scores.max() <= 1000
            assert torch.tensor(stored["bias"][method][str(step)]).equal((torch.tensor(expected) * 1000).round().int())
            assert sum(stored["load"][method][str(step)][0]) == 4 * stored["load_tokens"]


def test_mtp_experiment_writes_what_the_chapter_reads(options):
    found = mtp_experiment.experiment(options)
    assert json.loads(options.out.read_text()) == found
    assert found["steps"]["plain"] == found["steps"]["mtp"] == 5 < found["steps"]["plain_equal_flops"]
    spent = {run["variant"]: run["tokens"] for run in found["runs"]}
    assert spent["plain_equal_flops"] / spent["mtp"] == pytest.approx(found["flops_ratio"], abs=0.1)
    for run in found["runs"]:
        assert [tokens for tokens, _ in run["curve"]][-1] == run["tokens"]
        assert run["curve"][-1][1] == run["held_out"]
        has_mtp = run["variant"] == "mtp"
        assert (run["mtp_held_out"] is not None) == has_mtp
        for kind in KINDS:
            drafts, agreement, per_pass = (run[name][kind] for name in ("acceptance", "agreement", "tokens_per_pass"))
            assert drafts["n"] % 32 == 0 and 0 <= drafts["bigram"] <= 1 and 0 <= drafts["lookup"] <= 1
            for value in (drafts["mtp"], agreement["mtp"], agreement["mtp_without_token"]):
                assert 0 <= value <= 1 if has_mtp else value is None
            assert 1 <= per_pass <= 2 if has_mtp else per_pass is None


def test_a_failed_run_is_reported_and_the_others_are_kept(options, monkeypatch, capsys):
    """A run of one seed already done is skipped; results are written run by run."""
    header = {"what": "counting", "runs": []}
    done = {"method": "a", "seed": 0, "held_out": 1.0, "seconds": 0.0}
    nano_runs.write(options.out, {"what": "counting", "runs": [done]})
    monkeypatch.setattr(nano_runs, "prepare", lambda options, steps: {})
    found = nano_runs.run_all(count, ["a", "b"], options, 1, header, dict)
    assert [run["held_out"] for run in found["runs"]] == [1.0, 2.0]
    with pytest.raises(RuntimeError, match="1 of 2 runs failed"):
        nano_runs.run_all(count, ["a", "b", "bad", "c"], options, 1, header, dict)
    assert "bad, seed 0 failed: ValueError: no" in capsys.readouterr().out
    assert [run["method"] for run in json.loads(options.out.read_text())["runs"]] == ["a", "b", "c"]


def count(method: str, seed: int, options: Options, data: dict) -> dict:
    if method == "bad":
        raise ValueError("no")
    return {"method": method, "seed": seed, "held_out": 2.0, "seconds": 0.0}


@pytest.mark.parametrize("name, methods, key", [("router", METHODS, "method"),
                                                ("mtp", mtp_experiment.VARIANTS, "variant")])
def test_stored_results_are_what_the_scripts_write(name, methods, key):
    """Every stored claim is judged again from the stored runs."""
    stored = json.loads((nano_runs.RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    claims = {"router": router_experiment.CLAIMS, "mtp": mtp_experiment.CLAIMS}[name]
    assert stored["claims"] == nano_runs.judge(claims, stored["runs"], list(methods), key)
    assert {(run[key], run["seed"]) for run in stored["runs"]} == {(m, s) for m in methods for s in stored["seeds"]}
