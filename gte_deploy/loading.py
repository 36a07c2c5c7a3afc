"""`load`: from a path or name to a Model."""

import atexit
import contextlib
import functools
import importlib.util
import io
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, ParamSpec

import numpy as np
from numpy.typing import NDArray

from gte_deploy.backends.base import Backend
from gte_deploy.backends.choice import ASKED, ENGINE_OF, EngineChoice, choose_engine, is_for_gpus, streams_of
from gte_deploy.backends.devices import parse_device
from gte_deploy.backends.graphs import GraphFiles, verified_graphs
from gte_deploy.backends.joining import JoiningBackend
from gte_deploy.backends.onnxruntime import OnnxBackend, ThroughTensorRT
from gte_deploy.backends.stream_plan import StreamPlan, stream_count
from gte_deploy.backends.streams import StreamedBackend
from gte_deploy.bundle.download import resolve_model
from gte_deploy.bundle.manifest import (
    MANIFEST_NAME,
    GraphEntry,
    Manifest,
    has_manifest,
    is_bundle,
    read_manifest,
    require_manifest,
)
from gte_deploy.bundle.signature import KeySource, TrustedKeys
from gte_deploy.bundle.verified import VerifiedBundle
from gte_deploy.core.calls import JoinOptions
from gte_deploy.core.cpus import MAX_THREADS
from gte_deploy.core.errors import BackendError, BundleError, CheckpointError, GteDeployError, InputError
from gte_deploy.core.forking import in_use
from gte_deploy.core.options import check_choice, check_flags
from gte_deploy.core.own_cache import own_cache_folder, require_own
from gte_deploy.core.spec import (
    BACKENDS,
    LOAD_PRECISIONS,
    TASK_ALIASES,
    BackendName,
    ComputePrecision,
    LoadPrecision,
    ModelSpec,
    Profile,
    TaskName,
    is_packed,
)
from gte_deploy.model import Model, Origin
from gte_deploy.models import BUILTIN_EMBED_NAME, BUILTIN_NAMES, builtin_bundle, builtin_path, require_checkpoint
from gte_deploy.tasks import TASKS
from gte_deploy.text.batching import BatchLimits
from gte_deploy.text.inputs import MAX_BATCH_SIZE, MAX_BATCH_TOKENS, check_integer
from gte_deploy.text.tokenization import TextTokenizer, load_tokenizer

logger = logging.getLogger(__name__)

# A CPU is busy with few tokens, and small batches waste little padding; a GPU needs many.
_MAX_BATCH_TOKENS = {"cpu": 1024, "cuda": 32_768}
# Masks of one run through ONNX Runtime's TensorRT provider. More masks take several runs.
_MAX_MASKS = 512
_Arguments = ParamSpec("_Arguments")


