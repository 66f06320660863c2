"""A step is the whole batch's whatever the micro-batches, and a run that stopped ends exactly as one that did not."""

import copy
import errno
import json
import math
import random
import signal
import threading
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from minidsv3 import run_state, train
from minidsv3.balance import routers, update_biases
from minidsv3.checkpoint import CheckpointError, load_checkpoint, load_tokenizer
from minidsv3.data import Batch
from minidsv3.optim import AdamW, Recipe, parameter_groups
from minidsv3.run_state import load_latest, saved_steps
from minidsv3.train import Diverged, Interrupted, Run, TrainConfig, accumulate, evaluate, resume, train_step
from tiny import tiny_model, tiny_tokens
from tiny_run import STEPS, run_config, write_corpus

RECIPE = replace(Recipe.preset("nano"), sequence_length=16)
SEEN = 700_000               # tokens before the step: the learning rate is falling, MTP counts 0.1
MTP_BIAS = "model.layers.3.mlp.gate.e_score_correction_bias"


def random_batch(sequences: int) -> Batch:
    """Sequences of 16 inputs, with a document ending in the middle of each."""
    documents = (torch.arange(17) > 8).long().expand(sequences, -1)
    return Batch(tiny_tokens(sequences, 17, seed=1), documents)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


# ---- the step ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("micro_batch", [1, 2, 3, 4])     # five sequences: 2 leaves one over, 3 two, 4 one
def test_micro_batches_add_up_to_the_whole_batch(micro_batch):
    whole, parts = tiny_model(), tiny_model()
    want = accumulate(whole, RECIPE, random_batch(5), SEEN, 5, "fp32")
    got = accumulate(parts, RECIPE, random_batch(5), SEEN, micro_batch, "fp32")
    for field in want._fields:
        torch.testing.assert_close(getattr(got, field), getattr(want, field), atol=1e-12, rtol=0, msg=field)
    assert want.load.sum() == parts.config.num_experts_per_tok * 5 * (2 * 16 + 15)     # two MoE layers, and MTP's T - 1
    for name, gradient in gradients(parts).items():
        torch.testing.assert_close(gradient, gradients(whole)[name], atol=1e-12, rtol=0, msg=name)


def test_losses_of_a_step_are_those_of_the_model():
    batch = random_batch(3)
    want = tiny_model().loss(*batch, mtp_weight=RECIPE.mtp_weight(SEEN), balance_weight=RECIPE.balance_weight(SEEN))
    got = accumulate(tiny_model(), RECIPE, batch, SEEN, 3, "fp32")
    for field in want._fields:
        assert torch.equal(getattr(got, field), getattr(want, field).detach()), field


def test_a_step_is_clip_adamw_then_biases():
    """The same written out, with torch's AdamW: steps in every phase, so that moments count, of a clipped gradient."""
    recipe = replace(RECIPE, clip_norm=0.5)
    model, expected = tiny_model(), tiny_model()
    optimizer = AdamW(parameter_groups(model, recipe.weight_decay), betas=recipe.betas, eps=recipe.eps)
    adamw = torch.optim.AdamW(parameter_groups(expected, recipe.weight_decay), betas=recipe.betas, eps=recipe.eps)
    for seen in (20_000, SEEN, recipe.cosine_until):     # warming up; on the cosine; biases at rest
        measured = train_step(model, optimizer, recipe, random_batch(4), seen, micro_batch=3)
        losses = expected.loss(*random_batch(4), recipe.mtp_weight(seen), recipe.balance_weight(seen))
        losses.total.backward()
        norm = torch.cat([gradient.flatten() for gradient in gradients(expected).values()]).norm()
        assert norm > recipe.clip_norm
        for parameter in expected.parameters():
            parameter.grad *= recipe.clip_norm / (norm + 1e-6)      # torch's guard against a norm of 0
        for group in adamw.param_groups:
            group["lr"] = recipe.lr(seen)
        adamw.step()
        adamw.zero_grad()
        update_biases(expected, losses.load, recipe.gamma(seen))
        assert measured.grad_norm == pytest.approx(norm.item(), rel=1e-10)
        assert all(parameter.grad is None for parameter in model.parameters())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name], atol=1e-10, rtol=0, msg=name)


