"""One training run: the step of the report's section 4.2, the loop around it, and how a stopped run goes on.

    gradient of the whole batch, micro-batch by micro-batch -> clip to norm 1 -> AdamW -> routing biases -> EMA

    runs/nano/   step-00000100/  latest   everything that a run needs to go on, bit for bit (run_state.py)
                 metrics.jsonl            one line a step
                 model/  result.json      at the end: the hub's layout with the tokenizer; loss on text held out

A run is its settings: every schedule is a function of the tokens seen (optim.py), and the data's order of the seed.
"""

import json
import math
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm.auto import tqdm

from .balance import max_violation, update_biases
from .checkpoint import save_checkpoint
from .config import ModelConfig
from .cost import training_bytes
from .data import (Batch, Corpus, MixedBatches, bits_per_byte, held_out_batches, read_corpus, train_tokenizer,
                   unigram_entropy)
from .durable import fsync, replace_file
from .fp8 import to_fp8
from .model import Losses, Transformer
from .optim import EMA, AdamW, Recipe, parameter_groups
from .run_state import load_latest, random_state, save_state, saved_steps, set_random_state

PRECISIONS = ("fp32", "bf16", "fp8")
MOMENTS = {"bf16": torch.bfloat16, "fp32": torch.float32}
LOAD_EVERY = 10            # steps from one load histogram in the log to the next: they are most of its bytes


class Diverged(ValueError):
    """The loss or its gradient is not finite; the step was not taken and nothing was saved."""


class Interrupted(Exception):
    """Ctrl-C: the step was finished and the state saved."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides what a run computes; it is saved with the run. Raises ValueError for unknown words."""

    model: ModelConfig
    recipe: Recipe
    source: str | None = None          # of the corpus, as `read_corpus` takes it; None: Python's standard library
    seed: int = 0                      # of the weights and of the data's order
    fim_rate: float = 0.1
    precision: str = "fp32"            # "bf16": autocast; "fp8": also fp8.to_fp8. Weights, gradients, routers stay fp32
    moments: str = "bf16"              # of AdamW, as in the report's section 3.3.3, or "fp32"
    micro_batch: int = 8               # sequences that are in memory at once
    save_every: int = 100              # steps
    held_out_tokens: int = 65_536      # how much of the held-out text is measured at the end
    device: str = "cpu"

    def __post_init__(self):
        for name, choices in {"precision": PRECISIONS, "moments": tuple(MOMENTS)}.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be {' or '.join(choices)}")
        for name in ("micro_batch", "save_every", "held_out_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.recipe.sequence_length > self.model.max_position_embeddings:
            raise ValueError(f"sequence_length is {self.recipe.sequence_length}; the model has "
                             f"max_position_embeddings = {self.model.max_position_embeddings} positions")
        if self.source is not None and not self.source.startswith("hub:"):
            object.__setattr__(self, "source", str(Path(self.source).resolve()))   # a run resumes from any folder

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainConfig":
        """The inverse of `dataclasses.asdict`."""
        return cls(**values | {"model": ModelConfig(**values["model"]), "recipe": Recipe(**values["recipe"])})


# ---- the step ---------------------------------------------------------------------------------------------------

class Measured(NamedTuple):
    """One step in numbers: plain floats, and the load [MoE layers, experts] of the whole batch."""

    loss: float            # next-token cross-entropy, nats
    mtp: float
    balance: float
    grad_norm: float       # before clipping
    load: Tensor

    @classmethod
    def of(cls, losses: Losses, grad_norm: Tensor) -> "Measured":
        return cls(losses.main.item(), losses.mtp.item(), losses.balance.item(), grad_norm.item(), losses.load.cpu())


def train_step(model: Transformer, optimizer: AdamW, recipe: Recipe, batch: Batch, seen: int,
               micro_batch: int | None = None, precision: str = "fp32") -> Measured:
    """One optimiser step on `batch` after `seen` tokens (section 4.2). Gradients are None before and after.

    Every micro-batch counts with its share of the batch, so that gradient, losses and load are the whole batch's.
    Raises `Diverged` as `update_weights` does.
    """
    losses, grad_norm = clipped_gradient(model, recipe, batch, seen, micro_batch or len(batch.tokens), precision)
    return update(model, optimizer, recipe, seen, losses, grad_norm)


def clipped_gradient(model: Transformer, recipe: Recipe, batch: Batch, seen: int, micro_batch: int, precision: str
                     ) -> tuple[Losses, Tensor]:
    """The half of a step that asks the device for nothing, so that `graphed.py` can record it: the batch's losses, and
    its gradient's norm before clipping."""
    losses = accumulate(model, recipe, batch, seen, micro_batch, precision)
    return losses, nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)


