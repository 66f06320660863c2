"""The command line: python -m minidsv3 train | generate | export | cost | plan | bench.

Each command only gathers what its module needs and prints what comes back. What the package refuses with a ValueError
becomes one sentence on stderr and exit code 1; a wrong use of options is code 2, Ctrl-C is 130. Modules are imported
when a command runs, so that help appears at once.
"""

import json
import os
import warnings
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from .model import Transformer
    from .train import TrainConfig, TrainResult


class Sentences(TyperGroup):
    """Turns refusals into one sentence and code 1; any other exception is a fault of ours and keeps its traceback."""

    def invoke(self, ctx: typer.Context) -> Any:
        with warnings.catch_warnings():      # puts `showwarning` back
            warnings.showwarning = lambda message, *_: typer.echo(f"warning: {message}", err=True)
            try:
                return super().invoke(ctx)
            except (ValueError, OSError) as error:
                typer.echo(f"error: {error}", err=True)
                raise typer.Exit(1) from error


app = typer.Typer(cls=Sentences, no_args_is_help=True, add_completion=False, rich_markup_mode=None,
                  pretty_exceptions_enable=False,
                  help="DeepSeek-V3, small enough to read: train it, let it write, count its cost.")
bench = typer.Typer(no_args_is_help=True, help="Measure speed, peers beside it.")
app.add_typer(bench, name="bench")

Source = Annotated[Path, typer.Option("--model", help="a run's folder or one in the hub's layout")]
Device = Annotated[str, typer.Option(help="cpu or cuda")]
Kernels = Annotated[str, typer.Option(help="auto (Triton on a GPU), triton or torch (the definitions)")]


# ---- train ------------------------------------------------------------------------------------------------------

@app.command()
def train(
    preset: Annotated[str, typer.Option(help="nano (two CPU cores), mini (one GPU) or full")] = "nano",
    tokens: Annotated[int | None, typer.Option(help="length of the run; the schedules' milestones move along")] = None,
    corpus: Annotated[str | None, typer.Option(help="file, folder, .jsonl, .parquet or hub:owner/name; "
                                                    "else Python's standard library")] = None,
    out: Annotated[Path | None, typer.Option(help="the run's folder  [default: runs/PRESET]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in --out, whose settings stay")] = False,
    seed: Annotated[int | None, typer.Option(help="of weights and data  [default: 0]")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16 or fp8  [default: fp32]")] = None,
    save_every: Annotated[int | None, typer.Option(help="steps between checkpoints  [default: 100]")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda  [default: cpu]")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE",
                                                   help="any field of ModelConfig, Recipe, TrainConfig")] = None,
    kernels: Kernels = "auto",
    pp: Annotated[int, typer.Option(help="under torchrun: ranks of a pipeline")] = 1,
    ep: Annotated[int, typer.Option(help="under torchrun: ranks that share out the experts of a layer")] = 1,
    nodes: Annotated[int, typer.Option(help="nodes that these stand on; with several, dispatch takes two hops")] = 1,
    schedule: Annotated[str, typer.Option(help="1f1b, zb1p, dualpipev or dualpipe")] = "dualpipev",
    payload: Annotated[str | None, typer.Option(help="fp8: what a dispatch sends  [default: activations]")] = None,
    timeout: Annotated[float, typer.Option(help="seconds until a silent rank counts as lost")] = 600,
) -> None:
    """Train on real text; Ctrl-C saves, --resume goes on. `torchrun --nproc-per-node N -m minidsv3 train` shares a run
    among N processes: what --pp and --ep leave of them is data parallel, and --resume may lay them out anew."""
    from . import train as training
    from .kernels import use_kernels
    from .run_state import is_sharded
    use_kernels(kernels)
    settings = dict(source=corpus, seed=seed, precision=precision, save_every=save_every, device=device)
    settings = {name: value for name, value in settings.items() if value is not None}
    out = out or Path("runs") / preset
    if resume and (settings or set_ or tokens is not None):
        raise typer.BadParameter(f"a run resumes with the settings it began with; give --resume and --out {out} alone")
    run, resume_run, program = training.train, training.resume, "python"
    if "LOCAL_RANK" in os.environ or max(pp, ep, nodes) > 1 or resume and is_sharded(out):
        from .parallel import train as parallel
        spread = parallel.Spread(pp=pp, ep=ep, nodes=nodes, schedule=schedule, payload=payload)
        run = partial(parallel.train, spread=spread, timeout=timeout)
        resume_run, program = partial(parallel.resume, spread=spread, timeout=timeout), "torchrun .."
    try:
        if resume:
            result = resume_run(out)
        else:
            config = train_config(preset, set_ or [], tokens, settings)
            if leads():
                typer.echo("Reading the corpus and training a tokenizer on it takes some seconds.", err=True)
            result = run(config, out)
    except training.Interrupted as stopped:
        if leads():
            typer.echo(f"\n{stopped}; go on with: {program} -m minidsv3 train --resume --out {out}", err=True)
        raise typer.Exit(130) from stopped
    if result is not None:
        report(result, out)


