"""Writes the README.md and the Dockerfile of a repository."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version

from gte_deploy._version import __version__
from gte_deploy.exporters.triton.configs import TOKENIZER, Config, DeviceName, Serving
from gte_deploy.tasks import TASKS
from gte_deploy.tasks.base import HIDDEN

TRITON_TAG = "26.07-py3"

_ANSWERS = {
    "gte_embed": "a text -> its embedding",
    "gte_embed_fast": "the same without options of pooling, with fewer steps",
    "gte_token_embed": "a text -> the state of each of its tokens",
    "gte_fill_mask": "a text with masks -> the best tokens for each",
    "gte_rerank": "a text, or a pair of texts -> its score for each label",
    "gte_classify_tokens": "a text -> the labels of its tokens",
    "gte_sparse": "a text -> the weights of its tokens, a sparse vector",
    "gte_hybrid": "a text -> its embedding and the weights of its tokens, from one run of the encoder",
    "gte_multi_vector_query": "a query -> the embedding of each of its tokens",
    "gte_multi_vector_document": "a document -> the embedding of each of its tokens that is not skipped",
    "gte_multi_vector_ids": "token ids, and the tokens to keep -> as the two above",
    "gte_sparse_query": "a query -> the same, from stored weights without the encoder",
}


def dockerfile() -> str:
    """The Dockerfile of an image with the packages of the Python models, in the tokenizers version of this export."""
    return f"""\
# Triton with the packages that the Python models of this repository import.
ARG TRITON={TRITON_TAG}
FROM nvcr.io/nvidia/tritonserver:${{TRITON}}
RUN pip install --no-cache-dir 'tokenizers=={version("tokenizers")}' 'numpy>=1.26'
ENV ORT_DISABLE_TELEMETRY=1
"""


def readme(
    serving: Serving, configs: Mapping[DeviceName, Mapping[str, Config]], source: str, missed_bounds: Sequence[str] = ()
) -> str:
    """The README: the bounds that the export missed, the ensembles, and how to start and call the server."""
    models = next(iter(configs.values()))
    ensembles = [config for config in models.values() if config.get("platform") == "ensemble"]
    return f"""\
# {source} for Triton Inference Server

Written by gte-export of gte-deploy {__version__}: {serving.spec.task}, {serving.precision}, at most
{serving.spec.max_length:,} tokens a text.
{_missed(missed_bounds)}
| ask | for | inputs | outputs |
|---|---|---|---|
{"".join(_row(config) for config in ensembles)}
Texts are BYTES of shape [rows, 1], token ids INT64 of shape [rows, tokens]. Inputs in brackets are options: one value,
repeated for every row of the request.
{_rows_line(configs)} A mistake in one request is an error for that request only.

## Start

    docker build -t gte-triton .
{"".join(_run_lines(serving, device) for device in configs)}{_notes(serving, configs)}
## Ask

{_client_example(serving)}
    curl -s localhost:8000/v2/models/{ensembles[0]["name"]}/infer -d \\
      '{{"inputs": [{{"name": "TEXT", "shape": [1, 1], "datatype": "BYTES", "data": ["{_example(serving)}"]}}]}}'

JSON is slow for many texts; the client sends binary tensors.

## Change

Edit the configurations, then check them: `gte-export check .`. The hashes in manifest.json are those of the files
as they were exported.
"""


def _missed(lines: Sequence[str]) -> str:
    if not lines:
        return ""
    listed = "".join(f"- {line}\n" for line in lines)
    return (
        f"\n**This model misses its bounds**: it was exported with `--bounds report`, and is less accurate than it "
        f"should be.\n\n{listed}"
    )


def _row(config: Config) -> str:
    name = config["name"]
    text = _ANSWERS[name] if name in _ANSWERS else f"token ids -> as {name.removesuffix('_ids')}"
    if name == "gte_embed_ids":
        text = "token ids -> as gte_embed_fast"
    inputs = [f"[{t['name']}]" if t.get("optional") else t["name"] for t in config["input"]]
    outputs = [tensor["name"] for tensor in config["output"]]
    return f"| {name} | {text} | {', '.join(inputs)} | {', '.join(outputs)} |\n"


def _rows_line(configs: Mapping[DeviceName, Mapping[str, Config]]) -> str:
    named = ", ".join(f"{_max_rows(models)} ({device.upper()})" for device, models in configs.items())
    return f"The most rows of one request: {named}."


def _max_rows(models: Mapping[str, Config]) -> str:
    parameters = {item["key"]: item["value"]["string_value"] for item in models[TOKENIZER]["parameters"]}
    return parameters["max_rows"]


def _run_lines(serving: Serving, device: DeviceName) -> str:
    gpus = " --gpus all" if device == "gpu" else ""
    option = " --model-config-name=cpu" if device == "cpu" else ""
    if serving.response_cache:
        option += " --cache-config=local,size=268435456"
    return f"""
    # {device.upper()}{" (not tried by the authors of gte-deploy)" if device == "gpu" else ""}
    docker run --rm{gpus} --shm-size=1g -p 8000:8000 -p 8001:8001 -p 8002:8002 -v "$PWD":/models:ro gte-triton \\
      tritonserver --model-repository=/models{option}
"""


def _notes(serving: Serving, configs: Mapping[DeviceName, Mapping[str, Config]]) -> str:
    notes = []
    encoder = serving.encoder
    if "cpu" not in configs:
        notes.append("This repository is only for GPUs.")
    if "gpu" not in configs:
        notes.append("This repository is only for CPUs.")
    if HIDDEN not in encoder.output_names and serving.spec.multi_vector is None:
        notes.append(
            "The engine gives only the answer of its task, so there are no token embeddings"
            f"{'' if TASKS[serving.spec.task].pools else ' and no embeddings'} (gte-export --outputs all has them)."
        )
    if encoder.backend == "tensorrt":
        notes.append(
            "The plan runs only in the TensorRT version that built it: build the image from the Triton release that "
            "has it (`--build-arg TRITON=…`)."
        )
    return "".join(f"\n{note}\n" for note in notes)


def _example(serving: Serving) -> str:
    """A text that the first ensemble answers."""
    masked = serving.spec.task == "fill-mask" and "embedding_finished" not in serving.encoder.output_names
    return f"a {serving.mask_token}" if masked else "a text"


def _client_example(serving: Serving) -> str:
    calls = {
        "fill-mask": f'client.fill_mask("Paris is the {serving.mask_token} of France.")',
        "classify": 'client.predict([("a query", "a document")])',
        "token-classify": 'client.classify_tokens("Paris is in France.", aggregation_strategy="simple")',
        "sparse": 'client.encode_document(["a text", "another"])',
        "multi-vector": 'client.rank("a query", ["a document", "another"])',
        "hybrid": 'client.encode_hybrid(["a text", "another"], normalize_embeddings=True)',
    }
    ask = calls.get(serving.spec.task, 'client.encode(["a text", "another"], normalize_embeddings=True)')
    return f"""\
    from gte_deploy.triton import Client  # pip install '.[triton]' in a checkout of gte-deploy

    with Client("grpc://localhost:8001") as client:  # or http://localhost:8000
        {ask}
"""
