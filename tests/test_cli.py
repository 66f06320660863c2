"""The command line: a run from train to export, and every wrong input answered with one sentence and a code."""

import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from minidsv3 import train
from minidsv3.checkpoint import load_checkpoint, load_tokenizer
from minidsv3.cli import app, train_config
from minidsv3.config import ModelConfig
from minidsv3.corpus import Document
from minidsv3.data import train_tokenizer
from minidsv3.optim import Recipe
from minidsv3.run_state import load_latest, saved_steps
from test_train import interrupt, log, state_differences, stop_after
from tiny_run import run_config, write_corpus


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refusal(*arguments: object, code: int = 1) -> str:
    """The sentence with which the command was refused: one line, no traceback."""
    result = call(*arguments)
    assert result.exit_code == code, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in result.output
    return line.removeprefix("error: ")


def train_flags(corpus: Path, out: Path) -> list[str]:
    """What `run_config` says, as options of `train`."""
    config = run_config(corpus)
    values = {**vars(config), **vars(config.model), **vars(config.recipe)}
    nano = train_config("nano", [], None, {})
    presets = {**vars(nano), **vars(nano.model), **vars(nano.recipe)}
    own = ("model", "recipe", "source", "init_std")     # the last follows from the width
    changed = [name for name in values if values[name] != presets[name] and name not in own]
    return ["--corpus", str(corpus), "--out", str(out)] + [
        word for name in changed for word in ("--set", f"{name}={json.dumps(values[name])}")]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("text") / "corpus")


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory) -> Path:
    """A finished run, made through the command line."""
    out = tmp_path_factory.mktemp("run") / "run"
    result = call("train", *train_flags(corpus, out))
    assert result.exit_code == 0, result.output
    assert "nats a token" in result.stdout and "bits a byte" in result.stdout
    return out


# ---- what works -------------------------------------------------------------------------------------------------