def leads() -> bool:
    """Whether this process speaks for all that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def train_config(preset: str, assignments: list[str], tokens: int | None, settings: dict[str, Any]) -> "TrainConfig":
    """A preset's model and recipe, with `NAME=VALUE` assignments to any field and the settings that have an option."""
    from .config import ModelConfig
    from .optim import Recipe
    from .train import TrainConfig
    run = {field.name: field.default for field in fields(TrainConfig) if field.name not in ("model", "recipe")}
    known = {"model": vars(ModelConfig.preset(preset)), "recipe": vars(Recipe.preset(preset, tokens)), "run": run}
    changes: dict[str, dict[str, Any]] = {part: {} for part in known}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        part = next((part for part in known if name in known[part]), None)
        if part is None or not equals:
            raise ValueError(f"--set {assignment}: give NAME=VALUE with a field of ModelConfig, Recipe or TrainConfig")
        changes[part][name] = _value(assignment, text, known[part][name])
    return TrainConfig(model=ModelConfig.preset(preset, **changes["model"]),
                       recipe=replace(Recipe.preset(preset, tokens), **changes["recipe"]), **changes["run"] | settings)


def _value(assignment: str, text: str, current: Any) -> Any:
    """`text` as a value of the kind that the field has now."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    value = tuple(value) if isinstance(value, list) else value
    kinds = (int, float) if isinstance(current, float) else type(current)
    if isinstance(value, bool) != isinstance(current, bool) or not isinstance(value, kinds):
        raise ValueError(f"--set {assignment}: the preset has {current!r}; give a value of that kind")
    return value


def report(result: "TrainResult", out: Path) -> None:
    typer.echo(f"{result.steps} steps, {result.tokens:,} tokens. On text held out:\n"
               f"  {result.held_out_loss:.3f} nats a token, {result.bits_per_byte:.3f} bits a byte\n"
               f"  {result.held_out_loss_ema:.3f} nats with the averaged weights (EMA)\n"
               f"  {result.unigram_entropy:.3f} nats for a model that knows only how frequent each token is\n"
               f"The model lies in {result.model}. Let it write: python -m minidsv3 generate 'def main(' --model {out}")


# ---- generate, export -------------------------------------------------------------------------------------------

@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="text to continue; an empty one starts a document")],
    model: Source = Path("runs/nano"),
    tokens: Annotated[int, typer.Option(help="how many tokens to write at most")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time")] = 0.8,
    top_p: Annotated[float, typer.Option(help="draw from the best tokens that hold this probability")] = 0.95,
    speculative: Annotated[bool, typer.Option("--speculative", help="draft with the MTP module")] = False,
    seed: Annotated[int | None, typer.Option(help="makes drawn text repeatable")] = None,
    device: Device = "cpu",
    kernels: Kernels = "auto",
) -> None:
    """Continue a text with a trained model."""
    from .data import encode
    from .generate import generate as continue_text
    from .kernels import use_kernels
    use_kernels(kernels)
    transformer, tokenizer = load(model, device)
    eos = transformer.config.eos_token_id
    start = encode(tokenizer, prompt) or [eos]      # documents begin behind the end of another
    written = continue_text(transformer, [start], tokens, temperature, top_p, speculative, eos, seed)
    ids = written.tokens[0].tolist()
    typer.echo(tokenizer.decode(ids))
    drafts = f", {written.accepted} of {written.drafted} drafts accepted" if speculative else ""
    typer.echo(f"[{len(ids) - len(start)} tokens in {written.passes} passes of the main model{drafts}]", err=True)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="where to write it")],
    model: Source = Path("runs/nano"),
    dtype: Annotated[str, typer.Option(help="bf16, fp32 or fp8 (codes with 128 x 128 scales, as released)")] = "bf16",
) -> None:
    """Write a model in the hub's layout, which transformers and inference engines read; a hub folder is converted shard
    by shard."""
    from .checkpoint import convert_checkpoint, save_checkpoint
    if is_hub_folder(model):
        convert_checkpoint(model, folder, dtype)
    else:
        transformer, tokenizer = load(model, "cpu")
        save_checkpoint(transformer, folder, dtype, tokenizer)
    typer.echo(f"wrote {folder} in {dtype}")


def load(path: Path, device: str) -> "tuple[Transformer, Tokenizer]":
    """Model and tokenizer of a hub folder or of a run."""
    from .checkpoint import load_checkpoint, load_tokenizer
    from .run_state import is_sharded
    if is_hub_folder(path):
        return load_checkpoint(path, device=device), load_tokenizer(path)
    if not path.is_dir():
        raise ValueError(f"there is no folder {path}; give that of a run or of a model, or train one first")
    if is_sharded(path):
        from .parallel.train import load_run
    else:
        from .train import load_run
    transformer, tokenizer = load_run(path)
    return transformer.to(device), tokenizer


def is_hub_folder(path: Path) -> bool:
    """Whether `path` is a folder in the hub's layout and not that of a run."""
    return (path / "config.json").is_file()


