"""Builds the config.pbtxt of every model of a repository: first as plain data, then as protobuf text.

Field names and meanings: https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gte_deploy._version import __version__
from gte_deploy.core.spec import ModelSpec, Precision, Profile, TaskName, TensorSpec
from gte_deploy.tasks.fill_mask import MAX_LOGITS

DeviceName = Literal["gpu", "cpu"]
Config = dict[str, Any]

TOKENIZER, ENCODER = "gte_tokenizer", "gte_encoder"

_DATA_TYPES = {
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
}
_SHORTEST = 16


class Word(str):
    """A value of an enumeration, which has no quotes in protobuf text."""


@dataclass(frozen=True)
class ServingDevice:
    """The settings that differ between config.pbtxt for GPUs and configs/cpu.pbtxt.

    Args:
        name: "gpu" or "cpu".
        max_batch_size: the most rows of one run of the encoder and of one request.
        preferred_batch_sizes: batch sizes at which the encoder stops waiting for more requests.
        queue_delay_us: microseconds that the encoder waits for more requests.
        spare_tokens: padding, in tokens, that costs as much as one run of the encoder.
        tokenizers: number of processes that tokenise.
    """

    name: DeviceName
    max_batch_size: int
    preferred_batch_sizes: tuple[int, ...]
    queue_delay_us: int
    spare_tokens: int
    tokenizers: int

    @property
    def encoder_kind(self) -> Word:
        return Word("KIND_GPU" if self.name == "gpu" else "KIND_CPU")


def default_device(name: DeviceName, max_batch_size: int | None = None) -> ServingDevice:
    """The default settings. Only large batches keep a GPU busy; few tokens keep a CPU busy."""
    size = max_batch_size or (32 if name == "gpu" else 8)
    preferred = tuple(n for n in (8, 16, 32, 64, 128) if n <= size)[-2:] if name == "gpu" else ()
    return ServingDevice(
        name=name,
        max_batch_size=size,
        preferred_batch_sizes=preferred,
        queue_delay_us=500,
        spare_tokens=800 if name == "gpu" else 25,
        tokenizers=2 if name == "gpu" else 1,
    )


@dataclass(frozen=True)
class Encoder:
    """The model gte_encoder.

    Args:
        backend: Triton's name of the backend.
        files: device -> name of the graph or plan in the version folder; other devices are not served.
        inputs: the inputs, with the batch axis.
        outputs: the outputs, with the batch axis.
        profiles: the profiles of a TensorRT plan.
        max_masks: the most masks of one run.
    """

    backend: Literal["onnxruntime", "tensorrt"]
    files: Mapping[DeviceName, str]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[Profile, ...] = ()
    max_masks: int = 1 << 16

    @property
    def batched(self) -> bool:
        """Whether Triton may join requests. It may not if masks are (row, token) pairs, as in a plan."""
        return self.backend == "onnxruntime" or "mask_positions" not in self.input_names

    @property
    def input_names(self) -> list[str]:
        return [tensor.name for tensor in self.inputs]


@dataclass(frozen=True)
class Serving:
    """The facts for the configurations of a repository; lengths and sizes are those of the chosen encoder.

    Args:
        spec: the facts about the model; max_length is the limit of the encoder.
        precision: the precision of the encoder's weights.
        encoder: the model gte_encoder.
        mask_token: the mask token of the tokenizer, or None.
        version: number of the version folder.
        max_queue_size: the most requests that may wait for a model; None for no limit.
        queue_timeout_s: seconds that a request may wait for a model; None for no limit.
        threads: number of CPU threads inside one operator of the encoder.
        response_cache: whether the ensembles ask for the server's response cache.
    """

    spec: ModelSpec
    precision: Precision
    encoder: Encoder
    mask_token: str | None
    version: int
    max_queue_size: int | None
    queue_timeout_s: float | None
    threads: int
    response_cache: bool

    def max_masks(self, device: ServingDevice) -> int:
        """The most masks of one text, or of one request if Triton does not batch: a batch has 256 MB of logits."""
        rows = device.max_batch_size if self.encoder.batched else 1
        most = min(MAX_LOGITS // (rows * self.spec.vocab_size), self.encoder.max_masks)
        return 1 << max(0, most.bit_length() - 1)


def length_buckets(max_length: int, shortest: int = _SHORTEST) -> list[int]:
    """The lengths that rows are padded to: four for each power of two, which means 10 % of padding on average."""
    steps = (quarter << power for power in range(1, 24) for quarter in (4, 5, 6, 7))
    inner = {length for length in steps if length % 8 == 0 and shortest <= length < max_length}
    return [*sorted(inner), max_length]


def all_configs(serving: Serving, device: ServingDevice) -> dict[str, Config]:
    """Name of a model -> its configuration for one kind of device."""
    models = [_tokenizer(serving, device), _encoder(serving, device), _embed_output(serving, device)]
    ensembles = [
        _ensemble(serving, device, "gte_embed", _TEXT, models[2]),
        _token_ensemble(serving, device),
    ]
    for name, text_inputs, output in _heads(serving):
        models.append(output(serving, device))
        ensembles.append(_ensemble(serving, device, name, text_inputs, models[-1]))
    sparse = serving.spec.sparse
    if sparse is not None and sparse.query_weights is not None:
        models.append(_sparse_query_output(serving, device))
        ensembles.append(_sparse_query_ensemble(serving, device, models[-1]))
    return {config["name"]: config for config in (*models, *ensembles)}


_Head = tuple[str, Mapping[str, str], Callable[[Serving, ServingDevice], Config]]


def _heads(serving: Serving) -> list[_Head]:
    """The ensembles for the task's own head: name, text inputs, and the configuration of the Python model."""
    spec = serving.spec
    sparse: list[_Head] = [("gte_sparse", _TEXT, _sparse_output)] if spec.num_labels == 1 else []
    heads: dict[TaskName, list[_Head]] = {
        "embed": [],
        "fill-mask": [("gte_fill_mask", _MASKED_TEXT, _fill_mask_output)],
        "classify": [("gte_rerank", _PAIR, _rerank_output)],
        "token-classify": [("gte_classify_tokens", _PLAIN_TEXT, _classify_tokens_output), *sparse],
        "sparse": [("gte_sparse", _TEXT, _sparse_output)],
    }
    return heads[spec.task]


