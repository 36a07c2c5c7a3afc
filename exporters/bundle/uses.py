"""The programs and commands that load a bundle in each runtime, for its model card and its report."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gte_deploy.backends.tensorrt.variants import VARIANTS
from gte_deploy.bundle.manifest import Manifest
from gte_deploy.core.spec import TaskName
from gte_deploy.tasks.base import HIDDEN

PLACEHOLDER = (
    "`MODEL` stands for the id of this repository, or for the folder of the bundle; `MODEL@REVISION` pins a "
    "branch, tag or commit."
)
MASK = "[MASK]"
"""The mask in the examples; put the tokenizer's own in its place."""

_CALLS: Mapping[TaskName, str] = {
    "fill-mask": 'model.fill_mask("Paris is the [MASK] of France.")',
    "classify": 'model.predict([("what is a panda?", "The panda is a bear."), ("what is a panda?", "It rains.")])',
    "token-classify": 'model.classify_tokens("Ada Lovelace lived in London.")',
    "hybrid": 'model.encode_hybrid(["The panda is a bear."])',
    "sparse": 'model.encode_sparse(["The panda is a bear."])',
    "multi-vector": 'model.rank("what is a panda?", ["The panda is a bear.", "It rains."])',
}
_CLASSIFY = 'model.predict("The panda is a bear.")'
_OTHER_CALL = 'model.encode(["The panda is a bear.", "It rains."])'
_COMMANDS: Mapping[TaskName, str] = {
    "fill-mask": 'fill-mask -m MODEL "Paris is the [MASK] of France."',
    "embed": 'encode -m MODEL "The panda is a bear." "It rains."',
    "token-classify": 'classify-tokens -m MODEL "Ada Lovelace lived in London."',
    "hybrid": 'encode-hybrid -m MODEL "The panda is a bear."',
    "sparse": 'encode-sparse -m MODEL "The panda is a bear."',
    "multi-vector": 'rank -m MODEL -q "what is a panda?" "The panda is a bear." "It rains."',
}


@dataclass(frozen=True)
class Use:
    """How one runtime loads a bundle: a title for people, the language of the text, and the text to run."""

    title: str
    language: str
    text: str


def uses(described: Manifest, model_type: str) -> list[Use]:
    """Return how to load the bundle in each runtime that reads it; see `PLACEHOLDER`."""
    call = _CLASSIFY if _has_labels(described) else _CALLS.get(described.spec.task, _OTHER_CALL)
    python = f'import gte_deploy\n\nmodel = gte_deploy.load("MODEL")\nprint({call})'
    found = [
        Use(f"Python (gte-deploy; in a checkout of it, `pip install {_packages(described)}`)", "python", python),
        Use("Command line, and HTTP server (extra `serve`)", "console", _commands(described)),
    ]
    # On a CPU: a graph for GPUs needs options that docs/runtimes.md describes.
    for engine in ("onnxruntime", "openvino"):
        if engine in described.graphs and described.target == "cpu" and _is_plain(described, engine):
            found.append(Use(f"{engine} alone, in a downloaded folder", "python", _alone(described, engine)))
    if described.spec.task == "embed" and "onnxruntime" in described.graphs and described.target == "cpu":
        lines = _SENTENCE_TRANSFORMERS
        if model_type == "gte":  # released versions of sentence-transformers[onnx] pin an older transformers
            lines = f"{_REGISTER}\n{lines}"
        found.append(Use("sentence-transformers (`pip install 'sentence-transformers[onnx]'`)", "python", lines))
        found.append(Use("transformers.js", "js", _JAVASCRIPT))
    return found


def _commands(described: Manifest) -> str:
    spec = described.spec
    command = _COMMANDS.get(spec.task)
    if spec.task == "classify":
        command = 'predict -m MODEL "The panda is a bear."' if _has_labels(described) else _COMMANDS["multi-vector"]
    return "\n".join([*([f"$ gte-deploy {command}"] if command else []), "$ gte-deploy serve MODEL"])


def first_steps(described: Manifest) -> str:
    """Return what must be done before the bundle can be used as `uses` says; empty if it is ready."""
    if described.plan is not None or "tensorrt" not in described.graphs:
        return ""
    return (
        "This bundle has no TensorRT engine yet: build it first, and make it part of the bundle with `gte-export "
        "adopt`. Until then, only ONNX Runtime opens the graph, and a CPU runs it slowly."
    )