def test_help_lists_the_commands_and_imports_none_of_their_modules():
    command = [sys.executable, "-X", "importtime", "-m", "minidsv3", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert all(f"  {command}  " in done.stdout for command in ("train", "generate", "export", "cost", "bench"))
    assert len(done.stdout.splitlines()) < 20
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert imported.isdisjoint({"minidsv3.train", "minidsv3.data", "minidsv3.bench", "transformers"})


def test_a_run_has_the_settings_of_the_flags(corpus, trained):
    config = train.TrainConfig.from_dict(load_latest(trained).state["config"])
    assert config == run_config(corpus)
    assert config.model.init_std == pytest.approx(0.006 * (7168 / 32) ** 0.5)      # follows the width that was set


def test_settings_that_are_not_given_are_the_presets():
    config = train_config("nano", [], 400_000, {})
    assert config.model == ModelConfig.preset("nano") and config.recipe == Recipe.preset("nano", 400_000)
    assert train_config("nano", ["betas=[0.8,0.9]", "mtp_order=hidden_first"], None, {}).recipe.betas == (0.8, 0.9)


def test_resuming_a_finished_run_only_measures_again(trained):
    before = (trained / "result.json").read_text()
    assert call("train", "--resume", "--out", trained).exit_code == 0
    assert (trained / "result.json").read_text() == before


@pytest.mark.parametrize("folder", ["", "model"])
def test_generate_continues_text_from_a_run_or_an_export(trained, folder):
    result = call("generate", "def f(", "--model", trained / folder, "--tokens", 12, "--temperature", 0)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("def f(")
    tokens, passes = map(int, re.findall(r"\d+", result.stderr))
    assert 1 <= tokens == passes <= 12


def test_speculative_greedy_text_is_the_same_and_reports_acceptance(trained):
    plain = call("generate", "self", "--model", trained, "--tokens", 20, "--temperature", 0)
    drafted = call("generate", "self", "--model", trained, "--tokens", 20, "--temperature", 0, "--speculative")
    assert drafted.stdout == plain.stdout
    assert "drafts accepted]" in drafted.stderr and "accepted" not in plain.stderr


def test_generate_repeats_with_a_seed_and_starts_documents(trained):
    texts = [call("generate", "", "--model", trained, "--tokens", 20, "--seed", seed).stdout for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_export_writes_the_hub_layout(trained, tmp_path):
    assert call("export", tmp_path / "hub", "--model", trained).exit_code == 0
    model = load_checkpoint(tmp_path / "hub")
    assert model.lm_head.weight.dtype is torch.bfloat16
    exact = load_checkpoint(trained / "model").lm_head.weight
    assert torch.equal(model.lm_head.weight, exact.bfloat16())
    assert load_tokenizer(tmp_path / "hub").to_str() == load_tokenizer(trained / "model").to_str()


def test_cost_counts_a_preset_and_a_folder(trained):
    full = call("cost").stdout
    for number in ("671,026,419,200", "37,552,282,624", "11,610,068,224", "70,272", "250,463,422,464"):
        assert number in full
    model = load_checkpoint(trained / "model")
    main = sum(value.numel() for name, value in model.state_dict().items() if "layers.3" not in name)
    assert f"{main:,}" in call("cost", trained / "model").stdout


# ---- stopping ---------------------------------------------------------------------------------------------------

def test_ctrl_c_says_how_to_go_on(corpus, trained, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        stop_after(5, patched, interrupt)
        result = call("train", *train_flags(corpus, out))
    assert result.exit_code == 130
    assert f"python -m minidsv3 train --resume --out {out}" in result.stderr
    assert saved_steps(out)[0] == 5
    assert call("train", "--resume", "--out", out).exit_code == 0
    assert state_differences(out, trained) == []


KILLED_IN_STEP_7 = """
import os, signal
from minidsv3 import cli, train

def killing_step(*arguments, taken=[]):
    taken.append(None)
    if len(taken) == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(*arguments)

train_step, train.train_step = train.train_step, killing_step
cli.app()
"""


def test_kill_9_and_resume_equal_the_uninterrupted_run(corpus, trained, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-c", KILLED_IN_STEP_7, "train", *train_flags(corpus, out)]
    killed = subprocess.run(command, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert saved_steps(out)[0] == 4 and len(log(out)) == 6
    command = [sys.executable, "-m", "minidsv3", "train", "--resume", "--out", str(out)]
    resumed = subprocess.run(command, capture_output=True)
    assert resumed.returncode == 0, resumed.stderr
    assert state_differences(out, trained) == []
    assert log(out) == log(trained)


# ---- wrong input ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, sentence", [
    ("--preset pico", "there is no preset 'pico'; choose one of full, mini, nano"),
    ("--corpus {tmp}/nowhere", "there is no corpus at .*/nowhere"),
    ("--corpus {tmp}/empty", "holds 0 different documents with text"),
    ("--corpus {tmp}/binary.txt", "binary.txt is not UTF-8 text"),
    ("--corpus {tmp}/records.jsonl", "records.jsonl:1 has no string under 'text'"),
    ("--precision fp64", "precision is 'fp64'; it must be fp32 or bf16 or fp8"),
    ("--tokens 0", "total_tokens is 0"),
    ("--set vocab_size=100", "vocab_size is 100; it must hold all bytes and special tokens"),
    ("--set n_group=3", "n_group is 3; it must divide n_routed_experts, which is 16"),
    ("--set colour=blue", "--set colour=blue: give NAME=VALUE with a field of"),
    ("--set hidden_size", "--set hidden_size: give NAME=VALUE"),
    ("--set hidden_size=wide", "--set hidden_size=wide: the preset has 256; give a value of that kind"),
    ("--set sequence_length=2.5", "--set sequence_length=2.5: the preset has 256"),
    ("--set save_every=0", "save_every is 0; it must be at least 1"),
    ("--preset full", "training this model needs 10,922 GB"),
    ("--resume", "there is no saved state in .*out"),
])
def test_train_refuses(arguments, sentence, corpus, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    (tmp_path / "records.jsonl").write_text('{"texts": "no text"}\n')
    words = [word.format(tmp=tmp_path) for word in arguments.split()]
    default = [] if "--corpus" in words or "--resume" in words else ["--corpus", corpus]
    assert re.search(sentence, refusal("train", "--out", tmp_path / "out", *default, *words))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments", ["train --tokens many", "train --resume --seed 1", "train --resume --set seed=1",
                                       "train --no-such-option", "generate", "sing"])
def test_wrong_usage_is_code_2(arguments):
    result = call(*arguments.split())
    assert result.exit_code == 2 and "Error: " in result.stderr and "Traceback" not in result.output


def test_train_does_not_overwrite_a_run(corpus, trained):
    before = load_latest(trained).step
    assert "already holds a run (saved at step 12); resume it" in refusal("train", *train_flags(corpus, trained))
    assert load_latest(trained).step == before


def test_a_nan_loss_stops_training_and_keeps_the_last_good_checkpoint(corpus, tmp_path):
    """A learning rate at which the weights overflow: no NaN is planted."""
    out = tmp_path / "run"
    sentence = refusal("train", *train_flags(corpus, out), "--set", "save_every=1", "--set", "peak_lr=1e38")
    step = int(re.search(r"step (\d+) diverged .*the last good checkpoint is .*step-(\d+)", sentence)[1])
    assert saved_steps(out)[0] == load_latest(out).step == step - 1 == len(log(out))
    assert not (out / "model").exists()


def test_a_disk_that_refuses_stops_training_and_keeps_the_last_checkpoint(corpus, trained, tmp_path):
    """The system itself refuses to write: no file of this process may grow beyond what the first save needs."""
    resource = pytest.importorskip("resource")      # Windows has no such limits
    out = tmp_path / "run"
    largest = max(file.stat().st_size for file in (trained / "step-00000012").iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1, limits[1]))
    try:
        sentence = refusal("train", *train_flags(corpus, out))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "could not be written" in sentence and "File too large" in sentence
    assert saved_steps(out) == [0]
    assert call("train", "--resume", "--out", out).exit_code == 0
    assert state_differences(out, trained) == []


@pytest.mark.parametrize("arguments, sentence", [
    ("--model {tmp}/nowhere", "there is no folder .*/nowhere"),
    ("--model {tmp}", "there is no saved state in"),
    ("--tokens 40", "40 new ones are more than the model's context of 32"),
    ("--temperature -1", "temperature is -1"),
    ("--top-p 0", "top_p is 0"),
])
def test_generate_refuses(arguments, sentence, trained, tmp_path):
    words = [word.format(tmp=tmp_path) for word in arguments.split()]
    assert re.search(sentence, refusal("generate", "self", "--model", trained, "--tokens", 4, *words))


def test_generate_refuses_a_prompt_longer_than_the_context(trained):
    sentence = refusal("generate", "self items " * 40, "--model", trained, "--tokens", 1)
    assert re.search(r"a prompt of \d\d+ tokens and 1 new ones are more than the model's context of 32", sentence)


@pytest.fixture
def exported(trained, tmp_path) -> Path:
    """A copy of the exported model, to be damaged."""
    return shutil.copytree(trained / "model", tmp_path / "model")


def test_generate_refuses_a_tokenizer_of_another_model(exported):
    words = " ".join(f"word{number:03d}" for number in range(500))
    train_tokenizer([Document("words", words)] * 3, vocab_size=400).save(str(exported / "tokenizer.json"))
    assert re.search(r"token ids .*279", refusal("generate", "word123", "--model", exported, "--tokens", 4))


def test_generate_refuses_a_truncated_checkpoint(exported):
    file = next(exported.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1000])
    assert re.search(r"\.safetensors cannot be read: truncated", refusal("generate", "self", "--model", exported))