# Input of an ensemble -> input of the tokenizer.
_LIMITS = {"TRUNCATION": "TRUNCATION", "MAX_LENGTH": "MAX_LENGTH"}
_TEXT = {"TEXT": "TEXT", "PROMPT": "PROMPT", "PROMPT_NAME": "PROMPT_NAME", **_LIMITS}
_PLAIN_TEXT = {"TEXT": "PLAIN_TEXT", **_LIMITS}
_MASKED_TEXT = {"TEXT": "MASKED_TEXT", **_LIMITS}
_PAIR = {"TEXT": "FIRST", "TEXT_PAIR": "SECOND", "PROMPT": "PROMPT", "PROMPT_NAME": "PROMPT_NAME", **_LIMITS}
_OPTION_TYPES = {
    "TRUNCATION": "TYPE_BOOL",
    "NORMALIZE": "TYPE_BOOL",
    "APPLY_SOFTMAX": "TYPE_BOOL",
    "MAX_LENGTH": "TYPE_INT32",
    "TRUNCATE_DIM": "TYPE_INT32",
    "TOP_K": "TYPE_INT32",
    "MAX_ACTIVE_DIMS": "TYPE_INT32",
}


def _tokenizer(serving: Serving, device: ServingDevice) -> Config:
    encoder = serving.encoder
    masked = "mask_positions" in encoder.input_names
    wirings = [_TEXT, *(text_inputs for _, text_inputs, _ in _heads(serving))]
    names = dict.fromkeys(name for wiring in wirings for name in wiring.values())
    parameters = {
        "length_buckets": ",".join(map(str, _buckets(serving))),
        "spare_tokens": str(device.spare_tokens),
        "max_rows": str(device.max_batch_size),
    }
    if masked:
        parameters |= {
            "max_masks": str(serving.max_masks(device)),
            "flat_positions": str(int(not encoder.batched)),
        }
    return _python_model(
        serving,
        device,
        TOKENIZER,
        inputs=[_option(serving, name) for name in names],
        outputs=[_tensor(serving, tensor) for tensor in encoder.inputs],
        parameters=parameters,
        count=device.tokenizers,
    )


