"""Measures the differences of correct and of wrong FP32 graphs from PyTorch, for small and large outputs.

The "fp32" bound of `exporters/verification/bounds.py` is based on these numbers.

    python benchmarks/parity_scales.py                       # half an hour
    python benchmarks/parity_scales.py --sizes 64:2 --tasks classify

Models are random, of several widths and depths, with the weights of the last LayerNorm or of the head multiplied. Each
line gives the largest difference of any output in the graphs of ONNX Runtime and OpenVINO, absolute and relative as the
parity check measures it. It also gives the smallest relative difference that a fault causes: RoPE angles off by 2 %,
one weight off by three standard deviations of its matrix, a dropped bias, or a padding token that is attended to.
"""

import argparse
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    GteConfig,
    GteForMaskedLM,
    GteForSequenceClassification,
    GteForTokenClassification,
    GteModel,
)

from gte_deploy.backends.base import Batch
from gte_deploy.backends.onnxruntime import OnnxBackend
from gte_deploy.backends.openvino import OpenVinoBackend
from gte_deploy.core.spec import ModelSpec
from gte_deploy.exporters.graph.build import build_graphs, save_graphs
from gte_deploy.exporters.verification.accuracy import Runs
from gte_deploy.exporters.verification.cases import Case, TokenSource
from gte_deploy.exporters.verification.parity import Comparison, check_parity
from gte_deploy.exporters.verification.reference import TorchReference
from gte_deploy.exporters.verification.results import ParityReport

MODELS = {
    "embed": GteModel,
    "fill-mask": GteForMaskedLM,
    "classify": GteForSequenceClassification,
    "token-classify": GteForTokenClassification,
}
FACTORS = (1e-3, 1.0, 30.0, 1e4)
CASES = (Case(1), Case(17, 8, ragged=True), Case(128, 2, ragged=True), Case(512))
VOCABULARY = 2000
LENGTH = 512

Change = Callable[[Any], None]


