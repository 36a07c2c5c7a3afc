"""Builds the config.pbtxt of every model of a repository: first as plain data, then as protobuf text.

Field names and meanings: https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gte_deploy._version import __version__
from gte_deploy.core.cpus import available_cpus
from gte_deploy.core.spec import ModelSpec, Precision, Profile, TaskName, TensorSpec
from gte_deploy.tasks.base import HIDDEN
from gte_deploy.tasks.fill_mask import MAX_LOGITS
from gte_deploy.tasks.multi_vector import (
    DOCUMENT_VECTORS_SERVED,
    KEPT_TOKENS,
    QUERY_VECTORS_SERVED,
    SERVED_VECTORS,
    TOKEN_VECTORS,
)
from gte_deploy.tasks.sparse import SparseRequest

DeviceName = Literal["gpu", "cpu"]
Config = dict[str, Any]

TOKENIZER, ENCODER = "gte_tokenizer", "gte_encoder"
PLAN, TOKEN_ENCODER = "gte_plan", "gte_token_encoder"

_DATA_TYPES = {
    "bool": "TYPE_BOOL",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
}
_SHORTEST = 16
_TOGETHER = 128
"""Rows that gte_tokenizer takes at once, so that single texts which wait are tokenised in one call."""


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
        tokenizers: number of processes that tokenise, and of processes of each model that computes answers.
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


def default_device(name: DeviceName, max_batch_size: int | None = None, tokenizers: int | None = None) -> ServingDevice:
    """The default settings. Only large batches keep a GPU busy; few tokens keep a CPU busy.

    On a GPU half the CPUs of this machine tokenise, but at least 2 processes.
    """
    size = max_batch_size or (32 if name == "gpu" else 8)
    preferred = tuple(n for n in (8, 16, 32, 64, 128) if n <= size)[-2:] if name == "gpu" else ()
    return ServingDevice(
        name=name,
        max_batch_size=size,
        preferred_batch_sizes=preferred,
        queue_delay_us=500,
        spare_tokens=800 if name == "gpu" else 25,
        tokenizers=tokenizers or (max(2, available_cpus() // 2) if name == "gpu" else 1),
    )


@dataclass(frozen=True)
class Encoder:
    """The model gte_encoder: a graph for ONNX Runtime, or Python in front of the TensorRT plan gte_plan.

    Args:
        backend: Triton's name of the backend that runs the graph or the plan.
        files: device -> name of the graph or plan in the version folder; other devices are not served.
        inputs: the inputs, with one row for each text.
        outputs: the outputs, with one row for each text.
        profiles: the profiles of a TensorRT plan.
        max_masks: the most masks of one run.
        plan_inputs: the inputs of a TensorRT plan, which takes masks as (row, token) pairs.
        plan_outputs: the outputs of a TensorRT plan.
    """

    backend: Literal["onnxruntime", "tensorrt"]
    files: Mapping[DeviceName, str]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[Profile, ...] = ()
    max_masks: int = 1 << 16
    plan_inputs: tuple[TensorSpec, ...] = ()
    plan_outputs: tuple[TensorSpec, ...] = ()

    def rows_at(self, length: int) -> int:
        """The most rows of `length` tokens that a profile of the plan takes; 0 if none does."""
        return max((profile.max[0] for profile in self.profiles if profile.takes(1, length)), default=0)

    @property
    def model_with_file(self) -> str:
        """The name of the model that has the graph or plan."""
        return PLAN if self.backend == "tensorrt" else ENCODER

    @property
    def input_names(self) -> list[str]:
        return [tensor.name for tensor in self.inputs]

    @property
    def output_names(self) -> set[str]:
        return {tensor.name for tensor in self.outputs}


@dataclass(frozen=True)
class Serving:
    """The facts for the configurations of a repository; lengths and sizes are those of the chosen encoder.

    Args:
        spec: the facts about the model; max_length is the limit of the encoder.
        precision: the precision of the encoder's weights.
        encoder: the model gte_encoder.
        mask_token: the mask token of the tokenizer, or None.
        tokenizer: the fingerprint of the tokenizer.
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
    tokenizer: str
    version: int
    max_queue_size: int | None
    queue_timeout_s: float | None
    threads: int
    response_cache: bool

    @property
    def tokenized(self) -> tuple[TensorSpec, ...]:
        """The tensors that gte_tokenizer gives: the inputs of the encoder, and what output models need."""
        kept = TensorSpec(KEPT_TOKENS, "bool", ("batch", "sequence"))
        return (*self.encoder.inputs, *([] if self.spec.multi_vector is None else [kept]))

    @property
    def text_inputs(self) -> list[Mapping[str, str]]:
        """Input of an ensemble -> input of the tokenizer, for each kind of ensemble that takes texts."""
        if self.spec.multi_vector is not None:
            return list(_SIDES.values())
        return [_TEXT, *(text_inputs for _, text_inputs, _ in _heads(self))]

    def state_rows(self, device: ServingDevice) -> int:
        """The most rows of hidden states, which are large: those that a plan takes at every length."""
        rows = [self.encoder.rows_at(length) for length in _buckets(self)] if self.encoder.profiles else []
        return min([device.max_batch_size, *rows])

    def max_masks(self, device: ServingDevice) -> int:
        """The most masks of one text: a batch has 256 MB of logits."""
        most = min(MAX_LOGITS // (device.max_batch_size * self.spec.vocab_size), self.encoder.max_masks)
        return 1 << max(0, most.bit_length() - 1)


def length_buckets(max_length: int, shortest: int = _SHORTEST) -> list[int]:
    """The lengths that rows are padded to: four for each power of two, which means 10 % of padding on average."""
    steps = (quarter << power for power in range(1, 24) for quarter in (4, 5, 6, 7))
    inner = {length for length in steps if length % 8 == 0 and shortest <= length < max_length}
    return [*sorted(inner), max_length]


def all_configs(serving: Serving, device: ServingDevice) -> dict[str, Config]:
    """Name of a model -> its configuration for one kind of device."""
    models = [_tokenizer(serving, device), *_encoders(serving, device)]
    ensembles: list[Config] = []
    outputs = serving.encoder.output_names
    if "embedding_finished" in outputs:
        models.append(_embed_output(serving, device))
        ensembles += [
            _ensemble(serving, device, "gte_embed", _TEXT, models[-1]),
            _fast_ensemble(serving, device, "gte_embed_fast", _TEXT),
            _fast_ensemble(serving, device, "gte_embed_ids", None),
        ]
    if HIDDEN in outputs:
        ensembles.append(_token_ensemble(serving, device))
    for name, text_inputs, output in _heads(serving):
        models.append(output(serving, device))
        ensembles.append(_ensemble(serving, device, name, text_inputs, models[-1]))
        if "TEXT" not in {tensor["name"] for tensor in models[-1]["input"]}:
            ensembles.append(_ensemble(serving, device, f"{name}_ids", None, models[-1]))
    if serving.spec.multi_vector is not None:
        models.append(_multi_vector_output(serving, device))
        ensembles += [
            _ensemble(serving, device, name, wiring, models[-1])
            for name, wiring in (*_SIDES.items(), ("gte_multi_vector_ids", None))
        ]
    if serving.spec.task == "hybrid":
        halves = [model for model in models if model["name"] in ("gte_embed_output", "gte_sparse_output")]
        ensembles += [
            _ensemble(serving, device, name, wiring, *halves)
            for name, wiring in (("gte_hybrid", _TEXT), ("gte_hybrid_ids", None))
        ]
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
        "hybrid": [("gte_sparse", _TEXT, _sparse_output)],
        "multi-vector": [],
    }
    return heads[spec.task]


