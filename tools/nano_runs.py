"""What the experiments of chapters 02 and 03 share: the text by kind, the step, many runs side by side, claims.

An experiment is a list of runs (a method and a seed). Runs of one seed see the same tokens in the same order, so that
differences are taken pair by pair. The text is tokenised once and handed to the workers in a file; every finished run
is written at once, and a run that the result file already has is skipped.
"""

import argparse
import io
import json
import math
import multiprocessing
import os
import tempfile
import tokenize
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from minidsv3 import ModelConfig, Transformer, bench
from minidsv3.balance import update_biases
from minidsv3.data import Corpus, Document, MixedBatches, held_out_batches, read_corpus, train_tokenizer
from minidsv3.durable import replace_file
from minidsv3.kernels import Routing
from minidsv3.mtp import prediction_loss
from minidsv3.optim import AdamW, Recipe, parameter_groups
from minidsv3.train import autocast

RESULTS = Path(__file__).resolve().parents[1] / "results"
KINDS = ("code", "comments", "prose")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How an experiment is run. `tokens` is for one training run."""

    out: Path
    model: ModelConfig
    tokens: int
    seeds: tuple[int, ...]
    device: str = "cpu"
    precision: str = "fp32"
    workers: int = 1
    held_out_tokens: int = 65_536
    source: str | None = None          # of the corpus; None: Python's standard library
    sequences: int = 8                 # a step

    @property
    def steps(self) -> int:
        return self.tokens // (self.sequences * self.length)

    @property
    def length(self) -> int:
        """Tokens of a sequence: the nano recipe's, or what the model has positions for."""
        return min(Recipe.preset("nano").sequence_length, self.model.max_position_embeddings)


def read_options(description: str, out: Path, model: ModelConfig, tokens: int) -> Options:
    """The command line; `out` and `tokens` are what it may leave out."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--tokens", type=int, default=tokens, help="of one training run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--held-out-tokens", type=int, default=65_536)
    given = vars(parser.parse_args())
    return Options(model=model, **given | {"seeds": tuple(given["seeds"])})


# ---- text -----------------------------------------------------------------------------------------------------------

def split_source(source: str) -> tuple[str, str] | None:
    """Python source -> (code, comments and docstrings), or None where `tokenize` refuses it.

    A docstring is any string that is a statement of its own. The code keeps its layout, without the lines that are
    left empty.
    """
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (tokenize.TokenError, SyntaxError):
        return None
    taken, fresh = [], True
    for token, after in zip(tokens, tokens[1:]):
        docstring = token.type == tokenize.STRING and fresh and after.type in (tokenize.NEWLINE, tokenize.COMMENT)
        if token.type == tokenize.COMMENT or docstring:
            taken.append(token)
        if token.type not in (tokenize.COMMENT, tokenize.NL):
            fresh = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    code = source.splitlines(keepends=True)
    for token in reversed(taken):                     # from the end, so that the places of the others hold
        (first, start), (last, end) = token.start, token.end
        left = code[first - 1][:start] + code[last - 1][end:]
        code[first - 1:last] = [left] if left.strip() else []
    return "".join(code), "\n".join(token.string for token in taken) + "\n"


def by_kind(documents: list[Document]) -> dict[str, list[Document]]:
    """The documents' texts as code, comments (with docstrings) and prose; sources that cannot be split are left out."""
    kinds: dict[str, list[Document]] = {kind: [] for kind in KINDS}
    for document in documents:
        if not document.name.endswith(".py"):
            kinds["prose"].append(document)
        elif parts := split_source(document.text):
            for kind, text in zip(("code", "comments"), parts):
                kinds[kind].append(Document(document.name, text))
    return kinds


def spread(rows: Tensor, count: int) -> Tensor:
    """At most `count` of the rows, evenly from first to last."""
    return rows[torch.linspace(0, len(rows) - 1, min(count, len(rows))).long()]


def prepare(options: Options, steps: int) -> dict[str, Any]:
    """Everything that runs read, as tensors of ids: rows are [.., length + 1].

    `train[seed]` and `documents[seed]` [steps, sequences, length + 1], `held_out`, `kinds` (as many rows of each kind)
    and `tokenizer`, as its text.
    """
    corpus = read_corpus(options.source)
    tokenizer = train_tokenizer(corpus.train, options.model.vocab_size)
    data: dict[str, Any] = {"tokenizer": tokenizer.to_str(), "train": {}, "documents": {}}
    for seed in options.seeds:
        stream = MixedBatches(corpus.train, tokenizer, options.length, seed)
        batches = [stream.next(options.sequences) for _ in range(steps)]
        data["train"][seed] = torch.stack([batch.tokens for batch in batches])
        data["documents"][seed] = torch.stack([batch.documents for batch in batches])
    return data | held_out_rows(corpus, tokenizer, options)


