"""One MoE layer of the 671 B model, forward and backward on one GPU: in FP8, in BF16, and as transformers computes it.

11.5 B parameters, random, as are the inputs: tokens choose experts about evenly. All contenders take BF16 activations
in sequences of 4,096 and give every gradient, the input's too.

    minidsv3, FP8      FP32 master weights, multiplied as FP8 codes: 46 + 23 GB. A weight's gradient is written in FP32
                       and dropped before the next is computed: 46 GB a step, of which 30 are in memory at once
    .., quantised      the same with all weights quantised anew in every step: once an optimiser's step, it is shared by
                       the micro-batches in between
    BF16               weights and gradients 23 GB each; gradients are written and dropped after the step

Gradients are written, not added to others, on all sides. `cached` is what a forward pass leaves in memory until its
backward, the output included, which is the next layer's input. FLOPs are those of the products with weights that a
token uses and of causal attention, three times for forward and backward; what is computed again counts once. The FP8
layer needs about 115 GB, so an H200; a contender that does not fit leaves its error in place of numbers.
"""

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import cost
from .attention import make_context
from .bench_kernels import machine
from .block import Block
from .config import ModelConfig
from .fp8 import to_fp8
from .train import autocast
from .weight_gradients import Deferrable, Gradient, WeightGradStore

LENGTH, BATCHES = 4096, (1, 4)         # tokens of a sequence, sequences of a step
WARM_UP, ROUNDS = 3, 10
OURS, QUANTISED, OURS_BF16, PEER = ("minidsv3, FP8", "minidsv3, FP8, quantised in every step", "minidsv3, BF16",
                                    "transformers, BF16")


def bench_layer(out: Path, rounds: int = ROUNDS) -> dict:
    """Times every contender, writes `out` (JSON) and returns it. Needs transformers; raises ValueError without a CUDA
    device."""
    if not torch.cuda.is_available():
        raise ValueError("bench layer needs a CUDA device with 115 GB; on a CPU kernels are interpreted, which is no "
                         "measurement")
    from importlib.metadata import version
    config = ModelConfig.preset("full")
    results = {"command": " ".join(["python -m minidsv3", *sys.argv[1:]]),
               "machine": machine() | {"transformers": version("transformers")},
               "what": f"one MoE layer of the full configuration, forward and backward, sequences of {LENGTH} tokens; "
                       f"medians of {rounds} steps", "entries": []}
    out.parent.mkdir(parents=True, exist_ok=True)
    for name in tqdm(CONTENDERS, desc="bench layer", unit="contender"):
        try:
            results["entries"] += measured(name, config, "cuda", LENGTH, BATCHES, rounds)
        except Exception as error:     # it may not fit, or a peer may lack a kernel: it says so
            results["entries"].append({"contender": name, "error": f"{type(error).__name__}: {str(error)[:200]}"})
        gc.collect()
        torch.cuda.empty_cache()
        results["times_as_fast"] = times_as_fast(results["entries"])
        out.write_text(json.dumps(results, indent=1) + "\n")
    return results


def measured(name: str, config: ModelConfig, device: str, length: int, batches: tuple[int, ...], rounds: int
             ) -> list[dict]:
    """One contender's entries: milliseconds, TFLOPS and memory at every number of tokens."""
    torch.manual_seed(0)
    layer, entries = CONTENDERS[name](config, device), []
    for batch in batches:
        x = torch.randn(batch, length, config.hidden_size, dtype=torch.bfloat16, device=device, requires_grad=True)
        slope, tokens = torch.randn_like(x), batch * length
        for _ in range(WARM_UP):
            step(layer, x, slope)
        seconds = statistics.median(timed(lambda: step(layer, x, slope), device) for _ in range(rounds))
        entries.append({"contender": name, "tokens": tokens, "ms": round(1000 * seconds, 2),
                        "tflops": round(tokens * flops(config, length) / seconds / 1e12, 1),
                        "gradient_bytes": sum(weight.nbytes for weight in layer.parameters()),
                        **memory(layer, x, slope, device)})
    return entries


def step(layer: nn.Module, x: Tensor, slope: Tensor) -> None:
    """Forward and backward; the gradients are dropped."""
    layer(x).backward(slope)
    x.grad = None
    layer.zero_grad()


