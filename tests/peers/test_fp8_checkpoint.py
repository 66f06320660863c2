"""transformers reads our FP8 folders where its own loader is right, and what it makes of a short last block.

Without a GPU transformers dequantises when it loads (with `accelerate`), and both sides then compute in FP32 with the
same weights. Its loader takes rows / (rows of scales) for the height of a block, which is 128 only if 128 divides the
rows (or if there is one block). DeepSeek-V3's `kv_a_proj_with_mqa` has 576 rows and 5 scales, so it is refused.
"""

from pathlib import Path

import pytest
import torch
import transformers
from tiny import randomise, tiny_config, tiny_tokens
from torch import Tensor
from transformers import DeepseekV3ForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from minidsv3 import ModelConfig, Transformer
from minidsv3.checkpoint import convert_checkpoint, load_checkpoint, save_checkpoint
from minidsv3.kernels import dequantize_blocks, quantize_blocks

TOLERANCE = 1e-5                  # as in test_transformers.py: two FP32 computations of logits of order 1
ROUNDED = 1e-2                    # what quantising changes is far above it
EVEN = dict(hidden_size=256, intermediate_size=384, moe_intermediate_size=128, num_nextn_predict_layers=0,
            num_attention_heads=4, q_lora_rank=128, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32)


@pytest.fixture(autouse=True)
def quiet_peer():
    """The peer says that it dequantises without a GPU and that it has no place for MTP."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def uneven(config: ModelConfig, seed: int) -> Transformer:
    """A model whose blocks of 128 rows have scales that differ by powers of two."""
    model = randomise(Transformer(config), seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("q_b_proj.weight", "kv_a_proj_with_mqa.weight")):
                weight[:128] *= 0.25
    return model


def both(config: ModelConfig, folder: Path) -> tuple[Transformer, Transformer, DeepseekV3ForCausalLM]:
    """The model, what we read of its FP8 folder in FP32, and what transformers reads."""
    model = uneven(config, 0)
    save_checkpoint(model, folder, "fp8")
    peer = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, load_checkpoint(folder, torch.float32), peer.float()    # it leaves what is BF16 in the file in BF16


@torch.no_grad()
def difference(model: Transformer, other) -> float:
    tokens = tiny_tokens(2, 40)
    theirs = other(tokens)
    return float((model(tokens) - (theirs if isinstance(theirs, Tensor) else theirs.logits)).abs().max())


@pytest.mark.parametrize("latent, rope", [(96, 32), (128, 128)], ids=["kv_a of 128 rows", "kv_a of 256 rows"])
def test_same_logits_from_an_fp8_folder(tmp_path, latent, rope):
    """Every matrix has rows and columns that 128 divides, or fewer than 128, which are one block."""
    config = tiny_config(**EVEN | {"kv_lora_rank": latent, "qk_rope_head_dim": rope})
    model, ours, peer = both(config, tmp_path / "x")
    assert difference(ours, peer) < TOLERANCE
    assert difference(model, ours) > ROUNDED


@pytest.mark.parametrize("rows, scales", [(576, 5), (72, 1), (144, 2), (320, 3), (192, 2)])
def test_the_height_that_the_peer_takes_for_a_block(rows, scales):
    """Right for one block, wrong in silence where the scales divide the rows, refused where they do not."""
    weight = torch.randn(rows, 128) * torch.linspace(0.1, 3, rows)[:, None]
    codes, factors = quantize_blocks(weight)
    assert factors.shape == (scales, 1)
    peer = Fp8Dequantize(None)
    if rows % scales:
        with pytest.raises(ValueError, match=rf"\({rows}, 128\) not divisible by scale grid \({scales}, 1\)"):
            peer._dequantize_one(codes, factors)
        return
    theirs, ours = peer._dequantize_one(codes, factors, torch.float32), dequantize_blocks(codes, factors)
    wrong = (theirs != ours).any(1).nonzero().flatten()
    assert len(wrong) == 0 if scales == 1 else wrong[0] == rows // scales and wrong[-1] == 127
    assert (ours - weight).abs().max() < 0.04 * weight.abs().max()      # ours is the one near the weight


def test_the_peer_refuses_576_rows(tmp_path):
    """64 + 512 rows, as the released weights have, at a small width. The way out: a folder in BF16."""
    model = uneven(tiny_config(kv_lora_rank=512, qk_rope_head_dim=64, num_nextn_predict_layers=0), 0)
    save_checkpoint(model, tmp_path / "fp8", "fp8")
    with pytest.raises(RuntimeError, match="issues during automatic conversion of the weights"):
        DeepseekV3ForCausalLM.from_pretrained(tmp_path / "fp8")
    convert_checkpoint(tmp_path / "fp8", tmp_path / "bf16", "bf16")
    peer = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "bf16", dtype=torch.float32)
    assert difference(load_checkpoint(tmp_path / "bf16", torch.float32), peer) < TOLERANCE


def test_the_peer_misreads_a_short_block_in_silence(tmp_path):
    """144 rows and 2 scales: it takes rows 72 to 127 for the second block's."""
    _, ours, peer = both(tiny_config(**EVEN, kv_lora_rank=112), tmp_path / "x")
    name = "self_attn.kv_a_proj_with_mqa.weight"
    wrong = peer.model.layers[0].get_parameter(name) != ours.model.layers[0].get_parameter(name)
    assert (wrong.any(1).nonzero()[[0, -1], 0]).tolist() == [72, 127]
    assert difference(ours, peer) > 100 * TOLERANCE