# ---- cost -------------------------------------------------------------------------------------------------------

@app.command()
def cost(
    model: Annotated[str, typer.Argument(help="nano, mini, full, or a config.json or its folder")] = "full",
    context: Annotated[int, typer.Option(help="tokens of a training sequence")] = 4096,
    tokens: Annotated[float, typer.Option(help="tokens of the whole training")] = 14.8e12,
    mfu: Annotated[float | None, typer.Option(help="share of the H800's peak  [default: the report's 0.39]")] = None,
) -> None:
    """Count parameters, cache, FLOPs, GPU hours and dollars."""
    from . import cost as costs
    from .config import PRESETS, ModelConfig
    if model not in PRESETS and not Path(model).exists():
        raise ValueError(f"{model!r} is neither a preset ({', '.join(PRESETS)}) nor a config.json or a folder with one")
    config = ModelConfig.preset(model) if model in PRESETS else ModelConfig.from_hub(model)
    for line in parameter_table(costs.parameters(config), costs.active_parameters(config)):
        typer.echo(line)
    flops = costs.training_flops(config, context)
    mfu = costs.REPORT_MFU if mfu is None else mfu
    hours = costs.hours(flops.main, tokens, mfu)
    typer.echo(f"\nKV cache          {costs.kv_cache_bytes(config):>20,} bytes a token (bf16)")
    typer.echo(f"training          {flops.main:>20,} FLOPs a token in sequences of {context:,}; MTP adds {flops.mtp:,}")
    share = f"at {mfu:.0%} of the bf16 peak"
    typer.echo(f"{f'{tokens:.4g} tokens':17} {hours:>20,.1f} H800 hours without MTP, {share}")
    typer.echo(f"{'':17} {costs.dollars(hours):>20,.0f} dollars at ${costs.DOLLARS_PER_HOUR:.0f} an hour")


def parameter_table(stored: Any, active: Any) -> list[str]:
    """Lines of a table: each part of the model, how many values it stores, how many of them one token uses."""
    parts = [field.name for field in fields(stored) if field.name not in ("mtp", "mtp_stored")]
    rows = [(part, getattr(stored, part), getattr(active, part)) for part in [*parts, "main", "mtp", "total"]]
    return [f"{'':17} {'stored':>20} {'used by a token':>20}"] + [
        f"{name:17} {count:>20,} {used:>20,}" for name, count, used in rows]


# ---- plan -------------------------------------------------------------------------------------------------------