def test_generate_refuses_a_checkpoint_of_another_shape(exported):
    config = json.loads((exported / "config.json").read_text())
    (exported / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    assert re.search(r"has shape \[.*; config.json asks for", refusal("generate", "self", "--model", exported))


@pytest.mark.filterwarnings("default")
def test_a_torn_save_is_passed_over_and_nothing_is_made_up(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    for step, file in ((12, "model.safetensors"), (8, "optimizer.safetensors")):
        result = call("export", tmp_path / f"good-{step}", "--model", run)
        assert result.exit_code == 0
        torn = run / f"step-{step:08d}" / file
        torn.write_bytes(torn.read_bytes()[:-1])
    assert "warning: " in result.stderr and "trying the save before it" in result.stderr
    assert "is whole" in refusal("export", tmp_path / "bad", "--model", run)
    assert not (tmp_path / "bad").exists()


def test_export_and_cost_refuse(trained, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert "holds what no checkpoint does (notes.txt)" in refusal("export", tmp_path, "--model", trained)
    assert "dtype is 'int3'" in refusal("export", tmp_path / "hub", "--model", trained, "--dtype", "int3")
    assert "neither a preset" in refusal("cost", "huge")
    (tmp_path / "config.json").write_text("{")
    assert "not valid JSON" in refusal("cost", tmp_path)
    assert "mfu is 2" in refusal("cost", "nano", "--mfu", 2)
