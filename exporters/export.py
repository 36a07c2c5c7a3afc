"""Exports a checkpoint to a bundle, in steps: read, trace, build, verify, write."""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gte_deploy.bundle.manifest import Manifest
from gte_deploy.core.command_line import WARNING
from gte_deploy.core.errors import InputError, ParityError, require_modules
from gte_deploy.core.spec import Engine, MultiVectorSpec
from gte_deploy.exporters.bundle.source import checkpoint_name, checkpoint_source
from gte_deploy.exporters.bundle.writer import check_destination, publish, staging
from gte_deploy.exporters.graph import MIN_MAX_LENGTH
from gte_deploy.exporters.job import EVALUATION_TOKENS, Built, Job, Progress, Steps
from gte_deploy.exporters.options import ExportOptions, ExportRequest, make_request
from gte_deploy.models import require_checkpoint, resolve_checkpoint
from gte_deploy.models.description import Description, describe
from gte_deploy.models.multi_vector_modules import limited
from gte_deploy.tasks import TASKS
from gte_deploy.text.tokenization import TextTokenizer

if TYPE_CHECKING:
    from gte_deploy.exporters.graph.build import Graph
    from gte_deploy.exporters.verification.results import ParityReport

_EXTRA = (
    "torch",
    "transformers",
    "safetensors",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "onnxruntime",
)


@dataclass(frozen=True)
class ExportResult:
    """A finished export: the path of the bundle, its manifest, and the comparison of its graphs with PyTorch.

    `sensitivity` is the loss of each group of layers that was measured in 8 bits, first of the one that uses up most of
    a bound; `kept_groups` are those that stay in a higher precision.
    """

    path: Path
    manifest: Manifest
    parity: "ParityReport"
    sensitivity: Mapping[str, float] = field(default_factory=dict)
    kept_groups: Sequence[str] = ()


def export(
    model: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    options: ExportOptions | None = None,
    *,
    force: bool = False,
    progress: Progress | None = None,
    **given: Any,
) -> ExportResult:
    """Export a checkpoint to a verified bundle.

    Args:
        model: checkpoint folder, hub id or preset name; None for the built-in model.
        output: folder of the bundle; None for one in the working directory, named after model, format and precision.
        options: the options of every target, such as precision and longest input; see `ExportOptions`.
        force: whether to replace an existing bundle.
        progress: called with one line at every step.
        **given: `format` ("onnx", "executorch" or "trt") and `target` ("cpu", "cuda" or "openvino", for format onnx);
            single fields of `ExportOptions`, such as `precision="int8"`; and the options of the target, such as
            `calibration`: see `gte_deploy.exporters.targets`. `tensorrt` takes a `TensorRTOptions`.

    Raises:
        InputError: an option is out of range, or does not belong to this target.
        CheckpointError, ConfigError: the checkpoint cannot be read, or asks for something unsupported.
        ParityError: an engine differs from PyTorch by more than its bound, or a check fails; no bundle is written.
        OutputExistsError: the output must not be replaced.
        ExportError: the graph could not be built.
        MissingDependencyError: the [export] extra is not installed.
    """
    request = make_request(options, **given)
    require_modules(*_EXTRA, extra="export")
    steps = Steps(progress or (lambda line: None))
    path = Path(
        output if output is not None else default_output(model, format=request.kind, precision=request.precision)
    )
    # The real path, because a rename over a link would replace the link.
    destination = Path(os.path.realpath(path))
    require_checkpoint(model)
    check_destination(destination, force=force)
    from gte_deploy.exporters.bundle.contents import write_model_files, write_report

    with staging(destination, force=force) as folder:
        with steps("read the checkpoint"):
            checkpoint = _read(model, request, steps)
            source = checkpoint_source(model, checkpoint)
            request.target.check_model(checkpoint, request.precision)
        job = _load(checkpoint, folder, request, steps)
        built = request.target.build(_trace(job), job)
        write_model_files(job)
        built, parity = _verify(request, built, job)
        if not built.keeps_graphs:
            for engine in built.graphs:
                shutil.rmtree(job.graph_file(engine).parent, ignore_errors=True)
        with steps("write the bundle"):
            manifest = write_report(job, built, parity, source=source)
        steps.report(f"rename to {path}")
        publish(folder, destination, force=force)
    return ExportResult(path, manifest, parity, built.sensitivity, built.kept_groups)