# Input of an ensemble -> input of the tokenizer.
_LIMITS = {"TRUNCATION": "TRUNCATION", "MAX_LENGTH": "MAX_LENGTH"}
_TEXT = {"TEXT": "TEXT", "PROMPT": "PROMPT", "PROMPT_NAME": "PROMPT_NAME", **_LIMITS}
_PLAIN_TEXT = {"TEXT": "PLAIN_TEXT", **_LIMITS}
_MASKED_TEXT = {"TEXT": "MASKED_TEXT", **_LIMITS}
_PAIR = {"TEXT": "FIRST", "TEXT_PAIR": "SECOND", "PROMPT": "PROMPT", "PROMPT_NAME": "PROMPT_NAME", **_LIMITS}
_SIDES = {
    served.name: {**_TEXT, "TEXT": side, "SKIP_WORDS": "SKIP_WORDS"}
    for served, side in ((QUERY_VECTORS_SERVED, "QUERY"), (DOCUMENT_VECTORS_SERVED, "DOCUMENT"))
}
_LISTS = ("TARGETS", "IGNORE_LABELS", "SKIP_WORDS")
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
    names = dict.fromkeys(name for wiring in serving.text_inputs for name in wiring.values())
    parameters = {
        "length_buckets": ",".join(map(str, _buckets(serving))),
        # Requests for a plan are joined and padded by the model in front of it.
        "spare_tokens": str(device.spare_tokens if encoder.backend == "onnxruntime" else 0),
        "max_rows": str(device.max_batch_size),
        "threads": "1" if device.tokenizers > 1 else "0",
    }
    if masked:
        parameters["max_masks"] = str(serving.max_masks(device))
    tokenizing = dataclasses.replace(device, max_batch_size=max(_TOGETHER, device.max_batch_size))
    return _python_model(
        serving,
        tokenizing,
        TOKENIZER,
        inputs=[_option(name) for name in names],
        outputs=[_tensor(tensor) for tensor in serving.tokenized],
        parameters=parameters,
        count=device.tokenizers,
    )