def test_biases_move_once_a_step_by_gamma():
    model = tiny_model()
    before = [router.e_score_correction_bias.clone() for router in routers(model)]
    optimizer = AdamW(parameter_groups(model, 0.1))
    load = train_step(model, optimizer, RECIPE, random_batch(4), SEEN, micro_batch=1).load
    assert len(before) == 3                      # two MoE layers and the MTP module's
    for router, bias, counts in zip(routers(model), before, load):
        want = RECIPE.gamma(SEEN) * torch.sign(counts.mean() - counts)
        torch.testing.assert_close(router.e_score_correction_bias - bias, want.to(bias.dtype))


def test_a_loss_that_is_not_finite_changes_nothing():
    model = tiny_model()
    optimizer = AdamW(parameter_groups(model, 0.1))
    train_step(model, optimizer, RECIPE, random_batch(2), SEEN)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    weights, moments = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(Diverged, match="loss nan"):
        train_step(model, optimizer, RECIPE, random_batch(2), SEEN)
    assert differences(weights, model.state_dict()) == differences(moments, optimizer.state_dict()) == []
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_average_follows_every_step(corpus):
    config = run_config(corpus)
    text = train.read_corpus(config.source)
    run = Run(config, text, train.train_tokenizer(text.train, config.model.vocab_size))
    want = run.model.lm_head.weight.detach().clone()
    for _ in range(3):
        run.advance()
        want = config.recipe.ema_decay * want + (1 - config.recipe.ema_decay) * run.model.lm_head.weight.detach()
    torch.testing.assert_close(run.ema.state_dict()["lm_head.weight"], want, atol=1e-7, rtol=0)


def test_bf16_computes_in_bf16_and_keeps_fp32_weights():
    losses = {}
    for precision in ("fp32", "bf16"):
        model = tiny_model(dtype=torch.float32)
        optimizer = AdamW(parameter_groups(model, 0.1), moments=torch.bfloat16)
        losses[precision] = train_step(model, optimizer, RECIPE, random_batch(8), SEEN, 4, precision).loss
        assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    assert 0 < abs(losses["bf16"] - losses["fp32"]) < 0.02 * losses["fp32"]


def test_held_out_loss_is_the_mean_over_tokens():
    model, batch = tiny_model(), random_batch(5)
    batches = [Batch(*rows) for rows in zip(batch.tokens.split(3), batch.documents.split(3))]
    assert evaluate(model, batches) == pytest.approx(model.loss(batch.tokens).main.item(), rel=1e-12)


# ---- a run, stopped and resumed ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("text") / "corpus")


@pytest.fixture(scope="module")
def whole_run(corpus, tmp_path_factory) -> Path:
    """The run that nothing disturbs."""
    out = tmp_path_factory.mktemp("run") / "whole"
    train.train(run_config(corpus), out, progress=False)
    return out


def differences(a, b, path: str = "") -> list[str]:
    """Where two trees of dicts, lists and tensors differ, to the last bit and in dtype."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num()) else [path]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [found for key in a for found in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, (list, tuple)) and type(a) is type(b) and len(a) == len(b):
        return [found for i, (x, y) in enumerate(zip(a, b)) for found in differences(x, y, f"{path}/{i}")]
    return [] if type(a) is type(b) and a == b else [path]


def log(out: Path) -> list[dict]:
    """The log without what a clock measured."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def state_differences(a: Path, b: Path) -> list[str]:
    return differences(load_latest(a).state, load_latest(b).state)


def stop_after(step: int, monkeypatch, action) -> None:
    """Lets `action` happen while step number `step` (counted from now) is being computed."""
    taken = 0

    def counting(*args, **kwargs):
        nonlocal taken
        taken += 1
        if taken == step:
            action()
        return train_step(*args, **kwargs)

    monkeypatch.setattr(train, "train_step", counting)


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def disturb_generators() -> None:
    random.random()
    torch.rand(3)


