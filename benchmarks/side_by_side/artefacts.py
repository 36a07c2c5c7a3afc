"""Makes the checkpoints, graphs and bundles that contestants run, once, and keeps them in a work folder.

Every recipe runs in a process of its own, whose end frees its memory. It writes into a folder beside the wanted one,
which is renamed when it is complete. An artefact is made again if the sources of the exporter have changed.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gte_deploy.backends.picks import cpu_model
from gte_deploy.models import BUILTIN_NAME
from gte_deploy.tuning.measure import Worker, WorkerError

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "inference-benchmark"
_STAMP = "made-by.json"
_EXPORTS = {
    "bundle-int8-dynamic": ("--precision", "int8", "--activations", "dynamic"),
    "bundle-cuda-fp16-padded": ("--target", "cuda", "--precision", "fp16", "--padding", "keep"),
    **{f"bundle-cuda-{name}": ("--target", "cuda", "--precision", name) for name in ("fp32", "fp16", "bf16")},
    "bundle-cuda-fp16-cls": ("--target", "cuda", "--precision", "fp16", "--pooling", "cls"),
    **{
        f"bundle-tensorrt-fp16-cls{suffix}": (
            *("--format", "trt", "--runtime", "tensorrt", "--precision", "fp16", "--pooling", "cls"),
            *("--outputs", outputs),
        )
        for suffix, outputs in (("", "all"), ("-answer", "answer"))
    },
    "bundle-onnx-only-fp16": ("--format", "trt", "--precision", "fp16", "--onnx-only"),
    **{
        f"bundle-{runtime}-{name}": ("--format", "trt", "--runtime", runtime, "--precision", name)
        for runtime in ("tensorrt", "rtx")
        for name in ("fp16", "bf16", "int8", "fp8")
    },
}
_CALIBRATION_TEXTS = 64
_CALIBRATION_TOKENS = 256


@dataclass(frozen=True)
class Subject:
    """A model to measure.

    Args:
        name: the name for people and of the folder.
        preset: a preset of `gte_deploy.models.presets`, with seeded random weights, or the trained built-in model.
        task: "embed", or "fill-mask" for the agreement of predictions.
    """

    name: str
    preset: str
    task: str


SUBJECTS = {
    "base": Subject("base", "gte-en-mlm-base", "embed"),
    "large": Subject("large", "gte-en-mlm-large", "embed"),
    "tiny": Subject("tiny", BUILTIN_NAME, "embed"),
    "tiny-fill-mask": Subject("tiny-fill-mask", BUILTIN_NAME, "fill-mask"),
}


class Artefacts:
    """The work folder of one subject; `path` makes missing artefacts."""

    def __init__(self, folder: Path, subject: Subject, *, max_length: int, progress: Callable[[str], None]) -> None:
        self.subject = subject
        self._folder = folder / subject.name
        self._max_length = max_length
        self._progress = progress
        self._errors: dict[str, str] = {}

    def path(self, name: str) -> Path:
        """Return the folder of an artefact, and make it if it is missing.

        Artefacts are "checkpoint", "plain", "optimizer", "nncf", "exported" for `peers`, the bundles of `_EXPORTS`, and
        "bundle-PRECISION", which `gte-export --precision PRECISION` writes.

        Raises:
            WorkerError: the artefact cannot be made; later calls repeat the first error.
        """
        if name in self._errors:
            raise WorkerError(self._errors[name])
        target = self._folder / name
        sources = sources_digest(bundle=name.startswith("bundle-"))
        stamp = {"sources": sources, "max_length": self._max_length, "task": self.subject.task}
        if _read_stamp(target) == stamp:
            return target
        try:
            self._make(name, target, stamp)
        except WorkerError as error:
            self._errors[name] = str(error)
            raise
        return target

    def _make(self, name: str, target: Path, stamp: dict[str, Any]) -> None:
        subject = self.subject
        if name == "checkpoint":
            recipe: tuple[Any, ...] = (make_checkpoint, subject.preset, subject.task)
        elif name == "plain":
            recipe = (make_plain, self.path("checkpoint"), subject.task, self._max_length)
        elif name in ("optimizer", "nncf", "exported"):
            make = {"optimizer": make_optimized, "nncf": make_nncf, "exported": make_exported}[name]
            recipe = (make, self.path("plain"), self.path("checkpoint"))
        else:
            options = _EXPORTS.get(name) or ("--precision", name.removeprefix("bundle-"))
            recipe = (make_bundle, self.path("checkpoint"), subject.task, options, self._max_length)
        self._progress(f"{subject.name}: make {name}")
        aside = target.with_name(f".{target.name}.tmp")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        Worker(*recipe, aside).close()
        (aside / _STAMP).write_text(json.dumps(stamp), encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)


def result_file(benchmark: str, suffix: str, *, hardware: str | None = None) -> Path:
    """Return the path for today's result of a benchmark on `hardware`, by default this CPU."""
    words = re.sub(r"\((R|TM)\)|\b(CPU|Processor)\b|@.*", " ", hardware or cpu_model())
    name = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")
    return ROOT / "benchmarks" / "results" / f"{datetime.date.today()}-{benchmark}-{name}.{suffix}"


