"""FP8 checkpoints: the hub's names, dtypes, blocks and counts; what comes back to the bit and what does not; refusals.

Weights of 144 rows (kv_a) and 136 columns (kv_b, o) have short last blocks, as the full model's 576 rows have.
"""

import json
import re
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_checkpoint import KV_A, assert_equal, cut, published_names, tokenizer_of
from tiny import randomise, tiny_config, tiny_tokens
from torch import Tensor
from typer.testing import CliRunner

from minidsv3 import ModelConfig, Transformer, cost, shards
from minidsv3.checkpoint import CheckpointError, convert_checkpoint, hub_tensors, load_checkpoint, save_checkpoint
from minidsv3.cli import app
from minidsv3.fp8 import FP8Linear, to_fp8
from minidsv3.kernels import quantize_blocks
from minidsv3.shards import QUANTISED, Shards

Stored = dict[str, Tensor]
EVERY_MANTISSA = torch.arange(0x3F800000, 0x40000000, dtype=torch.int32).view(torch.float32)    # [1, 2)


@pytest.fixture(scope="module")
def model() -> Transformer:
    """Some blocks are all zeros, and some hold nothing above 1e-4, where the scale stops to shrink."""
    config = tiny_config(kv_lora_rank=136, v_head_dim=34, num_hidden_layers=2)
    model = randomise(Transformer(config), 0)
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight.zero_()
        model.model.layers[0].mlp.up_proj.weight.mul_(1e-5)
        model.model.layers[1].self_attn.kv_a_proj_with_mqa.weight[128:].mul_(1000)
    return model


@pytest.fixture
def folder(model, tmp_path) -> Path:
    save_checkpoint(model, tmp_path / "fp8", "fp8")
    return tmp_path / "fp8"


def stored(folder: Path) -> Stored:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def bits(tensors: Stored) -> Stored:
    return {name: tensor.view(torch.uint8) for name, tensor in tensors.items()}


def same_bits(one: Stored, other: Stored, ending: str = "") -> bool:
    """Whether all tensors whose names end so are the same to the bit."""
    one, other = bits(one), bits(other)
    assert one.keys() == other.keys()
    return all(tensor.equal(other[name]) for name, tensor in one.items() if name.endswith(ending))


# ---- the layout -----------------------------------------------------------------------------------------------------

def matrices(config: ModelConfig) -> set[str]:
    """What the released checkpoint holds in FP8, by its published names: not norms, routers, eh_proj, embedding, head.
    """
    return {name for name in published_names(config) if name.endswith(("_proj.weight", "_with_mqa.weight"))
            and not name.endswith("eh_proj.weight")}


