"""Cross-entropy over the vocabulary: -log softmax(logits)[target] for each token, in nats."""

import torch
import torch.nn.functional as F

from .precision import wide


def cross_entropy_reference(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The definition. logits [N, vocab], targets [N] int64; returns [N] in at least FP32, one loss a token."""
    return -wide(logits).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


def cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The same through torch's own kernel; raises ValueError unless logits are [N, vocab] and targets [N]."""
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"cross_entropy got logits {list(logits.shape)} and targets {list(targets.shape)}; "
                         "they must be [N, vocab] and [N]")
    return F.cross_entropy(wide(logits), targets, reduction="none")