def default_output(model: str | os.PathLike[str] | None, *, precision: str, format: str = "onnx") -> Path:
    """Return the default folder, named after model, format and precision, e.g. gte-en-mlm-tiny-onnx-fp32."""
    return Path(f"{checkpoint_name(model)}-{format}-{precision}")


def _read(model: str | os.PathLike[str] | None, request: ExportRequest, steps: Steps) -> Description:
    """Describe the checkpoint, with the limits of this export in its spec."""
    options = request.options
    checkpoint = describe(resolve_checkpoint(model), task=options.task, pooling=options.pooling)
    spec = checkpoint.spec
    if options.logits == "all" and spec.task != "fill-mask":
        raise InputError(f"logits 'all' is only for task fill-mask; the task is {spec.task}")
    if options.pooling != "auto" and spec.task in ("sparse", "multi-vector"):
        raise InputError(
            f"pooling is {options.pooling!r}, and task {spec.task} has no embedding that is pooled from hidden states; "
            "leave it out"
        )
    limit = checkpoint.family.max_tokens(checkpoint.config)
    length = spec.max_length if options.max_length is None else options.max_length
    if not MIN_MAX_LENGTH <= length <= limit:
        raise InputError(
            f"max_length is {length:,}; expected {MIN_MAX_LENGTH} to {limit:,}, the places of the checkpoint's "
            "max_position_embeddings"
        )
    if length > spec.max_length:
        steps.report(f"the bundle takes {length:,} tokens; the checkpoint's own limit is {spec.max_length:,}")
    multi_vector = None if spec.multi_vector is None else limited(spec.multi_vector, length)
    _require_reach(checkpoint, multi_vector)
    spec = dataclasses.replace(spec, max_length=length, logits=options.logits, multi_vector=multi_vector)
    return dataclasses.replace(checkpoint, spec=spec)


def _require_reach(checkpoint: Description, multi_vector: MultiVectorSpec | None) -> None:
    """Refuse queries that are lengthened beyond the window of local attention by tokens to which no token attends.

    Such a token may have no token to attend to. PyTorch's attention is zero there, and that of the graphs is not.
    """
    if multi_vector is None or not multi_vector.scores_unattended or not checkpoint.sites.get("local_attention"):
        return
    assert multi_vector.expansion is not None
    length, window = multi_vector.expansion.length, checkpoint.config.sliding_window
    if length > window + 1:  # the shortest text has one token
        raise InputError(
            f"queries are lengthened to {length} tokens to which no token attends, and local attention sees {window} "
            "tokens on both sides; a graph is right for at most one more than that. Run the checkpoint on PyTorch "
            "(load it with backend='torch'), or train it with attend_to_expansion_tokens."
        )


def _load(checkpoint: Description, folder: Path, request: ExportRequest, steps: Steps) -> Job:
    # Imported here and in the functions below, so that `gte-export --help` and refused requests load no heavy library.
    from gte_deploy.exporters.graph.build import DEFAULT_OPSET
    from gte_deploy.exporters.text_choice import choose_texts
    from gte_deploy.models.checkpoint import load_described

    spec = checkpoint.spec
    with steps("read the texts"):
        tokenizer = TextTokenizer(**checkpoint.tokenizer.parts())
        if spec.token_types:
            tokenizer.check_types(spec.type_vocab_size)
        texts = choose_texts(request, tokenizer, spec.vocab_size)
        for remark in texts.remarks:
            steps.report(WARNING + remark)
    with steps("load the weights"):
        return Job(
            checkpoint=checkpoint,
            folder=folder,
            precision=request.precision,
            opset=DEFAULT_OPSET if request.options.opset is None else request.options.opset,
            model=load_described(checkpoint),
            tokenizer=tokenizer,
            texts=texts,
            steps=steps,
            bounds=request.options.bounds,
        )


