"""Measures training speed on this machine's GPU or CPU: tokens/s and share of peak FLOP/s.

    python benchmarks/training.py            # a table, and a file in benchmarks/results/
    python benchmarks/training.py --json     # the same as JSON on stdout
    python benchmarks/training.py --all      # every measure, before and after, in ten minutes on a GPU
    python benchmarks/training.py --roofline # what arithmetic predicts for an H100; needs none (training_roofline.py)

The variants compute the same optimizer step from the same texts, masks and weights; the losses must agree:

    packed         the engine of `gte-train run`: no padding, vocabulary projection at masked positions only
    packed+compile the same with `compile: true` (GPU only)
    packed+compile+fa3  the same with FlashAttention-3 (Hopper with the package flash-attn-3 only)
    before         packed, but the last layer runs for all tokens, and the loss has all logits at once
    padded         the engine's step with rows padded to the longest of each micro-batch
    transformers   a plain loop: GteForMaskedLM with labels (all logits), padded rows, torch.optim.AdamW

`before` and FlashAttention-3 are in `--all`, which takes the stages of the published recipes, profiles a step (time of
products, of attention, and of the rest), and writes the prediction of the roofline beside what it measured, if one is
stored for this GPU. A variant that needs more memory than there is, and what the time does not allow, are named.

There are two kinds of text: "c4" has log-normal lengths like C4's (median 245 tokens, cut at the row's length), "full"
has full rows, as the published totals count. Only real tokens count, and FLOPs are model FLOPs of real tokens, so
padding shows as lower speed. Rounds are interleaved and medians reported: a change of the clock affects all variants
alike. Batches are prepared before the timing; the loader has its own test.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import json
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torch.profiler
import transformers
from torch import Tensor, nn
from transformers import GteConfig, GteForMaskedLM

from gte_deploy._version import __version__
from gte_deploy.core.files import write_text
from gte_deploy.models import builtin_path
from gte_deploy.models.config import build_config
from gte_deploy.training import train as engine
from gte_deploy.training.data.corpus import TokenCorpus
from gte_deploy.training.data.packing import (
    MicroBatch,
    PaddedMicroBatch,
    StepSettings,
    micro_batches,
    pad_to_static,
    padded_micro_batches,
)
from gte_deploy.training.data.prepare import prepare
from gte_deploy.training.data.sampling import ChunkIndex, Chunking
from gte_deploy.training.distributed import World, choose_device
from gte_deploy.training.flash_attention import flash_attention, why_not_flash_attention_3
from gte_deploy.training.flops import device_peak_flops, training_flops
from gte_deploy.training.model import PackedMaskedLM, build_model
from gte_deploy.training.optim import build_optimizer
from gte_deploy.training.recipe import Recipe, Stage

RESULTS = Path(__file__).resolve().parent / "results"
SEED = 0
C4_LOG_MEAN, C4_LOG_DEVIATION = 5.5, 1.1
DISTINCT_STEPS = 2
# The values of the recipes; other models use the first one.
TOKEN_BUDGETS = {"gte-en-mlm-base": 32768, "gte-en-mlm-large": 16384, "gte-multilingual-mlm-base": 16384}
# The stages of the published recipes for `--all`, the most important first.
STAGES = (
    ("gte-en-mlm-base", 2048, "full"),
    ("gte-en-mlm-large", 512, "full"),
    ("gte-en-mlm-base", 8192, "full"),
    ("gte-multilingual-mlm-base", 2048, "full"),
    ("gte-en-mlm-large", 8192, "full"),
    ("gte-en-mlm-large", 2048, "full"),
    ("gte-multilingual-mlm-base", 8192, "full"),
)


@dataclass(frozen=True)
class Workload:
    """One model on one kind of text; a step has `micro_batches` full micro-batches."""

    model: str
    kind: str  # "c4" or "full"
    max_length: int
    token_budget: int
    micro_batches: int

    @property
    def name(self) -> str:
        return f"{self.model} {self.max_length} {self.kind}"


@dataclass(frozen=True)
class StepData:
    """One optimizer step in the forms that the variants read, and its size in real tokens."""

    packed: list[MicroBatch]
    static: list[MicroBatch]
    padded: list[PaddedMicroBatch]
    tokens: int
    masked: int
    flops: float


@dataclass(frozen=True)
class Variant:
    """One way to train: `gradients` adds up a step's gradients and returns its mean loss; `optimizer` then steps."""

    name: str
    module: nn.Module
    optimizer: torch.optim.Optimizer
    gradients: Callable[[StepData], Tensor]
    around: Callable[[], AbstractContextManager[None]] = nullcontext

    def step(self, data: StepData) -> Tensor:
        loss = self.gradients(data)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    if "--roofline" in given:
        from training_roofline import main as predict

        return predict([argument for argument in given if argument != "--roofline"])
    args = _parse(given)
    device = choose_device(args.device)
    peak = args.peak_tflops * 1e12 if args.peak_tflops else device_peak_flops(device)
    started, results, longest = time.monotonic(), [], 0.0
    for workload in _workloads(args, device):
        spent = time.monotonic() - started
        if spent + longest > args.minutes * 60:
            _say(f"{workload.name}: left out, it would not end within {args.minutes:g} minutes")
            results.append({**dataclasses.asdict(workload), "skipped": f"after {spent:.0f} s"})
            continue
        results.append(
            measure(
                workload, device=device, peak_flops=peak, rounds=args.rounds, variants=args.variants, profiled=args.all
            )
        )
        longest = max(longest, time.monotonic() - started - spent) if args.all else 0.0
    report = {**environment(device), "rounds": args.rounds, "peak_flops": peak, "workloads": results}
    if args.all:
        report["predictions"] = stored_predictions(report["hardware"].get("gpu", ""))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_text(args.output, json.dumps(report, indent=2) + "\n")
    if args.all:
        write_text(args.output.with_suffix(".md"), markdown(report))
    print(json.dumps(report, indent=2) if args.json else table(report))
    _say(f"written to {args.output}")
    return 0