def _encoder(serving: Serving, device: ServingDevice) -> Config:
    encoder = serving.encoder
    instances: Config = {"count": 1, "kind": device.encoder_kind}
    if len(encoder.profiles) > 1:
        instances["profile"] = [str(i) for i in range(len(encoder.profiles))]
    config = {
        **_head(serving, device, ENCODER),
        "backend": encoder.backend,
        "default_model_filename": encoder.files[device.name],
        "input": [_tensor(serving, tensor) for tensor in encoder.inputs],
        "output": [_tensor(serving, tensor) for tensor in encoder.outputs],
        "instance_group": [instances],
        **_batching(serving, device, waits=True),
        "model_warmup": _warmup(serving, device),
    }
    if encoder.backend == "onnxruntime":
        if device.name == "cpu":
            # The exporter fused the graph already. A memory pattern for every shape would only need memory.
            config["optimization"] = {"graph": {"level": 2}}
            config["parameters"] = _parameters(
                intra_op_thread_count=str(serving.threads), inter_op_thread_count="1", enable_mem_pattern="0"
            )
        else:
            config["parameters"] = _parameters(enable_mem_pattern="0", arena_extend_strategy="1")
    return config


def _warmup(serving: Serving, device: ServingDevice) -> list[Config]:
    """Warm-up with the shortest and the longest shape. On a GPU the longest is a full batch, to test its memory."""
    batched = serving.encoder.batched
    buckets = _buckets(serving)
    full = device.max_batch_size if device.name == "gpu" and batched else 1
    return [
        {
            "name": name,
            "batch_size": rows if batched else 0,
            "inputs": [
                {
                    "key": tensor.name,
                    "value": {
                        "data_type": Word(_DATA_TYPES[tensor.dtype]),
                        "dims": warmup_shape(serving.encoder, tensor, length),
                        "input_data_file": warmup_file(tensor, length),
                    },
                }
                for tensor in serving.encoder.inputs
            ],
        }
        for name, rows, length in (("shortest", 1, buckets[0]), ("longest", full, buckets[-1]))
    ]


def warmup_lengths(serving: Serving) -> tuple[int, int]:
    """The two lengths for the warm-up of gte_encoder."""
    buckets = _buckets(serving)
    return buckets[0], buckets[-1]


def warmup_shape(encoder: Encoder, tensor: TensorSpec, length: int) -> list[int]:
    """The shape of one warm-up row: without the batch axis if Triton batches, else in full."""
    shape = [size if isinstance(size, int) else {"sequence": length}.get(size, 1) for size in tensor.shape]
    return shape[1:] if encoder.batched else shape


def warmup_file(tensor: TensorSpec, length: int) -> str:
    """The name of a file with warm-up data in gte_encoder/warmup. Zeros would be a row without any token."""
    return f"{tensor.name}_{length}"


def _embed_output(serving: Serving, device: ServingDevice) -> Config:
    outputs = [{**_tensor(serving, t), "name": _outward(serving, t)} for t in serving.encoder.outputs]
    pooled = [tensor for tensor in outputs if tensor["name"].startswith("embedding_")]
    if not pooled:
        pooled = _of_encoder(serving, "last_hidden_state", "attention_mask")
    return _python_model(
        serving,
        device,
        "gte_embed_output",
        inputs=[
            *pooled,
            *(_option(serving, name) for name in ("POOLING", "NORMALIZE", "TRUNCATE_DIM")),
        ],
        outputs=[_new(serving, "EMBEDDING", "TYPE_FP32", -1)],
    )


def _fill_mask_output(serving: Serving, device: ServingDevice) -> Config:
    answers = {"TOKEN": "TYPE_STRING", "TOKEN_ID": "TYPE_INT64", "SCORE": "TYPE_FP32", "SEQUENCE": "TYPE_STRING"}
    return _python_model(
        serving,
        device,
        "gte_fill_mask_output",
        inputs=[
            *_of_encoder(serving, "input_ids", "attention_mask", "logits"),
            _option(serving, "TOP_K"),
            {**_new(serving, "TARGETS", "TYPE_STRING", -1), "optional": True},
        ],
        outputs=[
            _new(serving, "MASKS", "TYPE_INT32", 1),
            *(_new(serving, name, data_type, -1, -1) for name, data_type in answers.items()),
        ],
    )


