"""A decoding step as one compiled program: one token a row, nothing decided on the host.

Uncompiled, a step of nano calls several hundred small operations, and calling them takes longer than computing. As one
program it is bound by reading the weights (`kernels/contract.py`).
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from .attention import Context, LatentCache
from .model import Transformer
from .rope import rope_table


class CompiledStep:
    """`model(tokens, cache)` for one token of each row, compiled for caches of one size when it is made.

    That takes half a minute and a C++ compiler. The program keeps the weights as they were then: after more training,
    make another. A step attends over the whole capacity and hides what lies beyond a row's length, so a cache should
    not be much longer than the text.
    """

    def __init__(self, model: Transformer, batch: int, capacity: int):
        """For caches of `batch` rows and `capacity` tokens."""
        self.batch, self.capacity = batch, capacity
        weight = model.lm_head.weight
        cache = LatentCache(model.config, batch, capacity, weight.dtype, weight.device)
        self.shape = cache.values.shape
        token = torch.zeros(batch, 1, dtype=torch.int64, device=weight.device)
        self._run = exported(_Step(model, capacity), (token, token.clone(), cache.values))

    @torch.no_grad()
    def __call__(self, tokens: Tensor, cache: LatentCache) -> Tensor:
        """Logits [B, 1, vocab] for tokens [B, 1] int64 in the vocabulary, which are added to the cache.

        Raises ValueError for a cache of another size than the step was compiled for, and for one that is full.
        """
        if cache.values.shape != self.shape or tokens.shape != (self.batch, 1):
            raise ValueError(f"this step was compiled for tokens {[self.batch, 1]} and a cache {list(self.shape)}; "
                             f"got tokens {list(tokens.shape)} and a cache {list(cache.values.shape)}")
        if cache.longest >= self.capacity:
            raise ValueError(f"the cache is full with {cache.longest} tokens; compile a step for a longer one")
        logits = self._run(tokens, cache.lengths[:, None], cache.values)
        cache.advance(1)
        return logits


@torch.no_grad()
def exported(module: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    """The module as a program of its own for inputs of these shapes: no guards to check, no Python inside."""
    with tempfile.TemporaryDirectory() as folder:
        program = torch.export.export(module, inputs)
        file = torch._inductor.aoti_compile_and_package(program, package_path=str(Path(folder) / "step.pt2"))
        return torch._inductor.aoti_load_package(file)


class _Step(nn.Module):
    """The main model over one token a row, as a function of tensors alone; it writes to `values` in place."""

    def __init__(self, model: Transformer, capacity: int):
        super().__init__()
        self.model = model
        positions = torch.arange(capacity, device=model.lm_head.weight.device)
        self.cos, self.sin = rope_table(model.config, positions, model.lm_head.weight.dtype)

    def forward(self, tokens: Tensor, positions: Tensor, values: Tensor) -> Tensor:
        """Logits [B, 1, vocab] for tokens and positions [B, 1]; values are those of a `LatentCache`."""
        x = self.model.model.embed_tokens(tokens)
        visible = torch.arange(values.shape[2], device=x.device) <= positions[:, None, :, None]
        context = Context(self.cos[positions], self.sin[positions], values, positions, visible)
        for block in self.model.blocks:
            x = block(x, context)
        return self.model.lm_head(self.model.model.norm(x))