def measure(
    workload: Workload,
    *,
    device: torch.device,
    peak_flops: float | None,
    rounds: int,
    variants: Sequence[str],
    profiled: bool = False,
) -> dict[str, Any]:
    """Time optimizer steps of every variant on one workload, and return the workload's entry of the report."""
    config = build_config(workload.model)
    with tempfile.TemporaryDirectory() as folder:
        steps, fill = make_steps(workload, config, Path(folder))
    chosen: list[Variant] = []
    too_large: list[str] = []
    first: dict[str, float] = {}  # with the time to compile
    for name in variants:
        started = time.monotonic()
        with _enough_memory(name, too_large):
            chosen.append(started_variant(VARIANTS[name], config, workload, device, steps[0]))
            first[name] = time.monotonic() - started
    require_same_loss(chosen, steps[0], bfloat16=device.type == "cuda")
    seconds: dict[str, list[float]] = {variant.name: [] for variant in chosen}
    memory: dict[str, int] = {}
    for number in range(-1, rounds):  # round -1 warms up: it chooses kernels
        for variant in [variant for variant in chosen if variant.name not in too_large]:
            with _enough_memory(variant.name, too_large), variant.around():
                taken = _timed_step(variant, steps[number % DISTINCT_STEPS], device)
                if number >= 0:
                    seconds[variant.name].append(taken / steps[number % DISTINCT_STEPS].tokens)
                if device.type == "cuda":
                    memory[variant.name] = torch.cuda.max_memory_allocated(device)
        _say(f"{workload.name}: round {number + 1} of {rounds}")
    chosen = [variant for variant in chosen if variant.name not in too_large]
    flops_per_token = sum(step.flops for step in steps) / sum(step.tokens for step in steps)
    rows = {}
    for name, per_token in ((variant.name, seconds[variant.name]) for variant in chosen):
        speed = 1 / statistics.median(per_token)
        rows[name] = {
            "tokens_per_second": speed,
            "peak_share": None if peak_flops is None else speed * flops_per_token / peak_flops,
            "tokens_per_second_by_round": [1 / value for value in per_token],
            "peak_memory_bytes": memory.get(name),
            "first_seconds": first[name],
        }
    if profiled:
        for variant in chosen:
            rows[variant.name]["seconds_by_kind"] = profile(variant, steps[0], device)
    del chosen
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return {
        **dataclasses.asdict(workload),
        "tokens_per_step": [step.tokens for step in steps],
        "flops_per_token": flops_per_token,
        "fill": fill,
        "out_of_memory": too_large,
        "variants": rows,
    }


