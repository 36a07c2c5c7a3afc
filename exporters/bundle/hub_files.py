"""Writes the Hugging Face files of a bundle: config, tokenizer, and settings of sentence-transformers.

Other libraries read limits, pooling, prompts, similarity and activation from these files. So their values are those of
the graph and the runtime, even if the checkpoint's own files differ.
"""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from gte_deploy.core.activations import TORCH_CLASSES
from gte_deploy.core.files import write_text, write_with
from gte_deploy.core.spec import ModelSpec
from gte_deploy.exporters.job import GRAPH_PATHS
from gte_deploy.models.description import Description
from gte_deploy.models.weight_files import WEIGHTS
from gte_deploy.tasks import TASKS

# The names of the modules in every version of the library.
_TYPES = "sentence_transformers.models"
_TRANSFORMER = "sentence_transformers.base.modules.transformer.Transformer"
# A browser cannot look for files, so transformers.js fetches the weights file of a graph only if this names the graph.
# Without the dtype, which here stands for a file name without a suffix, it asks for model_quantized.onnx in a browser.
_JAVASCRIPT = {"use_external_data_format": {Path(GRAPH_PATHS["onnxruntime"]).name: 1}, "dtype": "fp32"}


def write_hub_files(folder: Path, checkpoint: Description) -> None:
    """Write the files into the folder of a bundle, which has its graphs already."""
    files = hub_files(checkpoint)
    if (folder / GRAPH_PATHS["onnxruntime"]).is_file():
        files["config.json"]["transformers.js_config"] = _JAVASCRIPT
    checkpoint.tokenizer.save(folder, max_length=checkpoint.spec.max_length)
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_text(folder / name, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    for i, dense in enumerate(checkpoint.dense, start=2):
        (folder / f"{i}_Dense").mkdir()
        for name in ("config.json", WEIGHTS):
            write_with(folder / f"{i}_Dense" / name, partial(shutil.copyfile, checkpoint.folder / dense.path / name))


def hub_files(checkpoint: Description) -> dict[str, Any]:
    """The JSON files of a bundle except those of the tokenizer: path relative to the bundle -> content."""
    spec = checkpoint.spec
    config = checkpoint.family.hub_config(checkpoint.config, task=spec.head_task)
    config.pop("auto_map", None)  # the bundle has no weights for remote code
    if checkpoint.family.positions != "absolute":
        # The limit of the graph. A family with a table of positions keeps the number of its rows: libraries refuse the
        # weights otherwise.
        config["max_position_embeddings"] = spec.max_length
    if spec.activation is not None:
        config["sentence_transformers"] = {"activation_fn": _torch_path(spec.activation)}
    files: dict[str, Any] = {"config.json": config}
    if spec.task == "fill-mask" or TASKS[spec.task].pools:
        files |= _embedding(checkpoint)
    elif spec.task == "classify" and spec.prompts:
        files |= _reranker(spec)
    return files


def _embedding(checkpoint: Description) -> dict[str, Any]:
    """The pooling of hidden states for sentence-transformers and TEI, in a form that all versions read."""
    spec = checkpoint.spec
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    modules += [(f"{i}_Dense", "Dense") for i in range(2, 2 + len(checkpoint.dense))]
    modules += [(f"{len(modules)}_Normalize", "Normalize")] if spec.normalize else []
    return {
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"{_TYPES}.{kind}"}
            for i, (path, kind) in enumerate(modules)
        ],
        "1_Pooling/config.json": {
            "word_embedding_dimension": spec.hidden_size,
            "pooling_mode_cls_token": spec.pooling == "cls",
            "pooling_mode_mean_tokens": spec.pooling == "mean",
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
        },
        "sentence_bert_config.json": {
            "max_seq_length": spec.max_length,
            "do_lower_case": checkpoint.settings.lowercase,
        },
        "config_sentence_transformers.json": {
            **_prompts(spec),
            "similarity_fn_name": spec.similarity,
            **({} if spec.truncate_dim is None else {"truncate_dim": spec.truncate_dim}),
        },
    }


def _reranker(spec: ModelSpec) -> dict[str, Any]:
    """The prompts of a CrossEncoder, which the library reads only if modules.json lists its one module."""
    activation = {} if spec.activation is None else {"activation_fn": _torch_path(spec.activation)}
    return {
        "modules.json": [{"idx": 0, "name": "0", "path": "", "type": _TRANSFORMER}],
        "sentence_bert_config.json": {
            "max_seq_length": spec.max_length,  # which text-embeddings-inference reads
            "transformer_task": "sequence-classification",
            "modality_config": {"text": {"method": "forward", "method_output_name": "logits"}},
            "module_output_name": "scores",
        },
        "config_sentence_transformers.json": {"model_type": "CrossEncoder", **_prompts(spec), **activation},
    }


def _prompts(spec: ModelSpec) -> dict[str, Any]:
    return {"prompts": dict(spec.prompts), "default_prompt_name": spec.default_prompt_name}


def _torch_path(activation: str) -> str:
    name = TORCH_CLASSES[activation]
    return f"torch.nn.modules.{'linear' if name == 'Identity' else 'activation'}.{name}"