def update(model: Transformer, optimizer: AdamW, recipe: Recipe, seen: int, losses: Losses, grad_norm: Tensor
           ) -> Measured:
    """The other half: weights and biases move, gradients are forgotten. Raises `Diverged` as `update_weights` does."""
    update_weights(optimizer, recipe, seen, losses, grad_norm)
    update_biases(model, losses.load, recipe.gamma(seen))
    return Measured.of(losses, grad_norm)


def update_weights(optimizer: AdamW, recipe: Recipe, seen: int, losses: Losses, grad_norm: Tensor) -> None:
    """AdamW's step with the learning rate after `seen` tokens; forgets the gradients.

    Raises `Diverged`, before anything is changed, if the loss or the gradient's norm is not finite.
    """
    if not (losses.total.isfinite() and grad_norm.isfinite()):
        optimizer.zero_grad()
        raise Diverged(f"loss {losses.total.item()}, norm of the gradient {grad_norm.item()}")
    for group in optimizer.param_groups:
        group["lr"] = recipe.lr(seen)
    optimizer.step()
    optimizer.zero_grad()


def accumulate(model: Transformer, recipe: Recipe, batch: Batch, seen: int, micro_batch: int, precision: str) -> Losses:
    """Adds the gradient of the batch's loss to the parameters; returns its losses, without graph, on their device."""
    device = model.lm_head.weight.device
    sums, load = torch.zeros(4, dtype=torch.float64, device=device), 0.0
    for tokens, documents in zip(batch.tokens.split(micro_batch), batch.documents.split(micro_batch)):
        with autocast(device, precision):
            losses = model.loss(tokens.to(device), documents.to(device), mtp_weight=recipe.mtp_weight(seen),
                                balance_weight=recipe.balance_weight(seen))
        share = len(tokens) / len(batch.tokens)
        (losses.total * share).backward()
        sums += share * torch.stack(losses[:4]).detach()
        load = load + losses.load
    return Losses(*sums, load)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Matrix products in BF16, but where `precision` is "fp32". What FP8 is for, the model itself computes in FP8."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision != "fp32")


@torch.no_grad()
def evaluate(model: Transformer, batches: list[Batch], precision: str = "fp32") -> float:
    """Mean next-token loss over the batches, in nats a token."""
    device = model.lm_head.weight.device
    total = 0.0
    for batch in batches:
        with autocast(device, precision):
            total += model.loss(batch.tokens.to(device)).main.item() * len(batch.tokens)
    return total / sum(len(batch.tokens) for batch in batches)


# ---- the run ----------------------------------------------------------------------------------------------------