def make_checkpoint(preset_name: str, task: str, target: Path) -> None:
    """Write a preset with seeded random weights, or the built-in model, and mean pooling for sentence-transformers."""
    import torch
    from transformers import PreTrainedModel

    from gte_deploy.models import builtin_path
    from gte_deploy.models.checkpoint import copy_tokenizer, load_model, save_model
    from gte_deploy.models.config import build_config
    from gte_deploy.models.families.gte import GTE

    torch.manual_seed(0)
    if preset_name == BUILTIN_NAME:
        model: PreTrainedModel = load_model(builtin_path(), task=task)  # type: ignore[arg-type]
    else:
        model = GTE.model_class(task)(build_config(preset_name))
    save_model(model, target, layout="native")
    copy_tokenizer(builtin_path(), target)
    if task == "embed":
        _write_pooling(target, model.config.hidden_size)


def make_plain(checkpoint: Path, task: str, max_length: int, target: Path) -> None:
    """Write the traced graph in standard operators, without fusions, as torch.onnx alone gives it."""
    import onnx_ir as ir

    from gte_deploy.exporters.graph.trace import trace
    from gte_deploy.models.checkpoint import load_model

    model = load_model(checkpoint, task=task)  # type: ignore[arg-type]
    pooling = "mean" if task == "embed" else None
    traced = trace(model, task=task, max_length=max_length, pooling=pooling, logits="masked", opset=20)
    ir.save(traced, target / "model.onnx", external_data="model.onnx_data")


def make_optimized(plain: Path, checkpoint: Path, target: Path) -> None:
    """Run the plain graph through `onnxruntime.transformers.optimizer` for BERT."""
    from onnxruntime.transformers.optimizer import optimize_model

    config = _config(checkpoint)
    optimized = optimize_model(
        str(plain / "model.onnx"),
        model_type="bert",
        num_heads=config["num_attention_heads"],
        hidden_size=config["hidden_size"],
    )
    optimized.save_model_to_file(str(target / "model.onnx"), use_external_data_format=True)


def make_nncf(plain: Path, checkpoint: Path, target: Path) -> None:
    """Quantize to static int8 by NNCF's recipe for transformers, calibrated on the default texts of `gte-export`."""
    from gte_deploy.core.quiet import without_openvino_telemetry

    with without_openvino_telemetry():
        import nncf
        import openvino
    import numpy as np

    from gte_deploy.exporters.verification.texts import builtin_texts
    from gte_deploy.text.tokenization import load_tokenizer

    model = openvino.Core().read_model(str(plain / "model.onnx"))
    names = {value.any_name for value in model.inputs}
    texts = builtin_texts("calibration")[:_CALIBRATION_TEXTS]
    rows = load_tokenizer(checkpoint).encode_texts(texts, max_length=_CALIBRATION_TOKENS, truncation=True)

    def feed(row: list[int]) -> dict[str, Any]:
        ids = np.array([row])
        offered = {"input_ids": ids, "attention_mask": np.ones_like(ids), "mask_positions": np.array([[0, 1]])}
        return {name: offered[name] for name in names}

    dataset = nncf.Dataset([feed(row) for row in rows])
    quantized = nncf.quantize(model, dataset, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(rows))
    openvino.save_model(quantized, target / "model.xml", compress_to_fp16=False)


def make_exported(plain: Path, checkpoint: Path, target: Path) -> None:
    """Write the checkpoint with the plain graph in the folders where sentence-transformers and optimum look for one."""
    from gte_deploy.core.quiet import import_openvino

    openvino = import_openvino()
    shutil.copytree(checkpoint, target, dirs_exist_ok=True, copy_function=os.link)
    shutil.copytree(plain, target / "onnx", copy_function=os.link)
    for file in (target / _STAMP, target / "onnx" / _STAMP):
        file.unlink()
    model = openvino.Core().read_model(str(plain / "model.onnx"))
    openvino.save_model(model, target / "openvino" / "openvino_model.xml", compress_to_fp16=False)


def make_bundle(checkpoint: Path, task: str, options: Sequence[str], max_length: int, target: Path) -> None:
    """Run `gte-export`; if it refuses, raise its own error message."""
    command = "from gte_deploy.exporters.cli import main; raise SystemExit(main())"
    options = [*options, "--task", task, "--max-len", str(max_length), "--quiet", "--force"]
    done = subprocess.run(
        [sys.executable, "-c", command, str(checkpoint), str(target / "bundle"), *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise WorkerError((done.stderr.strip() or f"gte-export ended with {done.returncode}").splitlines()[-1])


def _write_pooling(folder: Path, hidden_size: int) -> None:
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate((("", "Transformer"), ("1_Pooling", "Pooling")))
    ]
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": hidden_size, "pooling_mode_mean_tokens": True}
    pooling |= dict.fromkeys(("pooling_mode_cls_token", "pooling_mode_max_tokens"), False)
    for name, content in (("modules.json", modules), ("1_Pooling/config.json", pooling)):
        (folder / name).write_text(json.dumps(content), encoding="utf-8")


def _config(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))


def _read_stamp(folder: Path) -> Any:
    try:
        return json.loads((folder / _STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@functools.cache
def sources_digest(*, bundle: bool) -> str:
    """Hash the sources of an artefact: the whole exporter for a bundle, only the trace for the others."""
    files = [Path(__file__), *(ROOT / "models").rglob("*.py"), ROOT / "exporters" / "graph" / "trace.py"]
    if bundle:
        files += (ROOT / "exporters").rglob("*.py")
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(os.fspath(file.relative_to(ROOT)).encode() + file.read_bytes())
    return digest.hexdigest()
