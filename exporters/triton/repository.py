"""Exports a bundle to a model repository for Triton Inference Server.

Clients call ensembles: gte_tokenizer (Python) computes padded token ids, gte_encoder (ONNX Runtime or TensorRT) runs
the model, and a Python model computes the same answers as `gte_deploy.load`. docs/triton.md describes the tensors.
"""

import dataclasses
import importlib.util
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gte_deploy._version import __version__
from gte_deploy.bundle.download import resolve_model
from gte_deploy.bundle.inspection import check_graphs, inspect_onnx
from gte_deploy.bundle.manifest import (
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    is_bundle,
    open_bundle,
    read_manifest,
    require_manifest,
)
from gte_deploy.bundle.signature import TrustedKeys
from gte_deploy.core.cpus import available_cpus
from gte_deploy.core.errors import BundleError, ConfigError, ExportError, InputError, ParityError, require_modules
from gte_deploy.core.formats import check_version
from gte_deploy.core.hub import HubModel
from gte_deploy.core.install import install_command
from gte_deploy.core.options import options_of
from gte_deploy.core.spec import POOLINGS, ModelSpec, TensorSpec
from gte_deploy.exporters.bundle.writer import hash_files, publish, staging, write_manifest
from gte_deploy.exporters.export import default_output, export
from gte_deploy.exporters.job import Progress
from gte_deploy.exporters.options import make_request, refuse_options_not_for
from gte_deploy.exporters.targets.tensorrt.profiles import MAX_MASKS
from gte_deploy.exporters.triton.configs import (
    ENCODER,
    PLAN,
    Config,
    DeviceName,
    Encoder,
    Serving,
    ServingDevice,
    all_configs,
    default_device,
    to_pbtxt,
    warmup_tensors,
)
from gte_deploy.exporters.triton.options import TritonOptions
from gte_deploy.exporters.triton.python_models import write_python_model
from gte_deploy.exporters.triton.readme import dockerfile, readme
from gte_deploy.models import locate
from gte_deploy.models.multi_vector_modules import limited
from gte_deploy.tasks import TASKS
from gte_deploy.tasks.base import EMBEDDING, HIDDEN
from gte_deploy.tasks.embed import EmbeddingRequest
from gte_deploy.tasks.pooling import pool
from gte_deploy.text.fingerprint import fingerprint
from gte_deploy.text.tokenization import load_tokenizer

FORMAT = "gte-deploy-triton-repository"
FORMAT_VERSION = 1
_BUNDLE = "bundle"  # temporary folder for the bundle of a checkpoint that is exported first
_MAX_DIFFERENCE = 1e-5
_MAX_MASKED_ROWS = 32


@dataclass(frozen=True)
class RepositoryResult:
    """A finished repository.

    Args:
        path: the folder of the repository.
        ensembles: the models that clients may call.
        devices: the devices that it can run on, the default first.
        files: path relative to the repository -> size and hash; every file except the manifest.
        checked: whether the configurations were checked, which needs tritonclient.
    """

    path: Path
    ensembles: tuple[str, ...]
    devices: tuple[DeviceName, ...]
    files: Mapping[str, FileEntry]
    checked: bool


def export_repository(
    model: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    options: TritonOptions | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
    **given: Any,
) -> RepositoryResult:
    """Write a model repository.

    Args:
        model: a bundle, or a model that `export` takes, which is exported to a bundle first.
        output: folder of the repository; None for one in the working directory, named after model and precision.
        options: the options for serving.
        force: whether to replace an existing repository.
        progress: called with one line at every step.
        **given: single fields of `TritonOptions`; and, if `model` is not a bundle, options of `export`.

    Raises:
        InputError: an argument is out of range.
        BundleError: the bundle is damaged, or has no graph or plan that Triton can run.
        SignatureError: trusted keys are given, and none of them has signed the bundle.
        ParityError: the encoder's graph differs from the bundle's.
        OutputExistsError: the output must not be replaced.
        ExportError: the configurations do not pass their checks.
        MissingDependencyError: the [export] extra is not installed.
    """
    own = {name: value for name, value in given.items() if name in options_of(TritonOptions)}
    export_options = {name: value for name, value in given.items() if name not in own}
    options = dataclasses.replace(options or TritonOptions(), **own)
    options.check()
    engine = options.engine
    trusted = None if options.trusted_keys is None else TrustedKeys(options.trusted_keys)
    if options.engine is None and isinstance(locate(model), HubModel):
        model = resolve_model(model, trusted=trusted)  # a bundle or a checkpoint
    served = _served(model if engine is None else engine, trusted)
    _check_arguments(model, served, options, export_options)
    report = progress or (lambda line: None)
    path = Path(output if output is not None else _default_output(model, served, export_options))
    destination = Path(os.path.realpath(path))
    with staging(destination, force=force, files_of=repository_files) as folder:
        bundle = served or export(model, folder / _BUNDLE, progress=report, **export_options).path
        manifest = open_bundle(bundle, trusted)
        check_graphs(bundle, manifest)
        if any(graph.half_weights for graph in manifest.graphs.values()):
            raise ExportError(
                f"{bundle} stores its weights in float16 and converts them when it is opened, which Triton would do in "
                "every request. Give the checkpoint instead; for the built-in model, leave the bundle out."
            )
        if manifest.missed_bounds:
            report(f"the bundle misses {len(manifest.missed_bounds)} bounds; the README of the repository lists them")
        report("write the encoder")
        encoder = _write_encoder(bundle, manifest, folder, options)
        _require_head(encoder, manifest.spec, bundle)
        spec, devices = _limits(encoder, manifest.spec, options)
        tokenizer = load_tokenizer(bundle)
        serving = Serving(
            spec=spec,
            precision=manifest.precision,
            encoder=encoder,
            mask_token=tokenizer.mask_token,
            tokenizer=fingerprint(bundle, tokenizer),
            version=options.model_version,
            max_queue_size=options.max_queue_size,
            queue_timeout_s=options.queue_timeout_s,
            threads=options.threads or available_cpus(),
            response_cache=options.response_cache,
        )
        report("write the models and their configurations")
        configs: dict[DeviceName, dict[str, Config]] = {device.name: all_configs(serving, device) for device in devices}
        _write_models(folder, bundle, serving, configs)
        _write_documents(folder, bundle, manifest, serving, configs)
        shutil.rmtree(folder / _BUNDLE, ignore_errors=True)
        checked = _check(folder, report)
        files = hash_files(folder)
        write_manifest(folder, _manifest_json(manifest, files))
        report(f"rename to {path}")
        publish(folder, destination, force=force, files_of=repository_files)
    models = configs[devices[0].name].values()
    return RepositoryResult(
        path=path,
        ensembles=tuple(config["name"] for config in models if config.get("platform") == "ensemble"),
        devices=tuple(configs),
        files=files,
        checked=checked,
    )


