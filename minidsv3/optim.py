"""How a run is driven: every schedule of the report's section 4.2, AdamW with BF16 moments, an average of the weights.

All schedules are functions of the tokens seen so far, not of steps: the batch grows during a run, and a run that is
resumed or scaled must find its place. `Recipe()` holds the full-size values; small runs keep the shape in fewer tokens.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

# ---- schedules ------------------------------------------------------------------------------------------------------

T, B = 10**12, 10**9


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Every number that drives a training run. Defaults are the published pre-training of 14.8 T tokens (section 4.2).

    Ask each schedule with the number of tokens seen before the step: `batch_size(0)` is the first batch, and the first
    step has the learning rate 0. At a milestone the new phase has begun. Milestones and sequence_length are in tokens,
    batches in sequences. Raises ValueError for values that do not fit together.
    """

    total_tokens: int = 14_800 * B
    sequence_length: int = 4096
    # learning rate: linear to the peak, constant, cosine to the low, constant, a last constant
    peak_lr: float = 2.2e-4
    low_lr: float = 2.2e-5
    last_lr: float = 7.3e-6
    warmup_until: int = 28_064_358_400          # "2K steps", counted along the batch ramp below
    peak_until: int = 10 * T
    cosine_until: int = 14_300 * B
    low_until: int = 14_633 * B
    # batch: "gradually increased"; the report does not state the shape of the ramp, linear in tokens is our choice
    first_batch: int = 3072
    last_batch: int = 15360
    ramp_until: int = 469 * B
    # coefficients
    bias_speed: float = 0.001                   # gamma of the routing biases
    sequence_balance: float = 1e-4              # alpha of the sequence-wise loss
    first_mtp_weight: float = 0.3               # lambda while the learning rate is at its peak
    last_mtp_weight: float = 0.1
    # optimiser
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8                           # not stated in the report
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    ema_decay: float = 0.999                    # not stated in the report

    def __post_init__(self):
        milestones = {name: getattr(self, name) for name in MILESTONES}
        if not 0 <= self.warmup_until <= self.peak_until <= self.cosine_until <= self.low_until <= self.total_tokens:
            raise ValueError(f"the milestones are {milestones} and total_tokens is {self.total_tokens}; warm-up, peak, "
                             "cosine and low must follow one another and end within the run")
        if self.total_tokens < 1 or self.sequence_length < 1:
            raise ValueError(f"total_tokens is {self.total_tokens} and sequence_length {self.sequence_length}; "
                             "both must be at least 1")
        if not 1 <= self.first_batch <= self.last_batch or self.ramp_until < 0:
            raise ValueError(f"the batch goes from {self.first_batch} to {self.last_batch} in {self.ramp_until} "
                             "tokens; it must start at 1 or more, not shrink, and not in negative time")

    @classmethod
    def preset(cls, name: str, total_tokens: int | None = None) -> "Recipe":
        """`full`, `full_32k`, `full_128k` (the report's), `mini`, `nano` (ours), scaled to `total_tokens` if given."""
        if name not in PRESETS:
            raise ValueError(f"there is no recipe {name!r}; choose one of {', '.join(PRESETS)}")
        recipe = PRESETS[name]()
        return recipe if total_tokens is None else recipe.scaled(total_tokens)

    def scaled(self, total_tokens: int) -> "Recipe":
        """The same run in `total_tokens` tokens: every milestone keeps its share of the whole."""
        moved = {name: getattr(self, name) * total_tokens // self.total_tokens for name in MILESTONES}
        return replace(self, total_tokens=total_tokens, **moved)

    def lr(self, tokens: int) -> float:
        """0 to 2.2e-4 in 2K steps, constant to 10 T, cosine to 2.2e-5 at 14.3 T, 7.3e-6 from 14.633 T tokens."""
        if tokens < self.warmup_until:
            return self.peak_lr * tokens / self.warmup_until
        if tokens < self.peak_until:
            return self.peak_lr
        if tokens < self.cosine_until:
            progress = (tokens - self.peak_until) / (self.cosine_until - self.peak_until)
            return self.low_lr + (self.peak_lr - self.low_lr) * (1 + math.cos(math.pi * progress)) / 2
        return self.low_lr if tokens < self.low_until else self.last_lr

    def batch_size(self, tokens: int) -> int:
        """3072 to 15360 sequences over the first 469 B tokens, whole sequences, then constant."""
        if tokens >= self.ramp_until:
            return self.last_batch
        return self.first_batch + (self.last_batch - self.first_batch) * tokens // self.ramp_until

    def gamma(self, tokens: int) -> float:
        """Speed of the routing biases: 0.001 for the first 14.3 T tokens, then 0."""
        return self.bias_speed if tokens < self.cosine_until else 0.0

    def balance_weight(self, tokens: int) -> float:
        """Weight of the sequence-wise balance loss: 1e-4 throughout."""
        return self.sequence_balance

    def mtp_weight(self, tokens: int) -> float:
        """Weight of multi-token prediction: 0.3 for the first 10 T tokens, then 0.1."""
        return self.first_mtp_weight if tokens < self.peak_until else self.last_mtp_weight


MILESTONES = ("warmup_until", "peak_until", "cosine_until", "low_until", "ramp_until")


def _long_context(sequence_length: int, batch: int) -> Recipe:
    """1000 steps at the last learning rate (section 4.3).

    gamma 0 and lambda 0.1, as pre-training ended, are our choice: the report states neither for these phases.
    """
    total, lr = 1000 * batch * sequence_length, 7.3e-6
    return Recipe(
        total_tokens=total, sequence_length=sequence_length, first_batch=batch, last_batch=batch, ramp_until=0,
        warmup_until=0, peak_until=total, cosine_until=total, low_until=total, peak_lr=lr, low_lr=lr, last_lr=lr,
        bias_speed=0.0, first_mtp_weight=0.1)


def _small(total_tokens: int, peak_lr: float, warmup: float, **values) -> Recipe:
    """The full recipe in fewer tokens, its learning rates in the same ratios; `warmup` is a share of the run.

    The full share of 0.2 % would be less than one step.
    """
    full = Recipe()
    ratio = peak_lr / full.peak_lr
    return replace(full.scaled(total_tokens), peak_lr=peak_lr, low_lr=full.low_lr * ratio, last_lr=full.last_lr * ratio,
                   warmup_until=int(warmup * total_tokens), **values)


PRESETS: dict[str, Callable[[], Recipe]] = {
    "full": Recipe,
    "full_32k": lambda: _long_context(32 * 1024, batch=1920),
    "full_128k": lambda: _long_context(128 * 1024, batch=480),
    "mini": lambda: _small(2 * B, peak_lr=6e-4, warmup=0.05, first_batch=32, last_batch=160),
    # A bias moves by gamma a step and has to cover the spread of the scores, about 0.12 at this width: 0.001 would need
    # more than a hundred steps of the few hundred that there are.
    "nano": lambda: _small(800_000, peak_lr=2e-3, warmup=0.05, sequence_length=256, first_batch=8, last_batch=8,
                           bias_speed=0.01, ema_decay=0.98),
}


# ---- optimiser ------------------------------------------------------------------------------------------------------

def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """All trainable parameters in two groups: matrices decay, vectors (the norms' gains) do not.

    The report does not say what decays; this is our choice. Routing biases are buffers and appear in no group.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [{"params": [parameter for parameter in trainable if parameter.ndim >= 2], "weight_decay": weight_decay},
            {"params": [parameter for parameter in trainable if parameter.ndim < 2], "weight_decay": 0.0}]


class AdamW(torch.optim.AdamW):
    """AdamW whose two moments may be kept in BF16 (section 3.3.3), half the optimiser's memory.

    The parameters are the master weights and must be at least FP32; what precision the model computes in is autocast's
    affair. A BF16 moment is brought to the parameter's precision for its update and rounded afterwards, one parameter
    at a time. That works because beta_2 is 0.95: where gradients vanish, the second moment loses 5 % a step, and BF16
    rounds by 0.4 % at most. With the usual 0.999 it would lose 0.1 %, be rounded back, and never decay.

    `moments` is torch.bfloat16 or torch.float32; the latter is at least FP32 and is `torch.optim.AdamW(fused=True)`.
    Raises ValueError for other moments and for parameters below FP32.
    """

    def __init__(self, params: Iterable, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8,
                 weight_decay: float = 0.1, moments: torch.dtype = torch.float32):
        if moments not in (torch.bfloat16, torch.float32):
            raise ValueError(f"moments is {moments}; choose torch.bfloat16 or torch.float32")
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
        self.moments = moments
        for parameter in self._parameters():
            if parameter.dtype not in (torch.float32, torch.float64):
                raise ValueError(f"a parameter is {parameter.dtype}; the optimiser needs master weights of at least "
                                 "torch.float32 (compute in BF16 under torch.autocast)")

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for group in self.param_groups for parameter in group["params"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update of every parameter that has a gradient; returns the closure's loss, if there is a closure."""
        if self.moments == torch.float32:
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, group)
        return loss

    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """A parameter's `step` (a scalar) and its two moments; all are zeros before its first step."""
        state = self.state[parameter]
        if not state:
            kind = torch.bfloat16 if self.moments == torch.bfloat16 else parameter.dtype
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state |= {name: torch.zeros_like(parameter, dtype=kind) for name in MOMENTS}
        return state

    def _step_one(self, parameter: nn.Parameter, group: dict) -> None:
        state = self.state_of(parameter)
        mean, square = (state[name].to(parameter.dtype) for name in MOMENTS)
        beta1, beta2 = group["betas"]
        adamw([parameter], [parameter.grad], [mean], [square], [], [state["step"]], fused=True, amsgrad=False,
              beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
              maximize=False)
        state["exp_avg"].copy_(mean)
        state["exp_avg_sq"].copy_(square)

    def load_state_dict(self, state_dict: dict) -> None:
        """Takes up a saved state; its moments are kept in this optimiser's precision, whatever they were saved in."""
        super().load_state_dict(state_dict)
        if self.moments == torch.bfloat16:      # torch has just cast them to the parameter's precision
            for state in self.state.values():
                state.update({name: state[name].to(self.moments) for name in MOMENTS})


