"""Predicts the speed of training on an H100 by arithmetic: a model, not a measurement.

    python benchmarks/training.py --roofline                 # the shipped recipes, and files in benchmarks/results/
    python benchmarks/training_roofline.py --gemm-tflops 600  # the same with another constant

The training step runs on fake tensors, which have shapes and no data. Every operator is recorded with its FLOPs and
with the bytes that it has to read and write, and takes the longer of two times: FLOPs over the rate of its kind, and
bytes over the bandwidth of the memory. The times of all operators add up; nothing overlaps.

Eager mode. Each operator is a kernel: it reads its arguments and writes its results. The operators are those of CUDA:
dropout is one kernel with a mask, autocast computes layer norms in float32, and attention is the flash kernel.

Compiled mode. The layers, the head and the softmax of the loss are traced as torch.compile traces them: with inductor's
decompositions, and with torch's own partitioner, which decides what the backward pass reads and what it computes again.
What then becomes one kernel is a rule of `training_kernels.py`: all element-wise operators, copies and sums along the
features that are connected, and that no matrix product or attention separates, are one kernel. It reads each tensor
from outside once, and writes each tensor that is needed outside. A sum over the tokens (gradients of biases and norms)
is a kernel of its own. Of an MLP with its norm and dropout, inductor's scheduler counts within 1 % the same bytes after
its own fusions (tests/benchmarks/test_training_roofline.py). No profile of a GPU was compared.

Left out: starting a kernel beyond `Machine.kernel_seconds`, waiting for the CPU, the data loader, padding, and talking
to other GPUs, which has a table of its own. All sequences are full, as the published totals count.

Legend: T tokens of a micro-batch, M masked tokens, L tokens of a sequence.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import datetime
import json
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx
from training_kernels import (
    AsOnCuda,
    Function,
    Kernel,
    KernelCounter,
    Machine,
    compiled_kernels,
    eager_kernels,
    graph_kernels,
    kernels_of,
    on_fake_gpu,
)
from transformers import GteConfig, GteForMaskedLM
from transformers.models.gte.modeling_gte import GteAttention, GteMLP, apply_rotary_pos_emb

from gte_deploy._version import __version__
from gte_deploy.core.files import write_text
from gte_deploy.models.attention import packed_attention
from gte_deploy.models.config import build_config
from gte_deploy.training.cross_entropy import CHUNK_ROWS, linear_cross_entropy, softmax_of_labels
from gte_deploy.training.flops import training_flops
from gte_deploy.training.last_layer import choose_rows_in_last_layer, rows_before
from gte_deploy.training.model import _transform, build_model
from gte_deploy.training.recipe import Recipe, Stage, load_recipe

RESULTS = Path(__file__).resolve().parent / "results"
LENGTHS = (512, 2048, 8192)
RECIPES = ("gte-en-mlm-base", "gte-en-mlm-large", "gte-multilingual-mlm-base")


@dataclass(frozen=True)
class Measures:
    """What a step does to be fast. The defaults are those of `gte-train run` on a GPU without FlashAttention-3."""

    compile: bool = True
    chunked_loss: bool = True
    masked_last_layer: bool = True
    packed_projections: bool = False
    flash: str = "FA2"
    half_residuals: bool = False
    apart: bool = False  # attention and MLP are compiled apart from the norms, as sharding: fsdp in bfloat16 makes it


# In the order of the table; each has those before it.
STEPS: dict[str, Measures] = {
    "eager, all logits at once, whole last layer": Measures(
        compile=False, chunked_loss=False, masked_last_layer=False, packed_projections=False
    ),
    "+ last layer for masked tokens": Measures(compile=False, chunked_loss=False, packed_projections=False),
    "+ loss in chunks": Measures(compile=False, packed_projections=False),
    "+ torch.compile": Measures(packed_projections=False),
    "the same with sharding: fsdp": Measures(packed_projections=False, apart=True),
    "+ packed projections (left out)": Measures(packed_projections=True),
    "+ FlashAttention-3": Measures(packed_projections=True, flash="FA3"),
    "+ residuals in bfloat16 (left out)": Measures(packed_projections=True, flash="FA3", half_residuals=True),
}


@dataclass(frozen=True)
class Shape:
    """One micro-batch of full sequences."""

    tokens: int
    length: int
    masked: int


# --- the parts of a step --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A piece of a micro-batch, which is compiled by itself, or not at all. `times`: how often a micro-batch has it."""

    name: str
    times: int
    kernels: tuple[Kernel, ...]