def held_out_rows(corpus: Corpus, tokenizer: Tokenizer, options: Options) -> dict[str, Any]:
    """`held_out` and `kinds` of `prepare`."""
    def rows(documents: list[Document]) -> Tensor:
        return torch.cat([batch.tokens for batch in held_out_batches(documents, tokenizer, options.length, 64)])

    kinds = {kind: rows(documents) for kind, documents in by_kind(corpus.held_out).items()}
    count = min(map(len, kinds.values()))
    return {"held_out": spread(rows(corpus.held_out), options.held_out_tokens // options.length),
            "kinds": {kind: spread(kind_rows, count) for kind, kind_rows in kinds.items()}}


# ---- one run --------------------------------------------------------------------------------------------------------

def new_model(config: ModelConfig, seed: int, device: str) -> Transformer:
    """Weights drawn on the CPU, so that a seed means the same on every device."""
    torch.manual_seed(seed)
    return Transformer(config).to(device)


Objective = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]   # tokens, documents, seen -> loss, load


def training(model: Transformer, recipe: Recipe, tokens: Tensor, documents: Tensor, objective: Objective,
             precision: str) -> Iterator[tuple[int, Tensor | None]]:
    """Takes a step on each batch [sequences, length + 1] of `tokens`. It computes what `minidsv3.train.train_step`
    computes, with any objective, and without waiting for the device.

    Yields how many steps are done and the last one's load [MoE layers, experts]; first (0, None).
    """
    device = model.lm_head.weight.device
    optimizer = AdamW(parameter_groups(model, recipe.weight_decay), betas=recipe.betas, eps=recipe.eps)
    tokens, documents = tokens.to(device), documents.to(device)
    yield 0, None
    for step in range(len(tokens)):
        seen = step * tokens[0, :, 1:].numel()
        with autocast(device, precision):
            loss, load = objective(tokens[step], documents[step], seen)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr(seen)
        optimizer.step()
        optimizer.zero_grad()
        update_biases(model, load, recipe.gamma(seen))
        yield step + 1, load


def forward(model: Transformer, rows: Tensor) -> tuple[Tensor, list[Routing]]:
    """Mean next-token loss of rows [B, T + 1] in nats, and every MoE layer's decisions."""
    record: list[Routing] = []
    hidden = model.hidden(rows[:, :-1], record=record)
    return prediction_loss(model.model.norm(hidden), model.lm_head.weight, rows, depth=0), record


@torch.no_grad()
def held_out_loss(model: Transformer, rows: Tensor) -> float:
    """Mean next-token loss of rows [B, T + 1] in nats, a few at a time."""
    losses = [forward(model, part)[0] * len(part) for part in rows.split(8)]
    return rounded(sum(losses).item() / len(rows))


def rounded(loss: float) -> float:
    """Refuses a loss that is not a number: one diverged run would spoil every mean."""
    if not math.isfinite(loss):
        raise ValueError(f"the held-out loss is {loss}; the run diverged")
    return round(loss, 4)


# ---- many runs ------------------------------------------------------------------------------------------------------

Run = Callable[[str, int, Options, dict], dict]      # method, seed, options, data -> the run's entry
_data: dict[str, Any] = {}                           # of a worker: what `prepare` made


def run_all(run: Run, methods: list[str], options: Options, steps: int, header: dict[str, Any],
            finish: Callable[[dict], dict], key: str = "method",
            keep: Callable[[dict], None] = lambda entry: None) -> dict:
    """Runs every method with every seed that `options.out` does not hold, seed by seed, and writes each when done.

    `header` says what the experiment is; a file with another one is refused with ValueError. `finish` adds to the
    result what follows from all runs; `keep` may store parts of an entry elsewhere first. A run that fails is reported
    and the others go on; then RuntimeError.
    """
    found = resume(options.out, header)
    there = {(entry[key], entry["seed"]) for entry in found["runs"]}
    wanted = [(method, seed) for seed in options.seeds for method in methods if (method, seed) not in there]
    failed = 0
    if wanted:
        for future, (method, seed) in _started(run, wanted, options, prepare(options, steps)):
            try:
                entry = future.result()
            except Exception as error:      # whatever it was, the other runs must not be lost
                failed += 1
                print(f"{method}, seed {seed} failed: {type(error).__name__}: {error}", flush=True)
                continue
            keep(entry)
            found["runs"].append(entry)
            found["runs"].sort(key=lambda entry: (entry["seed"], methods.index(entry[key])))
            write(options.out, finish(found))
            print(f"{method}, seed {seed}: {entry['seconds']:.0f} s, held out {entry['held_out']:.4f}", flush=True)
    if failed:
        raise RuntimeError(f"{failed} of {len(wanted)} runs failed; run the command again for those")
    return finish(found)