MOMENTS = ("exp_avg", "exp_avg_sq")


# ---- average of the weights -----------------------------------------------------------------------------------------

class EMA:
    """Exponential moving average of a model's parameters, to see early how it does after the learning rate has decayed.

    Section 3.2.3: the report keeps it in CPU memory and updates it after each step, asynchronously (here it is not). It
    does not state the decay. The average starts at the weights the model has, in at least FP32; buffers, the routing
    biases among them, are not averaged. Raises ValueError for a decay outside [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float, device: str = "cpu"):
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}; it is the share of the old average that stays, at least 0 and below 1")
        self.model, self.decay = model, decay
        self.values = {name: _copy(parameter, device) for name, parameter in model.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """average <- decay * average + (1 - decay) * weights; call it after the optimiser's step."""
        for name, parameter in self.model.named_parameters():
            average = self.values[name]
            average.lerp_(parameter.to(average), 1 - self.decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Writes the average into `model`, which must have the same parameters."""
        for name, parameter in model.named_parameters():
            parameter.copy_(self.values[name])

    @contextmanager
    def swap(self) -> Iterator[nn.Module]:
        """`with ema.swap() as model:` evaluates the average in the model itself, then puts the weights back."""
        weights = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        self.copy_to(self.model)
        try:
            yield self.model
        finally:
            with torch.no_grad():
                for name, parameter in self.model.named_parameters():
                    parameter.copy_(weights[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The average, by parameter name."""
        return dict(self.values)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Takes up a saved average. Raises ValueError if its names or shapes are not the model's."""
        wrong = sorted(name for name in {*state, *self.values}
                       if name not in state or name not in self.values or state[name].shape != self.values[name].shape)
        if wrong:
            raise ValueError(f"the saved average does not fit the model: {', '.join(wrong[:3])} is missing, unknown or "
                             "of another shape")
        for name, average in self.values.items():
            average.copy_(state[name])


def _copy(parameter: Tensor, device: str) -> Tensor:
    return parameter.detach().to(device, torch.promote_types(parameter.dtype, torch.float32), copy=True)
