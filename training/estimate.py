"""Estimates of a recipe before it runs: FLOPs, tokens, memory and hours on a number of GPUs, per stage and in total."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GteConfig, GteForMaskedLM

from gte_deploy.core.errors import InputError
from gte_deploy.training.cross_entropy import CHUNK_ROWS
from gte_deploy.training.data.corpus import TokenCorpus
from gte_deploy.training.data.sampling import ChunkSurvey, SampleLengths, survey
from gte_deploy.training.flops import training_flops
from gte_deploy.training.log import format_seconds
from gte_deploy.training.model import model_config, model_source
from gte_deploy.training.options import CorpusSource, Hardware
from gte_deploy.training.recipe import Recipe, Stage
from gte_deploy.training.run_data import open_corpus
from gte_deploy.training.state import stage_seed

GIB = 1 << 30


@dataclass(frozen=True)
class Lengths:
    """Sequence lengths of a stage in tokens: their mean, and the mean of their squares, for the cost of attention.

    `survey` has what they were counted from.
    """

    mean: float
    mean_square: float
    survey: ChunkSurvey | None = None


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one GPU at the peak of a step, without the CUDA context (about 1 GB) and the allocator's waste."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


@dataclass(frozen=True)
class StageData:
    """What a stage sees of a corpus: all chunks, its samples, and how often it visits a chunk at most."""

    all_chunks: SampleLengths
    samples: SampleLengths
    passes: float


@dataclass(frozen=True, kw_only=True)
class StageEstimate:
    """The estimate of one stage. Tokens do not count padding; FLOPs are model FLOPs of forward and backward pass.

    `data` is None without a corpus.
    """

    name: str
    steps: int
    tokens: float
    flops_per_token: float
    body_flops_per_token: float
    attention_flops_per_token: float
    head_flops_per_token: float
    flops: float
    micro_batches_per_gpu: int
    memory: Memory
    gpu_hours: float
    hours: float
    data: StageData | None


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The estimate of a whole recipe. `parameters` counts tied matrices once."""

    recipe: str
    parameters: int
    gpus: int
    peak_flops: float
    utilization: float
    sharding: str
    stages: tuple[StageEstimate, ...]

    @property
    def tokens(self) -> float:
        return sum(stage.tokens for stage in self.stages)

    @property
    def flops(self) -> float:
        return sum(stage.flops for stage in self.stages)

    @property
    def hours(self) -> float:
        return sum(stage.hours for stage in self.stages)

    @property
    def gpu_hours(self) -> float:
        return sum(stage.gpu_hours for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """Return the estimate for JSON, with the totals."""
        stages = [{**asdict(s), "memory": {**asdict(s.memory), "total": s.memory.total}} for s in self.stages]
        total = {"tokens": self.tokens, "flops": self.flops, "hours": self.hours, "gpu_hours": self.gpu_hours}
        return {**asdict(self), "stages": stages, "total": total}


def estimate(
    recipe: Recipe,
    hardware: Hardware = Hardware(),  # noqa: B008 - frozen
    *,
    lengths: Sequence[Lengths] | None = None,
) -> Estimate:
    """Estimate a recipe.

    Args:
        recipe: the recipe; its stages, token budget, dtype, gradient checkpointing and sharding count.
        hardware: the GPUs, and the share of their peak that a run reaches.
        lengths: sequence lengths per stage (see `stage_lengths`); None takes every sequence as full, which is an upper
            bound.

    Raises:
        ConfigError: the recipe's model is neither a preset nor a folder with a config.json.
    """
    config = model_config(recipe, model_source(recipe, weights=False))
    sizes = parameter_sizes(config)
    lengths = lengths or [full_lengths(stage) for stage in recipe.stages]
    speed = hardware.peak * hardware.utilization
    stages = tuple(
        _stage(stage, of, recipe=recipe, config=config, sizes=sizes, gpus=hardware.gpus, speed=speed)
        for stage, of in zip(recipe.stages, lengths, strict=True)
    )
    return Estimate(
        recipe=recipe.name,
        parameters=sizes.total,
        gpus=hardware.gpus,
        peak_flops=hardware.peak,
        utilization=hardware.utilization,
        sharding=recipe.sharding,
        stages=stages,
    )


@dataclass(frozen=True)
class ParameterSizes:
    """Number of parameters of the model, of one layer, and of their matrices. Tied parameters count once."""

    total: int
    layer: int
    matrices: int
    layer_matrices: int


def parameter_sizes(config: GteConfig) -> ParameterSizes:
    """Count the parameters of GteForMaskedLM without allocating them."""
    with torch.device("meta"):
        model = GteForMaskedLM(config)
    parameters = list(model.parameters())
    return ParameterSizes(
        total=sum(p.numel() for p in parameters),
        layer=sum(p.numel() for p in model.gte.layers[0].parameters()),
        matrices=sum(p.numel() for p in parameters if p.ndim > 1),
        layer_matrices=sum(p.numel() for p in model.gte.layers[0].parameters() if p.ndim > 1),
    )


def full_lengths(stage: Stage) -> Lengths:
    """Return the lengths of a stage in which every sequence has `max_length` tokens."""
    return Lengths(stage.max_length, stage.max_length**2)


def average_lengths(stage: Stage, average: float) -> Lengths:
    """Return lengths with the given mean. Attention counts at its upper bound, because their spread is not known.

    Raises:
        InputError: the average is above max_length.
    """
    if not 0 < average <= stage.max_length:
        raise InputError(f"stage {stage.name}: {average:g} tokens on average are not in (0, {stage.max_length}]")
    return Lengths(average, average * stage.max_length)


def corpus_lengths(corpus: TokenCorpus, stage: Stage, *, seed: int) -> Lengths:
    """Return the lengths that a stage samples from a corpus, after cutting, resampling and weighting.

    Raises:
        InputError: no chunk is left, or the stage's weights are not those of the corpus's languages.
    """
    found = survey(corpus, stage.chunking, seed=seed)
    return Lengths(found.sampled.mean, found.sampled.mean_square, found)


def stage_lengths(recipe: Recipe, *, averages: Sequence[float] | None, data: Path | str | None) -> list[Lengths] | None:
    """Return the lengths of each stage: from the corpus in the folder or at the URL `data`, or from averages, or None.

    Raises:
        InputError: there is no corpus, the averages are not one for each stage, or one is above max_length.
    """
    if data is not None:
        with contextlib.closing(open_corpus(CorpusSource(data=data))) as corpus:
            seeds = [stage_seed(recipe.seed, number) for number in range(len(recipe.stages))]
            return [corpus_lengths(corpus, stage, seed=seed) for stage, seed in zip(recipe.stages, seeds, strict=True)]
    if averages is None:
        return None
    if len(averages) != len(recipe.stages):
        raise InputError(f"{len(averages)} average lengths for {len(recipe.stages)} stages; give one for each stage")
    return [average_lengths(stage, average) for stage, average in zip(recipe.stages, averages, strict=True)]


def activation_bytes(
    config: GteConfig, *, tokens: int, masked: float, bfloat16: bool, gradient_checkpointing: bool
) -> float:
    """Count the bytes that the layers keep of one micro-batch for the backward pass, tensor by tensor, in eager mode.

    The last layer keeps keys and values of all tokens, and the rest of the `masked` ones. With autocast the inputs of
    q, k, v and of up and gate are cast once each, and LayerNorm keeps its float32 input. Dropout keeps a byte per
    element. `torch.compile` keeps less.
    """
    hidden, wide, size = config.hidden_size, config.intermediate_size, 2 if bfloat16 else 4
    # Inputs of q, k, v, up, gate, and of k and v alone; in float32 the three, and the two, share one.
    copies, inputs = (5, 2) if bfloat16 else (2, 1)
    dropout = 1 if config.hidden_dropout_prob else 0
    attention = 4 * hidden * size + 4 * config.num_attention_heads  # q, k, v, output; logsumexp
    norms = 2 * 4 * hidden
    gated = 4 * wide * size  # gate, activated gate, up, and their product, dropped out
    layer = copies * hidden * size + attention + norms + gated + dropout * (2 * hidden + wide)
    if gradient_checkpointing:
        return tokens * (config.num_hidden_layers * 4 * hidden + layer)
    last = tokens * (inputs + 2) * hidden * size + masked * layer
    return float(tokens * (config.num_hidden_layers - 1) * layer + last)


def logits_bytes(config: GteConfig, *, masked: float, bfloat16: bool) -> float:
    """Count the bytes at the loss: of one chunk of rows the logits, their softmax in float32, and its copy as gradient.

    The float32 gradient of the vocabulary's matrix adds up beside them, and is handed on at the end.
    """
    rows = min(masked, CHUNK_ROWS)
    gradient = 4 * config.vocab_size * config.hidden_size
    return rows * config.vocab_size * (2 + 4 + 2 if bfloat16 else 4 + 4) + gradient


def _stage(
    stage: Stage, lengths: Lengths, *, recipe: Recipe, config: GteConfig, sizes: ParameterSizes, gpus: int, speed: float
) -> StageEstimate:
    sequences, found = stage.steps * stage.batch_size, lengths.survey
    masked = stage.masking.probability
    # A token attends on average to `context` tokens: the sum of the squared lengths over the sum of the lengths.
    context = lengths.mean_square / lengths.mean
    body = training_flops(config, tokens=1, squared_lengths=0, masked=0)
    attention = training_flops(config, tokens=0, squared_lengths=context, masked=0)
    head = training_flops(config, tokens=0, squared_lengths=0, masked=masked)
    tokens = sequences * lengths.mean
    flops = tokens * (body + attention + head)
    step_tokens = stage.batch_size * lengths.mean
    micro_batches = math.ceil(step_tokens / gpus / recipe.tokens_per_micro_batch)
    return StageEstimate(
        name=stage.name,
        steps=stage.steps,
        tokens=tokens,
        flops_per_token=body + attention + head,
        body_flops_per_token=body,
        attention_flops_per_token=attention,
        head_flops_per_token=head,
        flops=flops,
        micro_batches_per_gpu=micro_batches,
        memory=_memory(
            recipe,
            config,
            sizes,
            gpus=gpus,
            tokens=min(recipe.tokens_per_micro_batch, math.ceil(step_tokens)),
            masked=masked,
            accumulates=micro_batches > 1,
        ),
        gpu_hours=flops / speed / 3600,
        hours=flops / speed / 3600 / gpus,
        data=StageData(found.cut, found.sampled, found.passes(sequences)) if found else None,
    )


def _memory(
    recipe: Recipe,
    config: GteConfig,
    sizes: ParameterSizes,
    *,
    gpus: int,
    tokens: int,
    masked: float,
    accumulates: bool,
) -> Memory:
    """Count float32 weights and gradients, AdamW's two moments, and the tensors of one micro-batch.

    FSDP2 shards weights, gradients and moments by layers. The root (embedding and head) is gathered and stays so; and
    one layer is gathered ahead of the layer that computes. In bfloat16 runs layers are gathered in bfloat16 and need no
    casts. Between the micro-batches of a step the gradients add up unsharded.
    """
    bfloat16 = recipe.dtype != "float32"  # "auto" is bfloat16 on a GPU
    shard = gpus if recipe.sharding == "fsdp" else 1
    root = sizes.total - config.num_hidden_layers * sizes.layer
    gathered = 4 * root + (2 if bfloat16 else 4) * 2 * sizes.layer if shard > 1 else 0
    # Autocast keeps the weights' casts until the backward pass.
    cast = sizes.matrices - (config.num_hidden_layers * sizes.layer_matrices if shard > 1 else 0)
    return Memory(
        weights=4 * sizes.total / shard + gathered + (2 * cast if bfloat16 else 0),
        gradients=4 * (sizes.total if shard == 1 or accumulates else sizes.total / shard + root + 2 * sizes.layer),
        optimizer=8 * sizes.total / shard,
        activations=activation_bytes(
            config,
            tokens=tokens,
            masked=masked * tokens,
            bfloat16=bfloat16,
            gradient_checkpointing=recipe.gradient_checkpointing,
        ),
        logits=logits_bytes(config, masked=masked * tokens, bfloat16=bfloat16),
    )


# Name of a unit -> its size, the largest first.
_FLOPS = {"EFLOP": 1e18, "PFLOP": 1e15, "TFLOP": 1e12}
_TIMES = {"GPU-hours": 1.0, "GPU-min": 1 / 60, "GPU-s": 1 / 3600}


def _unit(total: float, units: Mapping[str, float]) -> tuple[str, float]:
    """Return the largest unit of which `total` is at least one, or else the smallest, and its size."""
    return next(((name, size) for name, size in units.items() if total >= size), list(units.items())[-1])


def _figure(value: float) -> str:
    """Format with one digit after the point, and a value below 1 with two that count."""
    return f"{value:,.1f}" if value >= 1 else f"{value:.2g}"


def _wall_time(hours: float) -> str:
    return format_seconds(hours * 3600) if hours * 60 >= 1 else f"{_figure(hours * 3600)} s"


def table(result: Estimate) -> str:
    """Format the estimate for a person, in units that suit the whole run."""
    flops_name, flops_unit = _unit(result.flops, _FLOPS)
    time_name, time_unit = _unit(result.gpu_hours, _TIMES)
    header = (
        f"{'stage':<14} {'steps':>9} {'tokens':>10} {'MFLOP/token':>12} {'body':>6} {'attn':>6} {'head':>6} "
        f"{flops_name:>9} {time_name:>10} {'wall time':>14} {'GiB/GPU':>8}"
    )
    lines = [
        f"{result.recipe}: {result.parameters / 1e6:.1f} M parameters, {result.gpus} GPU(s) of "
        f"{result.peak_flops / 1e12:.0f} TFLOP/s at {result.utilization:.0%} of peak, {result.sharding}",
        header,
    ]
    for stage in result.stages:
        shares = (stage.body_flops_per_token, stage.attention_flops_per_token, stage.head_flops_per_token)
        parts = " ".join(f"{part / stage.flops_per_token:>6.0%}" for part in shares)
        lines.append(
            f"{stage.name:<14} {stage.steps:>9,} {stage.tokens:>10.3g} {stage.flops_per_token / 1e6:>12,.0f} {parts} "
            f"{_figure(stage.flops / flops_unit):>9} {_figure(stage.gpu_hours / time_unit):>10} "
            f"{_wall_time(stage.hours):>14} {stage.memory.total / GIB:>8.1f}"
        )
    lines.append(
        f"{'total':<14} {sum(s.steps for s in result.stages):>9,} {result.tokens:>10.3g} {'':>33} "
        f"{_figure(result.flops / flops_unit):>9} {_figure(result.gpu_hours / time_unit):>10} "
        f"{_wall_time(result.hours):>14}"
    )
    worst = max((stage.memory for stage in result.stages), key=lambda memory: memory.total)
    parts = ", ".join(f"{name} {value / GIB:.1f}" for name, value in asdict(worst).items())
    lines.append(f"memory of the largest stage, GiB per GPU: {parts}")
    for stage in result.stages:
        if stage.data is not None:
            lines += [
                f"{stage.name}, all chunks: {stage.data.all_chunks}",
                f"{stage.name}, sampled: {stage.data.samples}; {stage.data.passes:.2g} passes",
            ]
    return "\n".join(lines)