def _encoders(serving: Serving, device: ServingDevice) -> list[Config]:
    """The models that run the encoder: the graph, or the plan and the Python models in front of it."""
    if serving.encoder.backend == "onnxruntime":
        return [_graph(serving, device)]
    hidden = [tensor for tensor in serving.encoder.outputs if tensor.name == HIDDEN]
    others = [tensor for tensor in serving.encoder.outputs if tensor.name != HIDDEN]
    models = [_joiner(serving, device, ENCODER, others), _plan(serving, device)]
    if hidden:
        # Hidden states are large, so few rows of them may be joined.
        states = dataclasses.replace(device, max_batch_size=serving.state_rows(device))
        models.append(_joiner(serving, states, TOKEN_ENCODER, hidden))
    return models


def _graph(serving: Serving, device: ServingDevice) -> Config:
    encoder = serving.encoder
    config = {
        **_head(serving, device, ENCODER),
        "backend": "onnxruntime",
        "default_model_filename": encoder.files[device.name],
        "input": [_tensor(tensor) for tensor in encoder.inputs],
        "output": [_tensor(tensor) for tensor in encoder.outputs],
        "instance_group": [{"count": 1, "kind": device.encoder_kind}],
        **_batching(serving, device, waits=True),
        "model_warmup": _warmup(serving, device),
    }
    if device.name == "cpu":
        # The exporter fused the graph already. A memory pattern for every shape would only need memory.
        config["optimization"] = {"graph": {"level": 2}}
        config["parameters"] = _parameters(
            intra_op_thread_count=str(serving.threads), inter_op_thread_count="1", enable_mem_pattern="0"
        )
    else:
        config["parameters"] = _parameters(enable_mem_pattern="0", arena_extend_strategy="1")
    return config


def _joiner(serving: Serving, device: ServingDevice, name: str, outputs: Sequence[TensorSpec]) -> Config:
    """The Python model that joins requests to batches that a profile of the plan takes.

    Triton hands over requests of any lengths (allow_ragged_batch). Of two processes, one prepares a batch while the
    plan runs that of the other.
    """
    encoder = serving.encoder
    profiles = [[profile.min[1], profile.max[1], profile.max[0]] for profile in encoder.profiles if profile.min[0] == 1]
    return _python_model(
        serving,
        device,
        name,
        inputs=[{**_tensor(tensor), "allow_ragged_batch": True} for tensor in encoder.inputs],
        outputs=[_tensor(tensor) for tensor in outputs],
        parameters={
            "profiles": json.dumps(profiles),
            "plan_inputs": json.dumps({tensor.name: tensor.dtype for tensor in encoder.plan_inputs}),
            "plan_outputs": ",".join(tensor.name for tensor in encoder.plan_outputs),
            "max_masks": str(encoder.max_masks),
            "spare_tokens": str(device.spare_tokens),
        },
        count=2,
    )


