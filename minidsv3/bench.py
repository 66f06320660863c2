"""Speed on a CPU beside transformers: training and greedy decoding at nano's geometry, in one run, rounds interleaved.

Every contender does the same work in the same dtype: random weights, the same tokens, MTP off, AdamW (fused) and
clipping inside the training step. A number is the median of its rounds. transformers enters in several variants, plain,
with torch.compile, and exported as our own step is; what counts is the fastest. Compiled decoding takes the prompt
uncompiled on both sides.
"""

import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from .attention import LatentCache
from .compiled import CompiledStep, exported
from .config import ModelConfig
from .generate import generate
from .model import Transformer

BATCH, LENGTH = 8, 256          # a training step's sequences and their tokens
PROMPT, NEW = 16, 128           # tokens of a decoding run
PEERS = [(attention, experts) for attention in ("sdpa", "eager") for experts in ("grouped_mm", "batched_mm", "eager")]
OURS, OURS_MTP, OURS_COMPILED = "minidsv3", "minidsv3, with MTP", "minidsv3, compiled"


def bench_cpu(out: Path, rounds: int = 5, compiled: bool = True) -> dict:
    """Runs everything, writes `out` (JSON with machine, versions and command) and returns it.

    Needs transformers (the peer). `compiled=False` leaves torch.compile out, which needs a C++ compiler and minutes.
    """
    results = {"command": " ".join(["python -m minidsv3", *sys.argv[1:]]), "machine": machine(),
               "what": f"nano, MTP off; training {BATCH} x {LENGTH} tokens a step; greedy decoding of {NEW} tokens "
                       f"behind {PROMPT}; tokens a second, medians of {rounds} interleaved rounds"}
    bar = tqdm(total=4, desc="bench cpu", unit="part")
    for name, autocast in (("train_fp32", False), ("train_bf16_autocast", True)):
        steps = {who: build() for who, build in training_builders(autocast).items()}
        results[name] = interleave(steps, BATCH * LENGTH, rounds)
        bar.update()
    results["decode_fp32"] = interleave(decoding_contenders(compiled), NEW, rounds)
    bar.update()
    results["peak_memory_mb"] = {name: in_fresh_process(_peak_of_training, name) for name in
                                 (OURS, OURS_MTP, peer_name("sdpa", "grouped_mm"))}
    bar.update()
    bar.close()
    results["against_fastest_peer"] = {name: round(advantage(results[name]), 3) for name in
                                       ("train_fp32", "train_bf16_autocast", "decode_fp32")}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    return results


def interleave(contenders: dict[str, Callable[[], None]], tokens: int, rounds: int) -> dict[str, float]:
    """Tokens a second of each contender."""
    return {name: round(tokens / seconds, 1) for name, seconds in medians(contenders, rounds).items()}


def medians(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each contender: one warm-up, then the median of `rounds` rounds in turn; noise meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for run in contenders.values():
        run()
    for _ in range(rounds):
        for name, run in contenders.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times) for name, times in seconds.items()}


def advantage(rates: dict[str, float]) -> float:
    """Our fastest MTP-free contender over the fastest peer."""
    ours = max(rate for name, rate in rates.items() if name in (OURS, OURS_COMPILED))
    return ours / max(rate for name, rate in rates.items() if name.startswith("transformers"))


# ---- contenders -------------------------------------------------------------------------------------------------

def nano(mtp: int = 0) -> ModelConfig:
    return ModelConfig.preset("nano", num_nextn_predict_layers=mtp)


def peer_name(attention: str, experts: str) -> str:
    return f"transformers, {attention} attention, {experts} experts"


def peer(attention: str, experts: str) -> torch.nn.Module:
    """transformers' DeepSeek-V3 at nano's shape with the given implementations of attention and experts."""
    from transformers import AutoConfig, AutoModelForCausalLM
    config = AutoConfig.for_model(**nano().to_hub())
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, experts_implementation=experts)


