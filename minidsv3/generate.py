"""Writing text: one token a pass, or two when the prediction module's guess survives (report sections 2.2 and 5.4.3).

Speculative decoding keeps three things in step. With n tokens known, t_0 .. t_{n-1}:

    main model   has cached t_0 .. t_{n-2}; its logits gave t_{n-1}, which it has not read yet
    MTP module   has cached the pairs (h_j, t_{j+1}) for j <= n-2; the last of them drafts t_n
    one pass     reads [t_{n-1}, draft]: position 0 verifies the draft, position 1 continues behind it

An accepted draft gives two tokens for one pass. A refused one is cut by setting the cache back to its true length.
Verification is rejection sampling (Leviathan et al. 2023, Chen et al. 2023): the text keeps the main model's
distribution. Greedy decoding is the case in which each distribution is a single spike, and needs no code of its own.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .attention import LatentCache, make_context
from .compiled import CompiledStep
from .kernels.precision import wide
from .model import Transformer

# A near-tie: the two best logits differ by at most so many roundings of the best. A pass of two tokens rounds unlike a
# pass of one, a little in every layer, so the margin is wider than one rounding.
NEAR = 8


class Generation(NamedTuple):
    """What `generate` returns. Counts are sums over the rows, and stop when a row is finished."""

    tokens: Tensor | list[Tensor]   # prompt and continuation, in the form in which the prompts came
    passes: int                     # passes of the main model, the prompt's included
    drafted: int                    # tokens that the MTP module guessed
    accepted: int                   # how many of them the main model confirmed
    near_ties: int                  # greedy and speculative: tokens that rounding could have made another


def generate(model: Transformer, tokens: Tensor | Sequence, max_new_tokens: int, temperature: float = 0.0,
             top_p: float = 1.0, speculative: bool = False, eos: int | None = None, seed: int | None = None,
             compiled: CompiledStep | None = None) -> Generation:
    """Continues each prompt by at most `max_new_tokens`; a row ends early behind its first `eos`.

    tokens: [B, T] int64, or a list of B prompts (lists of ids or 1-D tensors) of any lengths. A list returns a list of
    1-D tensors, a tensor returns a tensor [B, T + new] in which rows that ended early are filled up with `eos`; both on
    the model's device. `temperature` 0 is greedy; otherwise tokens are drawn from softmax(logits / temperature), cut to
    the fewest best tokens that hold `top_p` of the probability. `seed` None draws a fresh one.

    `speculative` drafts with the first MTP module: greedy text stays what it is, up to rounding (see `near_ties`);
    drawn text keeps its distribution, though a seed gives other tokens than without drafts.

    `compiled` is a step compiled from this model for as many rows, and long enough; plain decoding then runs through it
    behind the prompt.

    Raises ValueError for what cannot be continued and for logits that are not finite.
    """
    prompts = _prompts(tokens)
    _check(model, prompts, max_new_tokens, speculative, compiled)
    rows = [list(prompt) for prompt in prompts]
    ends = [len(prompt) + max_new_tokens for prompt in prompts]
    counts = dict(passes=0, drafted=0, accepted=0, near_ties=0)
    sampler = Sampler(temperature, top_p, seed, model.lm_head.weight.device)
    with torch.no_grad():
        decoder = Decoder(model, prompts, max(ends), sampler, speculative, compiled)
        live = set(range(len(rows)))
        while live:
            new, near = decoder.step()
            counts["passes"] += 1
            for row in sorted(live):
                kept = _until(new[row], eos, ends[row] - len(rows[row]))
                rows[row] += kept
                counts["drafted"] += speculative and counts["passes"] > 1
                counts["accepted"] += len(new[row]) - 1
                counts["near_ties"] += sum(near[row][:len(kept)])
                if rows[row][-1] == eos or len(rows[row]) == ends[row]:
                    live.remove(row)
    return Generation(_like(tokens, rows, eos, decoder.device), **counts)


class Sampler:
    """From logits to a distribution, and from a distribution to a token, with a random generator of its own."""

    def __init__(self, temperature: float, top_p: float, seed: int | None, device: torch.device | str = "cpu"):
        if not 0 <= temperature < float("inf"):
            raise ValueError(f"temperature is {temperature}; it must be 0 (greedy) or a positive number")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p is {top_p}; it is a share of the probability: above 0 and at most 1")
        self.temperature, self.top_p = temperature, top_p
        self.generator = torch.Generator(device)
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    def probabilities(self, logits: Tensor) -> Tensor:
        """logits [..., vocab] -> probabilities in at least FP32; at temperature 0 all of it on the best token."""
        if not logits.amax().isfinite():   # the maximum is NaN if one logit is
            raise ValueError("the model's logits are not finite (NaN or infinity); its weights are damaged, "
                             "or too large for their dtype")
        logits = wide(logits)
        if self.temperature == 0:
            return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        p = (logits / self.temperature).softmax(-1)
        return p if self.top_p == 1 else nucleus(p, self.top_p)

    def draw(self, p: Tensor) -> Tensor:
        """One token from each distribution: p [..., vocab] -> [...] int64."""
        if self.temperature == 0:
            return p.argmax(-1)
        return torch.multinomial(p.flatten(0, -2), 1, generator=self.generator).view(p.shape[:-1])

    def verify(self, draft: Tensor, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """Rejection sampling: tokens [B] from p [B, vocab], given draft [B] from q [B, vocab]; 1 where it is the draft.

        Draft x is accepted with probability min(1, p(x) / q(x)); else the token comes from max(p - q, 0), normalised.
        """
        p_draft, q_draft = p.gather(-1, draft[:, None])[:, 0], q.gather(-1, draft[:, None])[:, 0]
        accepted = torch.rand(draft.shape, generator=self.generator, device=draft.device) * q_draft < p_draft
        rest = (p - q).clamp(min=0)
        rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)   # p = q: only rounding could refuse
        return torch.where(accepted, draft, self.draw(rest)), accepted.long()


def nucleus(p: Tensor, top_p: float) -> Tensor:
    """p [..., vocab] cut to the fewest best tokens that reach `top_p` together, normalised (Holtzman et al. 2020)."""
    ordered, token = p.sort(dim=-1, descending=True, stable=True)
    ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0.0)
    return torch.zeros_like(p).scatter_(-1, token, ordered / ordered.sum(-1, keepdim=True))


class Decoder:
    """A batch of sequences between two passes. `step` reads what is known and answers one or two new tokens a row."""

    def __init__(self, model: Transformer, prompts: list[list[int]], length: int, sampler: Sampler, speculative: bool,
                 compiled: CompiledStep | None = None):
        self.model, self.sampler, self.speculative, self.compiled = model, sampler, speculative, compiled
        self.device = model.lm_head.weight.device
        self.cache = LatentCache(model.config, len(prompts), compiled.capacity if compiled else length,
                                 model.model.embed_tokens.weight.dtype, self.device)
        self.rows = torch.arange(len(prompts), device=self.device)
        # what the next pass reads: tokens [B, T] and the index of each row's last token in them; padding stands behind
        widest = max(len(prompt) for prompt in prompts)
        self.window = torch.tensor([prompt + [0] * (widest - len(prompt)) for prompt in prompts], device=self.device)
        self.last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self.device)
        self.q: Tensor | None = None   # the distribution from which the draft, the last of the window, was drawn

    def step(self) -> tuple[list[list[int]], list[list[bool]]]:
        """One main pass. Returns each row's new tokens, two if its draft was accepted, and which were near-ties."""
        start = self.cache.lengths
        if self.compiled is not None and self.window.shape[1] == 1:
            hidden, logits = None, self.compiled(self.window, self.cache)[:, 0]
        else:
            hidden = self.model.hidden(self.window, self.cache)
            logits = self._logits(hidden if self.q is not None else hidden[self.rows, self.last])
        if self.q is None:   # the prompt, or plain decoding: one token from the last position
            p = self.sampler.probabilities(logits)
            new, accepted, near = self.sampler.draw(p)[:, None], torch.zeros_like(self.rows), [[False]] * len(p)
        else:
            p = self.sampler.probabilities(logits)
            token, accepted = self.sampler.verify(self.window[:, 1], self.q, p[:, 0])
            new, near = torch.stack((token, self.sampler.draw(p[:, 1])), 1), self._near_ties(logits)
        known = start + self.last + accepted + 1
        if self.speculative:
            self._draft(hidden, new, accepted, start)
        else:
            self.window, self.last = new, torch.zeros_like(self.last)
        # forget padding and refused drafts; a finished row idles at the end of the cache while others go on
        self.cache.lengths = known.clamp(max=self.cache.capacity - self.window.shape[1])
        return [row[:1 + more] for row, more in zip(new.tolist(), accepted.tolist())], near

    def _draft(self, hidden: Tensor, new: Tensor, accepted: Tensor, start: Tensor) -> None:
        """Joins each h_j with t_{j+1}, adds the pairs to the module's cache, and drafts behind the last new token."""
        module = self.model.mtp_modules[0]
        following = torch.cat((self.window[:, 1:], new[:, -1:]), 1)
        following.scatter_(1, self.last[:, None] + torch.arange(new.shape[1], device=self.device), new)
        context = make_context(self.model.config, following.shape, hidden.dtype, self.device, self.cache, start)
        ahead = module(self.model.carried(hidden), following, context)
        self.q = self.sampler.probabilities(module.logits(ahead[self.rows, self.last + accepted]))
        self.window = torch.stack((new[self.rows, accepted], self.sampler.draw(self.q)), 1)
        self.last = torch.zeros_like(self.last)

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.model.lm_head(self.model.model.norm(hidden))

    def _near_ties(self, logits: Tensor) -> list[list[bool]]:
        """Where the two best logits are so close that greedy decoding hangs on rounding (see NEAR)."""
        if self.sampler.temperature > 0:
            return torch.zeros(logits.shape[:-1], dtype=torch.bool).tolist()
        best, second = logits.topk(2).values.unbind(-1)
        return (best - second <= NEAR * torch.finfo(logits.dtype).eps * best.abs()).tolist()