def _errors_of_files(load: Callable[_Arguments, Model]) -> Callable[_Arguments, Model]:
    """Let an error of the system, of a file that may not be read for example, be one that `load` documents."""

    @functools.wraps(load)
    def loading(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> Model:
        try:
            return load(*args, **kwargs)
        except OSError as error:
            if isinstance(error, GteDeployError):
                raise
            raise CheckpointError(f"the model cannot be read: {error}") from error

    return loading


@_errors_of_files
def load(
    path: str | os.PathLike[str] | None = None,
    *,
    backend: BackendName = "auto",
    precision: LoadPrecision | None = "auto",
    device: str | None = None,
    num_threads: int | None = None,
    max_batch_tokens: int | None = None,
    streams: int | Literal["auto"] = "auto",
    compile: bool = False,
    join_calls: bool | JoinOptions = False,
    task: TaskName | Literal["auto"] = "auto",
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | None = None,
    trusted_keys: Sequence[KeySource] | None = None,
) -> Model:
    """Load a bundle or a checkpoint.

    Args:
        path: a bundle folder, a checkpoint folder, the id of either on the Hugging Face Hub (`owner/name`, or
            `owner/name@revision`), or the name of a model inside the package. None is "gte-en-embed-tiny" for the task
            "embed", and else "gte-en-mlm-tiny". Both are bundles; what only a checkpoint can do, such as backend
            "torch" and other tasks, is done with the checkpoint of the latter.
        backend: "onnx" (ONNX Runtime), "openvino", "tensorrt" and "executorch" run a bundle, "torch" runs a checkpoint.
            For a bundle, "auto" takes its TensorRT engine if that fits GPU and TensorRT, else the engine recorded on
            this machine by `gte-deploy bench --pick`, else the engine that was measured to be faster on similar CPUs.
            `Model.info` names the choice and the reason. "onnx" compiles the graph of a TensorRT bundle again, through
            ONNX Runtime's TensorRT provider.
        precision: precision that the engine computes in, if the bundle leaves the choice: "fp32", or "bf16" with
            openvino on a CPU that has it or with torch on a GPU. "auto", or None, is the precision recorded by
            `gte-deploy bench --pick`; else "bf16" for bundles that were exported and verified for it (`--precision
            bf16`, and `int8` in the parts that are not INT8) where a short measurement finds this CPU faster in it;
            else "fp32".
        device: "cpu", "cuda" or "cuda:N"; by default the GPU for a bundle that was exported for one, else the CPU.
        num_threads: number of CPU threads; by default every CPU that the process may use (affinity and cgroup). With
            torch the number holds for the whole process, see `gte_deploy.backends.torch.TorchBackend`. TensorRT uses
            no CPU threads.
        max_batch_tokens: largest number of tokens in a batch, padding included; by default 1,024 on a CPU and 32,768 on
            a GPU, or as `gte-deploy bench --pick` recorded.
        streams: number of batches of a list of texts that are computed at once, each on its share of the threads; a
            single batch keeps all threads. "auto" takes what `bench --pick` recorded, else what suits the CPUs; 1 is
            one batch after the other. A bundle on onnx or openvino and a CPU can have several. On openvino they take a
            second copy of the weights, so "auto" has one there unless `bench --pick` recorded several.
        compile: whether torch compiles the model during its first batches; only for backend "torch".
        join_calls: whether calls of several threads share batches (docs/processes.md): while one is computed, the texts
            that come meanwhile become the next. `JoinOptions` bounds how many tokens wait. A joined batch has at most
            `max_batch_tokens`, whatever the calls say.
        task: task to load a checkpoint for, one of `spec.TASK_NAMES`; "auto" is the task that it was trained for. A
            bundle has one task, and any other is refused.
        revision: branch, tag or commit on the hub; None is the default branch.
        cache_dir: folder for downloads; None is the Hugging Face cache.
        token: access token for gated and private models; None is HF_TOKEN, or the one of `hf auth login`.
        trusted_keys: public Ed25519 keys in PEM, as paths or as their text: load only a bundle that one of them has
            signed (`gte-deploy sign`). Nothing is parsed before the signature holds. Checkpoints are refused. None
            loads signed and unsigned models alike.

    Raises:
        InputError: an argument is out of range.
        BundleError: the bundle is incomplete or altered; every file is checked before any is loaded.
        SignatureError: no trusted key has signed the bundle as it is.
        CheckpointError, ConfigError: the model is not found, a file cannot be read, or a checkpoint has settings that
            are not supported.
        BackendError: the backend cannot run this model, or not on this device.
        MissingDependencyError: a package is missing; the message names the extra to install.
    """
    if device is not None:
        parse_device(device)
    if num_threads is not None:
        num_threads = check_integer("num_threads", num_threads, 1, MAX_THREADS)
    if max_batch_tokens is not None:
        max_batch_tokens = check_integer("max_batch_tokens", max_batch_tokens, 1, MAX_BATCH_TOKENS)
    check_flags(compile=compile)
    check_choice("backend", backend, BACKENDS)
    if precision is not None:
        check_choice("precision", precision, LOAD_PRECISIONS)
    asked = None if precision == "auto" else precision
    check_choice("task", task, ("auto", *TASKS), TASK_ALIASES)
    wanted = stream_count(streams)
    joins = _join_options(join_calls)
    if path is None and task == "embed":
        path = BUILTIN_EMBED_NAME
    trusted = None if trusted_keys is None else TrustedKeys(trusted_keys)
    folder = resolve_model(path, revision=revision, cache_dir=cache_dir, token=token, trusted=trusted)
    if folder == builtin_bundle() and (compile or _needs_checkpoint(backend, task)):
        folder = builtin_path()
    if trusted is not None:
        require_manifest(folder, folder)
    # The one time that the manifest is read: what a signature was verified of is what is used.
    manifest = read_manifest(folder, trusted) if trusted is not None or is_bundle(folder) else None
    with in_use():
        if manifest is not None:
            _require_for_bundle(folder, manifest, backend, task, compile)
            with contextlib.closing(VerifiedBundle(folder, manifest)) as bundle:
                opened = _open_bundle(bundle, backend, asked, device, num_threads, wanted)
        else:
            _refuse_streams(folder, wanted)
            opened = _open_checkpoint(folder, backend, asked, device or "cpu", num_threads, compile, task)
    engine = opened.backend
    logger.info("%s runs on %s in %s: %s", folder, engine.name, engine.precision, opened.reason)
    options = {
        "backend": engine.name,
        "precision": opened.precision,
        "device": engine.device,
        "num_threads": num_threads,
        "max_batch_tokens": max_batch_tokens,
        "streams": streams,
        "compile": compile,
        "join_calls": join_calls,
        "task": task,
        "trusted_keys": None if trusted is None else trusted.pem,
    }
    # A pickled model of the package is found again where another package lies.
    where = str(path) if path in BUILTIN_NAMES else None if path is None else str(folder.absolute())
    usual = opened.batch_tokens or _MAX_BATCH_TOKENS[parse_device(engine.device)[0]]
    tokens = usual if max_batch_tokens is None else max_batch_tokens
    if joins is not None:
        engine = JoiningBackend(
            engine, opened.spec, BatchLimits(MAX_BATCH_SIZE, tokens, opened.spec.max_length**2), joins
        )
    return Model(
        engine,
        opened.tokenizer,
        opened.spec,
        max_batch_tokens=tokens,
        path=folder,
        backend_reason=opened.reason,
        query_weights=opened.query_weights,
        origin=Origin(load_again, (where, opened.checksum, options), opened.reopen, opened.checksum),
    )


def _join_options(join_calls: object) -> JoinOptions | None:
    """Check the argument `join_calls` of `load`; None for no joining."""
    if isinstance(join_calls, bool):
        return JoinOptions() if join_calls else None
    if isinstance(join_calls, JoinOptions):
        return join_calls
    raise InputError(f"join_calls is {join_calls!r}; expected True, False or gte_deploy.JoinOptions(…)")


def load_again(path: str | None, checksum: str | None, options: Mapping[str, Any]) -> Model:
    """Load a pickled Model again; `checksum` is the checksum of its bundle, None for a checkpoint.

    Raises:
        BundleError: the path holds another bundle now. See also `load`.
    """
    model = load(path, **options)
    found = model.checksum
    if found != checksum:
        model.close()
        raise BundleError(
            f"{path} is not what the pickled model was loaded from: the bundle's checksum is {found}, not {checksum}. "
            "Load it with gte_deploy.load."
        )
    return model


@dataclass(frozen=True)
class _Opened:
    """An open engine with the facts about it.

    Args:
        backend: the engine.
        tokenizer: tokenizer of the model.
        spec: facts about the model.
        reason: why this engine was chosen.
        precision: the argument of `load` that gives this engine again.
        checksum: checksum of the bundle's manifest.
        reopen: function that opens the engine again in a forked process, with a given number of threads.
        batch_tokens: the recorded limit of tokens in a batch; None for the usual one.
        query_weights: the stored query weights [V] of a sparse model, if it has any.
    """

    backend: Backend
    tokenizer: TextTokenizer
    spec: ModelSpec
    reason: str
    precision: ComputePrecision | None = None
    checksum: str | None = None
    reopen: Callable[[int], Backend] | None = None
    batch_tokens: int | None = None
    query_weights: NDArray[np.float32] | None = None


def _checkpoint_query_weights(folder: Path, spec: ModelSpec, tokenizer: TextTokenizer) -> NDArray[np.float32] | None:
    """Return a sparse model's query weights [V] from the checkpoint's modules, or None."""
    if spec.sparse is None or spec.sparse.query_weights is None:
        return None
    from gte_deploy.models.folder import CheckpointFiles
    from gte_deploy.models.sparse_modules import read_query_weights, read_sparse_modules

    files = CheckpointFiles(folder)
    return read_query_weights(files, read_sparse_modules(files), spec.vocab_size, tokenizer.known_or_unknown_id)


def open_folder(folder: Path, backend: Backend, spec: ModelSpec) -> Model:
    """Create a model from a bundle's folder and an open engine. The folder needs no manifest yet.

    Args:
        folder: holds the tokenizer's files, and the query weights that the spec names.
        backend: runs the model, and is closed with the result.
        spec: the facts about the bundle's model.

    Raises:
        CheckpointError, BundleError: a file is missing or damaged.
    """
    return Model(
        backend,
        load_tokenizer(folder),
        spec,
        max_batch_tokens=_MAX_BATCH_TOKENS[parse_device(backend.device)[0]],
        path=folder,
        backend_reason=ASKED,
        query_weights=stored_query_weights(folder, spec),
    )


def stored_query_weights(
    bundle: Path, spec: ModelSpec, verified: Mapping[str, bytes] | None = None
) -> NDArray[np.float32] | None:
    """Return the query weights [V] that a bundle stores, or None if queries go through the model.

    `verified` holds the content of their file, if it was verified; None reads the folder.

    Raises:
        BundleError: the file is missing, or does not match the spec.
    """
    if spec.sparse is None or spec.sparse.query_weights is None:
        return None
    file = bundle / spec.sparse.query_weights
    try:
        source = file if verified is None else io.BytesIO(verified[spec.sparse.query_weights])
        weights = np.load(source, allow_pickle=False)
    except (OSError, KeyError, ValueError) as error:
        raise BundleError(f"{file} cannot be read as query weights ({error}). Export the bundle again.") from error
    if weights.dtype != np.float32 or weights.shape != (spec.vocab_size,):
        raise BundleError(f"{file} must be float32 [{spec.vocab_size}], and is {weights.dtype} {list(weights.shape)}")
    return weights


def _needs_checkpoint(backend: str, task: str) -> bool:
    """Whether the built-in model must run on torch: on request, for another task, or as there is no engine."""
    has_engine = any(map(importlib.util.find_spec, ("onnxruntime", "openvino")))
    no_other = backend == "auto" and not has_engine and importlib.util.find_spec("torch") is not None
    return backend == "torch" or no_other or task not in ("auto", read_manifest(builtin_bundle()).spec.task)


def _require_for_bundle(folder: Path, manifest: Manifest, backend: str, task: str, compile: bool) -> None:
    """Refuse what no bundle can do, before its files are verified."""
    if compile:
        raise InputError(f"{folder} is a bundle: it is compiled already. compile=True is for checkpoints.")
    if backend == "torch":
        raise BackendError(
            f"{folder} is a bundle, and the torch backend runs checkpoints. Load it with backend='onnx', or load the "
            "checkpoint that it was exported from."
        )
    if task != "auto" and (own := manifest.spec.task) != task:
        raise InputError(
            f"{folder} is a bundle for {own}, not for {task}. Export its checkpoint again with --task {task}, or leave "
            "task out."
        )


def _refuse_streams(folder: Path, streams: int | None) -> None:
    if streams is not None and streams > 1:
        raise InputError(
            f"streams={streams} is for bundles on onnx or openvino, and {folder} runs on torch. Export it with "
            "gte-export and load the result, or leave streams out."
        )


def _open_checkpoint(
    folder: Path,
    backend: str,
    precision: ComputePrecision | None,
    device: str,
    num_threads: int | None,
    compile: bool,
    task: TaskName | Literal["auto"],
) -> _Opened:
    if backend in ENGINE_OF:
        raise BackendError(
            f"{folder} is not a bundle: it has no {MANIFEST_NAME} of gte-export. Export it and load the result, or "
            "load it with backend='torch'."
        )
    if precision == "bf16" and parse_device(device)[0] == "cpu":
        raise InputError(
            f"precision 'bf16' on a CPU is what the openvino backend can compute a bundle in; {folder} would run on "
            "torch, which computes in fp32 there. Leave precision out."
        )
    if has_manifest(folder):
        logger.warning(
            "%s is read as a checkpoint: its %s is not one of gte-export, but of another project", folder, MANIFEST_NAME
        )
    require_checkpoint(folder)
    from gte_deploy.backends.torch import open_torch_backend

    opened, tokenizer = open_torch_backend(
        folder,
        task=None if task == "auto" else task,
        device=device,
        num_threads=num_threads,
        precision=precision or "fp32",
        compile=compile,
    )
    reason = ASKED if backend == "torch" else "torch runs checkpoints"
    weights = _checkpoint_query_weights(folder, opened.spec, tokenizer)
    return _Opened(opened, tokenizer, opened.spec, reason, precision, query_weights=weights)


def _open_bundle(
    bundle: VerifiedBundle,
    backend: str,
    precision: ComputePrecision | None,
    device: str | None,
    num_threads: int | None,
    streams: int | None,
) -> _Opened:
    folder, manifest = bundle.folder, bundle.manifest
    if manifest.missed_bounds:
        logger.warning(
            "%s was exported with --bounds report and misses its bounds in %d respects; the first: %s",
            folder,
            len(manifest.missed_bounds),
            manifest.missed_bounds[0],
        )
    if is_for_gpus(manifest):
        if precision not in (None, manifest.precision):
            raise InputError(
                f"{folder} computes in {manifest.precision}, as the types of its graph say, and not in {precision!r}. "
                "Leave precision out, or export it in another."
            )
    elif precision == "bf16" and backend == "onnx":
        raise InputError(
            f"precision 'bf16' is what the openvino backend can compute a bundle in; {folder} would run on onnx, which "
            "computes in fp32. Leave precision out."
        )
    choice = choose_engine(manifest, backend=backend, device=device, precision=precision)
    plan = streams_of(manifest, choice, num_threads=num_threads, streams=streams)
    if choice.backend == "tensorrt":
        from gte_deploy.backends.tensorrt.backend import open_tensorrt_backend

        opened: Backend = open_tensorrt_backend(folder, manifest, device=choice.device)
        reopen = None
    else:
        # ExecuTorch's threads are gone in a forked process, and it has no way to start others.
        open_graph = functools.partial(_open_graph, folder, manifest, choice, _graphs_of(bundle, choice))
        reopen = None if choice.backend == "executorch" else _reopening(folder, manifest, open_graph)
        opened = open_graph(num_threads)
        if plan.streams > 1 and reopen is not None:
            opened = StreamedBackend(opened, plan, functools.partial(reopen, plan.threads, plan))
    again = precision if is_for_gpus(manifest) else choice.precision
    checksum = manifest.to_json()["checksum"]
    contents = bundle.contents()
    tokenizer = load_tokenizer(folder, contents)
    weights = stored_query_weights(folder, manifest.spec, contents)
    bundle.require_same_paths()
    return _Opened(opened, tokenizer, manifest.spec, choice.reason, again, checksum, reopen, plan.batch_tokens, weights)


def _graphs_of(bundle: VerifiedBundle, choice: EngineChoice) -> GraphFiles:
    """Return the ONNX graph of an engine and its parts; empty if the bundle has none for it."""
    graphs = bundle.manifest.graphs
    entry = graphs.get(ENGINE_OF[choice.backend])
    if entry is None and choice.backend == "onnx":
        entry = graphs.get("tensorrt")
    return {} if entry is None or choice.backend == "executorch" else verified_graphs(bundle, entry)


def _reopening(folder: Path, manifest: Manifest, open_graph: Callable[..., Backend]) -> Callable[..., Backend]:
    """Return a function that opens the graph again, unless its files changed since they were verified.

    The function takes a number of threads, and the plan if the engine is for streams.
    """
    folder = folder.absolute()  # a child may change its working directory
    found = _identities(folder, manifest)

    def reopen(num_threads: int, plan: StreamPlan | None = None) -> Backend:
        if _identities(folder, manifest) != found:
            raise BackendError(f"{folder} has changed since it was loaded; load it again in this process")
        return open_graph(num_threads, plan)

    return reopen


def _identities(folder: Path, manifest: Manifest) -> list[tuple[int, ...]]:
    """Return the properties of each file that change with its content; an empty list if a file is not accessible."""
    try:
        stats = [(folder / name).stat() for name in sorted(manifest.files)]
    except OSError:
        return []
    return [(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats]


def _open_graph(
    folder: Path,
    manifest: Manifest,
    choice: EngineChoice,
    graphs: GraphFiles,
    num_threads: int | None,
    plan: StreamPlan | None = None,
) -> Backend:
    """Open a graph for single batches on `num_threads`; with a plan, for streams of so many threads each."""
    graph = manifest.graphs.get(ENGINE_OF[choice.backend])
    on_cpu = parse_device(choice.device)[0] == "cpu"
    options: dict[str, Any] = {"device": choice.device, "num_threads": num_threads}
    if choice.backend == "onnx" and graph is not None and manifest.target == "cuda" and on_cpu:
        raise BackendError(
            f"{folder} was exported for CUDA: its {manifest.precision} graph has operators that ONNX Runtime runs on a "
            "GPU alone. Load it with device='cuda', or export it again without --target cuda."
        )
    if choice.backend == "onnx" and graph is None and "tensorrt" in manifest.graphs:
        graph = manifest.graphs["tensorrt"]
        if is_packed(graph.inputs):
            raise BackendError(
                f"{folder} holds a padding-free graph, which TensorRT 11.1 and later alone can run. Build its engine "
                "and load it with backend='tensorrt', or export it again without --padding remove."
            )
        if on_cpu:
            logger.warning("%s is made for TensorRT; a CPU runs its %s graph slowly", folder, manifest.precision)
        else:
            options["tensorrt"] = _through_tensorrt(manifest, graph)
    if graph is None:
        raise BackendError(_no_graph(folder, manifest, choice.backend))
    if is_for_gpus(manifest):
        options["precision"] = manifest.precision
    else:
        options["precision"] = choice.precision
        if choice.precision not in graph.computes:
            logger.warning(
                "%s was not shown to stay within its bounds in %s when it was exported; see its report.html",
                folder,
                choice.precision,
            )
    if choice.backend == "executorch":
        from gte_deploy.backends.executorch import ExecuTorchBackend

        return ExecuTorchBackend(
            folder / graph.path, manifest.spec, inputs=graph.inputs, outputs=graph.outputs, **options
        )
    if choice.backend == "openvino":
        from gte_deploy.backends.openvino import OpenVinoBackend

        if plan is not None:
            options["streams"] = plan.streams
        return OpenVinoBackend(graphs, manifest.spec, **options)
    if plan is not None:
        options["packed"] = plan.packed
    options["half_weights"] = graph.half_weights
    return OnnxBackend(graphs, manifest.spec, **options)


def _no_graph(folder: Path, manifest: Manifest, backend: str) -> str:
    if not manifest.graphs:
        return (
            f"{folder} holds a TensorRT engine and no ONNX graph, which the {backend} backend needs. Load it with "
            "backend='tensorrt' on a GPU, or export it with --format onnx."
        )
    if backend == "executorch":
        return f"{folder} has no program for ExecuTorch. Leave backend out, or export it with --format executorch."
    if "executorch" in manifest.graphs:
        return (
            f"{folder} has only a program for ExecuTorch. Load it with backend='executorch', or export it again with "
            "--format onnx."
        )
    if backend == "onnx":
        return (
            f"{folder} has no graph for ONNX Runtime: it was exported for {', '.join(manifest.graphs)} alone. Load it "
            "with backend='openvino' on a CPU, or export it again with --target cpu."
        )
    return (
        f"{folder} has no graph for OpenVINO: openvino was not installed where it was exported, or its precision "
        f"{manifest.precision} has none. Load it with backend='onnx', or export it again."
    )


def _through_tensorrt(manifest: Manifest, graph: GraphEntry) -> ThroughTensorRT:
    """Make one profile for all lengths: as many rows as the plan's longest profile, tuned for its middle profile."""
    length = manifest.spec.max_length
    if manifest.plan is None:
        rows = max(1, _MAX_BATCH_TOKENS["cuda"] // length)
        tuned = (rows, min(512, length))
    else:
        profiles = sorted(manifest.plan.profiles, key=lambda profile: profile.max[1])
        rows, length = profiles[-1].max
        tuned = profiles[len(profiles) // 2].opt
    profile = Profile(min=(1, 1), opt=(min(tuned[0], rows), tuned[1]), max=(rows, length))
    takes_masks = any(tensor.name == "mask_positions" for tensor in graph.inputs)
    max_masks, token_types = _MAX_MASKS if takes_masks else None, manifest.spec.token_types
    return ThroughTensorRT(profile, _compiled_folder(manifest), max_masks, token_types)


def _compiled_folder(manifest: Manifest) -> Path | None:
    """Create the cache folder for engines that ONNX Runtime compiles from this bundle.

    Engines are executable code, so the folder is trusted only if nobody but this user or root can have written it and
    its files. Otherwise it is a temporary one, which is removed when the process ends.
    """
    try:
        folder = own_cache_folder("tensorrt", manifest.to_json()["checksum"][:32])
        for file in folder.iterdir():
            require_own(file, file.lstat())  # a link belongs to all
        return folder
    except PermissionError as error:
        logger.warning("this process compiles the graph for itself: %s", error)
    except OSError as error:
        logger.warning("every load compiles the graph, because there is no cache folder: %s", error)
        return None
    folder = Path(tempfile.mkdtemp(prefix="gte-deploy-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder
