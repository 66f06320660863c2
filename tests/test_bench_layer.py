"""What `bench layer` times is the layer: every gradient once, the same numbers in all precisions, its FLOPs."""

import pytest
import torch
from tiny import tiny_config, tiny_model, tiny_tokens
from torch.utils.flop_counter import FlopCounterMode

from minidsv3 import ModelConfig, bench_layer
from minidsv3.bench_layer import CONTENDERS, OURS, OURS_BF16, PEER, QUANTISED, Ours, OursFP8, measured, times_as_fast
from minidsv3.fp8 import to_fp8
from minidsv3.train import autocast

CONFIG = tiny_config(hidden_size=64, num_attention_heads=2, moe_intermediate_size=32)


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 24, 64, generator=generator).bfloat16().requires_grad_()
    return x, torch.randn(2, 24, 64, generator=generator).bfloat16()


def same_weights(build) -> torch.nn.Module:
    torch.manual_seed(0)
    return build()


@pytest.mark.parametrize("quantises", [False, True])
def test_fp8_computes_what_the_layer_computes(quantises):
    (x, slope), (x_fp8, _) = inputs(), inputs()
    exact = same_weights(lambda: Ours(CONFIG, "cpu", torch.float32))
    fp8 = same_weights(lambda: OursFP8(CONFIG, "cpu", quantises))
    y, y_fp8 = exact(x.float()), fp8(x_fp8)
    y.backward(slope.float())
    y_fp8.backward(slope)
    assert y_fp8.dtype == torch.bfloat16
    for value, right in ((y_fp8 - x_fp8, y - x), (x_fp8.grad - slope, x.grad - slope)):
        assert (value.float() - right).norm() < 0.25 * right.norm()


def test_every_weight_gets_its_gradient_once_and_keeps_none(monkeypatch):
    """What the store drops is what a pass without a store leaves in .grad; the mutant computes nothing."""
    found = {}

    def put(self, weight, gradient):
        assert id(weight) not in found
        found[id(weight)] = gradient(None)

    x, slope = inputs()
    layer = same_weights(lambda: OursFP8(CONFIG, "cpu", False))
    with monkeypatch.context() as patched:
        patched.setattr(bench_layer.OneAtATime, "put", put)
        layer(x).backward(slope)
    plain = same_weights(lambda: OursFP8(CONFIG, "cpu", False))
    for module in plain.modules():
        module.store = None
    plain(x).backward(slope)
    waits = {name for name, weight in layer.named_parameters() if weight.grad is None}
    assert len(waits) == len(found) == 10 and all("_proj" in name for name in waits)
    for (name, weight), right in zip(layer.named_parameters(), plain.parameters()):
        gradient = found.get(id(weight), weight.grad)
        assert gradient.dtype == torch.float32 and gradient.equal(right.grad), name


def test_quantising_in_every_step_is_counted(monkeypatch):
    def calls(quantises: bool) -> int:
        layer = OursFP8(CONFIG, "cpu", quantises)
        products = layer.block.mlp.experts.gate_up_codes.products
        made, weight = [], products.weight
        monkeypatch.setattr(products, "weight", lambda value: made.append(value) or weight(value))
        for _ in range(3):
            bench_layer.step(layer, *inputs())
        return len(made)

    assert calls(True) == 3 * calls(False)


def test_bench_trainings_fp8_model_learns_with_bf16_weights():
    """What `bench training` times beside BF16: gradients come in the weights' dtype, and a step lowers the loss."""
    model, tokens = to_fp8(tiny_model(dtype=torch.bfloat16)), tiny_tokens(4, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    losses = []
    for _ in range(4):
        with autocast(tokens.device, "fp8"):
            loss = model.loss(tokens).total
        loss.backward()
        assert all(weight.grad.dtype == torch.bfloat16 for weight in model.parameters() if weight.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2


@pytest.mark.parametrize("name", CONTENDERS)
def test_every_contender_runs_on_a_cpu(name):
    config = CONFIG.replace(v_head_dim=20)      # the CPU's flash attention pads values otherwise
    (entry,) = measured(name, config, "cpu", 24, (2,), rounds=1)
    weights = sum(weight.numel() for weight in CONTENDERS[name](config, "cpu").parameters())
    assert entry["contender"] == name and entry["tokens"] == 48 and entry["ms"] > 0
    assert entry["gradient_bytes"] == weights * (4 if name in (OURS, QUANTISED) else 2)


def test_both_sides_are_the_same_layer():
    ours, theirs = (sum(p.numel() for p in CONTENDERS[name](CONFIG, "cpu").parameters()) for name in (OURS_BF16, PEER))
    assert ours == theirs
    full = ModelConfig.preset("full")
    with torch.device("meta"):
        layer = bench_layer.Block(full, 3)
    assert sum(p.numel() for p in layer.parameters()) == 11_507_286_272 - 256      # without the router's biases


def test_flops_are_three_times_a_forward_pass(monkeypatch):
    """The products with weights as torch counts them; it counts no grouped products, so experts run one by one."""
    monkeypatch.setattr("minidsv3.moe.has_grouped_mm", lambda x: False)
    layer, tokens, c = Ours(CONFIG, "cpu", torch.float32), 24, CONFIG
    x = torch.randn(1, tokens, 64)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    per_key = c.num_attention_heads * (c.qk_head_dim + c.v_head_dim)
    weights = bench_layer.flops(c, tokens) / 3 - per_key * (tokens + 1)
    counted = counter.get_total_flops() - sum(
        flops for name, flops in counter.get_flop_counts()["Global"].items() if "attention" in str(name))
    assert counted == weights * tokens


def test_speeds_are_relative_to_the_peers():
    entries = [{"contender": OURS, "tokens": 4, "ms": 2.0}, {"contender": OURS_BF16, "error": "out of memory"},
               {"contender": PEER, "tokens": 4, "ms": 5.0}]
    assert times_as_fast(entries) == {OURS: {"4": 2.5}, QUANTISED: {}, OURS_BF16: {}}
    assert times_as_fast(entries[:2])[OURS] == {}


def test_a_cpu_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="bench layer needs a CUDA device with 115 GB"):
        bench_layer.bench_layer(tmp_path / "x.json")