@pytest.mark.parametrize("step", [3, 8, 10])     # while the batch is constant; while it grows, at a regular save; after
def test_ctrl_c_finishes_the_step_saves_and_resumes_bit_for_bit(step, corpus, whole_run, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        stop_after(step, patched, interrupt)
        with pytest.raises(Interrupted, match=f"after step {step} .* saved in"):
            train.train(run_config(corpus), out, progress=False)
    assert saved_steps(out)[0] == len(log(out)) == step
    disturb_generators()
    result = resume(out, progress=False)
    assert state_differences(out, whole_run) == []
    assert log(out) == log(whole_run)
    assert result.steps == STEPS
    saved = json.loads((whole_run / "result.json").read_text())
    assert {**saved, "model": str(out / "model")} == result._asdict()


def test_the_disturbed_run_would_show(whole_run):
    """What the test above compares: BF16 moments, the average, every schedule in motion, more than one epoch."""
    state = load_latest(whole_run).state
    moments = [value for state in state["optimizer"]["state"].values() for key, value in state.items() if key != "step"]
    assert {value.dtype for value in moments} == {torch.bfloat16}
    assert state["model"][MTP_BIAS].abs().max() > 0
    assert differences(state["ema"]["lm_head.weight"], state["model"]["lm_head.weight"])
    for name in ("sequences", "lr", "gamma", "mtp_weight"):
        assert len({line[name] for line in log(whole_run)}) > 1, name
    documents = len(train.read_corpus(state["config"]["source"]).train)
    lanes = state["data"]["lanes"]                        # a lane that has read all its documents is in a later epoch
    assert max(lane["document"] for lane in lanes) >= documents / len(lanes)


def resume_without(part: str):
    def load(run: Run, step: int, state: dict) -> None:
        fresh = run.state_dict()
        complete(run, step, {**state, part: fresh[part]})

    complete = Run.load_state_dict
    return load


@pytest.mark.parametrize("part", ["tokens", "model", "optimizer", "ema", "data", "random"])
def test_every_part_of_the_state_counts(part, corpus, whole_run, tmp_path, monkeypatch):
    """Mutations: a resume that forgets one part ends elsewhere."""
    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        stop_after(3, patched, interrupt)
        with pytest.raises(Interrupted):
            train.train(run_config(corpus), out, progress=False)
    disturb_generators()
    monkeypatch.setattr(Run, "__init__", with_disturbed_generators(Run.__init__))
    monkeypatch.setattr(Run, "load_state_dict", resume_without(part))
    resume(out, progress=False)
    assert state_differences(out, whole_run)


def with_disturbed_generators(init):
    def disturbed(run, *args):
        init(run, *args)
        disturb_generators()
    return disturbed


def test_fp32_moments_resume_too(corpus, tmp_path, monkeypatch):
    config = run_config(corpus, moments="fp32")
    train.train(config, tmp_path / "whole", progress=False)
    with monkeypatch.context() as patched:
        stop_after(5, patched, interrupt)
        with pytest.raises(Interrupted):
            train.train(config, tmp_path / "run", progress=False)
    resume(tmp_path / "run", progress=False)
    assert state_differences(tmp_path / "run", tmp_path / "whole") == []


def fail() -> None:
    raise RuntimeError("the power went")


def test_a_run_that_died_repeats_the_steps_after_its_last_save(corpus, whole_run, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        stop_after(7, patched, fail)
        with pytest.raises(RuntimeError):
            train.train(run_config(corpus), out, progress=False)
    assert saved_steps(out)[0] == 4 and len(log(out)) == 6
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "tok')                   # a torn line
    resume(out, progress=False)
    assert state_differences(out, whole_run) == []
    assert log(out) == log(whole_run)


def test_a_run_that_died_before_its_first_step_resumes(corpus, whole_run, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        stop_after(1, patched, fail)
        with pytest.raises(RuntimeError):
            train.train(run_config(corpus), tmp_path / "run", progress=False)
    resume(tmp_path / "run", progress=False)
    assert state_differences(tmp_path / "run", whole_run) == []


def test_a_full_disk_loses_nothing(corpus, whole_run, tmp_path, monkeypatch):
    def full(tensors, file, *args):
        if "step-00000008" in str(file):
            raise OSError(errno.ENOSPC, "No space left on device")
        return save_file(tensors, file, *args)

    out, save_file = tmp_path / "run", run_state.save_file
    with monkeypatch.context() as patched:
        patched.setattr(run_state, "save_file", full)
        with pytest.raises(CheckpointError, match="No space left on device"):
            train.train(run_config(corpus), out, progress=False)
    assert saved_steps(out)[0] == 4
    resume(out, progress=False)
    assert state_differences(out, whole_run) == []


def test_divergence_names_the_step_and_the_last_good_checkpoint(corpus, tmp_path, monkeypatch):
    def poisoned(model, *args):
        taken.append(model)
        if len(taken) == 6:
            with torch.no_grad():
                model.lm_head.weight[0, 0] = math.inf
        return train_step(model, *args)

    taken, out = [], tmp_path / "run"
    monkeypatch.setattr(train, "train_step", poisoned)
    with pytest.raises(Diverged, match="step 6 diverged .*the last good checkpoint is .*step-00000004"):
        train.train(run_config(corpus), out, progress=False)
    assert saved_steps(out)[0] == 4 and len(log(out)) == 5
    assert all(value.isfinite().all() for value in load_latest(out).state["model"].values())


def test_an_existing_run_is_not_overwritten(corpus, whole_run):
    before = load_latest(whole_run)
    with pytest.raises(ValueError, match="already holds a run .saved at step 12.; resume it"):
        train.train(run_config(corpus), whole_run, progress=False)
    assert differences(load_latest(whole_run).state, before.state) == []


def test_another_corpus_is_refused(tmp_path):
    corpus = write_corpus(tmp_path / "corpus")
    train.train(run_config(corpus), tmp_path / "run", progress=False)
    (corpus / "0.txt").write_text("other words")
    with pytest.raises(ValueError, match="other documents"):
        resume(tmp_path / "run", progress=False)


def test_a_second_ctrl_c_stops_at_once():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), train.stop_on_interrupt() as asked:
        assert not asked()
        interrupt()
        assert asked()
        interrupt()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_in_a_thread_needs_no_signals():
    def enter() -> None:
        with train.stop_on_interrupt() as asked:
            answers.append(asked())

    answers = []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert answers == [False]


# ---- what a run leaves ------------------------------------------------------------------------------------------

def test_the_log_has_what_notebooks_draw(corpus, whole_run):
    lines = log(whole_run)
    config = TrainConfig.from_dict(load_latest(whole_run).state["config"])
    assert config == run_config(corpus)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        seen = line["tokens"] - line["sequences"] * 32
        assert line["sequences"] == config.recipe.batch_size(seen)
        assert line["lr"] == config.recipe.lr(seen) and line["gamma"] == config.recipe.gamma(seen)
        assert len(line["max_violation"]) == 3
    loads = {line["step"]: torch.tensor(line["load"]) for line in lines if "load" in line}
    assert list(loads) == [1, 11]
    counts = lines[0]["sequences"] * 4 * torch.tensor([32, 32, 31])     # MTP's layer sees T - 1 positions
    assert torch.equal(loads[1].sum(1), counts)
    assert lines[-1]["loss"] < lines[0]["loss"] - 1


def test_the_exported_model_is_the_last_state(whole_run):
    model, state = load_checkpoint(whole_run / "model"), load_latest(whole_run).state
    assert differences(dict(model.state_dict()), dict(state["model"])) == []
    assert load_tokenizer(whole_run / "model").to_str() == Tokenizer.from_str(state["tokenizer"]).to_str()
    again, tokenizer = train.load_run(whole_run)
    assert differences(dict(again.state_dict()), dict(state["model"])) == []
    assert tokenizer.to_str() == state["tokenizer"]


def test_the_result_is_measured_on_held_out_text(whole_run):
    state, result = load_latest(whole_run).state, json.loads((whole_run / "result.json").read_text())
    config = TrainConfig.from_dict(state["config"])
    model, tokenizer = train.load_run(whole_run)
    batches = train.held_out_batches(train.read_corpus(config.source).held_out, tokenizer, 32, 100)
    assert result["held_out_loss"] == pytest.approx(evaluate(model, batches), rel=1e-6)
    for name, parameter in model.named_parameters():
        parameter.data = state["ema"][name]
    assert result["held_out_loss_ema"] == pytest.approx(evaluate(model, batches), rel=1e-6)


@pytest.mark.parametrize("change, sentence", [
    (dict(precision="fp16"), "precision is 'fp16'; it must be fp32 or bf16 or fp8"),
    (dict(moments="fp8"), "moments is 'fp8'; it must be bf16 or fp32"),
    (dict(micro_batch=0), "micro_batch is 0; it must be at least 1"),
    (dict(save_every=0), "save_every is 0; it must be at least 1"),
    (dict(recipe=Recipe.preset("nano")), "sequence_length is 256; the model has max_position_embeddings = 32"),
])
def test_settings_that_cannot_be_are_refused(change, sentence, corpus):
    with pytest.raises(ValueError, match=sentence):
        run_config(corpus, **change)


def test_settings_survive_json(corpus):
    config = run_config(corpus, seed=3, precision="bf16")
    assert TrainConfig.from_dict(asdict(config)) == config


def test_a_model_beyond_the_memory_is_refused_before_it_is_built(corpus):
    config = run_config(corpus)
    full = type(config.model).preset("full", max_position_embeddings=32)
    with pytest.raises(ValueError, match="needs 10,922 GB for weights, gradients and moments"):
        train.check_memory(replace(config, model=full))