def _rerank_output(serving: Serving, device: ServingDevice) -> Config:
    labels = serving.spec.num_labels
    scores = {**_new(serving, "SCORE", "TYPE_FP32", labels), "label_filename": "labels.txt"}
    return _python_model(
        serving,
        device,
        "gte_rerank_output",
        inputs=[*_of_encoder(serving, "logits"), _option(serving, "APPLY_SOFTMAX")],
        outputs=[scores, _new(serving, "LOGITS", "TYPE_FP32", labels)],
    )


def _classify_tokens_output(serving: Serving, device: ServingDevice) -> Config:
    columns = {"LABEL": "TYPE_STRING", "SCORE": "TYPE_FP32", "INDEX": "TYPE_INT32", "WORD": "TYPE_STRING"}
    columns |= {"START": "TYPE_INT32", "END": "TYPE_INT32"}
    return _python_model(
        serving,
        device,
        "gte_classify_tokens_output",
        inputs=[
            _new(serving, "TEXT", "TYPE_STRING", 1),
            *_of_encoder(serving, "attention_mask", "logits"),
            *(_option(serving, name) for name in ("TRUNCATION", "MAX_LENGTH", "AGGREGATION_STRATEGY")),
            {**_new(serving, "IGNORE_LABELS", "TYPE_STRING", -1), "optional": True},
        ],
        outputs=[
            _new(serving, "ENTITIES", "TYPE_INT32", 1),
            *(_new(serving, name, data_type, -1) for name, data_type in columns.items()),
            _new(serving, "TOKENS", "TYPE_INT32", 1),
            _new(serving, "LOGITS", "TYPE_FP32", -1, serving.spec.num_labels),
        ],
    )


def _sparse_output(serving: Serving, device: ServingDevice) -> Config:
    pooled = serving.spec.task == "sparse"
    names = ("sparse_embedding",) if pooled else ("input_ids", "attention_mask", "logits")
    return _sparse_model(serving, device, "gte_sparse_output", _of_encoder(serving, *names))


def _sparse_query_output(serving: Serving, device: ServingDevice) -> Config:
    inputs = _of_encoder(serving, *_QUERY_INPUTS)
    return _sparse_model(serving, device, "gte_sparse_query_output", inputs)


_QUERY_INPUTS = ("input_ids", "attention_mask")


def _sparse_model(serving: Serving, device: ServingDevice, name: str, inputs: Sequence[Config]) -> Config:
    entries = {"TOKEN": "TYPE_STRING", "TOKEN_ID": "TYPE_INT64", "WEIGHT": "TYPE_FP32"}
    return _python_model(
        serving,
        device,
        name,
        inputs=[*inputs, _option(serving, "MAX_ACTIVE_DIMS")],
        outputs=[
            _new(serving, "TOKENS", "TYPE_INT32", 1),
            *(_new(serving, name, data_type, -1) for name, data_type in entries.items()),
        ],
    )


def _sparse_query_ensemble(serving: Serving, device: ServingDevice, output: Config) -> Config:
    """Tokenizer and stored weights, without the encoder."""
    names = {name: name for name in _QUERY_INPUTS}
    weigh = _step(output["name"], [t["name"] for t in output["input"]], [t["name"] for t in output["output"]])
    tokenize = _step(TOKENIZER, {inner: outer for outer, inner in _TEXT.items()}, names)
    return {
        **_ensemble_head(serving, device, "gte_sparse_query", _TEXT, [_option(serving, "MAX_ACTIVE_DIMS")]),
        "output": output["output"],
        "ensemble_scheduling": {"step": [tokenize, weigh]},
        **_cache(serving),
    }