def _until(new: list[int], eos: int | None, room: int) -> list[int]:
    """`new` up to its first eos and no longer than `room`."""
    end = new.index(eos) + 1 if eos in new else len(new)
    return new[:min(end, room)]


def _like(prompts: Tensor | Sequence, rows: list[list[int]], eos: int | None, device: torch.device):
    """The rows in the form in which the prompts came: a list of tensors for a list, a padded tensor for a tensor."""
    if not isinstance(prompts, Tensor):
        return [torch.tensor(row, device=device) for row in rows]
    longest = max(map(len, rows))
    return torch.tensor([row + [eos] * (longest - len(row)) for row in rows], device=device)


def _prompts(tokens: Tensor | Sequence) -> list[list[int]]:
    """The prompts as lists of ids; a sentence for anything that is not a batch of them."""
    whole = "tokens must be a [batch, tokens] tensor of ids or a list of prompts, each a list of ids or a 1-D tensor"
    if isinstance(tokens, Tensor) and tokens.dim() != 2:
        raise ValueError(f"{whole}; this tensor has shape {list(tokens.shape)} (one prompt is tokens[None])")
    prompts = [row.tolist() if isinstance(row, Tensor) else row for row in tokens]
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, Sequence) or isinstance(prompt, str):
            raise ValueError(f"{whole}; entry {number} is {prompt!r}")
        if not all(isinstance(token, int) for token in prompt):
            raise ValueError(f"{whole}; prompt {number} holds something other than whole numbers")
        if not prompt:
            raise ValueError(f"prompt {number} is empty; it needs at least one token, such as begin-of-sentence")
    if not prompts:
        raise ValueError(f"there is no prompt; {whole}")
    return [list(prompt) for prompt in prompts]