def started_variant(
    make: Callable[[GteConfig, Workload, torch.device], Variant],
    config: GteConfig,
    workload: Workload,
    device: torch.device,
    data: StepData,
) -> Variant:
    """Make a variant, and compute a step's gradients, which compiles what it compiles."""
    variant = make(config, workload, device)
    with variant.around():
        variant.gradients(data).item()
    variant.optimizer.zero_grad()
    return variant


@contextmanager
def _enough_memory(name: str, too_large: list[str]) -> Iterator[None]:
    """Note a variant for which the GPU's memory is too small, and go on."""
    try:
        yield
    except torch.OutOfMemoryError:
        too_large.append(name)
        torch.cuda.empty_cache()


# Parts of the names of CUDA kernels, and of CPU operators; the first that fits counts.
KINDS = {
    "attention": ("flash", "fmha", "scaled_dot_product", "varlen_attn"),
    "gemm": ("gemm", "nvjet", "cutlass", "xmma", "aten::mm", "aten::addmm", "aten::bmm", "mkldnn"),
}


def profile(variant: Variant, data: StepData, device: torch.device) -> dict[str, float]:
    """Return the seconds that the kernels of one step take, by kind, as torch's profiler sees them."""
    on_gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if on_gpu else torch.profiler.ProfilerActivity.CPU
    with variant.around(), torch.profiler.profile(activities=[activity]) as profiler:
        variant.step(data)
        if on_gpu:
            torch.cuda.synchronize(device)
    seconds = dict.fromkeys((*KINDS, "rest"), 0.0)
    for event in profiler.key_averages():
        taken = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        name = event.key.lower()
        kind = next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "rest")
        seconds[kind] += taken / 1e6
    return seconds


def make_steps(workload: Workload, config: GteConfig, folder: Path) -> tuple[list[StepData], dict[str, float]]:
    """Make the workload's steps, the same in every form; return them and each form's share of real tokens."""
    corpus = make_corpus(workload, folder)
    index = ChunkIndex(corpus, Chunking(workload.max_length), seed=SEED)
    stage = _recipe(workload, compile=False).stages[0]
    mean = float(index.lengths.mean())
    batch_size = max(1, int(workload.micro_batches * workload.token_budget / mean))
    settings = StepSettings(batch_size=batch_size, token_budget=workload.token_budget, seed=SEED, masking=stage.masking)
    steps = []
    for number in range(DISTINCT_STEPS):
        packed = micro_batches(index, number, settings)
        static = [
            pad_to_static(
                b, num_tokens=workload.token_budget, max_length=workload.max_length, pad_id=corpus.vocab.pad_id
            )
            for b in packed
        ]
        padded = [_trimmed(batch) for batch in padded_micro_batches(index, number, settings)]
        lengths = np.concatenate([np.diff(batch.cu_seqlens) for batch in packed]).astype(float)
        masked = sum(len(batch.labels) for batch in packed)
        flops = training_flops(config, tokens=lengths.sum(), squared_lengths=(lengths**2).sum(), masked=masked)
        steps.append(StepData(packed, static, padded, int(lengths.sum()), masked, flops))
    tokens = sum(step.tokens for step in steps)
    return steps, {
        "packed": tokens / sum(len(step.packed) * workload.token_budget for step in steps),
        "padded": tokens / sum(batch.input_ids.size for step in steps for batch in step.padded),
    }