def _ensemble(serving: Serving, device: ServingDevice, name: str, wiring: Mapping[str, str], output: Config) -> Config:
    """Tokenizer, encoder and the Python model that computes the answer."""
    own = {tensor["name"] for tensor in output["input"]}
    produced = {tensor.name: _outward(serving, tensor) for tensor in serving.encoder.outputs}
    known = {*serving.encoder.input_names, *produced.values(), *wiring}
    options = [tensor for tensor in output["input"] if tensor["name"] not in known]
    return {
        **_ensemble_head(serving, device, name, wiring, options),
        "output": output["output"],
        "ensemble_scheduling": {
            "step": [
                _tokenizer_step(serving, wiring),
                _step(ENCODER, serving.encoder.input_names, {k: v for k, v in produced.items() if v in own}),
                _step(output["name"], [t["name"] for t in output["input"]], [t["name"] for t in output["output"]]),
            ]
        },
        **_cache(serving),
    }


def _token_ensemble(serving: Serving, device: ServingDevice) -> Config:
    """Tokenizer and encoder, which give the state of every token and the inputs of the encoder."""
    encoder = serving.encoder
    tensors = {tensor.name: tensor for tensor in (*encoder.inputs, *encoder.outputs)}
    names = {"INPUT_IDS": "input_ids", "ATTENTION_MASK": "attention_mask", "TOKEN_EMBEDDINGS": "last_hidden_state"}
    if serving.spec.token_types:
        names["TOKEN_TYPE_IDS"] = "token_type_ids"
    outward = {inner: outer for outer, inner in names.items()}
    tokenizer = _tokenizer_step(serving, _TEXT, outward)
    inputs = {name: outward.get(name, name) for name in encoder.input_names}
    run = _step(ENCODER, inputs, {"last_hidden_state": "TOKEN_EMBEDDINGS"})
    return {
        **_ensemble_head(serving, device, "gte_token_embed", _TEXT, []),
        "output": [{**_tensor(serving, tensors[inner]), "name": outer} for outer, inner in names.items()],
        "ensemble_scheduling": {"step": [tokenizer, run]},
        **_cache(serving),
    }


def _ensemble_head(
    serving: Serving,
    device: ServingDevice,
    name: str,
    wiring: Mapping[str, str],
    options: Sequence[Config],
) -> Config:
    facts = {
        "version": __version__,
        "precision": serving.precision,
        "mask_token": serving.mask_token,
        "max_masks": serving.max_masks(device) if "mask_positions" in serving.encoder.input_names else None,
        "max_batch_size": device.max_batch_size,
    }
    return {
        **_head(serving, device, name),
        "platform": "ensemble",
        "input": [
            _new(serving, "TEXT", "TYPE_STRING", 1),
            *(_option(serving, outer) for outer in wiring if outer != "TEXT"),
            *options,
        ],
        "parameters": _parameters(gte_deploy_spec=_spec_json(serving), gte_deploy=json.dumps(facts)),
    }


def _tokenizer_step(serving: Serving, wiring: Mapping[str, str], names: Mapping[str, str] | None = None) -> Config:
    outputs = {name: (names or {}).get(name, name) for name in serving.encoder.input_names}
    return _step(TOKENIZER, {inner: outer for outer, inner in wiring.items()}, outputs)


def _step(model: str, inputs: Mapping[str, str] | Iterable[str], outputs: Mapping[str, str] | Iterable[str]) -> Config:
    """A step of an ensemble. The mappings rename tensors; names without a mapping stay."""
    return {"model_name": model, "model_version": -1, "input_map": _map(inputs), "output_map": _map(outputs)}


def _map(names: Mapping[str, str] | Iterable[str]) -> list[Config]:
    pairs = names.items() if isinstance(names, Mapping) else ((name, name) for name in names)
    return [{"key": key, "value": value} for key, value in pairs]


def _python_model(
    serving: Serving,
    device: ServingDevice,
    name: str,
    *,
    inputs: Sequence[Config],
    outputs: Sequence[Config],
    parameters: Mapping[str, str] | None = None,
    count: int = 1,
) -> Config:
    return {
        **_head(serving, device, name),
        "backend": "python",
        "input": list(inputs),
        "output": list(outputs),
        "instance_group": [{"count": count, "kind": Word("KIND_CPU")}],
        **_batching(serving, device),
        "parameters": _parameters(gte_deploy_spec=_spec_json(serving), **(parameters or {})),
    }