@app.command()
def plan(
    preset: Annotated[str, typer.Option(help="nano, mini or full")] = "full",
    pp: Annotated[int, typer.Option(help="ranks of a pipeline")] = 16,
    ep: Annotated[int, typer.Option(help="GPUs that share out the experts of a layer")] = 64,
    gpus: Annotated[int, typer.Option(help="all of them; gpus / pp hold the same stages")] = 2048,
    schedule: Annotated[str, typer.Option(help="1f1b, zb1p, dualpipev or dualpipe")] = "dualpipe",
    micro_batches: Annotated[int | None, typer.Option(help="sequences of a pipeline in a step  "
                                                           "[default: its share of the recipe's last batch]")] = None,
    precision: Annotated[str, typer.Option(help="fp8, bf16 or fp32")] = "fp8",
    rank: Annotated[int | None, typer.Option(help="one GPU alone, 0 to gpus - 1  [default: one of each kind]")] = None,
) -> None:
    """Plan a layout without having a GPU: bytes, step time, GPU hours.

    Builds the objects that one GPU would train with, on a process group in name only and with tensors that hold
    nothing, counts them beside what shapes say, and simulates the schedule with published durations. The defaults are
    the report's layout, and published figures stand beside it, with what stays unexplained.
    """
    from .config import ModelConfig
    from .optim import Recipe
    from .parallel.layout import Layout
    from .parallel.plan import plan as make_plan
    from .parallel.plan_text import plan_lines
    config, recipe = ModelConfig.preset(preset), Recipe.preset(preset)
    if micro_batches is None:
        micro_batches = pipeline_share(recipe.last_batch, gpus, pp)
    layout = Layout(config=config, gpus=gpus, pp=pp, ep=ep, schedule=schedule, micro_batches=micro_batches,
                    sequence=recipe.sequence_length)
    for line in plan_lines(make_plan(layout, precision, rank)):
        typer.echo(line)


def pipeline_share(batch: int, gpus: int, pp: int) -> int:
    """The sequences of a batch that each of gpus / pp pipelines gets; `Layout` refuses what has no such pipelines."""
    pipelines = gpus // pp if pp > 0 and gpus > 0 and gpus % pp == 0 else 1
    if batch % pipelines:
        raise ValueError(f"a batch of {batch} sequences cannot be shared out over {pipelines} pipelines (gpus / pp); "
                         "give --micro-batches")
    return batch // pipelines


# ---- bench ------------------------------------------------------------------------------------------------------

@bench.command("cpu")
def bench_cpu(
    out: Annotated[Path, typer.Option(help="where the numbers go")] = Path("results/bench_cpu.json"),
    rounds: Annotated[int, typer.Option(help="of which the median counts")] = 5,
    compiled: Annotated[bool, typer.Option(help="also decode with torch.compile, which needs a C++ compiler")] = True,
) -> None:
    """Training and decoding at nano's geometry beside transformers; run it alone on a quiet machine."""
    from . import bench as benchmark
    typer.echo(json.dumps(benchmark.bench_cpu(out, rounds, compiled), indent=1))


@bench.command("kernels")
def bench_kernels(
    out: Annotated[Path, typer.Option(help="where the numbers go")] = Path("results/kernels.json"),
    only: Annotated[list[str] | None, typer.Option(help="an operation; may be repeated  [default: all]")] = None,
) -> None:
    """Every kernel at full size beside its peers, on one NVIDIA GPU that does nothing else."""
    from . import bench_kernels as benchmark
    results = benchmark.bench_kernels(out, only or ())
    for line in results["entries"]:
        typer.echo(f"{line['operation']}, {line['shape']}, {line['pass']}: " + ", ".join(
            f"{name} {value:.4f} ms" if isinstance(value, float) else f"{name} failed" for name, value in
            line["ms"].items()))


@bench.command("training")
def bench_training(
    out: Annotated[Path, typer.Option(help="where the numbers go")] = Path("results/bench_training.json"),
    steps: Annotated[int, typer.Option(help="of which the median counts")] = 10,
) -> None:
    """A training step of mini in BF16 and FP8 beside transformers, on one NVIDIA GPU that does nothing else."""
    from . import bench_training as benchmark
    typer.echo(json.dumps(benchmark.bench_training(out, steps), indent=1))


@bench.command("layer")
def bench_layer(
    out: Annotated[Path, typer.Option(help="where the numbers go")] = Path("results/bench_layer.json"),
    rounds: Annotated[int, typer.Option(help="of which the median counts")] = 10,
) -> None:
    """One MoE layer of the 671 B model in FP8 and BF16 beside transformers, on one NVIDIA GPU of 141 GB."""
    from . import bench_layer as benchmark
    typer.echo(json.dumps(benchmark.bench_layer(out, rounds), indent=1))