def training_step(model: torch.nn.Module, loss: Callable[[], torch.Tensor], autocast: bool) -> Callable[[], None]:
    """A function that takes one step: forward, backward, clipping to norm 1, fused AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return step


def training_builders(autocast: bool) -> dict[str, Callable[[], Callable[[], None]]]:
    """For each contender a function that builds its model and returns its training step."""
    torch.manual_seed(0)
    tokens = torch.randint(nano().vocab_size, (BATCH, LENGTH + 1))

    def ours(mtp: int) -> Callable[[], None]:
        model = Transformer(nano(mtp))
        return training_step(model, lambda: model.loss(tokens, mtp_weight=0.3 * mtp).total, autocast)

    def theirs(attention: str, experts: str) -> Callable[[], None]:
        model = peer(attention, experts)

        def loss() -> torch.Tensor:
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
            return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        return training_step(model, loss, autocast)

    peers = {peer_name(*variant): partial(theirs, *variant) for variant in PEERS if variant[1] != "batched_mm"}
    return {OURS: partial(ours, 0), OURS_MTP: partial(ours, 1), **peers}


def decoding_contenders(compiled: bool) -> dict[str, Callable[[], None]]:
    """Greedy, batch 1. `batched_mm` copies weights for each token, so it enters here and not in training."""
    torch.manual_seed(0)
    prompt = torch.randint(nano().vocab_size, (1, PROMPT))
    model = Transformer(nano()).eval()
    contenders = {OURS: lambda: generate(model, prompt, NEW)}
    for variant in PEERS:
        contenders[peer_name(*variant)] = _peer_generate(peer(*variant).eval(), prompt)
    if compiled:
        contenders[OURS_COMPILED] = _compiled_ours(model, prompt)
        for experts in ("batched_mm", "grouped_mm"):
            for way in ("compiled", "exported"):
                contenders[f"{peer_name('sdpa', experts)}, {way}"] = _compiled_peer(
                    peer("sdpa", experts).eval(), prompt, export=way == "exported")
    return contenders


def _peer_generate(model: torch.nn.Module, prompt: torch.Tensor) -> Callable[[], None]:
    return lambda: model.generate(prompt, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)


def _compiled_ours(model: Transformer, prompt: torch.Tensor) -> Callable[[], None]:
    step = CompiledStep(model, 1, PROMPT + NEW)

    @torch.no_grad()
    def run() -> None:
        cache = LatentCache(model.config, 1, PROMPT + NEW)
        token = model(prompt, cache)[:, -1:].argmax(-1)
        for _ in range(NEW - 1):
            token = step(token, cache).argmax(-1)
    return run


class _PeerStep(torch.nn.Module):
    """The peer over new tokens behind a static cache, whose tensors are arguments, so that a program can write them."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, tensors: list[torch.Tensor]) -> torch.Tensor:
        cache = _static_cache(self.model)
        for layer, keys, values, length in zip(cache.layers, *(tensors[i::3] for i in range(3))):
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values, layer.cumulative_length = keys, values, length
        return _peer_pass(self.model, tokens, positions, cache)


def _static_cache(model: torch.nn.Module):
    from transformers import StaticCache
    return StaticCache(config=model.config, max_cache_len=PROMPT + NEW)


def _peer_pass(model: torch.nn.Module, tokens: torch.Tensor, positions: torch.Tensor, cache) -> torch.Tensor:
    out = model(input_ids=tokens, past_key_values=cache, use_cache=True, position_ids=positions[None])
    return out.logits[:, -1:].argmax(-1)


def _compiled_peer(model: torch.nn.Module, prompt: torch.Tensor, export: bool) -> Callable[[], torch.Tensor]:
    """The peer's best cases known to us: one step over a static cache, by torch.compile or, as ours, as a program."""
    def prefill() -> tuple:
        cache = _static_cache(model)
        return _peer_pass(model, prompt, torch.arange(PROMPT), cache), cache, [
            tensor for layer in cache.layers for tensor in (layer.keys, layer.values, layer.cumulative_length)]

    if export:
        with torch.no_grad():
            token, _, tensors = prefill()
        program = exported(_PeerStep(model), (token, torch.tensor([PROMPT]), tensors))
    else:   # `freezing` makes its code fail
        compiled = torch.compile(lambda *inputs: _peer_pass(model, *inputs), options={"cpp_wrapper": True})

    @torch.no_grad()
    def run() -> torch.Tensor:
        token, cache, tensors = prefill()
        text = [token]
        for position in range(PROMPT, PROMPT + NEW - 1):
            where = torch.tensor([position])
            text.append(program(text[-1], where, tensors) if export else compiled(text[-1], where, cache))
        return torch.cat(text, 1)
    return run


# ---- memory and machine -----------------------------------------------------------------------------------------

def _peak_of_training(name: str) -> float:
    """Peak resident memory in MB of three training steps in this process, imports included (Linux: VmHWM)."""
    run = training_builders(autocast=False)[name]()
    for _ in range(3):
        run()
    status = Path("/proc/self/status").read_text()
    return round(int(status.split("VmHWM:")[1].split()[0]) / 1024, 1)


def in_fresh_process(function: Callable, *arguments):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def machine() -> dict:
    """What the numbers hang on: processor, threads, versions."""
    from importlib.metadata import version
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {"processor": names[0] if names else platform.processor(), "cores": os.cpu_count(),
            "threads": torch.get_num_threads(), "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "transformers")}}