def _head(serving: Serving, device: ServingDevice, name: str) -> Config:
    return {
        "name": name,
        "max_batch_size": device.max_batch_size if serving.encoder.batched else 0,
        "version_policy": {"latest": {"num_versions": 1}},
    }


def _batching(serving: Serving, device: ServingDevice, *, waits: bool = False) -> Config:
    """Join waiting requests, and refuse those that would wait too long, if the options ask for it.

    The encoder `waits` a little for more requests; in a Python model that would only delay the answers. A model without
    a batch axis also gets these bounds: Triton's dynamic batcher then runs its requests one by one.

    By default there are no bounds, because with them single requests stay in the queue for half a second
    (docs/decisions/triton-queue-policy.md).
    """
    policy: Config = {}
    if serving.max_queue_size is not None:
        policy["max_queue_size"] = serving.max_queue_size
    if serving.queue_timeout_s is not None:
        policy |= {
            "timeout_action": Word("REJECT"),
            "default_timeout_microseconds": round(serving.queue_timeout_s * 1e6),
            "allow_timeout_override": True,
        }
    batching: Config = {"default_queue_policy": policy} if policy else {}
    if waits and serving.encoder.batched:
        batching["max_queue_delay_microseconds"] = device.queue_delay_us
        if device.preferred_batch_sizes:
            batching["preferred_batch_size"] = list(device.preferred_batch_sizes)
    return {"dynamic_batching": batching}


def _cache(serving: Serving) -> Config:
    return {"response_cache": {"enable": True}} if serving.response_cache else {}


def _buckets(serving: Serving) -> list[int]:
    shortest = min((profile.min[1] for profile in serving.encoder.profiles), default=_SHORTEST)
    return length_buckets(serving.spec.max_length, max(shortest, _SHORTEST))


def _spec_json(serving: Serving) -> str:
    return json.dumps(dataclasses.asdict(serving.spec), ensure_ascii=False)


def _outward(serving: Serving, tensor: TensorSpec) -> str:
    """The name of an encoder output in the ensemble. A plan names its pooled output without the kind of pooling."""
    return f"embedding_{serving.spec.pooling}" if tensor.name == "sentence_embedding" else tensor.name


def _of_encoder(serving: Serving, *names: str) -> list[Config]:
    tensors = {tensor.name: tensor for tensor in (*serving.encoder.inputs, *serving.encoder.outputs)}
    return [_tensor(serving, tensors[name]) for name in names]


def _tensor(serving: Serving, tensor: TensorSpec) -> Config:
    sizes = [size if isinstance(size, int) else -1 for size in tensor.shape]
    dims = sizes[1:] if serving.encoder.batched else sizes
    return {"name": tensor.name, "data_type": Word(_DATA_TYPES[tensor.dtype]), "dims": dims}


def _option(serving: Serving, name: str) -> Config:
    return {**_new(serving, name, _OPTION_TYPES.get(name, "TYPE_STRING"), 1), "optional": True}


def _new(serving: Serving, name: str, data_type: str, *sizes: int) -> Config:
    dims = list(sizes) if serving.encoder.batched else [-1, *sizes]
    return {"name": name, "data_type": Word(data_type), "dims": dims}


def _parameters(**values: str) -> list[Config]:
    return [{"key": name, "value": {"string_value": value}} for name, value in values.items()]


def to_pbtxt(config: Config, indent: str = "") -> str:
    """Convert to protobuf text: scalars as `name: value`, messages in braces, both repeated for lists."""
    lines = []
    for name, value in config.items():
        if name == "dims":
            lines.append(f"{indent}dims: [ {', '.join(map(str, value))} ]")
            continue
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict):
                inner = to_pbtxt(item, indent + "  ")
                lines.append(f"{indent}{name} {{\n{inner}{indent}}}")
            else:
                lines.append(f"{indent}{name}: {_scalar(item)}")
    return "".join(f"{line}\n" for line in lines)


def _scalar(value: Any) -> str:
    if isinstance(value, Word):
        return str(value)
    # JSON's strings are valid in protobuf text, if characters outside ASCII are not escaped.
    return json.dumps(value, ensure_ascii=False)