def check_layout(model: Transformer, folder: Path) -> None:
    tensors, config = stored(folder), model.config
    assert tensors.keys() == published_names(config) | {f"{name}_scale_inv" for name in matrices(config)}
    for name, tensor in tensors.items():
        if name in matrices(config):
            assert tensor.dtype is torch.float8_e4m3fn
            grid = [-(-size // 128) for size in tensor.shape]
            assert list(tensors[f"{name}_scale_inv"].shape) == grid, name
        else:
            exact = name.endswith(("_scale_inv", "e_score_correction_bias"))
            assert tensor.dtype is (torch.float32 if exact else torch.bfloat16), name
    assert tensors[KV_A].shape == (144, 32) and tensors[f"{KV_A}_scale_inv"].shape == (2, 1)


def test_names_dtypes_and_grids_are_the_hubs(model, folder):
    check_layout(model, folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16" and config["quantization_config"] == {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
    assert ModelConfig.from_hub(config) == model.config


@pytest.mark.parametrize("too_much", [r"\.(self_attn|mlp)\..*\.weight$", r"_proj\.weight$", r"\.mlp\..*_proj\.weight$"])
def test_another_choice_of_matrices_is_caught(model, tmp_path, monkeypatch, too_much):
    """With routers and norms, with eh_proj, without attention."""
    monkeypatch.setattr(shards, "QUANTISED", re.compile(too_much))
    with pytest.raises((AssertionError, ValueError)):
        save_checkpoint(model, tmp_path / "x", "fp8")
        check_layout(model, tmp_path / "x")


@pytest.mark.parametrize("limit", [1, 5_000, 10**9], ids=["a tensor each", "some", "one"])
def test_the_index_tells_where_everything_is_and_how_large(model, tmp_path, limit):
    save_checkpoint(model, tmp_path / "x", "fp8", shard_bytes=limit)
    homes, size = {}, 0
    for file in sorted((tmp_path / "x").glob("*.safetensors")):
        tensors = load_file(file)
        homes |= dict.fromkeys(tensors, file.name)
        here = sum(tensor.nbytes for tensor in tensors.values())
        assert here <= limit or len(tensors) <= 2       # a weight with its scales is not torn apart
        size += here
    index = json.loads((tmp_path / "x" / "model.safetensors.index.json").read_text())
    assert index == {"metadata": {"total_size": size}, "weight_map": homes}


def test_full_size_has_the_published_counts_and_bytes():
    """From the code that writes, without memory: 91,991 tensors, 684,531,386,000 values, 688,574,839,360 bytes."""
    with torch.device("meta"):
        model = Transformer(ModelConfig.preset("full"))
    shapes = {name: tensor.shape for name, tensor in hub_tensors(model)}
    layout = Shards(shapes, "fp8", 5 * 10**9)
    assert layout.index()["metadata"]["total_size"] == 688_574_839_360
    assert len(layout.index()["weight_map"]) == 91_991
    codes = sum(shape.numel() for name, shape in shapes.items() if layout.quantises(name))
    biases = sum(shape.numel() for name, shape in shapes.items() if name.endswith("bias"))
    scales = (layout.total_size - codes - 2 * (sum(shape.numel() for shape in shapes.values()) - codes - biases)
              - 4 * biases) // 4
    assert (codes, scales, biases) == (680_571_043_840, 41_540_496, 41_555_600 - 41_540_496)


@pytest.mark.parametrize("preset", ["nano", "mini", "full"])
def test_costs_count_what_is_written(preset):
    config = ModelConfig.preset(preset)
    with torch.device("meta"):
        index = Shards({name: t.shape for name, t in hub_tensors(Transformer(config))}, "fp8", 10**9).index()
    assert index["metadata"]["total_size"] == cost.stored(config).bytes
    assert len(index["weight_map"]) == cost.stored(config).tensors


# ---- codes and scales -----------------------------------------------------------------------------------------------

def by_hand(weight: Tensor) -> tuple[Tensor, Tensor]:
    """One block after the other: scale = max(max |w|, 1e-4) / 448, codes = round(w / scale)."""
    codes, rows = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), []
    for top in range(0, weight.shape[0], 128):
        rows.append([])
        for left in range(0, weight.shape[1], 128):
            block = weight[top:top + 128, left:left + 128].float()
            scale = block.abs().max().clamp(min=1e-4) / torch.tensor(448.0)
            codes[top:top + 128, left:left + 128] = (block / scale).to(torch.float8_e4m3fn)
            rows[-1].append(scale)
    return codes, torch.tensor(rows)


def check_values(model: Transformer, folder: Path) -> None:
    tensors = stored(folder)
    for name, value in hub_tensors(model):
        if name in matrices(model.config):
            codes, scales = by_hand(value.detach())
            assert tensors[f"{name}_scale_inv"].equal(scales), name
            assert tensors[name].view(torch.uint8).equal(codes.view(torch.uint8)), name
        else:
            assert tensors[name].equal(value.to(tensors[name].dtype)), name


def test_codes_and_scales_are_those_made_by_hand(model, folder):
    check_values(model, folder)


def even_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The mistake of dividing the rows evenly among the scales: 144 rows in 2 blocks of 72."""
    height, width = (-(-size // -(-size // 128)) for size in weight.shape)
    codes, scales = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), []
    for top in range(0, weight.shape[0], height):
        parts = [weight[top:top + height, left:left + width] for left in range(0, weight.shape[1], width)]
        scales.append([part.abs().max().clamp(min=1e-4) / 448 for part in parts])
        codes[top:top + height] = torch.cat([part / scale for part, scale in zip(parts, scales[-1])], 1)
    return codes, torch.tensor(scales)


def inverted(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The mistake of believing the name `weight_scale_inv`."""
    codes, scales = quantize_blocks(weight)
    return codes, 1 / scales


@pytest.mark.parametrize("mutant", [even_blocks, inverted, partial(quantize_blocks, pow2=True)])
def test_other_scales_are_caught(model, tmp_path, monkeypatch, mutant):
    monkeypatch.setattr(shards, "quantize_blocks", lambda weight: mutant(weight.detach()))
    save_checkpoint(model, tmp_path / "x", "fp8")
    with pytest.raises(AssertionError):
        check_values(model, tmp_path / "x")


def test_a_weight_that_is_not_finite_does_not_come_back_finite(tmp_path):
    model = randomise(Transformer(tiny_config(num_hidden_layers=1, num_nextn_predict_layers=0)), 0)
    model.model.layers[0].mlp.up_proj.weight.data[3, 4] = torch.inf
    save_checkpoint(model, tmp_path / "x", "fp8")
    assert load_checkpoint(tmp_path / "x").model.layers[0].mlp.up_proj.weight.isnan().all()


def test_codes_are_those_that_fp8_training_multiplies(tmp_path):
    """Exporting a model trained in FP8 changes nothing that its products saw."""
    model = to_fp8(randomise(Transformer(tiny_config(hidden_size=144, num_hidden_layers=1)), 0))
    save_checkpoint(model, tmp_path / "x", "fp8")
    tensors, seen = stored(tmp_path / "x"), 0
    for name, module in model.named_modules():
        if isinstance(module, FP8Linear) and not any(size % 16 for size in module.weight.shape):
            codes, scales = module.codes(module.weight)[0]
            assert same_bits({name: codes}, {name: tensors[f"{name}.weight"]})
            assert scales.equal(tensors[f"{name}.weight_scale_inv"])
            seen += 1
    assert seen > 5


# ---- there and back -------------------------------------------------------------------------------------------------

def test_through_fp32_codes_and_scales_come_back_to_the_bit(folder, tmp_path):
    save_checkpoint(load_checkpoint(folder, torch.float32), tmp_path / "again", "fp8")
    assert same_bits(stored(folder), stored(tmp_path / "again"))


def test_the_scale_of_every_largest_weight_comes_back():
    """The proof behind the last test, for all 2^23 mantissas of the largest weight m; other exponents are the same
    arithmetic. The scale is s = m / 448. What is read, 448 s, is not m for one mantissa in nine, but its scale is s.
    A scale that was not made so need not come back: every ninth would move by its last bit."""
    def scale(largest: Tensor) -> Tensor:
        return largest / torch.tensor(448.0)

    scales = scale(EVERY_MANTISSA)
    assert scale(448 * scales).equal(scales)
    assert 0.1 < (448 * scales != EVERY_MANTISSA).float().mean() < 0.12
    assert 0.1 < (scale(448 * EVERY_MANTISSA) != EVERY_MANTISSA).float().mean() < 0.12


def test_through_bf16_codes_come_back_and_scales_settle_at_once(folder, tmp_path):
    """BF16 keeps 8 bits of the largest weight, so a scale moves by one part in 256 at most; it is then a BF16 number
    over 448, and the second trip changes nothing."""
    trips = [folder, tmp_path / "second", tmp_path / "third"]
    for before, after in zip(trips, trips[1:]):
        save_checkpoint(load_checkpoint(before), after, "fp8")
    first, second, third = map(stored, trips)
    codes = {name for name, tensor in first.items() if tensor.dtype is torch.float8_e4m3fn}
    assert all(first[name].view(torch.uint8).equal(second[name].view(torch.uint8)) for name in codes)
    moved = [(second[f"{name}_scale_inv"] / first[f"{name}_scale_inv"] - 1).abs().max().item() for name in codes]
    assert 0 < max(moved) <= 2**-8 * (1 + 1e-6)
    assert same_bits(second, third)


def test_blocks_that_do_not_reach_448_get_new_codes(model, folder, tmp_path, monkeypatch):
    """Power-of-two scales, as V3.1 has them: the values come back within a rounding to E4M3, the codes do not."""
    with monkeypatch.context() as patched:
        patched.setattr(shards, "quantize_blocks", partial(quantize_blocks, pow2=True))
        save_checkpoint(model, tmp_path / "pow2", "fp8")
    loaded = load_checkpoint(tmp_path / "pow2", torch.float32)
    save_checkpoint(loaded, tmp_path / "again", "fp8")
    assert not same_bits(stored(tmp_path / "pow2"), stored(tmp_path / "again"), "_proj.weight")
    again = dict(hub_tensors(load_checkpoint(tmp_path / "again", torch.float32)))
    for name, value in hub_tensors(loaded):
        error = (again[name] - value).abs()
        assert (error <= value.abs() / 16 + value.abs().max() * 2**-18).all(), name


def test_loading_multiplies_codes_by_the_scales_of_their_blocks(model, folder):
    tensors = stored(folder)
    for name, value in hub_tensors(load_checkpoint(folder, torch.float32)):
        if name in matrices(model.config):
            spread = tensors[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
            assert value.equal(tensors[name].float() * spread[:value.shape[0], :value.shape[1]]), name
    assert load_checkpoint(folder).lm_head.weight.dtype is torch.bfloat16


# ---- conversion -----------------------------------------------------------------------------------------------------

def test_conversion_is_loading_and_saving(model, folder, tmp_path):
    save_checkpoint(model, tmp_path / "bf16", "bf16", shard_bytes=5_000)
    convert_checkpoint(tmp_path / "bf16", tmp_path / "to_fp8", "fp8", shard_bytes=5_000)
    save_checkpoint(load_checkpoint(tmp_path / "bf16"), tmp_path / "saved", "fp8", shard_bytes=5_000)
    assert {file.name: file.read_bytes() for file in (tmp_path / "to_fp8").iterdir()} \
        == {file.name: file.read_bytes() for file in (tmp_path / "saved").iterdir()}
    convert_checkpoint(folder, tmp_path / "to_bf16", "bf16")
    assert_equal(load_checkpoint(folder), load_checkpoint(tmp_path / "to_bf16"))
    assert "quantization_config" not in json.loads((tmp_path / "to_bf16" / "config.json").read_text())


def test_conversion_of_fp8_to_fp8_copies_every_bit(folder, tmp_path):
    convert_checkpoint(folder, tmp_path / "again", "fp8", shard_bytes=5_000)
    assert same_bits(stored(folder), stored(tmp_path / "again"))


def test_conversion_builds_no_model_and_holds_one_shard(folder, tmp_path, monkeypatch):
    """What is written at once is a shard; what was written before is gone."""
    alive: list[weakref.ref] = []

    def watched(tensors: Stored, file: Path, metadata: dict) -> None:
        assert not any(ref() is not None for ref in alive)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 20_000 or len(tensors) == 1
        alive[:] = map(weakref.ref, tensors.values())
        save_file(tensors, file, metadata)

    monkeypatch.setattr(shards, "save_file", watched)
    monkeypatch.setattr(torch.nn.Module, "to_empty", None)
    convert_checkpoint(folder, tmp_path / "x", "fp32", shard_bytes=20_000)
    assert len(list((tmp_path / "x").glob("*.safetensors"))) > 5


def test_conversion_keeps_the_tokenizer_and_finds_absent_duplicates(model, tmp_path):
    save_checkpoint(model, tmp_path / "a", "fp32", tokenizer=tokenizer_of(61))
    (tmp_path / "a" / "generation_config.json").write_text('{"temperature": 0.6}')
    file = next((tmp_path / "a").glob("*.safetensors"))
    tensors = load_file(file)
    del tensors["model.layers.2.shared_head.head.weight"]
    save_file(tensors, file)
    convert_checkpoint(tmp_path / "a", tmp_path / "b", "fp8")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    written = stored(tmp_path / "b")
    assert written["model.layers.2.shared_head.head.weight"].equal(written["lm_head.weight"])


def test_export_converts_both_ways(folder, tmp_path):
    def export(target: str, source: Path, dtype: str):
        return CliRunner().invoke(app, ["export", str(tmp_path / target), "--model", str(source), "--dtype", dtype])

    assert export("bf16", folder, "bf16").stdout == f"wrote {tmp_path / 'bf16'} in bf16\n"
    assert export("back", tmp_path / "bf16", "fp8").exit_code == 0
    first, back = stored(folder), stored(tmp_path / "back")
    assert all(first[name].view(torch.uint8).equal(back[name].view(torch.uint8))
               for name in first if QUANTISED.search(name))
    refused = export("x", folder, "int4")
    assert refused.exit_code == 1 and "a checkpoint is saved as bf16, fp32 or fp8" in refused.stderr


# ---- bad folders ----------------------------------------------------------------------------------------------------

SHARD = "model-00001-of-00001.safetensors"


def rewrite(change):
    def damage(folder: Path) -> None:
        tensors = load_file(folder / SHARD)
        change(tensors)
        save_file(tensors, folder / SHARD)
    return damage


def put(name, tensor):
    return rewrite(lambda tensors: tensors.update({name: tensor}))


SCALES = f"{KV_A}_scale_inv"
BAD = {
    "scale missing": (rewrite(lambda tensors: tensors.pop(SCALES)),
                      f"{KV_A} in .* is float8_e4m3fn and has no {SCALES}"),
    "codes missing": (rewrite(lambda tensors: tensors.pop(KV_A)), f"has no tensor {KV_A}; its config.json asks for it"),
    "floor grid": (put(SCALES, torch.ones(1, 1)), rf"{KV_A} in .*got scales \[1, 1\].* \[144, 32\] need \[2, 1\]"),
    "transposed grid": (put(SCALES, torch.ones(1, 2)), rf"{KV_A} in .*got scales \[1, 2\].* need \[2, 1\]"),
    "one number": (put(SCALES, torch.tensor(1.0)), rf"{KV_A} in .*got scales \[\].* need \[2, 1\]"),
    "rounded scales": (put(SCALES, torch.ones(2, 1).bfloat16()), f"{KV_A} in .*bfloat16; .* need .* torch.float32"),
    "scales of BF16": (put(KV_A, torch.ones(144, 32).bfloat16()), f"{KV_A} in .* is bfloat16 and has a {SCALES}"),
    "a norm in codes": (put("model.norm.weight", torch.ones(32).to(torch.float8_e4m3fn)),
                        "model.norm.weight in .* has no"),
    "torn": (cut(SHARD, 60_000), f"{SHARD} cannot be read: truncated"),
    "shard gone": (lambda folder: (folder / SHARD).unlink(), f"{SHARD} is missing"),
}


@pytest.mark.parametrize("damage, sentence", BAD.values(), ids=BAD)
def test_a_bad_folder_is_refused_and_nothing_is_left(folder, tmp_path, damage, sentence):
    damage(folder)
    with pytest.raises(CheckpointError, match=sentence):
        load_checkpoint(folder)
    with pytest.raises(CheckpointError, match=sentence):
        convert_checkpoint(folder, tmp_path / "x", "bf16")
    assert not (tmp_path / "x").exists()


def test_headers_alone_tell_the_format(folder):
    """What an engine reads before it reads any value."""
    with safe_open(folder / SHARD, "pt") as file:
        assert file.get_slice(KV_A).get_dtype() == "F8_E4M3" and file.get_slice(SCALES).get_dtype() == "F32"
        assert file.metadata() == {"format": "pt"}
