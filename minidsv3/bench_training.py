"""Speed of a training step of `mini` on one GPU, beside transformers: the same shape, tokens and optimiser.

Weights, gradients and moments are BF16 on both sides, AdamW is torch's fused one, MTP is off where a peer is compared.
In FP8 (`fp8.to_fp8`) matrices are multiplied as codes, which are made anew in every step, and all else is the same.
A number is tokens a second of the median step, after steps that compile and warm up; one contender is in memory at a
time.
Every contender also runs its whole step as one CUDA graph, which takes Python's time for launching kernels away; who
asks the GPU for a value in the middle of a step cannot.
"""

import gc
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .bench_kernels import machine
from .config import ModelConfig
from .fp8 import to_fp8
from .kernels import use_kernels
from .model import Transformer
from .train import autocast

BATCH, LENGTH = 8, 2048
WARM_UP, STEPS = 4, 10
OURS, DEFINITIONS, OURS_MTP, OURS_FP8 = ("minidsv3", "minidsv3, kernels='torch'", "minidsv3, with MTP",
                                         "minidsv3, FP8")
PEERS = [("sdpa", "grouped_mm"), ("sdpa", "eager"), ("eager", "grouped_mm")]


def bench_training(out: Path, steps: int = STEPS) -> dict:
    """Times every contender, writes `out` (JSON) and returns it. Raises ValueError without a CUDA device."""
    if not torch.cuda.is_available():
        raise ValueError("bench training needs a CUDA device; `bench cpu` measures on a CPU")
    results = {"command": " ".join(["python -m minidsv3", *sys.argv[1:]]), "machine": machine() | peer_version(),
               "what": f"mini, {BATCH} x {LENGTH} tokens a step, BF16 where no other is named; tokens a second of the "
                       f"median of {steps} steps",
               "tokens_a_second": {}, "peak_memory_gb": {}}
    out.parent.mkdir(parents=True, exist_ok=True)
    everybody = contenders()
    everybody |= {f"{name}, one CUDA graph": lambda build=build: graphed(build()) for name, build in everybody.items()}
    for name, build in tqdm(everybody.items(), desc="bench training", unit="contender"):
        torch.cuda.reset_peak_memory_stats()
        try:
            seconds = time_steps(build(), steps)
            results["tokens_a_second"][name] = round(BATCH * LENGTH / seconds)
            results["peak_memory_gb"][name] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
        except Exception as error:   # a peer's variant may not fit or not run here: it says so
            results["tokens_a_second"][name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        gc.collect()
        torch.cuda.empty_cache()
        out.write_text(json.dumps(results, indent=1) + "\n")
    return results


def time_steps(step: Callable[[], None], steps: int) -> float:
    """Seconds of the median step."""
    for _ in range(WARM_UP):
        step()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in zip(marks, marks[1:])) / 1000


def graphed(step: Callable[[], None]) -> Callable[[], None]:
    """The step, recorded once: every call replays the same kernels on the same memory."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay


def contenders() -> dict[str, Callable[[], Callable[[], None]]]:
    """For each contender a function that builds its model on the GPU and returns its step."""
    torch.manual_seed(0)
    tokens = torch.randint(mini(0).vocab_size, (BATCH, LENGTH + 1), device="cuda")

    def ours(mtp: int, kernels: str = "auto") -> Callable[[], None]:
        model = build(lambda: Transformer(mini(mtp)))
        step = training_step(model, lambda: model.loss(tokens, mtp_weight=0.3 * mtp).total)

        def run() -> None:
            with use_kernels(kernels):
                step()
        return run

    def in_fp8() -> Callable[[], None]:
        model = to_fp8(build(lambda: Transformer(mini(0))))

        def loss() -> Tensor:
            with autocast(tokens.device, "fp8"):
                return model.loss(tokens).total
        return training_step(model, loss)

    def theirs(attention: str, experts: str) -> Callable[[], None]:
        model = build(lambda: peer(attention, experts))

        def loss() -> Tensor:
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
            return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        return training_step(model, loss)

    return {OURS: lambda: ours(0), DEFINITIONS: lambda: ours(0, "torch"), OURS_MTP: lambda: ours(1), OURS_FP8: in_fp8,
            **{f"transformers, {attention} attention, {experts} experts":
               lambda attention=attention, experts=experts: theirs(attention, experts) for attention, experts in PEERS}}


def training_step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """Forward, backward, clipping to norm 1, fused AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True, capturable=True)

    def step() -> None:
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return step


def build(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("cuda"):
        return make().bfloat16()


def mini(mtp: int) -> ModelConfig:
    return ModelConfig.preset("mini", num_nextn_predict_layers=mtp)


def peer(attention: str, experts: str) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM
    config = AutoConfig.for_model(**mini(0).to_hub())
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, experts_implementation=experts)


def peer_version() -> dict[str, str]:
    from importlib.metadata import version
    return {"transformers": version("transformers")}