def _plan(serving: Serving, device: ServingDevice) -> Config:
    """The plan. It takes full shapes (max_batch_size 0), because the Python model in front of it makes the batches."""
    encoder = serving.encoder
    instances: Config = {"count": 1, "kind": device.encoder_kind}
    if len(encoder.profiles) > 1:
        instances["profile"] = [str(i) for i in range(len(encoder.profiles))]
    return {
        "name": PLAN,
        "max_batch_size": 0,
        "version_policy": {"latest": {"num_versions": 1}},
        "backend": "tensorrt",
        "default_model_filename": encoder.files[device.name],
        "input": [_full_tensor(tensor) for tensor in encoder.plan_inputs],
        "output": [_full_tensor(tensor) for tensor in encoder.plan_outputs],
        "instance_group": [instances],
        # Each profile has a context; by default each context reserves the memory of the largest profile.
        "parameters": _parameters(execution_context_allocation_strategy="ON_PROFILE_CHANGE"),
        "model_warmup": _plan_warmup(serving),
    }


@dataclass(frozen=True)
class WarmupTensor:
    """An input of a warm-up request.

    Args:
        name: the name of the tensor.
        dtype: its data type.
        shape: its shape; without the batch axis if Triton batches.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def file(self) -> str:
        """The name of the file with the data, in the folder warmup. Zeros would be a row without any token."""
        return f"{self.name}_{'x'.join(map(str, self.shape))}"


def warmup_tensors(serving: Serving) -> list[list[WarmupTensor]]:
    """The inputs of each warm-up request for the model that has the graph or plan.

    A graph gets one row of the shortest and of the longest length, which Triton repeats. A plan gets the largest shape
    of each profile, so that missing memory shows before the server is ready.
    """
    encoder = serving.encoder
    if encoder.backend == "onnxruntime":
        buckets = _buckets(serving)
        rows_and_lengths = [(1, buckets[0]), (1, buckets[-1])]
    else:
        longest = serving.spec.max_length
        rows_and_lengths = [(profile.max[0], min(profile.max[1], longest)) for profile in encoder.profiles]
    found = []
    for rows, length in rows_and_lengths:
        sizes = {"batch": rows, "sequence": length}
        tensors = encoder.plan_inputs or encoder.inputs
        shapes = [tuple(size if isinstance(size, int) else sizes.get(size, 1) for size in t.shape) for t in tensors]
        found.append(
            [
                WarmupTensor(tensor.name, tensor.dtype, shape if encoder.plan_inputs else shape[1:])
                for tensor, shape in zip(tensors, shapes, strict=True)
            ]
        )
    return found


def _warmup(serving: Serving, device: ServingDevice) -> list[Config]:
    """Warm-up with the shortest and the longest shape. On a GPU the longest is a full batch, to test its memory."""
    full = device.max_batch_size if device.name == "gpu" else 1
    shortest, longest = warmup_tensors(serving)
    return [_warmup_request("shortest", 1, shortest), _warmup_request("longest", full, longest)]


def _plan_warmup(serving: Serving) -> list[Config]:
    return [_warmup_request(f"profile {i}", 0, tensors) for i, tensors in enumerate(warmup_tensors(serving))]


def _warmup_request(name: str, rows: int, tensors: Sequence[WarmupTensor]) -> Config:
    values = {
        tensor.name: {
            "data_type": Word(_DATA_TYPES[tensor.dtype]),
            "dims": list(tensor.shape),
            "input_data_file": tensor.file,
        }
        for tensor in tensors
    }
    inputs = [{"key": key, "value": value} for key, value in values.items()]
    return {"name": name, "batch_size": rows, "inputs": inputs}


def _embed_output(serving: Serving, device: ServingDevice) -> Config:
    pooled = [_tensor(tensor) for tensor in serving.encoder.outputs if tensor.name in _POOLED]
    return _python_model(
        serving,
        device,
        "gte_embed_output",
        inputs=[
            *pooled,
            *(_option(name) for name in ("POOLING", "NORMALIZE", "TRUNCATE_DIM")),
        ],
        outputs=[_new("EMBEDDING", "TYPE_FP32", -1)],
        count=_answering(device),
    )


_POOLED = ("embedding_mean", "embedding_cls")


def _answering(device: ServingDevice) -> int:
    """The number of processes of a model that computes answers: it does less for each text than the tokenizer."""
    return max(1, device.tokenizers // 2)


def _fill_mask_output(serving: Serving, device: ServingDevice) -> Config:
    answers = {"TOKEN": "TYPE_STRING", "TOKEN_ID": "TYPE_INT64", "SCORE": "TYPE_FP32", "SEQUENCE": "TYPE_STRING"}
    return _python_model(
        serving,
        device,
        "gte_fill_mask_output",
        inputs=[
            *_of_encoder(serving, "input_ids", "attention_mask", "logits"),
            _option("TOP_K"),
            _option("TARGETS"),
        ],
        outputs=[
            _new("MASKS", "TYPE_INT32", 1),
            *(_new(name, data_type, -1, -1) for name, data_type in answers.items()),
        ],
        count=_answering(device),
    )


def _rerank_output(serving: Serving, device: ServingDevice) -> Config:
    labels = serving.spec.num_labels
    scores = {**_new("SCORE", "TYPE_FP32", labels), "label_filename": "labels.txt"}
    return _python_model(
        serving,
        device,
        "gte_rerank_output",
        inputs=[*_of_encoder(serving, "logits"), _option("APPLY_SOFTMAX")],
        outputs=[scores, _new("LOGITS", "TYPE_FP32", labels)],
        count=_answering(device),
    )


def _classify_tokens_output(serving: Serving, device: ServingDevice) -> Config:
    columns = {"LABEL": "TYPE_STRING", "SCORE": "TYPE_FP32", "INDEX": "TYPE_INT32", "WORD": "TYPE_STRING"}
    columns |= {"START": "TYPE_INT32", "END": "TYPE_INT32"}
    return _python_model(
        serving,
        device,
        "gte_classify_tokens_output",
        inputs=[
            _new("TEXT", "TYPE_STRING", 1),
            *_of_encoder(serving, "attention_mask", "logits"),
            *(_option(name) for name in ("TRUNCATION", "MAX_LENGTH", "AGGREGATION_STRATEGY", "IGNORE_LABELS")),
        ],
        outputs=[
            _new("ENTITIES", "TYPE_INT32", 1),
            *(_new(name, data_type, -1) for name, data_type in columns.items()),
            _new("TOKENS", "TYPE_INT32", 1),
            _new("LOGITS", "TYPE_FP32", -1, serving.spec.num_labels),
        ],
        count=_answering(device),
    )


def _multi_vector_output(serving: Serving, device: ServingDevice) -> Config:
    return _python_model(
        serving,
        device,
        "gte_multi_vector_output",
        inputs=[*_of_encoder(serving, KEPT_TOKENS, TOKEN_VECTORS), _option("NORMALIZE")],
        outputs=[
            _new("TOKENS", "TYPE_INT32", 1),
            _new(SERVED_VECTORS, "TYPE_FP32", -1, serving.spec.embedding_width),
        ],
        count=_answering(device),
    )


def _sparse_output(serving: Serving, device: ServingDevice) -> Config:
    (weights,) = SparseRequest(serving.spec).graph_outputs(())
    names = (weights,) if serving.spec.task == "sparse" else ("input_ids", "attention_mask", weights)
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
        inputs=[*inputs, _option("MAX_ACTIVE_DIMS")],
        outputs=[
            _new("TOKENS", "TYPE_INT32", 1),
            *(_new(name, data_type, -1) for name, data_type in entries.items()),
        ],
        count=_answering(device),
    )


def _sparse_query_ensemble(serving: Serving, device: ServingDevice, output: Config) -> Config:
    """Tokenizer and stored weights, without the encoder."""
    names = {name: name for name in _QUERY_INPUTS}
    weigh = _step(output["name"], [t["name"] for t in output["input"]], [t["name"] for t in output["output"]])
    tokenize = _step(TOKENIZER, {inner: outer for outer, inner in _TEXT.items()}, names)
    return {
        **_ensemble_head(serving, device, "gte_sparse_query", _TEXT, [_option("MAX_ACTIVE_DIMS")]),
        "output": output["output"],
        "ensemble_scheduling": {"step": [tokenize, weigh]},
        **_cache(serving, _TEXT),
    }


def _ensemble(
    serving: Serving, device: ServingDevice, name: str, wiring: Mapping[str, str] | None, *outputs: Config
) -> Config:
    """Tokenizer, encoder and the Python models that compute the answer; without `wiring` clients send token ids."""
    taken = [tensor for output in outputs for tensor in output["input"]]
    produced = serving.encoder.output_names
    known = {*(tensor.name for tensor in serving.tokenized), *produced, *(wiring or ())}
    options = [tensor for tensor in taken if tensor["name"] not in known]
    outward = _outward_names(serving) if wiring is None else {}
    answers = [
        _step(
            output["name"],
            {each: outward.get(each, each) for each in _names(output["input"])},
            _names(output["output"]),
        )
        for output in outputs
    ]
    return {
        **_ensemble_head(serving, device, name, wiring, options),
        "output": [tensor for output in outputs for tensor in output["output"]],
        "ensemble_scheduling": {
            "step": [*_encoding(serving, wiring, [each for each in _names(taken) if each in produced]), *answers]
        },
        **_cache(serving, wiring),
    }


def _fast_ensemble(serving: Serving, device: ServingDevice, name: str, wiring: Mapping[str, str] | None) -> Config:
    """Embeddings straight from the encoder, which pools and normalises: no Python model computes the answer."""
    names = {"embedding_finished": "EMBEDDING", "embedding_normalized": "NORMALIZED_EMBEDDING"}
    tensors = {tensor.name: tensor for tensor in serving.encoder.outputs}
    return {
        **_ensemble_head(serving, device, name, wiring, []),
        "output": [{**_tensor(tensors[inner]), "name": outer} for inner, outer in names.items()],
        "ensemble_scheduling": {"step": _encoding(serving, wiring, names)},
    }


def _encoding(
    serving: Serving, wiring: Mapping[str, str] | None, outputs: Mapping[str, str] | Iterable[str]
) -> list[Config]:
    """The steps up to the encoder: with `wiring` the tokenizer and the encoder, else the encoder."""
    if wiring is None:
        return [_step(ENCODER, {name: name.upper() for name in serving.encoder.input_names}, outputs)]
    return [_tokenizer_step(serving, wiring), _step(ENCODER, serving.encoder.input_names, outputs)]


def _outward_names(serving: Serving) -> dict[str, str]:
    """Tensor of the tokenizer -> its name for clients that send token ids."""
    return {tensor.name: tensor.name.upper() for tensor in serving.tokenized}


def _names(tensors: Sequence[Config]) -> list[str]:
    return [tensor["name"] for tensor in tensors]


def _token_ensemble(serving: Serving, device: ServingDevice) -> Config:
    """Tokenizer and encoder, which give the state of every token and the inputs of the encoder."""
    encoder = serving.encoder
    tensors = {tensor.name: tensor for tensor in (*encoder.inputs, *encoder.outputs)}
    names = {"INPUT_IDS": "input_ids", "ATTENTION_MASK": "attention_mask", "TOKEN_EMBEDDINGS": HIDDEN}
    if serving.spec.token_types:
        names["TOKEN_TYPE_IDS"] = "token_type_ids"
    outward = {inner: outer for outer, inner in names.items()}
    tokenizer = _tokenizer_step(serving, _TEXT, outward)
    inputs = {name: outward.get(name, name) for name in encoder.input_names}
    model = TOKEN_ENCODER if encoder.backend == "tensorrt" else ENCODER
    rows = dataclasses.replace(device, max_batch_size=serving.state_rows(device))
    return {
        **_ensemble_head(serving, rows, "gte_token_embed", _TEXT, []),
        "output": [{**_tensor(tensors[inner]), "name": outer} for outer, inner in names.items()],
        "ensemble_scheduling": {"step": [tokenizer, _step(model, inputs, {HIDDEN: "TOKEN_EMBEDDINGS"})]},
        **_cache(serving, _TEXT),
    }


def _ensemble_head(
    serving: Serving,
    device: ServingDevice,
    name: str,
    wiring: Mapping[str, str] | None,
    options: Sequence[Config],
) -> Config:
    facts = {
        "version": __version__,
        "precision": serving.precision,
        "mask_token": serving.mask_token,
        "max_masks": serving.max_masks(device) if "mask_positions" in serving.encoder.input_names else None,
        "max_batch_size": device.max_batch_size,
        "max_state_rows": serving.state_rows(device),
        "hidden_states": HIDDEN in serving.encoder.output_names,
        "length_buckets": _buckets(serving),
        "tokenizer": serving.tokenizer,
        "response_cache": serving.response_cache,
    }
    inputs = (
        [{**_tensor(tensor), "name": tensor.name.upper()} for tensor in serving.tokenized]
        if wiring is None
        else [_new("TEXT", "TYPE_STRING", 1), *(_option(outer) for outer in wiring if outer != "TEXT")]
    )
    return {
        **_head(serving, device, name),
        "platform": "ensemble",
        "input": [*inputs, *options],
        "parameters": _parameters(gte_deploy_spec=_spec_json(serving), gte_deploy=json.dumps(facts)),
    }


def _tokenizer_step(serving: Serving, wiring: Mapping[str, str], names: Mapping[str, str] | None = None) -> Config:
    outputs = {tensor.name: (names or {}).get(tensor.name, tensor.name) for tensor in serving.tokenized}
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
        "max_batch_size": device.max_batch_size,
        "version_policy": {"latest": {"num_versions": 1}},
    }


def _batching(serving: Serving, device: ServingDevice, *, waits: bool = False) -> Config:
    """Join waiting requests, and refuse those that would wait too long, if the options ask for it.

    The encoder `waits` a little for more requests; in a Python model that would only delay the answers.

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
    if waits:
        batching["max_queue_delay_microseconds"] = device.queue_delay_us
        if device.preferred_batch_sizes:
            batching["preferred_batch_size"] = list(device.preferred_batch_sizes)
    return {"dynamic_batching": batching}