def make_corpus(workload: Workload, folder: Path) -> TokenCorpus:
    """Make a corpus of random words, each of one token, large enough for the steps."""
    words = [
        word
        for word in (builtin_path() / "vocab.txt").read_text("utf-8").split("\n")
        if len(word) > 2 and word.isascii() and word.isalpha()
    ]
    rng = np.random.default_rng(SEED)
    room = workload.max_length - 2
    wanted = (DISTINCT_STEPS + 1) * workload.micro_batches * workload.token_budget
    texts, total = [], 0
    while total < wanted:
        length = room if workload.kind == "full" else int(rng.lognormal(C4_LOG_MEAN, C4_LOG_DEVIATION))
        length = min(max(length, 3), room)
        texts.append(" ".join(rng.choice(words, length)))
        total += length
    (folder / "text.txt").write_text("\n\n".join(texts))
    return prepare([str(folder / "text.txt")], folder / "corpus", tokenizer=builtin_path())


def require_same_loss(variants: Sequence[Variant], data: StepData, *, bfloat16: bool) -> None:
    """Stop the benchmark unless all variants have the same loss without dropout, and so do the same work."""
    losses = {}
    for variant in variants:
        variant.module.eval()
        with variant.around():
            losses[variant.name] = variant.gradients(data).item()
        variant.optimizer.zero_grad()
        variant.module.train()
    if max(losses.values()) - min(losses.values()) > (2e-2 if bfloat16 else 1e-4):
        raise SystemExit(f"the variants do not compute the same loss: {losses}")


# --- variants -------------------------------------------------------------------------------------------------------


def make_packed(config: GteConfig, workload: Workload, device: torch.device, *, compile: bool = False) -> Variant:
    recipe, world = _recipe(workload, compile=compile), World(0, 1, device)
    model = build_model(config, rope_theta=recipe.stages[0].rope_theta, seed=SEED)
    module = engine.place_model(model, recipe, world)
    stage = recipe.stages[0]
    fused = device.type == "cuda"
    optimizer = build_optimizer(module, stage.optimizer, learning_rate=stage.learning_rate, fused=fused)

    def gradients(data: StepData) -> Tensor:
        batches = data.static if compile else data.packed
        dtype = "bfloat16" if device.type == "cuda" else "float32"
        return engine.accumulate_gradients(module, batches, world=world, masked_tokens=data.masked, dtype=dtype)

    return Variant("packed+compile" if compile else "packed", module, optimizer, gradients)


def make_compiled(config: GteConfig, workload: Workload, device: torch.device) -> Variant:
    return make_packed(config, workload, device, compile=True)


def make_flash_attention_3(config: GteConfig, workload: Workload, device: torch.device) -> Variant:
    compiled = make_compiled(config, workload, device)
    return dataclasses.replace(
        compiled, name="packed+compile+fa3", around=functools.partial(flash_attention, "FA3", device)
    )


class WholeMaskedLM(PackedMaskedLM):
    """The last layer for all tokens, and all logits at once."""

    def __init__(self, model: GteForMaskedLM) -> None:
        nn.Module.__init__(self)
        self.model = model

    def forward(self, input_ids: Tensor, position_ids: Tensor, **kwargs: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        places, labels = kwargs.pop("masked_positions"), kwargs.pop("labels")
        out = self.model.gte(input_ids=input_ids[None], position_ids=position_ids[None], **kwargs)
        logits = self.model.lm_head(out.last_hidden_state[0][places])
        return F.cross_entropy(logits.float(), labels, reduction="sum")


def make_before(config: GteConfig, workload: Workload, device: torch.device) -> Variant:
    module = WholeMaskedLM(build_model(config, rope_theta=10_000, seed=SEED)).to(device)
    stage, world = _recipe(workload, compile=False).stages[0], World(0, 1, device)
    gpu = device.type == "cuda"
    optimizer = build_optimizer(module, stage.optimizer, learning_rate=stage.learning_rate, fused=gpu)

    def gradients(data: StepData) -> Tensor:
        dtype = "bfloat16" if gpu else "float32"
        return engine.accumulate_gradients(module, data.packed, world=world, masked_tokens=data.masked, dtype=dtype)

    return Variant("before", module, optimizer, gradients)


def make_padded(config: GteConfig, workload: Workload, device: torch.device) -> Variant:
    model = _rectangular_model(config, device)
    stage = _recipe(workload, compile=False).stages[0]
    fused = device.type == "cuda"
    optimizer = build_optimizer(model, stage.optimizer, learning_rate=stage.learning_rate, fused=fused)

    def nats(batch: PaddedMicroBatch) -> Tensor:
        input_ids, attention_mask, places, labels = _to(
            device, batch.input_ids, batch.attention_mask, batch.masked_positions, batch.labels
        )
        hidden = model.gte(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits = model.lm_head(hidden.flatten(0, 1)[places])
        return F.cross_entropy(logits.float(), labels, reduction="sum")

    return Variant("padded", model, optimizer, lambda data: _add_up(nats, data, device))


def make_transformers(config: GteConfig, workload: Workload, device: torch.device) -> Variant:
    model = _rectangular_model(config, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.05)

    def nats(batch: PaddedMicroBatch) -> Tensor:
        every_label = np.full(batch.input_ids.size, -100, dtype=np.int64)
        every_label[batch.masked_positions] = batch.labels
        input_ids, attention_mask, labels = _to(
            device, batch.input_ids, batch.attention_mask, every_label.reshape(batch.input_ids.shape)
        )
        return model(input_ids=input_ids, attention_mask=attention_mask, labels=labels).loss * len(batch.labels)

    return Variant("transformers", model, optimizer, lambda data: _add_up(nats, data, device))


VARIANTS: dict[str, Callable[[GteConfig, Workload, torch.device], Variant]] = {
    "before": make_before,
    "packed": make_packed,
    "packed+compile": make_compiled,
    "packed+compile+fa3": make_flash_attention_3,
    "padded": make_padded,
    "transformers": make_transformers,
}


def _rectangular_model(config: GteConfig, device: torch.device) -> Any:
    model: Any = build_model(config, rope_theta=10_000, seed=SEED)
    model.set_attn_implementation("sdpa")
    return model.to(device)


def _add_up(nats: Callable[[PaddedMicroBatch], Tensor], data: StepData, device: torch.device) -> Tensor:
    total = torch.zeros((), device=device)
    for batch in data.padded:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = nats(batch) / data.masked
        loss.backward()
        total += loss.detach()
    return total


def _trimmed(batch: PaddedMicroBatch) -> PaddedMicroBatch:
    """Cut a batch to its longest row, as transformers' collators pad."""
    width, longest = batch.input_ids.shape[1], int(batch.attention_mask.sum(axis=1).max())
    rows, places = np.divmod(batch.masked_positions, width)
    return dataclasses.replace(
        batch,
        input_ids=np.ascontiguousarray(batch.input_ids[:, :longest]),
        attention_mask=np.ascontiguousarray(batch.attention_mask[:, :longest]),
        masked_positions=rows * longest + places,
    )


def _to(device: torch.device, *arrays: np.ndarray) -> list[Tensor]:
    return [torch.from_numpy(array).to(device) for array in arrays]


def _recipe(workload: Workload, *, compile: bool) -> Recipe:
    stage = Stage(
        name="benchmark",
        max_length=workload.max_length,
        rope_theta=10_000,
        steps=1,
        batch_size=1,
        learning_rate=2e-4,
    )
    return Recipe(
        name="benchmark",
        model=workload.model,
        stages=(stage,),
        tokens_per_micro_batch=workload.token_budget,
        compile=compile,
    )


def _timed_step(variant: Variant, data: StepData, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    loss = variant.step(data)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    taken = time.perf_counter() - started
    if not torch.isfinite(loss):
        raise SystemExit(f"{variant.name}: the loss is {loss.item()}")
    return taken


# --- report ---------------------------------------------------------------------------------------------------------


def environment(device: torch.device) -> dict[str, Any]:
    """Return date, command, hardware and versions."""
    hardware = {"cpu": _cpu_name(), "cpus": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        hardware |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory}
    return {
        "benchmark": "training",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "device": device.type,
        "dtype": "bfloat16 autocast" if device.type == "cuda" else "float32",
        "hardware": hardware,
        "versions": {
            "gte-deploy": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "transformers": transformers.__version__,
        },
    }


def table(report: dict[str, Any]) -> str:
    """Return the report as a table for people; "ratio" is the speed relative to the plain transformers loop."""
    where = report["hardware"].get("gpu", report["hardware"]["cpu"])
    lines = [f"{report['date']}  {where}  {report['dtype']}  torch {report['versions']['torch']}"]
    lines.append(
        f"{'model':<18} {'length':>6} {'text':<5} {'variant':<15} {'tokens/s':>10} {'of peak':>8} {'ratio':>6}"
    )
    for workload in report["workloads"]:
        head = f"{workload['model']:<18} {workload['max_length']:>6} {workload['kind']:<5}"
        if "skipped" in workload:
            lines.append(f"{head} left out {workload['skipped']}")
            continue
        plain = workload["variants"].get("transformers", {}).get("tokens_per_second")
        for name, row in workload["variants"].items():
            share = "unknown" if row["peak_share"] is None else f"{row['peak_share']:.1%}"
            ratio = "" if plain is None else f"{row['tokens_per_second'] / plain:.2f}"
            lines.append(f"{head} {name:<15} {row['tokens_per_second']:>10,.0f} {share:>8} {ratio:>6}")
        fill = workload["fill"]
        lines.append(f"{'':<31} real tokens: {fill['packed']:.1%} of packed, {fill['padded']:.1%} of padded rows")
    return "\n".join(lines)


# The row of the roofline that predicts a variant.
PREDICTED = {
    "before": "eager, all logits at once, whole last layer",
    "packed": "+ loss in chunks",
    "packed+compile": "+ torch.compile",
    "packed+compile+fa3": "+ FlashAttention-3",
}


def stored_predictions(gpu: str) -> list[dict[str, Any]]:
    """Return what the newest stored roofline predicts for full rows on this GPU; nothing for one that it has not."""
    files = sorted(RESULTS.glob("*-training-roofline.json"))
    if not files:
        return []
    stored = json.loads(files[-1].read_text("utf-8"))
    if stored["machine"]["name"].split()[0] not in gpu:
        return []
    return [
        {"model": stage["recipe"], "max_length": stage["max_length"], "variant": variant}
        | {key: stage["rows"][row][key] for key in ("tokens_per_second", "share_of_peak")}
        for stage in stored["stages"]
        for variant, row in PREDICTED.items()
    ]


def markdown(report: dict[str, Any]) -> str:
    """Return the report of `--all` as a Markdown table."""
    where = report["hardware"].get("gpu", report["hardware"]["cpu"])
    lines = [
        f"{report['date']}, {where}, {report['dtype']}, torch {report['versions']['torch']}: `{report['command']}`",
        "",
        "| model, tokens, text | variant | tokens/s | of peak | predicted "
        "| products | attention | rest | GB | first, s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    predicted = {(p["model"], p["max_length"], p["variant"]): p for p in report["predictions"]}
    for workload in report["workloads"]:
        head = f"{workload['model']}, {workload['max_length']}, {workload['kind']}"
        if "skipped" in workload:
            lines.append(f"| {head} | left out {workload['skipped']} |" + " |" * 8)
            continue
        for name in workload["out_of_memory"]:
            lines.append(f"| {head} | {name}: out of memory |" + " |" * 8)
        for name, row in workload["variants"].items():
            found = predicted.get((workload["model"], workload["max_length"], name))
            known = found if workload["kind"] == "full" else None
            lines.append("| " + " | ".join([head, *_cells(name, row, known)]) + " |")
    return "\n".join(lines) + "\n"


def _cells(name: str, row: dict[str, Any], predicted: dict[str, Any] | None) -> Iterator[str]:
    yield name
    yield f"{row['tokens_per_second']:,.0f}"
    yield "" if row["peak_share"] is None else f"{row['peak_share']:.1%}"
    yield "" if predicted is None else f"{predicted['tokens_per_second']:,.0f}, {predicted['share_of_peak']:.1%}"
    total = sum(row["seconds_by_kind"].values()) or 1.0
    for kind in ("gemm", "attention", "rest"):
        yield f"{row['seconds_by_kind'][kind] / total:.0%}"
    yield "" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 1e9:.1f}"
    yield f"{row['first_seconds']:.1f}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _workloads(args: argparse.Namespace, device: torch.device) -> list[Workload]:
    """Return the workloads, the most important first: the last ones are left out when the time is over."""
    gpu = device.type == "cuda"
    if args.all and gpu and not args.models and not args.lengths:
        stages = [*STAGES, *((model, length, "c4") for model, length, _ in STAGES[:2])]
        return [
            Workload(model, kind, length, args.token_budget or TOKEN_BUDGETS[model], args.micro_batches)
            for model, length, kind in stages
        ]
    models = args.models or (["gte-en-mlm-base", "gte-en-mlm-large"] if gpu else ["gte-en-mlm-tiny"])
    lengths = args.lengths or ([512, 8192] if gpu else [128, 512])
    return [
        Workload(
            model,
            kind,
            length,
            args.token_budget or (TOKEN_BUDGETS.get(model, 32768) if gpu else 2048),
            args.micro_batches,
        )
        for kind in args.kinds
        for length in lengths
        for model in models
    ]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every variant on the stages of the published recipes")
    parser.add_argument(
        "--roofline", action="store_true", help="predict in place of measuring; `--roofline --help` has its options"
    )
    parser.add_argument("--models", nargs="+", metavar="PRESET", help="default: base and large on a GPU, tiny on a CPU")
    parser.add_argument("--lengths", nargs="+", type=int, help="default: 512 8192 on a GPU, 128 512 on a CPU")
    parser.add_argument("--kinds", nargs="+", choices=["full", "c4"], default=["full", "c4"], help="default: both")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, help="default: all, compiled on a GPU only")
    parser.add_argument("--rounds", type=int, help="timed steps of each variant; default: 5 on a GPU, 3 on a CPU")
    parser.add_argument(
        "--token-budget", type=int, help="tokens of a micro-batch; default: the recipes', 2,048 on a CPU"
    )
    parser.add_argument("--micro-batches", type=int, help="number in one step; default: 2 on a GPU, 1 on a CPU")
    parser.add_argument(
        "--minutes",
        type=float,
        help="none starts later, with --all none that would end later; default: 8 on a GPU (--all: 9), 2 on a CPU",
    )
    parser.add_argument("--peak-tflops", type=float, help="the device's peak, unless it is a known GPU")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    parser.add_argument("--output", type=Path, help="JSON file; default: benchmarks/results/training-DEVICE-DATE.json")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    args = parser.parse_args(argv)
    device = choose_device(args.device)
    gpu = device.type == "cuda"
    args.variants = args.variants or _variants(device, every=args.all)
    args.rounds = args.rounds or (5 if gpu else 3)
    args.micro_batches = args.micro_batches or (2 if gpu else 1)
    args.minutes = args.minutes if args.minutes is not None else (8 + args.all if gpu else 2)
    kind = torch.cuda.get_device_name().replace(" ", "-").lower() if gpu else "cpu"
    args.output = args.output or RESULTS / f"training-{kind}-{datetime.date.today().isoformat()}.json"
    return args


def _variants(device: torch.device, *, every: bool) -> list[str]:
    """Return the variants that can run on a device, without those that only `--all` measures."""
    left_out = set() if every else {"before", "packed+compile+fa3"}
    if device.type != "cuda":
        left_out.add("packed+compile")
    if missing := why_not_flash_attention_3(device):
        left_out.add("packed+compile+fa3")
        if every:
            _say(f"without FlashAttention-3: {missing}")
    return [name for name in VARIANTS if name not in left_out]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