def _started(run: Run, wanted: list, options: Options, data: dict) -> Iterator:
    """Futures as they are done, each with its method and seed; processes get the data through a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.pt"
        torch.save(data, path)
        os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")      # children inherit it before they load torch
        pool = ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn"), _begin, (path,))
        with pool:
            futures = {pool.submit(_run_one, partial(run, method, seed, options)): (method, seed)
                       for method, seed in wanted}
            for future in as_completed(futures):
                yield future, futures[future]


def _begin(path: Path) -> None:
    """Makes a process ready for runs."""
    torch.set_num_threads(1)
    _data.update(torch.load(path, weights_only=True))


def _run_one(run: Callable[[dict], dict]) -> dict:
    return run(_data)


def resume(out: Path, header: dict[str, Any]) -> dict[str, Any]:
    """The result so far: `header`, and the runs that `out` holds. Raises ValueError if it is another experiment's."""
    if not out.exists():
        return header | {"runs": []}
    found = json.loads(out.read_text(encoding="utf-8"))
    if found.get("what") != header["what"]:
        raise ValueError(f"{out} holds another experiment ({found.get('what')!r}); this one is {header['what']!r}: "
                         "give another --out or move that file away")
    return header | {"runs": found["runs"]}


def write(out: Path, result: dict[str, Any]) -> None:
    """JSON, whole or not at all; an entry of a long list has a line of its own."""
    def text(value: Any) -> str:
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return "[\n" + ",\n".join("  " + _json(entry) for entry in value) + "\n ]"
        return _json(value)

    out.parent.mkdir(parents=True, exist_ok=True)
    lines = (f" {_json(name)}: {text(value)}" for name, value in result.items())
    replace_file(out, "{\n" + ",\n".join(lines) + "\n}\n")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def command(script: str, options: Options) -> str:
    """What repeats the experiment."""
    seeds = " ".join(map(str, options.seeds))
    return (f"python tools/{script} --tokens {options.tokens} --seeds {seeds} --device {options.device} "
            f"--precision {options.precision} --workers {options.workers} --held-out-tokens {options.held_out_tokens}")


def smoke(options: Options) -> str:
    """A warning for runs too short to say anything."""
    return "" if options.steps >= 100 else "A smoke run, far too short for any claim: "


def machine(device: str) -> dict[str, Any]:
    """What the numbers hang on."""
    return bench.machine() | {"accelerator": torch.cuda.get_device_name() if device == "cuda" else None}


# ---- claims ---------------------------------------------------------------------------------------------------------

@dataclass(frozen=True, kw_only=True)
class Claim:
    """A sentence with a threshold, and the number of one seed's runs that decides it.

    `value` is positive in the claimed direction. It holds from `least` on; a claim of equality has `most` instead, and
    holds up to that distance from 0. A mark to reach has no direction: below it the claim just does not show.
    """

    id: str
    claim: str
    value: Callable[[dict[str, dict]], float]      # runs of one seed by method
    least: float = 0.0
    most: float | None = None
    directed: bool = True

    def holds(self, value: float) -> bool:
        return value >= self.least if self.most is None else abs(value) <= self.most

    def verdict(self, values: list[float]) -> str:
        """Four of five pairs decide, or that share of another number."""
        def mostly(test: Callable[[float], bool]) -> bool:
            return sum(map(test, values)) >= 0.8 * len(values)

        if mostly(self.holds):
            return "reproduces in size"
        directed = self.directed and self.most is None
        if directed and mostly(lambda value: value > 0):
            return "reproduces in direction"
        if directed and mostly(lambda value: value < 0):
            return "shows the opposite"
        return "does not show at this scale"


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def worse(runs: dict[str, dict], method: str, than: str) -> float:
    """By how many nats the held-out loss of `method` lies above that of `than`, of one seed's runs by method."""
    return runs[method]["held_out"] - runs[than]["held_out"]


def judge(claims: tuple[Claim, ...], runs: list[dict], methods: list[str], key: str = "method") -> list[dict]:
    """Each claim's verdict over the seeds whose runs are complete; empty while there is none."""
    seeds = sorted({entry["seed"] for entry in runs})
    pairs = {seed: {entry[key]: entry for entry in runs if entry["seed"] == seed} for seed in seeds}
    pairs = {seed: by_method for seed, by_method in pairs.items() if set(methods) <= set(by_method)}
    if not pairs:
        return []
    judged = []
    for claim in claims:
        values = [claim.value(by_method) for by_method in pairs.values()]
        judged.append({"id": claim.id, "claim": claim.claim,
                       "holds": f"{sum(map(claim.holds, values))} of {len(values)} pairs",
                       "verdict": claim.verdict(values), "values": [round(value, 4) for value in values]})
    return judged


def main(experiment: Callable[[Options], dict], options: Options) -> None:
    """Runs the experiment and prints its verdicts."""
    print(f"{options.steps} steps a run, {options.workers} workers on {options.device}", flush=True)
    for claim in experiment(options)["claims"]:
        print(f"{claim['holds']}: {claim['claim']} -> {claim['verdict']}", flush=True)