def repository_files(folder: Path) -> set[str]:
    """The files that the manifest of a repository names.

    Raises:
        BundleError: `export_repository` did not write the folder, or that of a newer gte-deploy did.
    """
    file = folder / MANIFEST_NAME
    try:
        data = json.loads(file.read_bytes())
        is_ours, version, files = data["format"] == FORMAT, data["format_version"], set(data["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(f"{file} is not the manifest of a {FORMAT}.") from error
    if not is_ours:
        raise BundleError(f"{file} is not the manifest of a {FORMAT}.")
    check_version(file, version, (FORMAT_VERSION,), error=BundleError, advice="Export the repository again.")
    return files


def _served(given: str | os.PathLike[str] | None, trusted: TrustedKeys | None) -> Path | None:
    """Return the bundle that is served as it is; None for a model that is exported first.

    Raises:
        SignatureError: trusted keys are given, and none of them has signed it.
    """
    path = None if given is None else Path(given)
    if trusted is not None:
        require_manifest(path, given or "the built-in model")
    elif path is None or not is_bundle(path):
        return None
    return path


def _check_arguments(
    model: Any, served: Path | None, options: TritonOptions, export_options: Mapping[str, Any]
) -> None:
    require_modules("onnx", "onnxruntime", extra="export")
    if options.engine is not None and model is not None:
        raise InputError("engine is a complete bundle with its own tokenizer; give engine or a model, not both")
    if served is None and options.engine is not None:
        raise BundleError(f"{options.engine} is not a bundle. Write one with gte-export --format trt.")
    if served is not None and export_options:
        raise InputError(
            f"{served} is a bundle already; {', '.join(export_options)} applies only when a checkpoint is exported"
        )
    if served is None:
        request = make_request(**export_options)
        refuse_options_not_for("triton", request)
        if "onnxruntime" not in request.target.engines:
            raise InputError(f"Triton serves graphs for ONNX Runtime, but target {request.target.name} has none")


def _default_output(
    model: str | os.PathLike[str] | None, bundle: Path | None, export_options: Mapping[str, Any]
) -> Path:
    if bundle is not None:
        manifest = read_manifest(bundle)
        return default_output(_name(manifest), format="triton", precision=manifest.precision)
    return default_output(model, format="triton", precision=make_request(**export_options).precision)


def _write_encoder(bundle: Path, manifest: Manifest, folder: Path, options: TritonOptions) -> Encoder:
    from gte_deploy.exporters.triton.graph import tensor_specs

    version = str(options.model_version)
    if options.engine is not None:
        return _write_plan(bundle, manifest, folder / PLAN / version)
    folder = folder / ENCODER / version
    folder.mkdir(parents=True)
    if "onnxruntime" not in manifest.graphs:
        raise BundleError(f"{bundle} holds no graph for ONNX Runtime; serve its plan with --engine {bundle}.")
    # INT8 graphs have operators that only a CPU has, and graphs for CUDA have operators that a CPU lacks.
    files: dict[DeviceName, str] = {}
    if manifest.target == "cuda" or not manifest.precision.startswith("int"):
        files["gpu"] = "model.onnx"
    if manifest.target == "cpu":
        files["cpu"] = "model.onnx"
    for name in dict.fromkeys(files.values()):
        _write_graph(bundle / manifest.graphs["onnxruntime"].path, folder / name, manifest)
    inputs, outputs = tensor_specs(folder / next(iter(files.values())))
    return Encoder(
        backend="onnxruntime",
        files=files,
        inputs=inputs,
        outputs=outputs,
    )


def _require_head(encoder: Encoder, spec: ModelSpec, bundle: Path) -> None:
    """Refuse an encoder without the head of the model's task.

    Raises:
        ExportError: the message says what is missing.
    """
    if spec.task == "embed":
        return
    (head,) = (name for name in TASKS[spec.task].outputs if name not in (HIDDEN, EMBEDDING))
    if head not in {tensor.name for tensor in (encoder.plan_outputs or encoder.outputs)}:
        raise ExportError(f"{bundle} is for task {spec.task}, but its encoder has no output {head}. Export it again.")
    if spec.task == "fill-mask" and "mask_positions" not in encoder.input_names:
        raise ExportError(
            f"{bundle} computes the logits of every token, which no server should send. Export the checkpoint with "
            "--logits masked."
        )


def _write_graph(source: Path, target: Path, manifest: Manifest) -> None:
    from gte_deploy.exporters.triton.graph import write_graph

    write_graph(source, target, manifest.spec)
    for name in inspect_onnx(source).external_files:
        if not (target.parent / name).exists():
            shutil.copyfile(source.parent / name, target.parent / name)
    if manifest.target == "cpu":
        _require_equal(source, target, manifest.spec)


def _require_equal(source: Path, written: Path, spec: ModelSpec) -> None:
    """Run the bundle's graph and the written graph on the same rows, and compare.

    Raises:
        ParityError: an output differs.
    """
    import onnxruntime

    from gte_deploy.backends.base import Batch
    from gte_deploy.backends.onnxruntime import OnnxBackend

    generator = np.random.default_rng(0)
    ids = generator.integers(0, spec.vocab_size, (3, 8))
    mask = (np.arange(8) < np.array([[8], [5], [1]])).astype(np.int64)
    by_row = np.array([[1, 7], [4, 2], [0, 0]])
    masked = spec.task == "fill-mask"
    pairs = np.stack([np.repeat(np.arange(3), 2), by_row.reshape(-1)], axis=1) if masked else None
    own = TASKS[spec.task]
    names = [name for name in (own.answers if spec.multi_vector else own.outputs) if name != EMBEDDING]
    types = generator.integers(0, spec.type_vocab_size, ids.shape) if spec.token_types else None
    backend = OnnxBackend(source, spec, num_threads=1)
    try:
        names += [name for name in (EMBEDDING,) if name in backend.outputs]
        expected = backend.run(Batch(ids, mask, pairs, types), names)
    finally:
        backend.close()
    if spec.multi_vector is None:
        expected |= _expected_embeddings(expected, mask, spec)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # as in the server
    session = onnxruntime.InferenceSession(str(written), options, providers=["CPUExecutionProvider"])
    feed = {"input_ids": ids, "attention_mask": mask, **({"mask_positions": by_row} if masked else {})}
    feed |= {} if types is None else {"token_type_ids": types}
    found = {name: np.asarray(value) for name, value in zip(expected, session.run(list(expected), feed), strict=True)}
    for name, values in expected.items():
        difference = np.abs(found[name].reshape(values.shape) - values).max() / max(1.0, np.abs(values).max())
        if not difference <= _MAX_DIFFERENCE:
            raise ParityError(
                f"{written.name} differs from {source} by {difference:.2g} in {name}; {_MAX_DIFFERENCE} is allowed"
            )


def _expected_embeddings(
    given: dict[str, NDArray[np.float32]], mask: NDArray[np.int64], spec: ModelSpec
) -> dict[str, NDArray[np.float32]]:
    """The embeddings that the written graph should give; `given` loses the pooled states, which it has renamed."""
    own = given.pop(EMBEDDING, None)
    pooled = {f"embedding_{kind}": pool(given[HIDDEN], mask, kind) for kind in POOLINGS}
    if spec.embedding_size is not None:  # Dense modules follow the model's own pooling
        assert own is not None
        pooled = {f"embedding_{spec.pooling}": own}
    plain, scaled = (
        EmbeddingRequest(spec, spec.pooling, normalize=normalize, truncate_dim=spec.truncate_dim)
        for normalize in (False, True)
    )
    states = pooled[f"embedding_{spec.pooling}"]
    return {**pooled, "embedding_finished": plain.finished(states), "embedding_normalized": scaled.finished(states)}


def _write_plan(bundle: Path, manifest: Manifest, folder: Path) -> Encoder:
    plan = manifest.plan
    if plan is None:
        raise BundleError(f"{bundle} holds no TensorRT plan. Write one with gte-export --format trt.")
    if plan.variant != "tensorrt":
        raise BundleError(
            f"{bundle} holds a {plan.variant} engine, but Triton runs only ordinary TensorRT's. Build it with that."
        )
    if plan.padding_free:
        raise BundleError(
            f"{bundle} holds a padding-free engine, but the repository's models send padded batches. Export it without "
            "--padding remove."
        )
    folder.mkdir(parents=True)
    shutil.copyfile(bundle / plan.path, folder / "model.plan")
    return Encoder(
        backend="tensorrt",
        files={"gpu": "model.plan"},
        inputs=tuple(_input_by_row(tensor) for tensor in plan.inputs),
        outputs=tuple(_outputs_by_row(plan.outputs, manifest.spec)),
        profiles=plan.profiles,
        max_masks=MAX_MASKS,
        plan_inputs=plan.inputs,
        plan_outputs=plan.outputs,
    )


def _input_by_row(tensor: TensorSpec) -> TensorSpec:
    """An input of gte_encoder, which takes mask positions by row, and 64-bit integers whatever the plan takes."""
    shape = ("batch", "masks") if tensor.name == "mask_positions" else tensor.shape
    return TensorSpec(tensor.name, "int64", shape)


def _outputs_by_row(given: Sequence[TensorSpec], spec: ModelSpec) -> Iterator[TensorSpec]:
    """The outputs of gte_encoder: those of the plan, mask logits by row, and the embeddings that it computes.

    A plan of answers alone has embeddings only if they are the answer; a multi-vector model has those of tokens.
    """
    if spec.multi_vector is not None:
        yield from (tensor for tensor in given if tensor.name != HIDDEN)
        return
    pooled = [tensor for tensor in given if tensor.name == EMBEDDING]
    for tensor in given:
        if tensor.name == "logits" and spec.task == "fill-mask":
            yield dataclasses.replace(tensor, shape=("batch", "masks", spec.vocab_size))
        elif tensor not in pooled:
            yield tensor
    if not pooled and HIDDEN not in {tensor.name for tensor in given}:
        return
    # A plan that pools gives only its own pooling.
    kinds = [spec.pooling] if pooled or spec.embedding_size is not None else list(POOLINGS)
    kept = min(spec.truncate_dim or spec.embedding_width, spec.embedding_width)
    widths = {f"embedding_{kind}": spec.embedding_width for kind in kinds}
    for name, width in {**widths, "embedding_finished": kept, "embedding_normalized": kept}.items():
        yield TensorSpec(name, "float32", ("batch", width))


def _limits(encoder: Encoder, spec: ModelSpec, options: TritonOptions) -> tuple[ModelSpec, list[ServingDevice]]:
    """The spec with the longest text to serve, and the devices with the batch sizes that the encoder takes."""
    size = options.max_batch_size
    if encoder.profiles:
        lengths = [min(profile.max[1], spec.max_length) for profile in encoder.profiles]
        served = [length for length in lengths if encoder.rows_at(length)]
        if not served:
            raise InputError(
                f"no profile of the plan takes a single text: {', '.join(map(str, encoder.profiles))}. Build it with "
                "profiles that begin at one row."
            )
        spec = _limited(spec, max(served))
        most = max(encoder.rows_at(length) for length in served)
        # The logits of masks need much memory, so fill-mask has fewer rows.
        size = size or min(most, _MAX_MASKED_ROWS if spec.task == "fill-mask" else most)
    return spec, [default_device(name, size, options.tokenizers) for name in encoder.files]


def _limited(spec: ModelSpec, longest: int) -> ModelSpec:
    """The spec of a model whose plan takes texts of at most `longest` tokens."""
    try:
        sides = None if spec.multi_vector is None else limited(spec.multi_vector, longest)
    except ConfigError as error:
        raise ExportError(f"the profiles of the plan take {longest:,} tokens; {error}") from error
    return dataclasses.replace(spec, max_length=longest, multi_vector=sides)


def _write_models(
    folder: Path, bundle: Path, serving: Serving, configs: Mapping[DeviceName, Mapping[str, Config]]
) -> None:
    default = next(iter(configs))
    for name, config in configs[default].items():
        version = folder / name / str(serving.version)
        version.mkdir(parents=True, exist_ok=True)
        (folder / name / "config.pbtxt").write_text(to_pbtxt(config), encoding="utf-8")
        if "cpu" in configs:
            (folder / name / "configs").mkdir()
            (folder / name / "configs" / "cpu.pbtxt").write_text(to_pbtxt(configs["cpu"][name]), encoding="utf-8")
        if config.get("backend") == "python":
            write_python_model(name, version, bundle)
        if name == "gte_sparse_query_output":
            assert serving.spec.sparse is not None and serving.spec.sparse.query_weights is not None
            shutil.copyfile(bundle / serving.spec.sparse.query_weights, version / serving.spec.sparse.query_weights)
        elif config.get("platform") == "ensemble":
            (version / ".keep").touch()  # Triton needs the folder, but many tools do not copy empty folders
        if any("label_filename" in tensor for tensor in config["output"]):
            labels = (serving.spec.id2label.get(i, str(i)) for i in range(serving.spec.num_labels))
            (folder / name / "labels.txt").write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
    _write_warmup(folder / serving.encoder.model_with_file / "warmup", serving)


def _write_warmup(folder: Path, serving: Serving) -> None:
    folder.mkdir()
    for request in warmup_tensors(serving):
        for tensor in request:
            # The same token everywhere and no padding; masks are at the first token, and token types are 0.
            values = np.full(tensor.shape, tensor.name in ("input_ids", "attention_mask"), dtype=tensor.dtype)
            (folder / tensor.file).write_bytes(values.tobytes())


def _write_documents(
    folder: Path,
    bundle: Path,
    manifest: Manifest,
    serving: Serving,
    configs: Mapping[DeviceName, Mapping[str, Config]],
) -> None:
    (folder / "README.md").write_text(
        readme(serving, configs, _name(manifest), manifest.missed_bounds), encoding="utf-8"
    )
    (folder / "Dockerfile").write_text(dockerfile(), encoding="utf-8")
    for name in ("report.json", "report.html"):  # the comparison of the encoder with PyTorch
        if (bundle / name).is_file():
            shutil.copyfile(bundle / name, folder / name)


def _check(folder: Path, report: Progress) -> bool:
    """Check the configurations; return False if tritonclient is missing.

    Raises:
        ExportError: the configurations have problems.
    """
    if importlib.util.find_spec("tritonclient") is None:
        report(f"the configurations are not checked; to check them: {install_command('triton')}, then gte-export check")
        return False
    from gte_deploy.exporters.triton.checks import check_repository

    report("check the configurations")
    if problems := check_repository(folder):
        raise ExportError("the repository does not pass its own checks: " + "; ".join(problems))
    return True


def _manifest_json(manifest: Manifest, files: Mapping[str, FileEntry]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "gte_deploy": __version__,
        "spec": dataclasses.asdict(manifest.spec),
        "precision": manifest.precision,
        "source": dict(manifest.source),
        "missed_bounds": list(manifest.missed_bounds),
        "files": {name: dataclasses.asdict(entry) for name, entry in files.items()},
    }


def _name(manifest: Manifest) -> str:
    return manifest.source.get("name", "gte").rpartition("/")[2]