def random_model(task: str, width: int, layers: int, *, labels: int = 3) -> Any:
    """Make a model with weights so large that each of them affects the output."""
    torch.manual_seed(0)
    config = GteConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64) if width >= 256 else 2,
        intermediate_size=2 * width,
        max_position_embeddings=LENGTH,
        type_vocab_size=0,
        pad_token_id=0,
        initializer_range=1.2 / math.sqrt(width),
        num_labels=labels,
    )
    model = MODELS[task](config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def scaled(module: Any, factor: float) -> None:
    """Multiply a layer's weights and bias."""
    with torch.no_grad():
        module.weight.mul_(factor)
        module.bias.mul_(factor)


def changes(task: str) -> Iterator[tuple[str, Change]]:
    """Yield the changes that are made to a model, with their names."""
    for factor in FACTORS:
        yield f"last LayerNorm × {factor:g}", lambda m, f=factor: scaled(m.base_model.layers[-1].post_mlp_layernorm, f)
    heads: dict[str, Callable[[Any], Any]] = {
        "fill-mask": lambda m: m.lm_head.layer_norm,
        "classify": lambda m: m.classifier,
        "token-classify": lambda m: m.classifier,
    }
    if task in heads:
        for factor in FACTORS:
            if factor != 1:
                yield f"head × {factor:g}", lambda m, f=factor: scaled(heads[task](m), f)


def _wrong_angles(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            module.inv_freq.mul_(1.02)


def _wrong_weight(model: Any) -> None:
    weight = model.base_model.layers[0].self_attn.v_proj.weight
    weight[3, 5] += 3 * weight.std()


def _no_bias(model: Any) -> None:
    model.base_model.layers[-1].mlp.down_proj.bias.zero_()


FAULTS: Mapping[str, Change] = {"angles": _wrong_angles, "weight": _wrong_weight, "bias": _no_bias}


class Leaking:
    """A PyTorch model that takes one padding token in the last row for a real one."""

    def __init__(self, inner: Runs) -> None:
        self.inner = inner

    def run(self, batch: Batch, outputs: Any) -> Any:
        mask = batch.attention_mask.copy()
        if (mask[-1] == 0).any():
            mask[-1, mask[-1].sum()] = 1
        return self.inner.run(replace(batch, attention_mask=mask), outputs)


def compare(task: str, model: Any, candidates: Mapping[Any, Runs], names: list[str]) -> ParityReport:
    """Run the project's own parity check."""
    spec = ModelSpec(
        task=task, max_length=LENGTH, vocab_size=VOCABULARY, hidden_size=model.config.hidden_size, pad_token_id=0
    )
    rng = np.random.default_rng(0)
    tokens = TokenSource(text=rng.integers(10, VOCABULARY, 300), prefix=(2,), suffix=(3,), mask=4)
    reference = _reference(task, model)
    return check_parity(reference, candidates, Comparison(names, spec, "fp32", tokens, cases=CASES))


def _reference(task: Any, model: Any) -> TorchReference:
    return TorchReference(model, task=task, pooling="mean", logits="masked")


def measure(task: str, width: int, layers: int, change: Change) -> tuple[float, float, str, float, str]:
    """Return the engines' largest absolute and relative difference and bounds, and the least fault and its name."""
    model = random_model(task, width, layers)
    change(model)
    pooling = "mean" if task == "embed" else None
    graphs = build_graphs(model, task=task, max_length=LENGTH, pooling=pooling)
    names = [output.name for output in graphs["onnxruntime"].outputs]
    spec = ModelSpec(task=task, max_length=LENGTH, vocab_size=VOCABULARY, hidden_size=width, pad_token_id=0)
    with tempfile.TemporaryDirectory() as folder:
        files = {engine: Path(folder) / f"{engine}.onnx" for engine in graphs}
        save_graphs({files[engine]: graph for engine, graph in graphs.items()}, Path(folder) / "weights")
        kinds = {"onnxruntime": OnnxBackend, "openvino": OpenVinoBackend}
        opened = {(engine, "fp32"): kind(files[engine], spec) for engine, kind in kinds.items()}
        sound = compare(task, model, opened, names)
        for backend in opened.values():
            backend.close()
    wrong: dict[str, Runs] = {"padding": Leaking(_reference(task, model))}
    for name, fault in FAULTS.items():
        other = random_model(task, width, layers)
        with torch.no_grad():
            fault(other)
        change(other)
        wrong[name] = _reference(task, other)
    found = {
        name: compare(task, model, {("onnxruntime", "fp32"): candidate}, names).engines[0].max_rel
        for name, candidate in wrong.items()
    }
    bounds = sound.engines[0].tolerance
    least = min(found, key=lambda name: found[name])
    return (
        max(engine.max_abs for engine in sound.engines),
        max(engine.max_rel for engine in sound.engines),
        f"{bounds.max_rel:g}, {bounds.labels or bounds.max_rel:g}{'' if sound.passed else ' MISSED'}",
        found[least],
        least,
    )


def main() -> None:
    """Print a line of a Markdown table for each model and change."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["32:2", "128:6", "384:12", "768:12"], metavar="WIDTH:LAYERS")
    parser.add_argument("--tasks", nargs="+", default=list(MODELS), choices=MODELS)
    arguments = parser.parse_args()
    print("| width × layers | task | change | sound: absolute | relative | bounds: vectors, labels | wrong: least |")
    print("|---|---|---|---|---|---|---|")
    for size in arguments.sizes:
        width, layers = map(int, size.split(":"))
        for task in arguments.tasks:
            for name, change in changes(task):
                absolute, relative, bound, fault, which = measure(task, width, layers, change)
                cells = (
                    f"{width} × {layers}",
                    task,
                    name,
                    f"{absolute:.1e}",
                    f"{relative:.1e}",
                    bound,
                    f"{fault:.1e} ({which})",
                )
                print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