class Run:
    """All that changes while a run goes on. What `state_dict` returns is what a save holds."""

    leads, ema_device = True, "cpu"    # whether this process keeps the log; `parallel/train.py` has runs of many

    def __init__(self, config: TrainConfig, corpus: Corpus, tokenizer: Tokenizer):
        check_memory(config)
        random.seed(config.seed)
        torch.manual_seed(config.seed)
        recipe = config.recipe
        self.config, self.corpus, self.tokenizer = config, corpus, tokenizer
        self.model = self.build_model()
        self.optimizer = AdamW(parameter_groups(self.model, recipe.weight_decay), lr=recipe.lr(0), betas=recipe.betas,
                               eps=recipe.eps, moments=MOMENTS[config.moments])
        self.ema = EMA(self.model, recipe.ema_decay, self.ema_device)
        self.data = MixedBatches(corpus.train, tokenizer, recipe.sequence_length, config.seed, config.fim_rate)
        self.step = self.tokens = 0

    def build_model(self) -> nn.Module:
        """The module whose parameters are trained."""
        model = Transformer(self.config.model).to(self.config.device)
        return to_fp8(model) if self.config.precision == "fp8" else model

    def advance(self) -> dict[str, Any]:
        """Takes one step; returns its line of the log."""
        recipe, seen, began = self.config.recipe, self.tokens, time.perf_counter()
        batch = self.data.next(self.sequences(seen))
        measured = self.take_step(batch, seen)
        self.ema.update()
        self.step += 1
        self.tokens += batch.tokens[:, 1:].numel()
        line = {"step": self.step, "tokens": self.tokens, "sequences": len(batch.tokens), **measured._asdict(),
                "lr": recipe.lr(seen), "gamma": recipe.gamma(seen), "mtp_weight": recipe.mtp_weight(seen),
                "max_violation": max_violation(measured.load).tolist(), "seconds": time.perf_counter() - began}
        load = line.pop("load").int().tolist()
        return line | {"load": load} if self.step % LOAD_EVERY == 1 else line

    def sequences(self, seen: int) -> int:
        """How many sequences the batch after `seen` tokens has."""
        return self.config.recipe.batch_size(seen)

    def take_step(self, batch: Batch, seen: int) -> Measured:
        config = self.config
        return train_step(self.model, self.optimizer, config.recipe, batch, seen, config.micro_batch, config.precision)

    @property
    def finished(self) -> bool:
        return self.tokens >= self.config.recipe.total_tokens

    def agreed(self, stop: bool) -> bool:
        """Whether to stop, if this process would."""
        return stop

    def save(self, out: Path) -> None:
        save_state(out, self.step, self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        return {"config": asdict(self.config), "tokenizer": self.tokenizer.to_str(), "tokens": self.tokens,
                "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                "ema": self.ema.state_dict(), "data": self.data.state_dict(), "random": random_state()}

    def load_state_dict(self, step: int, state: dict[str, Any]) -> None:
        self.step, self.tokens = step, state["tokens"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.load_state_dict(state["ema"])
        self.data.load_state_dict(state["data"])
        set_random_state(state["random"])


def check_memory(config: TrainConfig) -> None:
    """Raises ValueError if weights, gradients and moments alone are more than this machine has."""
    if config.device != "cpu" or not hasattr(os, "sysconf"):
        return
    needed, there = training_bytes(config.model, "fp32"), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise ValueError(f"training this model needs {needed / 1e9:,.0f} GB for weights, gradients and moments; this "
                         f"machine has {there / 1e9:,.0f} GB: choose a smaller preset or fewer layers")


@contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether Ctrl-C was pressed; a second Ctrl-C raises KeyboardInterrupt at once."""
    pressed: list[int] = []

    def ask(number: int, frame: object) -> None:
        pressed.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    if threading.current_thread() is not threading.main_thread():   # where Python delivers no signals
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


# ---- start, resume, finish --------------------------------------------------------------------------------------

class TrainResult(NamedTuple):
    steps: int
    tokens: int
    held_out_loss: float         # nats a token
    held_out_loss_ema: float     # the same of the averaged weights
    bits_per_byte: float
    unigram_entropy: float       # what a model that knows only frequencies would reach, nats a token
    model: str                   # the exported folder


def train(config: TrainConfig, out: str | Path, progress: bool = True) -> TrainResult:
    """A new run in the folder `out`, from the corpus to the exported model.

    Raises ValueError if `out` holds a run already or anything given is unusable, `Diverged` for a loss that is not
    finite, `CheckpointError` when the disk refuses, `Interrupted` after Ctrl-C. All of them leave earlier saves whole.
    """
    steps = saved_steps(out)
    if steps:
        raise ValueError(f"{out} already holds a run (saved at step {steps[0]}); resume it, or choose another folder")
    corpus = read_corpus(config.source)
    run = Run(config, corpus, train_tokenizer(corpus.train, config.model.vocab_size))
    run.save(Path(out))
    drive(run, Path(out), progress)
    return finish(run, Path(out))


def resume(out: str | Path, progress: bool = True) -> TrainResult:
    """Goes on with the run in `out` from its last save, exactly as if it had not stopped; otherwise as `train`."""
    saved = load_latest(out)
    config = TrainConfig.from_dict(saved.state["config"])
    run = Run(config, read_corpus(config.source), Tokenizer.from_str(saved.state["tokenizer"]))
    run.load_state_dict(saved.step, saved.state)
    drive(run, Path(out), progress)
    return finish(run, Path(out))


def load_run(out: str | Path) -> tuple[Transformer, Tokenizer]:
    """Model and tokenizer of the run in `out`, as last saved."""
    state = load_latest(out).state
    model = Transformer(TrainConfig.from_dict(state["config"]).model)
    model.load_state_dict(state["model"])
    return model, Tokenizer.from_str(state["tokenizer"])


def drive(run: Run, out: Path, progress: bool) -> None:
    """Takes steps until the run is finished: a line in the log for each, a save now and then."""
    log = out / "metrics.jsonl"
    if run.leads:
        _shorten(log, run.step)
    bar = tqdm(total=run.config.recipe.total_tokens, initial=run.tokens, unit="tok", unit_scale=True,
               disable=not (progress and run.leads))
    with bar, stop_on_interrupt() as asked_to_stop:
        while not run.finished:
            line = _advance(run, out)
            if run.leads:
                with log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            bar.update(run.tokens - bar.n)
            bar.set_postfix(loss=f"{line['loss']:.3f}", MaxVio=f"{_mean(line['max_violation']):.2f}")
            stop = run.agreed(asked_to_stop())
            if run.finished or stop or run.step % run.config.save_every == 0:
                if run.leads:
                    fsync(log)
                run.save(out)
            if stop and not run.finished:
                raise Interrupted(f"stopped after step {run.step} ({run.tokens:,} tokens) and saved in {out}")


def _advance(run: Run, out: Path) -> dict[str, Any]:
    try:
        return run.advance()
    except Diverged as error:
        raise Diverged(f"step {run.step + 1} diverged ({error}); training stops, and the last good checkpoint is "
                       f"{out / f'step-{saved_steps(out)[0]:08d}'}: try a lower peak_lr in a new run") from error


def _shorten(log: Path, steps: int) -> None:
    """Drops the lines of steps that were taken after the last save: they are about to be taken again."""
    if log.exists():
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
        replace_file(log, "".join(lines[:steps]))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def finish(run: Run, out: Path) -> TrainResult:
    """Measures the model on text that it has not seen, and exports it."""
    config, tokenizer, length = run.config, run.tokenizer, run.config.recipe.sequence_length
    batches = held_out_batches(run.corpus.held_out, tokenizer, length, config.micro_batch)
    batches = batches[:math.ceil(config.held_out_tokens / (length * config.micro_batch))]
    loss = evaluate(run.model, batches, config.precision)
    with run.ema.swap() as averaged:
        loss_ema = evaluate(averaged, batches, config.precision)
    save_checkpoint(run.model, out / "model", dtype="fp32", tokenizer=tokenizer)
    result = TrainResult(run.step, run.tokens, loss, loss_ema, bits_per_byte(loss, batches, tokenizer),
                         unigram_entropy(run.corpus.train, batches, tokenizer), str(out / "model"))
    replace_file(out / "result.json", json.dumps(result._asdict(), indent=2) + "\n")
    return result