def timed(call: Callable[[], None], device: str) -> float:
    """Seconds of one call, until the device is done."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - began


def memory(layer: nn.Module, x: Tensor, slope: Tensor, device: str) -> dict[str, float | None]:
    """Bytes a token that wait between forward and backward, and the most that was in use, in GB. A CPU does not say."""
    if device != "cuda":
        return {"cached_bytes_a_token": None, "peak_memory_gb": None}
    before = torch.cuda.memory_allocated()
    y = layer(x)
    cached = torch.cuda.memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    del y
    step(layer, x, slope)
    return {"cached_bytes_a_token": round(cached / x[..., 0].numel()),
            "peak_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1)}


def flops(config: ModelConfig, length: int) -> int:
    """Of one token, forward and backward, in causal sequences of `length` (as `cost.training_flops`)."""
    one = config.replace(num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)
    matrices = [weight for weight in cost.layer_weights(one, moe=True) if len(weight.shape) == 2]
    return 6 * sum(weight.size * weight.used for weight in matrices) + cost.training_flops(one, length).attention


def times_as_fast(entries: list[dict]) -> dict[str, dict[str, float]]:
    """Each contender's speed over transformers', by tokens; nothing before both are measured."""
    ms = {(entry["contender"], entry["tokens"]): entry["ms"] for entry in entries if "ms" in entry}
    return {name: {str(tokens): round(ms[PEER, tokens] / time, 3) for (who, tokens), time in ms.items()
                   if who == name and (PEER, tokens) in ms} for name in CONTENDERS if name != PEER}


# ---- contenders -----------------------------------------------------------------------------------------------------

class OneAtATime(WeightGradStore):
    """Computes a weight's gradient as soon as it can be and drops it: no two are in memory together."""

    def put(self, weight: Tensor, gradient: Gradient) -> None:
        gradient(None)


class Ours(nn.Module):
    """Our layer with random weights in `dtype`, alone in the world: positions count from 0 in every sequence."""

    def __init__(self, config: ModelConfig, device: str, dtype: torch.dtype):
        super().__init__()
        self.config = config
        with torch.device("meta"):
            self.block = Block(config, config.first_k_dense_replace)
        self.to(dtype).to_empty(device=device)
        with torch.no_grad():
            for name, value in self.state_dict().items():
                if name.endswith("norm.weight"):
                    value.fill_(1)
                elif name.endswith("e_score_correction_bias"):
                    value.zero_()
                else:
                    value.normal_(0, config.init_std)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x, make_context(self.config, x.shape[:2], x.dtype, x.device))


class OursFP8(Ours):
    """The same in FP8; `quantises` asks for new codes in every pass."""

    def __init__(self, config: ModelConfig, device: str, quantises: bool):
        super().__init__(config, device, torch.float32)
        self.quantises = quantises
        to_fp8(self.block)
        store = OneAtATime()
        for module in self.modules():
            if isinstance(module, Deferrable):
                module.store = store

    def forward(self, x: Tensor) -> Tensor:
        if self.quantises:
            torch.autograd.graph.increment_version(list(self.parameters()))
        with autocast(x.device, "fp8"):
            return super().forward(x)


def peer(config: ModelConfig, device: str) -> nn.Module:
    """transformers' layer in its fastest variant that bench_training.py knows, out of a model of this one layer."""
    from transformers import AutoConfig, AutoModel
    one = config.replace(num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0, vocab_size=8)
    with torch.device(device):
        model = AutoModel.from_config(AutoConfig.for_model(**one.to_hub()), dtype=torch.bfloat16,
                                      attn_implementation="sdpa", experts_implementation="grouped_mm")
    return Theirs(model.layers[0], model.rotary_emb)


class Theirs(nn.Module):
    """The peer's layer as its model calls it."""

    def __init__(self, layer: nn.Module, rotary: nn.Module):
        super().__init__()
        self.layer, self.rotary = layer, rotary

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device)[None]
        return self.layer(x, position_ids=positions, position_embeddings=self.rotary(x, positions))


CONTENDERS: dict[str, Callable[[ModelConfig, str], nn.Module]] = {
    OURS: lambda config, device: OursFP8(config, device, quantises=False),
    QUANTISED: lambda config, device: OursFP8(config, device, quantises=True),
    OURS_BF16: lambda config, device: Ours(config, device, torch.bfloat16),
    PEER: peer,
}