def _has_labels(described: Manifest) -> bool:
    """Whether the model sorts texts into classes; with one label, it is a reranker."""
    return described.spec.task == "classify" and described.spec.num_labels > 1


def _packages(described: Manifest) -> str:
    """Return what pip installs to run the bundle."""
    if described.plan is not None:
        return f"'.[{VARIANTS[described.plan.variant].extra}]'"
    if "tensorrt" in described.graphs:
        return "'.[trt]'"
    if "executorch" in described.graphs:
        return ". executorch"
    if described.target == "cuda":
        return "'.[gpu]'"
    return f"'.[{'cpu' if 'onnxruntime' in described.graphs else 'openvino'}]'"


_REGISTER = """\
import gte_deploy.integrations.transformers

gte_deploy.integrations.transformers.register()  # transformers before 5.18 does not know "gte"
"""
_SENTENCE_TRANSFORMERS = """\
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("MODEL", backend="onnx", model_kwargs={"file_name": "onnx/model.onnx"})
print(model.encode(["The panda is a bear.", "It rains."]))"""
_JAVASCRIPT = """\
import { AutoModel, AutoTokenizer } from "@huggingface/transformers";

const tokenizer = await AutoTokenizer.from_pretrained("MODEL");
const model = await AutoModel.from_pretrained("MODEL", { dtype: "fp32" }); // the graph onnx/model.onnx
const inputs = tokenizer(["The panda is a bear.", "It rains."], { padding: true, truncation: true });
const { sentence_embedding } = await model(inputs);
console.log(sentence_embedding.normalize().tolist());"""


def _is_plain(described: Manifest, engine: Any) -> bool:
    """Whether the graph takes only what a tokenizer gives, and the places of masks."""
    known = {"input_ids", "attention_mask", "token_type_ids", "mask_positions"}
    return {tensor.name for tensor in described.graphs[engine].inputs} <= known


def _alone(described: Manifest, engine: Any) -> str:
    """Return a program that runs a graph of the bundle with its engine and tokenizers alone."""
    graph, late = described.graphs[engine], described.spec.multi_vector
    inputs = {tensor.name for tensor in graph.inputs}
    feeds = ['"input_ids": ids', '"attention_mask": np.ones_like(ids)']
    types = "np.array([encoded.type_ids])" if late is None else "np.zeros_like(ids)"
    feeds += [f'"token_type_ids": {types}'] if "token_type_ids" in inputs else []
    masks = '"mask_positions": np.argwhere(ids == tokenizer.token_to_id("[MASK]"))'
    feeds += [masks] if "mask_positions" in inputs else []
    texts = ["Paris is the [MASK] of France." if described.spec.task == "fill-mask" else "The panda is a bear."]
    if described.spec.task == "classify" and not _has_labels(described):
        texts.insert(0, "what is a panda?")
    output = next((tensor.name for tensor in graph.outputs if tensor.name != HIDDEN), HIDDEN)
    lines = [
        "import numpy as np",
        f"import {engine}",
        "from tokenizers import Tokenizer",
        "",
        'tokenizer = Tokenizer.from_file("MODEL/tokenizer.json")',
        f"encoded = tokenizer.encode({', '.join(map(json.dumps, texts))})",
        "ids = np.array([encoded.ids])  # int64",
    ]
    prefix = None if late is None else late.document_prefix
    lines += [] if prefix is None else [f"ids = np.insert(ids, 1, {prefix}, axis=1)  # the token of documents"]
    lines.append(f"feed = {{{', '.join(feeds)}}}")
    if engine == "onnxruntime":
        lines += [f'session = onnxruntime.InferenceSession("MODEL/{graph.path}")']
        answer = f'session.run(["{output}"], feed)[0]'
    else:
        hint = '{"INFERENCE_PRECISION_HINT": "f32"}'  # without it, CPUs that have bfloat16 compute in it
        lines += [f'model = openvino.compile_model("MODEL/{graph.path}", "CPU", {hint})']
        answer = f'model(feed)["{output}"]'
    if late is None:
        return "\n".join([*lines, f"print({answer})"])
    lines += [f"vectors = {answer}[0]  # of each token"]
    if late.skipped_in_documents:
        lines += [f"vectors = vectors[~np.isin(ids[0], {list(late.skipped_in_documents)})]"]
    lines += ["vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)"] if described.spec.normalize else []
    return "\n".join([*lines, "print(vectors)"])
