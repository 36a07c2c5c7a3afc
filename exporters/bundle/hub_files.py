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
from gte_deploy.models.modules import DenseModule
from gte_deploy.models.multi_vector_modules import MULTI_VECTOR_TYPE, PYLATE_DENSE, PYLATE_TYPE
from gte_deploy.models.weight_files import WEIGHTS
from gte_deploy.tasks import TASKS

# The names of the modules in every version of the library.
_TYPES = "sentence_transformers.models"
_BASE = "sentence_transformers.base.modules"
_TRANSFORMER = f"{_BASE}.transformer.Transformer"
_CLASSES = {
    "MultiVectorMask": "sentence_transformers.multi_vector_encoder.modules.multi_vector_mask.MultiVectorMask",
    "Normalize": f"{_BASE}.normalize.Normalize",
}
_WHOLE = "config_sentence_transformers.json"
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
        _write_json(folder / name, data)
    for where, dense in _dense_folders(checkpoint).items():
        (folder / where).mkdir()
        if dense.path:
            for name in ("config.json", WEIGHTS):
                write_with(folder / where / name, partial(shutil.copyfile, checkpoint.folder / dense.path / name))
        else:
            _write_inner_dense(folder / where, checkpoint, dense)


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
    elif spec.task == "multi-vector":
        files |= _multi_vector(checkpoint)
    elif spec.task == "classify" and spec.prompts:
        files |= _reranker(spec)
    return files


def _dense_folders(checkpoint: Description) -> dict[str, DenseModule]:
    """Return folder in the bundle -> Dense module. A pooling comes before those of an embedding model."""
    first = 1 if checkpoint.spec.multi_vector is not None else 2
    return {f"{i}_Dense": dense for i, dense in enumerate(checkpoint.dense, start=first)}


def _write_inner_dense(folder: Path, checkpoint: Description, dense: DenseModule) -> None:
    """Write a projection that the checkpoint has among its other weights."""
    from gte_deploy.models.dense import inner_weight
    from gte_deploy.models.stored_tensors import save_tensors

    fields = {"in_features": dense.in_features, "out_features": dense.out_features, "bias": dense.bias}
    _write_json(folder / "config.json", {**fields, "activation_function": "torch.nn.modules.linear.Identity"})
    weight = {"linear.weight": inner_weight(checkpoint.places.weight_files, dense).float()}
    write_with(folder / WEIGHTS, lambda file: save_tensors(weight, file))


def _write_json(file: Path, data: Any) -> None:
    write_text(file, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _multi_vector(checkpoint: Description) -> dict[str, Any]:
    """The files of a multi-vector model: in the layout of PyLate, or of MultiVectorEncoder if the checkpoint has it.

    MultiVectorEncoder reads both. PyLate's layout names the token before each text; a MultiVectorEncoder has none.
    """
    found, spec = checkpoint.settings.multi_vector, checkpoint.spec
    multi_vector = spec.multi_vector
    assert found is not None and multi_vector is not None  # a model for this task has both
    is_pylate = found.layout != "sentence-transformers"
    settings: dict[str, Any] = {"max_seq_length": spec.max_length, "do_lower_case": checkpoint.settings.lowercase}
    whole = {**_prompts(spec), "similarity_fn_name": spec.similarity}
    modules = [("", f"{_TYPES}.Transformer")]
    dense = PYLATE_DENSE if is_pylate else f"{_BASE}.dense.Dense"
    modules += [(where, dense) for where in _dense_folders(checkpoint)]
    files: dict[str, Any] = {}
    lengths = {"query_length": multi_vector.query_length, "document_length": multi_vector.document_length}
    expansion = found.expansion
    if is_pylate:
        whole |= {
            "model_type": PYLATE_TYPE,
            **lengths,
            **{f"{side}_prefix": word for side, word in found.prefixes.items()},
            "do_query_expansion": expansion is not None,
            "attend_to_expansion_tokens": expansion is not None and expansion.attended,
            "skiplist_words": list(found.skipped.get("document", ())),
        }
    else:
        whole["model_type"] = MULTI_VECTOR_TYPE
        settings |= lengths
        if expansion is not None:
            settings["query_expansion"] = {
                "strategy": "fixed" if expansion.fixed else "min",
                "attend": expansion.attended,
                "token": expansion.token or None,
                "length": expansion.length,
            }
        words = sorted({word for of_side in found.skipped.values() for word in of_side})
        files["MultiVectorMask"] = {"skiplist_words": words, "skiplist_tasks": list(found.skipped) or ["document"]}
        if found.normalize:
            files["Normalize"] = dict.fromkeys(("module_input_name", "module_output_name"), "token_embeddings")
        paths = [(f"{i}_{kind}", _CLASSES[kind]) for i, kind in enumerate(files, start=len(modules))]
        modules += paths
        files = {f"{path}/config.json": data for (path, _), data in zip(paths, files.values(), strict=True)}
    listed = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(modules)]
    return {"modules.json": listed, **files, "sentence_bert_config.json": settings, _WHOLE: whole}


def _embedding(checkpoint: Description) -> dict[str, Any]:
    """The pooling of hidden states for sentence-transformers and TEI, in a form that all versions read."""
    spec = checkpoint.spec
    modules = [("", "Transformer"), ("1_Pooling", "Pooling")]
    modules += [(where, "Dense") for where in _dense_folders(checkpoint)]
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
        _WHOLE: {
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
        _WHOLE: {"model_type": "CrossEncoder", **_prompts(spec), **activation},
    }


def _prompts(spec: ModelSpec) -> dict[str, Any]:
    return {"prompts": dict(spec.prompts), "default_prompt_name": spec.default_prompt_name}


def _torch_path(activation: str) -> str:
    name = TORCH_CLASSES[activation]
    return f"torch.nn.modules.{'linear' if name == 'Identity' else 'activation'}.{name}"
