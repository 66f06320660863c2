"""Training runs longer than one sitting: one process a GPU, stopped when the time is up, resumed bit for bit.

    read_text   Python sources as rows of tokens, made once and kept in a file that every run maps
    go_on       takes a run's steps from its last save until the end, or saves when the time is up
    spread      works through many runs, as many at once as there are devices

A machine that is lent for minutes keeps its disk between two calls: the same command, given again, goes on. What a run
needs lies in its folder; a folder without a save means a new run.
"""

import itertools
import multiprocessing
import random
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from minidsv3 import Transformer
from minidsv3.corpus import Document
from minidsv3.data import EOS, Batch, train_tokenizer
from minidsv3.graphed import GraphedStep
from minidsv3.optim import AdamW, Recipe
from minidsv3.run_state import load_latest, save_state, saved_steps
from minidsv3.train import Diverged, train_step

# ---- text -----------------------------------------------------------------------------------------------------------

Text = dict[str, Tensor]       # tokens and documents [rows, length + 1], held_out [fewer, length + 1]; int32


def read_text(file: Path, folder: Path | None, vocab_size: int, length: int, rows: int, held_out: int) -> Text:
    """Python sources as rows to train on and rows held out, of other documents; read from `file` if it is there.

    Packing is that of data.py without fill-in-the-middle; rows are mixed, so that a batch holds many documents. A small
    corpus is read several times.
    """
    if not file.exists():
        documents = python_sources(folder)
        aside = max(1, len(documents) // 20)
        tokenizer = train_tokenizer(documents[aside:], vocab_size)
        tokens, numbers = packed(documents[aside:], tokenizer, length, rows)
        mixed = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"tokens": tokens[mixed], "documents": numbers[mixed],
                   "held_out": packed(documents[:aside], tokenizer, length, held_out)[0]}, file)
    return load_file(file)


def python_sources(folder: Path | None) -> list[Document]:
    """Every different Python source under `folder`, or of the interpreter with what is installed, in random order."""
    folders = [folder] if folder else sorted({Path(sysconfig.get_path(kind)) for kind in ("stdlib", "purelib")})
    names: dict[str, str] = {}
    for path in (path for folder in folders for path in sorted(folder.rglob("*.py"))):
        try:
            names.setdefault(path.read_text(encoding="utf-8"), str(path))
        except UnicodeDecodeError:       # some tests of encodings
            continue
    documents = [Document(name, text) for text, name in names.items() if text.strip()]
    if len(documents) < 2:
        raise ValueError(f"{', '.join(map(str, folders))} holds {len(documents)} Python sources with text; at least 2 "
                         "are needed, one to train on and one to hold out")
    random.Random(0).shuffle(documents)
    return documents


def packed(documents: list[Document], tokenizer: Tokenizer, length: int, rows: int) -> tuple[Tensor, Tensor]:
    """Tokens and document numbers [rows, length + 1] of the documents end to end, each with its eos. A row's last token
    is also the next row's first."""
    eos, wanted, endless = tokenizer.token_to_id(EOS), rows * length + 1, enumerate(itertools.cycle(documents))
    tokens, numbers, size = [], [], 0
    tokenizer.encode_special_tokens = True            # as in `data.encode`, which takes one text after the other
    while size < wanted:
        chunk = list(itertools.islice(endless, 256))
        found = tokenizer.encode_batch([document.text for _, document in chunk], add_special_tokens=False)
        for (number, _), encoding in zip(chunk, found):
            tokens.append(torch.tensor([*encoding.ids, eos], dtype=torch.int32))
            numbers.append(torch.full_like(tokens[-1], number))
            size += len(tokens[-1])
    return tuple(torch.cat(stream).unfold(0, length + 1, length)[:rows].contiguous() for stream in (tokens, numbers))


# ---- one run --------------------------------------------------------------------------------------------------------

class Taken(NamedTuple):
    """How far a run has come."""

    losses: list[float]                # next-token loss of every step, nats a token
    seconds_a_step: float | None       # median of the steps of this sitting
    diverged: str | None = None        # what was not finite in the step that was not taken


def go_on(folder: Path, model: Transformer, optimizer: AdamW, recipe: Recipe, batches: list[Batch], precision: str,
          until: float, graphed: bool = False) -> Taken:
    """Takes the steps on `batches` that the last save in `folder` has not taken, and stops at the end, before a step
    that is not finite or, saving, when `time.time()` passes `until`. Steps are `train_step`, or `graphed` (on a GPU),
    which is faster and computes the same."""
    step = (GraphedStep(model, optimizer, recipe, precision) if graphed else
            partial(train_step, model, optimizer, recipe, precision=precision))
    losses: list[float] = []
    if saved_steps(folder):
        saved = load_latest(folder).state
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        losses = saved["losses"]
    seconds, diverged = [], None
    for batch in batches[len(losses):]:
        began = time.time()
        if began >= until:
            save_state(folder, len(losses), {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                                             "losses": losses}, keep=1)
            break
        try:
            seen = len(losses) * batch.tokens[:, 1:].numel()
            losses.append(step(batch, seen).loss)
        except Diverged as error:
            diverged = str(error)
            break
        seconds.append(time.time() - began)
        if len(losses) % 100 == 0:       # a line, not a bar: many runs share the screen
            rate = batch.tokens[:, 1:].numel() / statistics.median(seconds)
            print(f"{folder.name}: step {len(losses)} of {len(batches)}, loss {losses[-1]:.3f}, {rate:,.0f} tokens a "
                  "second", flush=True)
    return Taken(losses, statistics.median(seconds) if seconds else None, diverged)


# ---- many runs ------------------------------------------------------------------------------------------------------

_device: list[str] = []        # of a worker


def spread(work: Callable[[str, str], dict | None], names: list[str], devices: list[str]
           ) -> Iterator[tuple[str, dict | None | Exception]]:
    """Calls work(name, device) for every name, in processes that keep one device each; yields what each returned or
    raised, as it comes. One that fails does not stop the others."""
    context = multiprocessing.get_context("spawn")
    free = context.SimpleQueue()
    for device in devices:
        free.put(device)
    with ProcessPoolExecutor(len(devices), context, _take, (free,)) as pool:
        futures = {pool.submit(_work, work, name): name for name in names}
        for future in as_completed(futures):
            yield futures[future], future.exception() or future.result()


def _take(free: multiprocessing.SimpleQueue) -> None:
    _device.append(free.get())


def _work(work: Callable[[str, str], dict | None], name: str) -> dict | None:
    return work(name, _device[0])