def _cache(serving: Serving, wiring: Mapping[str, str] | None) -> Config:
    """The key of the cache has the bytes of the inputs, without their shapes and without the requested outputs.

    So ensembles of token ids use no cache, and neither does gte_embed_fast, of which clients ask for one output.
    """
    return {"response_cache": {"enable": True}} if serving.response_cache and wiring is not None else {}


def _buckets(serving: Serving) -> list[int]:
    """The lengths of rows; for a plan those that a profile takes."""
    encoder = serving.encoder
    shortest = min((profile.min[1] for profile in encoder.profiles), default=_SHORTEST)
    buckets = length_buckets(serving.spec.max_length, max(shortest, _SHORTEST))
    return [length for length in buckets if not encoder.profiles or encoder.rows_at(length)]


def _spec_json(serving: Serving) -> str:
    return json.dumps(dataclasses.asdict(serving.spec), ensure_ascii=False)


def _of_encoder(serving: Serving, *names: str) -> list[Config]:
    tensors = {tensor.name: tensor for tensor in (*serving.tokenized, *serving.encoder.outputs)}
    return [_tensor(tensors[name]) for name in names]


def _tensor(tensor: TensorSpec) -> Config:
    """A tensor of a model that batches: `dims` leave the batch axis out."""
    full = _full_tensor(tensor)
    return {**full, "dims": full["dims"][1:]}


def _full_tensor(tensor: TensorSpec) -> Config:
    dims = [size if isinstance(size, int) else -1 for size in tensor.shape]
    return {"name": tensor.name, "data_type": Word(_DATA_TYPES[tensor.dtype]), "dims": dims}


def _option(name: str) -> Config:
    size = -1 if name in _LISTS else 1
    return {**_new(name, _OPTION_TYPES.get(name, "TYPE_STRING"), size), "optional": True}


def _new(name: str, data_type: str, *sizes: int) -> Config:
    return {"name": name, "data_type": Word(data_type), "dims": list(sizes)}


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