def _check(model: Transformer, prompts: list[list[int]], max_new_tokens: int, speculative: bool,
           compiled: CompiledStep | None) -> None:
    config, longest = model.config, max(map(len, prompts))
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if longest + max_new_tokens > config.max_position_embeddings:
        raise ValueError(f"a prompt of {longest} tokens and {max_new_tokens} new ones are more than the model's "
                         f"context of {config.max_position_embeddings}; shorten the prompt or ask for fewer")
    low, high = min(map(min, prompts)), max(map(max, prompts))
    if low < 0 or high >= config.vocab_size:
        raise ValueError(f"token ids run from {low} to {high}; the vocabulary has ids 0 to {config.vocab_size - 1}")
    if speculative and not model.mtp_modules:
        raise ValueError("the model has no MTP module to draft with (num_nextn_predict_layers is 0); "
                         "pass speculative=False")
    if compiled is not None and speculative:
        raise ValueError("a compiled step reads one token a pass and drafts need two; "
                         "leave out compiled or speculative")
    if compiled is not None and (compiled.batch != len(prompts) or compiled.capacity < longest + max_new_tokens):
        raise ValueError(f"the step was compiled for {compiled.batch} rows of {compiled.capacity} tokens; "
                         f"these prompts need {len(prompts)} rows of {longest + max_new_tokens}")