def _trace(job: Job) -> "Mapping[Engine, Graph]":
    from gte_deploy.exporters.graph import build as graph

    spec = job.spec
    with job.steps("trace and fuse"):
        return graph.build_graphs(
            job.model,
            task=spec.task,
            max_length=spec.max_length,
            pooling=spec.pooling if TASKS[spec.task].pools else None,
            logits=spec.logits,
            opset=job.opset,
            token_types=spec.token_types,
            sparse=spec.sparse,
        )


def _verify(request: ExportRequest, built: Built, job: Job) -> "tuple[Built, ParityReport]":
    """Compare numbers with PyTorch, then answers with the checkpoint's own library.

    The model's files are in the folder of the bundle already. If graphs in 8 bits miss their bounds, the target builds
    others with more layers in a higher precision; this chooses a single number by the verdict's texts, see
    docs/decisions/sensitivity-sweep.md.

    Returns:
        The graphs and engine that keep the bounds, and their comparison.

    Raises:
        ParityError: a bound is missed and `bounds` is "strict", or the graph or engine is broken.
    """
    bounds = request.options.bounds
    parity = _judge(request, built, job)
    while bounds == "strict" and parity.failures() and not parity.broken() and built.finer is not None:
        job.steps.report(f"more layers in a higher precision, because of missed bounds: {'; '.join(parity.failures())}")
        try:
            built = built.finer()
        except ParityError:  # no layer is left
            if not all(check.passed for check in parity.checks):
                parity.require(bounds)
            raise
        parity = _judge(request, built, job)
    parity.require(bounds)
    parity = parity.with_checks(*request.target.finish(job))
    parity.require(bounds)
    return built, parity


def _judge(request: ExportRequest, built: Built, job: Job) -> "ParityReport":
    """Compare numbers with PyTorch and, if they keep their bounds, answers with the checkpoint's own library."""
    from gte_deploy.exporters.verification.answers import Asked, check_bundle
    from gte_deploy.exporters.verification.answers.source_libraries import library_of

    checkpoint, options = job.checkpoint.folder, request.options
    parity = _compare(request, built, job)
    if parity.broken() or (parity.failures() and options.bounds == "strict"):
        return parity
    asked = Asked(pooling=options.pooling, limit="own" if options.max_length is None else "asked")
    with job.steps(f"compare answers with {library_of(checkpoint, job.checkpoint.task)}"):
        with contextlib.closing(request.target.open(built, job)) as model:
            return parity.with_checks(check_bundle(checkpoint, model, job.precision, asked))


def _compare(request: ExportRequest, built: Built, job: Job) -> "ParityReport":
    """Compare the built graphs or engine, run as users will run them, with PyTorch."""
    from gte_deploy.exporters.verification.cases import TokenSource
    from gte_deploy.exporters.verification.parity import Comparison, check_parity
    from gte_deploy.exporters.verification.reference import TorchReference
    from gte_deploy.exporters.verification.reference_cache import open_cache
    from gte_deploy.exporters.verification.texts import evaluation_rounds

    spec = job.spec
    asked = Comparison(
        outputs=[output.name for output in next(iter(built.graphs.values())).outputs],
        spec=spec,
        precision=job.precision,
        tokens=TokenSource.from_tokenizer(job.tokenizer),
        texts=evaluation_rounds(
            job.texts.evaluation.texts,
            job.tokenizer,
            spec,
            max_tokens=EVALUATION_TOKENS,
        ),
        texts_entry=job.texts.evaluation.entry,
        parts=[[output.name for output in part.outputs] for part in next(iter(built.parts.values()), {}).values()],
        device=built.made_for,
    )
    with job.steps("compare with PyTorch"), request.target.candidates(built, job) as candidates:
        return check_parity(
            TorchReference(
                job.model,
                task=spec.task,
                pooling=spec.pooling,
                logits=spec.logits,
                sparse=spec.sparse,
                cache=open_cache(request.options.reference_cache, job.steps.report),
            ),
            candidates.runs,
            asked,
            emulated=candidates.emulated,
            without_parts=candidates.without_parts,
            all_logits=candidates.all_logits,
            caveats=[*job.texts.remarks, *built.caveats, *candidates.caveats],
            progress=job.steps.report,
        )
