"""Training on many processes: one program on every rank, started by torchrun.

    torchrun --nproc-per-node 4 -m minidsv3 train --preset nano --pp 2 --ep 2 --schedule dualpipe

Every rank reads the same text and takes its own rows of each batch; ranks of one pipeline take the same rows. What a
step computes is that of one process (`train.train_step`): the gradient of the whole batch, clipped by the norm of the
whole model, one step of AdamW, one move of the biases by the load of the whole batch.
"""

import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import Tensor, nn

from ..data import Batch, Corpus, read_corpus, train_tokenizer
from ..model import Transformer
from ..run_state import saved_steps
from ..train import Measured, Run, TrainConfig, TrainResult, drive, finish, update_weights
from .layout import Layout
from .mesh import in_the_whole, make_mesh, parallelise
from .pipeline import Pipeline
from .places import named_biases
from .saves import latest_facts, load_sharded, on_rank_0, save_sharded, training_state


class RankLost(ValueError):
    """Another rank died or does not answer."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How a run is laid out over its processes; whatever pp and ep leave is data parallel."""

    pp: int = 1                      # ranks of a pipeline
    ep: int = 1                      # ranks that share out the experts of a layer ..
    nodes: int = 1                   # .. and the nodes that these stand on
    schedule: str = "dualpipev"
    payload: str | None = None       # of a dispatch: "fp8", or None for the activations' own dtype


@contextmanager
def process_group(device: str, timeout: float) -> Iterator[str]:
    """The group of all processes that torchrun started; yields this one's device.

    A rank that hears nothing for `timeout` seconds gives up. Raises ValueError without torchrun.
    """
    if "LOCAL_RANK" not in os.environ:
        raise ValueError("this run needs several processes; start it with torchrun --nproc-per-node N -m minidsv3 ..")
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(seconds=timeout))
    try:
        yield device
    finally:
        if not isinstance(sys.exception(), RuntimeError):      # from a rank that is gone one cannot part
            dist.destroy_process_group()


class ParallelRun(Run):
    """This rank's part of a run: a `Run` whose parameters are shards.

    Every rank draws all initial weights, as one process does, and keeps its own: a seed means the same model in every
    layout. Raises ValueError for a layout that does not fit the model or the batch.
    """

    def __init__(self, config: TrainConfig, corpus: Corpus, tokenizer: Tokenizer, spread: Spread, device: str = "cpu"):
        ranks = dist.get_world_size()
        if ranks % spread.pp:
            raise ValueError(f"pp is {spread.pp} and there are {ranks} ranks; pp must divide their number")
        self.spread, self.leads = spread, dist.get_rank() == 0
        self.device = self.ema_device = device
        self.mesh = make_mesh(spread.pp, ranks // spread.pp, spread.ep, spread.nodes)
        self.micro_batch = largest_micro_batch(config, spread, ranks)
        super().__init__(config, corpus, tokenizer)          # calls `build_model`, which needs all of these

    def build_model(self) -> nn.Module:
        """This rank's stages."""
        config, mesh = self.config, self.mesh
        self.pipeline = Pipeline(
            config.model, self.spread.schedule, Transformer(config.model).state_dict(), self.micro_batch,
            config.precision, self.device, mesh.pp.get_group(), mesh.dp.get_group(),
            wrap=lambda stage: parallelise(stage, mesh, self.spread.payload))
        return nn.ModuleList(self.pipeline.stages)

    def sequences(self, seen: int) -> int:
        """The recipe's batch, rounded down to whole micro-batches on every rank (nano's is never rounded)."""
        unit = self.mesh.dp.size() * self.micro_batch * (2 if self.spread.schedule == "dualpipe" else 1)
        return super().sequences(seen) // unit * unit

    def take_step(self, batch: Batch, seen: int) -> Measured:
        recipe, mine = self.config.recipe, self.mesh.dp.get_local_rank()
        tokens, documents = (rows.chunk(self.mesh.dp.size())[mine] for rows in (batch.tokens, batch.documents))
        losses = self.pipeline.step(tokens, documents, recipe.mtp_weight(seen), recipe.balance_weight(seen))
        grad_norm = self.pipeline.clip(recipe.clip_norm)
        update_weights(self.optimizer, recipe, seen, losses, grad_norm)
        self.pipeline.update_biases(losses.load, recipe.gamma(seen))
        return Measured.of(losses, grad_norm)

    def agreed(self, stop: bool) -> bool:
        """Whether any rank was asked to stop: all must end with the same step."""
        flag = torch.tensor(float(stop), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    # ---- saves --------------------------------------------------------------------------------------------------

    def save(self, out: Path) -> None:
        own = self.pipeline.own_weights()
        save_sharded(out, self.step, self.tensors(own), {
            "config": asdict(self.config), "tokenizer": self.tokenizer.to_str(), "tokens": self.tokens,
            "data": self.data.state_dict()})

    def load(self, save: Path, step: int, facts: dict[str, Any]) -> None:
        """Goes on from `save`, of whatever layout. Nothing random happens in a step, so no generator is restored."""
        load_sharded(save, self.tensors(self.pipeline.weights()))
        _go_on_at(self, step, facts)

    def tensors(self, weights: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """The state of `weights`, and all biases, by name in the whole model."""
        state = training_state(weights, self.optimizer, self.ema)
        whole = {name: in_the_whole(tensor, self.mesh) for name, tensor in state.items()}
        return whole | biases(self.pipeline.stages)


def largest_micro_batch(config: TrainConfig, spread: Spread, ranks: int) -> int:
    """Sequences of a micro-batch: up to `config.micro_batch`, but few enough that the schedule has its micro-batches.

    Raises ValueError, with the layout's reason, if even one sequence each makes too few.
    """
    each, refusal = config.recipe.first_batch // (ranks // spread.pp), None
    for size in range(min(config.micro_batch, each), 0, -1):
        try:
            Layout(config=config.model, gpus=ranks, pp=spread.pp, ep=spread.ep, micro_batches=each // size,
                   sequence=config.recipe.sequence_length, schedule=spread.schedule)
            return size
        except ValueError as error:
            refusal = error
    raise ValueError(f"a batch of {config.recipe.first_batch} sequences does not suffice for {ranks} ranks: {refusal}; "
                     "set first_batch and last_batch higher, or use fewer ranks")


# ---- start, resume, finish --------------------------------------------------------------------------------------

def train(config: TrainConfig, out: str | Path, spread: Spread, timeout: float = 600,
          progress: bool = True) -> TrainResult | None:
    """`minidsv3.train.train` on all ranks that torchrun started. The result on rank 0, None on the others.

    Raises `RankLost` if another rank dies or is silent for `timeout` seconds, besides what one process raises.
    """
    out = Path(out)
    with contact(out), process_group(config.device, timeout) as device:
        steps = on_rank_0(lambda: saved_steps(out))
        if steps:
            raise ValueError(f"{out} already holds a run (saved at step {steps[0]}); resume it, or take another folder")
        corpus = read_corpus(config.source)
        tokenizer = on_rank_0(lambda: train_tokenizer(corpus.train, config.model.vocab_size).to_str())
        run = ParallelRun(config, corpus, Tokenizer.from_str(tokenizer), spread, device)
        run.save(out)
        drive(run, out, progress)
    return finish(alone(out), out) if run.leads else None


def resume(out: str | Path, spread: Spread, timeout: float = 600, progress: bool = True) -> TrainResult | None:
    """Goes on with a run of many ranks from its last save, on these ranks and this layout, or, without torchrun, as one
    process; otherwise as `train`."""
    out = Path(out)
    if "LOCAL_RANK" not in os.environ and spread.pp == spread.ep == 1:
        run = alone(out)
        drive(run, out, progress)
        return finish(run, out)
    save, step, facts = latest_facts(out)
    config = TrainConfig.from_dict(facts["config"])
    with contact(out), process_group(config.device, timeout) as device:
        run = ParallelRun(config, read_corpus(config.source), Tokenizer.from_str(facts["tokenizer"]), spread, device)
        run.load(save, step, facts)
        drive(run, out, progress)
    return finish(alone(out), out) if run.leads else None


def alone(out: str | Path) -> Run:
    """The run in `out`, saved by many ranks, as a run of this one process."""
    save, step, facts = latest_facts(Path(out))
    config = TrainConfig.from_dict(facts["config"])
    run = Run(config, read_corpus(config.source), Tokenizer.from_str(facts["tokenizer"]))
    load_sharded(save, training_state(dict(run.model.named_parameters()), run.optimizer, run.ema) | biases([run.model]))
    _go_on_at(run, step, facts)
    return run


def load_run(out: str | Path) -> tuple[Transformer, Tokenizer]:
    """Model and tokenizer of a run of many ranks, as last saved. Its text need not be there any more."""
    save, _, facts = latest_facts(Path(out))
    model = Transformer(TrainConfig.from_dict(facts["config"]).model)
    weights = {f"model/{name}": parameter.detach() for name, parameter in model.named_parameters()}
    load_sharded(save, weights | biases([model]))
    return model, Tokenizer.from_str(facts["tokenizer"])


def biases(stages: Iterable[nn.Module]) -> dict[str, Tensor]:
    """The routers' biases, by name in a save."""
    return {f"model/{name}": bias for name, bias in named_biases(stages).items()}


def _go_on_at(run: Run, step: int, facts: dict[str, Any]) -> None:
    run.step, run.tokens = step, facts["tokens"]
    run.data.load_state_dict(facts["data"])
    for state in run.optimizer.state.values():
        state["step"].fill_(step)


@contextmanager
def contact(out: Path) -> Iterator[None]:
    """Says in a sentence that another rank is gone. One notices it by a broken connection, by silence, or because
    torchrun, which noticed first, terminates those that are left."""
    def terminated(number: int, frame: object) -> None:
        raise dist.DistError("torchrun ended this one too")

    after = signal.signal(signal.SIGTERM, terminated)
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        after = signal.SIG_IGN          # what is said must not be cut short: torchrun may be about to end this rank too
        signal.signal(signal.SIGTERM, after)
        reason, step = str(error).splitlines()[0], max(saved_steps(out), default=0)
        raise RankLost(f"another rank died or was silent for too long ({reason}); {out} is saved at step {step}, and "
                       "torchrun .. -m minidsv3 train --resume goes on from there") from error
    finally:
        signal.signal(signal.SIGTERM, after)