class StepModel:
    """A model on fake tensors, and the parts of its micro-batch."""

    def __init__(self, config: GteConfig, shape: Shape, measures: Measures) -> None:
        self.config, self.shape, self.measures = config, shape, measures
        small = copy.deepcopy(config)
        small.num_hidden_layers = 2  # an ordinary layer and the last one; the others are equal to the first
        self.model = build_model(small, rope_theta=10_000.0)
        if measures.masked_last_layer:
            choose_rows_in_last_layer(self.model)
        if measures.packed_projections:
            join_projections(self.model)
        if measures.half_residuals:
            halve_residuals(self.model)
        self.parameters = sum(p.numel() for p in build_model(config, rope_theta=10_000.0).parameters())

    def parts(self) -> list[Part]:
        trace = compiled_kernels if self.measures.compile else eager_kernels
        gte, head, shape, hidden = self.model.gte, self.model.lm_head, self.shape, self.config.hidden_size
        ids, rows = torch.zeros(1, shape.tokens, dtype=torch.int64), torch.zeros(shape.masked, dtype=torch.int64)
        dtype = torch.bfloat16 if self.measures.half_residuals else torch.float32
        x = torch.zeros(1, shape.tokens, hidden, dtype=dtype, requires_grad=True)
        cos, sin = (torch.zeros(1, shape.tokens, hidden // self.config.num_attention_heads) for _ in range(2))
        bounds = torch.zeros(shape.tokens // shape.length + 1, dtype=torch.int32)
        first, last = gte.layers
        chosen = torch.zeros(1, shape.masked, hidden, dtype=dtype, requires_grad=True)

        def ordinary(layer: nn.Module) -> Function:
            return lambda x, cos, sin, bounds: layer(
                x, position_embeddings=(cos, sin), cu_seqlens=bounds, max_seqlen=shape.length
            )

        def of_rows(x: Tensor, rows: Tensor, asking: Tensor, cos: Tensor, sin: Tensor, bounds: Tensor) -> Tensor:
            shared = {"position_embeddings": (cos, sin), "cu_seqlens": bounds, "max_seqlen": shape.length}
            return last(x, rows=rows, cu_seqlens_q=asking, **shared)

        def embed(ids: Tensor) -> Tensor:
            embedded = gte.embeddings(input_ids=ids)
            gte.rotary_emb(embedded, ids)
            rows_before(rows, bounds)
            return embedded

        if self.measures.masked_last_layer:
            end = kernels_of(trace, last, of_rows, (x, rows, bounds, cos, sin, bounds))
        else:
            end = kernels_of(trace, last, ordinary(last), (x, cos, sin, bounds))
            end += kernels_of(eager_kernels, nn.Identity(), lambda x, rows: x[0].index_select(0, rows), (x, rows))
        if self.measures.apart:
            ordinary_layer = layer_apart(first, (x, cos, sin, bounds), length=shape.length)
        else:
            ordinary_layer = kernels_of(trace, first, ordinary(first), (x, cos, sin, bounds))
        transform = kernels_of(trace, head, lambda chosen: _transform(head, chosen), (chosen[0],))
        return [
            Part("embeddings", 1, kernels_of(eager_kernels, gte.embeddings, embed, (ids,))),
            Part("layer", self.config.num_hidden_layers - 1, ordinary_layer),
            Part("last layer", 1, end),
            Part("head", 1, transform),
            Part("loss", 1, tuple(self._loss())),
        ]

    def _loss(self) -> list[Kernel]:
        decoder = self.model.lm_head.decoder
        rows = torch.zeros(self.shape.masked, self.config.hidden_size, requires_grad=True)
        labels = torch.zeros(self.shape.masked, dtype=torch.int64)
        if not self.measures.chunked_loss:
            return eager_kernels(
                lambda rows, w, b, labels: F.cross_entropy(F.linear(rows, w, b).float(), labels, reduction="sum"),
                (rows, decoder.weight, decoder.bias, labels),
            )
        with KernelCounter() as counter, AsOnCuda():
            softmax = self._compiled_softmax(counter) if self.measures.compile else softmax_of_labels
            with torch.autocast("cpu", torch.bfloat16):
                loss = linear_cross_entropy(rows, decoder.weight, decoder.bias, labels, softmax=softmax)
            with counter.paused():
                gradient = torch.ones_like(loss)
            torch.autograd.grad(loss, (rows, decoder.weight, decoder.bias), gradient)
        return counter.kernels

    def _compiled_softmax(self, counter: KernelCounter) -> Callable[..., Any]:
        def softmax(logits: Tensor, labels: Tensor) -> Any:
            with counter.paused():
                graph = make_fx(softmax_of_labels, select_decomp_table())(logits, labels)
                out = softmax_of_labels(logits, labels)
            counter.kernels += graph_kernels(graph.graph)
            return out

        return softmax

    def end_of_step(self) -> dict[str, Kernel]:
        """Further kernels, of 4 bytes a parameter and tensor.

        tied: the embedding's gradient and the decoder's are added, in each micro-batch. accumulate: a micro-batch adds
        to the gradients of the one before. optimizer: AdamW reads gradients and changes weights and two moments, and
        the norm reads the gradients.
        """
        size = 4.0 * self.parameters
        tied = 4.0 * self.config.vocab_size * self.config.hidden_size
        return {
            "tied": Kernel("tied gradient", "elementwise", 0.0, 3 * tied),
            "accumulate": Kernel("accumulate", "elementwise", 0.0, 3 * size),
            "optimizer": Kernel("norm and AdamW", "elementwise", 0.0, size + 7 * size),
        }


class FlatLinear(nn.Linear):
    """A linear layer on rows: its output is no view of another tensor, which the trace does not take."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.flatten(0, -2))


def layer_apart(layer: Any, inputs: Sequence[Tensor], *, length: int) -> tuple[Kernel, ...]:
    """Kernels of a layer, which it changes, of which attention, MLP and the rest are compiled by themselves."""
    layer.self_attn.o_proj.__class__ = layer.mlp.down_proj.__class__ = FlatLinear
    x = inputs[0].flatten(0, 1).detach().requires_grad_()
    added = torch.zeros_like(x, dtype=torch.bfloat16, requires_grad=True)

    def attend(x: Tensor, cos: Tensor, sin: Tensor, bounds: Tensor) -> Tensor:
        return layer.self_attn(x, position_embeddings=(cos, sin), cu_seqlens=bounds, max_seqlen=length)[0]

    def add(x: Tensor, added: Tensor) -> Tensor:
        return layer.post_mlp_layernorm(x + layer.post_mlp_dropout(added))

    between = kernels_of(compiled_kernels, layer.post_mlp_layernorm, add, (x, added))
    # The gradients of x as a residual and as an input are added outside of both.
    residual = Kernel("add", "elementwise", 0.0, 3.0 * x.numel() * x.element_size())
    return (
        *kernels_of(compiled_kernels, layer.self_attn, attend, inputs),
        *kernels_of(compiled_kernels, layer.mlp, layer.mlp, (inputs[0],)),
        *(*between, residual) * 2,
    )


# --- measures that `gte-train` does not have ------------------------------------------------------------------------


class JoinedAttention(GteAttention):
    """One product for query, key and value, of weights that each pass puts together."""

    def forward(self, hidden_states: Tensor, *, position_embeddings: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        packed = joined_linear(hidden_states, (self.q_proj, self.k_proj, self.v_proj))
        query, key, value = packed.unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)  # [1, heads, T, D]
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        attended, _ = packed_attention(self, query, key, value, scaling=self.scaling, **kwargs)
        return self.o_proj(attended.flatten(2)), None


class JoinedMLP(GteMLP):
    """One product for gate and up."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = joined_linear(x, (self.gate_proj, self.up_proj)).chunk(2, dim=-1)
        return self.down_proj(self.dropout(self.act_fn(gate) * up))


def joined_linear(x: Tensor, layers: Sequence[nn.Linear]) -> Tensor:
    weight = torch.cat([_cast(layer.weight) for layer in layers])
    bias = torch.cat([_cast(layer.bias) for layer in layers]) if layers[0].bias is not None else None
    return F.linear(x, weight, bias)


def _cast(parameter: Tensor) -> Tensor:
    kind = parameter.device.type
    return parameter.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else parameter


def join_projections(model: GteForMaskedLM) -> None:
    """Turn the attention of all layers but the last one, and all MLPs, into joined ones, in place."""
    layers: Any = model.gte.layers
    for layer in layers:
        layer.mlp.__class__ = JoinedMLP
    for layer in layers[:-1]:
        layer.self_attn.__class__ = JoinedAttention


class HalfLayerNorm(nn.LayerNorm):
    """Computes in float32, and hands on bfloat16."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).to(torch.bfloat16)


def halve_residuals(model: GteForMaskedLM) -> None:
    """Let all norms of the encoder hand on bfloat16, in place, so that autocast's residuals are bfloat16."""
    for module in model.gte.modules():
        if isinstance(module, nn.LayerNorm):
            module.__class__ = HalfLayerNorm


# --- the prediction -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """A step of one stage on one GPU of `gpus`. FLOPs are model FLOPs; seconds, tokens and FLOPs are those of a GPU."""

    measures: Measures
    seconds: float
    tokens: int
    model_flops: float
    computed_flops: float
    by_kind: dict[str, float]
    bytes: dict[str, float]
    kernels: int
    logits_bytes: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    def share(self, machine: Machine) -> float:
        return self.model_flops / self.seconds / machine.peak_flops


def predict(
    config: GteConfig,
    shape: Shape,
    measures: Measures,
    *,
    micro_batches: int,
    machine: Machine = Machine(),  # noqa: B008 - frozen
) -> Prediction:
    """Predict a step of `micro_batches` micro-batches of this shape."""
    kernels, once = _kernels(_Key(config, shape, dataclasses.replace(measures, flash="FA2")))  # other rates alone
    counted = [(part.times * micro_batches, kernel) for part in kernels for kernel in part.kernels]
    counted += [(micro_batches, once["tied"]), (micro_batches - 1, once["accumulate"]), (1, once["optimizer"])]
    kinds = ("gemm", "attention", "elementwise")
    seconds = {
        kind: sum(n * machine.seconds(k, flash=measures.flash) for n, k in counted if k.kind == kind) for kind in kinds
    }
    tokens = micro_batches * shape.tokens
    return Prediction(
        measures=measures,
        seconds=sum(seconds.values()),
        tokens=tokens,
        model_flops=training_flops(
            config, tokens=tokens, squared_lengths=tokens * shape.length, masked=micro_batches * shape.masked
        ),
        computed_flops=sum(n * k.flops for n, k in counted),
        by_kind=seconds,
        bytes={kind: sum(n * k.bytes for n, k in counted if k.kind == kind) for kind in kinds},
        kernels=sum(part.times * len(part.kernels) for part in kernels),
        logits_bytes=_largest_logits(config, shape, chunked=measures.chunked_loss),
    )


@dataclass(frozen=True, eq=False)
class _Key:
    """What the kernels depend on, by value."""

    config: GteConfig
    shape: Shape
    measures: Measures

    def _value(self) -> tuple[str, Shape, Measures]:
        return self.config.to_json_string(), self.shape, self.measures

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._value() == other._value()

    def __hash__(self) -> int:
        return hash(self._value())


@lru_cache(maxsize=64)
def _kernels(key: _Key) -> tuple[list[Part], dict[str, Kernel]]:
    with on_fake_gpu():
        model = StepModel(key.config, key.shape, key.measures)
        return model.parts(), model.end_of_step()


def _largest_logits(config: GteConfig, shape: Shape, *, chunked: bool) -> float:
    """Bytes of the logits that are in memory at once, in bfloat16, float32 and their gradients."""
    rows = min(shape.masked, CHUNK_ROWS) if chunked else shape.masked
    return rows * config.vocab_size * (2.0 + 4.0 + 2.0 if chunked else 2.0 + 4.0 + 4.0 + 4.0 + 2.0)


def stage_shape(recipe: Recipe, stage: Stage, *, gpus: int) -> tuple[Shape, int]:
    """Return the micro-batch of a stage with full sequences, and their number in a step of one GPU."""
    sequences = recipe.tokens_per_micro_batch // stage.max_length
    tokens = sequences * stage.max_length
    shape = Shape(tokens, stage.max_length, int(tokens * stage.masking.probability))
    return shape, max(1, math.ceil(stage.batch_size / gpus / sequences))


def stages_of(recipe: Recipe) -> list[Stage]:
    """Return a recipe's stages, and for comparison its first one at lengths that it does not have."""
    missing = {*LENGTHS} - {stage.max_length for stage in recipe.stages}
    others = [
        dataclasses.replace(recipe.stages[0], name=f"no stage, {length} tokens", max_length=length)
        for length in sorted(missing)
    ]
    return sorted([*recipe.stages, *others], key=lambda stage: stage.max_length)


def communication(config: GteConfig, machine: Machine, *, gpus: int) -> dict[str, float]:
    """Seconds that the traffic of a rank takes on its link if nothing hides it. All collectives are rings."""
    with on_fake_gpu():
        model = build_model(config, rope_theta=10_000.0)
        layers = sum(p.numel() for p in model.gte.layers.parameters())
        rest = sum(p.numel() for p in model.parameters()) - layers
    each = (gpus - 1) / gpus / machine.link
    return {
        "ddp: all-reduce of float32 gradients, once a step": 2 * 4 * (layers + rest) * each,
        "fsdp: layers gathered twice a micro-batch, the rest once, float32": (2 * 4 * layers + 4 * rest) * each,
        "fsdp: the same with the layers in bfloat16": (2 * 2 * layers + 4 * rest) * each,
        "fsdp: float32 gradients scattered, once a step": 4 * (layers + rest) * each,
    }


def roofline(machine: Machine, *, recipes: Sequence[str] = RECIPES, gpus: int = 8) -> dict[str, Any]:
    """Predict all stages of recipes with each measure, and return the report."""
    stages = []
    for name in recipes:
        recipe = load_recipe(name)
        config = build_config(recipe.model)
        for stage in stages_of(recipe):
            shape, micro_batches = stage_shape(recipe, stage, gpus=gpus)
            rows = {
                step: predict(config, shape, measures, micro_batches=micro_batches, machine=machine)
                for step, measures in STEPS.items()
            }
            stages.append(
                {
                    "recipe": name,
                    "stage": stage.name,
                    "max_length": stage.max_length,
                    "micro_batches": micro_batches,
                    "tokens_per_micro_batch": shape.tokens,
                    "rows": {step: _row(row, machine) for step, row in rows.items()},
                }
            )
            print(f"{name} {stage.name}", file=sys.stderr, flush=True)
    return {
        "benchmark": "training roofline: modelled, not measured",
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "versions": {"gte-deploy": __version__, "torch": torch.__version__},
        "gpus": gpus,
        "machine": {**dataclasses.asdict(machine), "flash": {" ".join(k): v for k, v in machine.flash.items()}},
        "stages": stages,
        "communication": {
            name: communication(build_config(load_recipe(name).model), machine, gpus=gpus) for name in recipes
        },
    }


def _row(row: Prediction, machine: Machine) -> dict[str, Any]:
    plain = {key: value for key, value in dataclasses.asdict(row).items()}
    return {**plain, "tokens_per_second": row.tokens_per_second, "share_of_peak": row.share(machine)}


def table(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    lines = [
        f"One GPU of {report['gpus']} ({report['machine']['name']}), full sequences. **Modelled, not measured.**",
        "",
        "| recipe, stage | measures | step, s | tokens/s | of peak | products | attention | rest | logits, GB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for stage in report["stages"]:
        head = f"{stage['recipe']}, {stage['stage']}"
        for step, row in stage["rows"].items():
            parts = " | ".join(
                f"{row['by_kind'][k] / row['seconds']:.0%}" for k in ("gemm", "attention", "elementwise")
            )
            lines.append(
                f"| {head} | {step} | {row['seconds']:.2f} | {row['tokens_per_second']:,.0f} "
                f"| {row['share_of_peak']:.1%} | {parts} | {row['logits_bytes'] / 1e9:.1f} |"
            )
            head = ""
    lines += ["", "| recipe | traffic between GPUs | ms |", "|---|---|---|"]
    for name, rows in report["communication"].items():
        for what, seconds in rows.items():
            lines.append(f"| {name} | {what} | {seconds * 1e3:.1f} |")
            name = ""
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--recipes", nargs="+", default=list(RECIPES), metavar="RECIPE", help="default: the published ones"
    )
    parser.add_argument("--gpus", type=int, default=8, help="number of GPUs that share a step (8)")
    parser.add_argument("--gemm-tflops", type=float, help="what matrix products reach, in place of 650")
    parser.add_argument("--bandwidth", type=float, help="GB/s of the memory that copies reach, in place of 2,800")
    parser.add_argument(
        "--output", type=Path, help="JSON file; default: benchmarks/results/DATE-training-roofline.json"
    )
    args = parser.parse_args(argv)
    changes: dict[str, Any] = {}
    if args.gemm_tflops:
        changes["gemm_flops"] = args.gemm_tflops * 1e12
    if args.bandwidth:
        changes["bandwidth"] = args.bandwidth * 1e9
    report = roofline(Machine(**changes), recipes=args.recipes, gpus=args.gpus)
    output = args.output or RESULTS / f"{report['date']}-training-roofline.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, json.dumps(report, indent=2) + "\n")
    write_text(output.with_suffix(".md"), table(report))
    print(table(report), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
