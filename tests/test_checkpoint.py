"""The hub's layout: names, dtypes and shards as published, values back to the bit, a sentence for every bad folder."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from crash import every_crash, every_full_disk, small_files_only
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_tokens
from tokenizers import Tokenizer, models

from minidsv3 import ModelConfig, Transformer, stored
from minidsv3.checkpoint import CheckpointError, hub_tensors, load_checkpoint, load_tokenizer, save_checkpoint
from minidsv3.kernels import dequantize_blocks

MTP_HEAD, MTP_EMBEDDING = "model.layers.3.shared_head.head.weight", "model.layers.3.embed_tokens.weight"
KV_A, KV_B = (f"model.layers.1.self_attn.{name}.weight" for name in ("kv_a_proj_with_mqa", "kv_b_proj"))
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


@pytest.fixture
def model() -> Transformer:
    return tiny_model(dtype=torch.float32)


@pytest.fixture
def folder(model: Transformer, tmp_path: Path) -> Path:
    """The tiny model in fp32 and one file without an index, easy to damage."""
    path = tmp_path / "model"
    save_checkpoint(model, path, "fp32")
    (path / "model-00001-of-00001.safetensors").rename(path / "model.safetensors")
    (path / "model.safetensors.index.json").unlink()
    return path


def rewrite(folder: Path, change) -> None:
    """Applies `change` to the dict of the folder's tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")


def reconfigure(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def assert_equal(model: Transformer, other: Transformer) -> None:
    values = dict(hub_tensors(other))
    for name, tensor in hub_tensors(model):
        assert values.pop(name).equal(tensor), name
    assert not values


# ---- the layout -------------------------------------------------------------------------------------------------

def published_names(c: ModelConfig) -> set[str]:
    """README_WEIGHTS.md of DeepSeek-V3, written out."""
    names = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for layer in range(c.num_hidden_layers + c.num_nextn_predict_layers):
        inside = ["input_layernorm", "post_attention_layernorm"]
        inside += [f"self_attn.{x}_{kind}" for x in ("q", "kv") for kind in ("a_layernorm", "b_proj")]
        inside += ["self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.o_proj"]
        homes = ["mlp"] if layer < c.first_k_dense_replace else ["mlp.shared_experts"]
        if layer >= c.first_k_dense_replace:
            homes += [f"mlp.experts.{expert}" for expert in range(c.n_routed_experts)]
            inside.append("mlp.gate")
            names.add(f"model.layers.{layer}.mlp.gate.e_score_correction_bias")
        inside += [f"{home}.{x}_proj" for home in homes for x in ("gate", "up", "down")]
        if layer >= c.num_hidden_layers:
            inside += ["embed_tokens", "enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head"]
        names |= {f"model.layers.{layer}.{name}.weight" for name in inside}
    return names


def test_full_size_has_the_published_names_shapes_and_counts():
    config = ModelConfig.preset("full")
    with torch.device("meta"):
        tensors = dict(hub_tensors(Transformer(config)))
    assert tensors.keys() == published_names(config)
    assert sum(t.numel() for t in tensors.values()) == 684_489_845_504
    quantised = [n for n in tensors if n.endswith(("_proj.weight", "_mqa.weight")) and "eh_proj" not in n]
    assert len(tensors) + len(quantised) == 91_991
    blocks = sum(-(-tensors[n].shape[0] // 128) * -(-tensors[n].shape[1] // 128) for n in quantised)
    assert blocks == 41_540_496
    assert tensors["model.layers.3.mlp.experts.255.down_proj.weight"].shape == (7168, 2048)
    assert tensors["model.layers.61.self_attn.kv_a_proj_with_mqa.weight"].shape == (576, 7168)


@pytest.mark.parametrize("dtype, code", [("bf16", "BF16"), ("fp32", "F32")])
def test_shards_index_and_dtypes(model, tmp_path, dtype, code):
    limit = 40_000
    save_checkpoint(model, tmp_path / "x", dtype, shard_bytes=limit)
    shards = sorted((tmp_path / "x").glob("*.safetensors"))
    assert len(shards) > 3 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((tmp_path / "x" / "model.safetensors.index.json").read_text())
    names, size = {}, 0
    for shard in shards:
        with safe_open(shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            for name in file.keys():
                assert file.get_slice(name).get_dtype() == ("F32" if name.endswith("bias") else code)
                names[name] = shard.name
        here = sum(tensor.nbytes for tensor in load_file(shard).values())
        assert here <= limit
        size += here
    assert index == {"metadata": {"total_size": size}, "weight_map": names}
    assert names.keys() == published_names(model.config)
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    assert config["torch_dtype"] == {"bf16": "bfloat16", "fp32": "float32"}[dtype]
    assert ModelConfig.from_hub(config) == model.config


def test_the_hub_has_gate_then_up_and_the_duplicates(model, folder):
    tensors, expert = load_file(folder / "model.safetensors"), "model.layers.2.mlp.experts.5"
    experts, width = model.model.layers[2].mlp.experts, model.config.moe_intermediate_size
    assert tensors[f"{expert}.gate_proj.weight"].equal(experts.gate_up_proj[5, :width])
    assert tensors[f"{expert}.up_proj.weight"].equal(experts.gate_up_proj[5, width:])
    assert tensors[f"{expert}.down_proj.weight"].equal(experts.down_proj[5])
    assert tensors[MTP_HEAD].equal(model.lm_head.weight)
    assert tensors[MTP_EMBEDDING].equal(model.model.embed_tokens.weight)


# ---- there and back ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shard_bytes", [1, 40_000, 10**9], ids=["a tensor each", "some", "one"])
def test_fp32_comes_back_to_the_bit(model, tmp_path, shard_bytes):
    save_checkpoint(model, tmp_path / "x", "fp32", shard_bytes=shard_bytes)
    loaded = load_checkpoint(tmp_path / "x")
    assert_equal(model, loaded)
    assert loaded(tiny_tokens(2, 9)).equal(model(tiny_tokens(2, 9)))
    assert loaded.mtp_modules[0].embed_tokens is loaded.model.embed_tokens
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_bf16_rounds_once_and_spares_the_biases(model, tmp_path):
    save_checkpoint(model, tmp_path / "x")
    loaded = load_checkpoint(tmp_path / "x")
    assert loaded.lm_head.weight.dtype is torch.bfloat16
    biases = {name: tensor for name, tensor in hub_tensors(loaded) if name.endswith("bias")}
    assert len(biases) == 3 and {bias.dtype for bias in biases.values()} == {torch.float32}
    assert biases[BIAS].equal(dict(hub_tensors(model))[BIAS])
    assert_equal(model.to(torch.bfloat16), loaded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_dtype_can_be_asked_for(model, folder, dtype):
    loaded = load_checkpoint(folder, dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert_equal(model.to(dtype), loaded)


def test_loading_draws_no_random_numbers(folder):
    before = torch.get_rng_state()
    load_checkpoint(folder)
    assert torch.get_rng_state().equal(before)


def test_a_loaded_model_does_not_depend_on_its_files(model, folder):
    loaded = load_checkpoint(folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(bytes(400_000))
    assert_equal(model, loaded)


def test_a_folder_as_transformers_writes_it(model, folder):
    """`rope_parameters`, no `scoring_func`, biases in bf16, an MTP module in the config that no tensor belongs to."""
    rewrite(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers.3." in name])
    rewrite(folder, lambda tensors: tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()}))
    reconfigure(folder, rope_theta=None, rope_scaling=None, scoring_func=None, topk_method=None,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    with pytest.warns(UserWarning, match=r"has no tensors for the 1 MTP module\(s\) of its config"):
        loaded = load_checkpoint(folder)
    assert loaded.config == model.config.replace(num_nextn_predict_layers=0) and len(loaded.mtp_modules) == 0
    wanted = dict(hub_tensors(model.to(torch.bfloat16)))
    for name, tensor in hub_tensors(loaded):
        assert tensor.equal(wanted[name].bfloat16().to(tensor.dtype))


def test_duplicates_may_be_absent_but_not_different(model, folder):
    rewrite(folder, lambda tensors: tensors.pop(MTP_HEAD))
    assert_equal(model, load_checkpoint(folder))
    rewrite(folder, lambda tensors: tensors[MTP_EMBEDDING].add_(1))
    with pytest.raises(CheckpointError, match=f"{MTP_EMBEDDING} in .* differs from model.embed_tokens.weight"):
        load_checkpoint(folder)


# ---- FP8 --------------------------------------------------------------------------------------------------------

def by_hand(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """w = fp8 * scale, one value at a time."""
    rows, columns = weight.shape
    w, s = weight.float().tolist(), scales.tolist()
    return torch.tensor([[w[i][j] * s[i // 128][j // 128] for j in range(columns)] for i in range(rows)])


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (129, 5), (192, 130), (64, 257)])
def test_blocks_are_dequantised_as_by_hand(shape):
    weight = torch.randn(shape).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-shape[0] // 128), -(-shape[1] // 128)) + 0.1
    assert dequantize_blocks(weight, scales).equal(by_hand(weight, scales))
    assert dequantize_blocks(weight, scales, torch.bfloat16).equal(by_hand(weight, scales).bfloat16())


def test_576_rows_have_five_scales():
    weight = torch.ones(576, 128).to(torch.float8_e4m3fn)
    rows = dequantize_blocks(weight, torch.arange(1.0, 6.0)[:, None])[:, 0]
    assert rows.unique_consecutive(return_counts=True)[1].tolist() == [128, 128, 128, 128, 64]


def quantise(tensors: dict[str, torch.Tensor], names: list[str]) -> None:
    """Makes `tensors` an FP8 checkpoint: bf16 with FP8 and scales for `names`."""
    for name in list(tensors):
        if name in names:
            rows, columns = tensors[name].shape
            tensors[name + "_scale_inv"] = torch.rand(-(-rows // 128), -(-columns // 128)) + 0.1
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        elif not name.endswith("bias"):
            tensors[name] = tensors[name].bfloat16()


@pytest.fixture
def fp8_folder(tmp_path: Path) -> Path:
    """kv_a has 136 + 8 = 144 rows, kv_b 112 rows of 136: neither is a multiple of the block."""
    path = tmp_path / "fp8"
    save_checkpoint(tiny_model(dtype=torch.float32, kv_lora_rank=136), path, "fp32")
    (path / "model-00001-of-00001.safetensors").rename(path / "model.safetensors")
    (path / "model.safetensors.index.json").unlink()
    expert = "model.layers.2.mlp.experts.5.up_proj.weight"
    rewrite(path, lambda tensors: quantise(tensors, [KV_A, KV_B, expert]))
    return path


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_fp8_folders_are_dequantised(fp8_folder, dtype):
    loaded = dict(hub_tensors(load_checkpoint(fp8_folder, dtype)))
    tensors = load_file(fp8_folder / "model.safetensors")
    scaled = [name for name in tensors if name + "_scale_inv" in tensors]
    assert len(scaled) == 3
    for name in scaled:
        right = by_hand(tensors[name], tensors[name + "_scale_inv"])
        assert loaded[name].equal(right.to(dtype or torch.bfloat16)), name
    assert loaded["model.norm.weight"].dtype is (dtype or torch.bfloat16) and loaded[BIAS].dtype is torch.float32


def equal_blocks(weight, scales, dtype=torch.float32):
    """The mistake of dividing the rows evenly among the scales: 144 rows in 2 blocks of 72."""
    height, width = (-(-size // n) for size, n in zip(weight.shape, scales.shape))
    each = scales.repeat_interleave(height, 0)[:weight.shape[0]].repeat_interleave(width, 1)[:, :weight.shape[1]]
    return (weight.float() * each).to(dtype)


def test_equal_blocks_are_caught(fp8_folder, monkeypatch):
    monkeypatch.setattr(stored, "dequantize_blocks", equal_blocks)
    with pytest.raises(AssertionError):
        test_fp8_folders_are_dequantised(fp8_folder, torch.float32)


# ---- bad folders: one sentence each -----------------------------------------------------------------------------

def drop(name):
    return lambda folder: rewrite(folder, lambda tensors: tensors.pop(name))


def put(name, tensor):
    return lambda folder: rewrite(folder, lambda tensors: tensors.update({name: tensor}))


def write_index(content: str):
    return lambda folder: (folder / "model.safetensors.index.json").write_text(content)


def only_pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut(file: str, size: int):
    return lambda folder: os.truncate(folder / file, size)


def with_config(**changes):
    return lambda folder: reconfigure(folder, **changes)


MISSING_SHARD = '{"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}'
UNREADABLE = "model.safetensors cannot be read: truncated or no safetensors file"
BAD = {
    "tensor missing": (drop(KV_A), f"has no tensor {KV_A}; its config.json asks for it"),
    "layers missing": (with_config(num_hidden_layers=9, num_nextn_predict_layers=0), r"layers.4.* \(and \d+ more\);"),
    "tensor extra": (put("model.odd.weight", torch.ones(2)), "model.odd.weight in .*safetensors has no place"),
    "scale extra": (put("model.odd.weight_scale_inv", torch.ones(2)), "model.odd.weight_scale_inv in .* has no place"),
    "fewer experts": (with_config(n_routed_experts=8), r"\(and \d+ more\) has no place in the model of config.json"),
    "mis-shaped": (put(KV_A, torch.ones(3, 4)), rf"{KV_A} in .* has shape \[3, 4\]; config.json asks for \[24, 32\]"),
    "other config": (with_config(vocab_size=60), r"has shape \[61, 32\]; config.json asks for \[60, 32\]"),
    "no scale": (put(KV_A, torch.ones(24, 32).to(torch.float8_e4m3fn)), f"{KV_A} in .* is float8_e4m3fn and has no"),
    "scale alone": (put(KV_A + "_scale_inv", torch.ones(1, 1)), f"{KV_A} in .* is float32 and has a {KV_A}_scale_inv"),
    "truncated": (cut("model.safetensors", 50_000), UNREADABLE),
    "empty file": (cut("model.safetensors", 0), UNREADABLE),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing$"),
    "pickled": (only_pickled, "model.safetensors is missing; pytorch_model.bin is not opened, for unpickling runs"),
    "shard missing": (write_index(MISSING_SHARD), "model-2.safetensors is missing"),
    "index torn": (write_index('{"weight_map": {"a"'), "index.json is no index of shards"),
    "index odd": (write_index("[]"), "index.json is no index of shards"),
    "config missing": (lambda folder: (folder / "config.json").unlink(), "there is no config.json at"),
    "config torn": (cut("config.json", 40), "config.json is not valid JSON"),
    "folder missing": (shutil.rmtree, "there is no config.json at"),
}


@pytest.mark.parametrize("damage, sentence", BAD.values(), ids=BAD)
def test_a_bad_folder_is_refused_with_a_sentence(folder, damage, sentence):
    damage(folder)
    with pytest.raises(ValueError, match=sentence):
        load_checkpoint(folder)


def test_a_scale_of_another_grid_is_refused(fp8_folder):
    rewrite(fp8_folder, lambda tensors: tensors.update({KV_A + "_scale_inv": torch.ones(3, 1)}))
    sentence = rf"{KV_A} in .*: .*got scales \[3, 1\] torch.float32; codes of shape \[144, 32\] need \[2, 1\]"
    with pytest.raises(CheckpointError, match=sentence):
        load_checkpoint(fp8_folder)


def test_nothing_is_unpickled(folder):
    """A pickle that would leave a trace lies under every name that others open."""
    trace = folder.parent / "trace"
    payload = b"cos\nmkdir\n(S'" + os.fsencode(trace) + b"'\ntR."
    pickle.loads(payload)
    assert trace.exists()   # the payload works
    trace.rmdir()
    for name in ("model.safetensors", "pytorch_model.bin", "model.pt"):
        (folder / name).write_bytes(payload)
    with pytest.raises(CheckpointError, match="truncated or no safetensors file"):
        load_checkpoint(folder)
    assert not trace.exists()


# ---- saving: what may be replaced, and when it fails ------------------------------------------------------------

def test_an_older_checkpoint_is_replaced_whole(model, tmp_path):
    path = tmp_path / "x"
    save_checkpoint(model, path, shard_bytes=40_000)
    save_checkpoint(model, path, "fp32")
    assert sorted(os.listdir(path)) == ["config.json", "model-00001-of-00001.safetensors",
                                        "model.safetensors.index.json"]
    assert os.listdir(tmp_path) == ["x"]


def test_a_folder_of_other_things_is_left_alone(model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds what no checkpoint does \(notes.txt\); choose an empty folder"):
        save_checkpoint(model, tmp_path)
    with pytest.raises(CheckpointError, match="notes.txt is a file; a checkpoint is a folder"):
        save_checkpoint(model, tmp_path / "notes.txt")
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_an_unknown_dtype_is_refused(model, tmp_path):
    with pytest.raises(CheckpointError, match="dtype is 'fp16'; a checkpoint is saved as bf16, fp32 or fp8"):
        save_checkpoint(model, tmp_path / "x", "fp16")


def test_a_crash_at_any_step_leaves_the_old_or_the_new_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    small = dict(num_hidden_layers=1, num_nextn_predict_layers=0)
    old, new, path = tiny_model(1, torch.float32, **small), tiny_model(2, torch.float32, **small), tmp_path / "x"

    def fresh() -> None:
        shutil.rmtree(tmp_path)
        save_checkpoint(old, path, "fp32")

    found = []

    def check() -> None:
        survivor = load_checkpoint(path if path.exists() else tmp_path / "x.replaced")
        found.append("old" if survivor.lm_head.weight.equal(old.lm_head.weight) else "new")
        assert_equal({"old": old, "new": new}[found[-1]], survivor)

    assert every_crash(lambda: save_checkpoint(new, path, "fp32"), check, fresh) >= 10
    assert found == sorted(found, reverse=True) and set(found) == {"old", "new"}


def test_a_full_disk_gives_a_sentence_and_leaves_the_old_checkpoint(model, tmp_path):
    path = tmp_path / "x"

    def save() -> None:
        save_checkpoint(model, path, "fp32")

    def check() -> None:
        assert_equal(model, load_checkpoint(path))

    save()
    with small_files_only(8192), pytest.raises(CheckpointError, match="x could not be written .*too large.*untouched"):
        save()
    check()
    assert every_full_disk(save, check) >= 6
    assert os.listdir(tmp_path) == ["x"]


# ---- the tokenizer ----------------------------------------------------------------------------------------------

def tokenizer_of(size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(size)}, unk_token="t2"))
    tokenizer.add_special_tokens(["t0", "t1"])
    return tokenizer


def test_transformers_reads_the_tokenizer(model, tmp_path):
    from transformers import AutoTokenizer
    save_checkpoint(model, tmp_path / "x", tokenizer=tokenizer_of(61))
    peer = AutoTokenizer.from_pretrained(tmp_path / "x")
    assert (peer.bos_token, peer.eos_token, peer.model_max_length) == ("t0", "t1", 64)
    assert peer("t7")["input_ids"] == [7] == load_tokenizer(tmp_path / "x").encode("t7").ids
    assert_equal(model.to(torch.bfloat16), load_checkpoint(tmp_path / "x"))


def test_a_tokenizer_of_another_model_is_refused(model, tmp_path):
    with pytest.raises(CheckpointError, match="the tokenizer has 62 tokens and the model 61"):
        save_checkpoint(model, tmp_path / "x", tokenizer=tokenizer_of(62))
    assert os.listdir(tmp_path) == []


def test_a_missing_or_torn_tokenizer_is_refused(model, tmp_path):
    save_checkpoint(model, tmp_path / "x", tokenizer=tokenizer_of(61))
    os.truncate(tmp_path / "x" / "tokenizer.json", 100)
    with pytest.raises(CheckpointError, match="tokenizer.json is not a tokenizer"):
        load_tokenizer(tmp_path / "x")
    (tmp_path / "x" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="there is no tokenizer.json in"):
        load_tokenizer(tmp_path / "x")
