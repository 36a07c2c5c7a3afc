"""Makes an engine that another tool built, such as trtexec on a Jetson, the engine of a bundle.

The bundle holds the graph that the engine was built from (`gte-export --format trt --onnx-only`). The engine is opened
with the TensorRT of this machine and held against that graph. Neither PyTorch nor ONNX is needed.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gte_deploy.backends.devices import parse_device
from gte_deploy.backends.tensorrt.cuda import Cuda
from gte_deploy.backends.tensorrt.plan import engine_profiles, engine_tensors
from gte_deploy.backends.tensorrt.variants import VARIANTS
from gte_deploy.bundle.inspection import check_graphs
from gte_deploy.bundle.manifest import (
    MANIFEST_NAME,
    FileEntry,
    GraphEntry,
    Manifest,
    PlanEntry,
    read_manifest,
    verify_bundle,
)
from gte_deploy.bundle.signature import SIGNATURE_NAME
from gte_deploy.core.errors import BundleError, ExportError, InputError, MissingDependencyError, OutputExistsError
from gte_deploy.core.files import read_json_object, sha256_file, write_bytes, write_text
from gte_deploy.core.spec import ModelSpec, Profile, TensorRTVariant, TensorSpec
from gte_deploy.exporters.job import Progress
from gte_deploy.exporters.targets.tensorrt.engine import PLAN_PATH
from gte_deploy.exporters.targets.tensorrt.layers import (
    Expected,
    compare_layers,
    inspector_lines,
    listing_caveats,
    overflow_line,
    overflowing_sums,
    parse_layers,
)
from gte_deploy.exporters.targets.tensorrt.layouts import TextLayout, layout_of
from gte_deploy.exporters.targets.tensorrt.runtimes import MessageLog, import_tensorrt
from gte_deploy.tasks import TASKS
from gte_deploy.text.tokenization import load_tokenizer

# The first four bytes of a plan. Bytes 24 to 27 are the version if bytes 4 to 7 are 0; TensorRT's trtexec
# (--getPlanVersionOnly) reads the same.
_TAGS: Mapping[bytes, TensorRTVariant] = {b"ftrt": "tensorrt", b"vtrt": "tensorrt-rtx"}
_HEADER_BYTES = 28


@dataclass(frozen=True)
class AdoptionResult:
    """A bundle with its new engine.

    Args:
        path: the folder of the bundle.
        plan: the engine, as the manifest describes it.
        size: bytes of the plan.
    """

    path: Path
    plan: PlanEntry
    size: int


@dataclass(frozen=True)
class PlanHeader:
    """The facts that a plan's first bytes give.

    Args:
        variant: the TensorRT that built it.
        version: the version of that TensorRT; None if the header has an unknown form.
    """

    variant: TensorRTVariant
    version: str | None


def adopt(
    plan: str | os.PathLike[str],
    bundle: str | os.PathLike[str],
    *,
    device: str = "cuda",
    force: bool = False,
    progress: Progress | None = None,
) -> AdoptionResult:
    """Copy a plan into a bundle and describe it in the manifest, so that `gte_deploy.load` and Triton run it.

    It needs the GPU that the plan is for, and the TensorRT that built it. A plan is code that runs on the GPU: adopt
    only plans that you built. The bundle's model card names the engine and
    what was not compared; the other files, and the report of the export, stay as they are.

    Args:
        plan: the file, for example from trtexec.
        bundle: the folder of a bundle with the graph that the plan was built from, from `gte-export --format trt
            --onnx-only`.
        device: the GPU, "cuda" or "cuda:N".
        force: whether to replace an engine that the bundle has.
        progress: called with one line at every step.

    Raises:
        InputError: `plan` is no plan, or `device` no GPU.
        BundleError: the bundle is damaged.
        ExportError: the bundle has an engine, or no graph for one; or the plan does not fit the graph, this TensorRT
            or the bundle's longest input.
        BackendError: there is no GPU.
        MissingDependencyError: the TensorRT of the plan, or cuda-bindings, is not installed.
    """
    report = progress or (lambda line: None)
    file, folder = Path(plan), Path(os.path.realpath(bundle))
    report("check the bundle")
    manifest = _open(folder, force=force)
    try:
        data = file.read_bytes()
    except OSError as error:
        raise InputError(f"the plan {file} cannot be read: {error}") from error
    header = read_header(data, str(file))
    trt = _module_for(header, str(file))
    kind, index = parse_device(device)
    if kind != "cuda":
        raise InputError(f"device is {device!r}; a TensorRT engine is opened on a GPU: 'cuda' or 'cuda:N'")
    cuda = Cuda(index, extra=VARIANTS[header.variant].extra)
    report(f"open the plan with {VARIANTS[header.variant].title} {trt.__version__}")
    config = read_json_object(folder / "config.json", error=BundleError, advice="Export the bundle again.")
    entry = describe_plan(
        data, manifest, name=str(file), variant=header.variant, trt=trt, cuda=cuda, num_layers=_num_layers(config)
    )
    for caveat in entry.caveats:
        report(caveat)
    if (folder / SIGNATURE_NAME).exists():
        report("remove the signatures, which are of the manifest without the engine: sign the bundle again")
    report("write the plan, the model card and the manifest")
    _write(folder, manifest, entry, data)
    return AdoptionResult(Path(bundle), entry, len(data))


def read_header(data: bytes, name: str) -> PlanHeader:
    """Read the first bytes of the plan `name`.

    Raises:
        InputError: it is not a plan.
    """
    variant = _TAGS.get(data[:4])
    if variant is None or len(data) < _HEADER_BYTES:
        raise InputError(
            f"{name} is not a plan of TensorRT or TensorRT-RTX ({len(data):,} bytes, which begin with {data[:4]!r}). "
            "Give the file that trtexec wrote with --saveEngine, without --versionCompatible."
        )
    version = ".".join(map(str, data[24:28])) if data[4:8] == bytes(4) else None
    return PlanHeader(variant, version)


def describe_plan(
    data: bytes,
    manifest: Manifest,
    *,
    name: str,
    variant: TensorRTVariant,
    trt: Any,
    cuda: Cuda,
    num_layers: int,
) -> PlanEntry:
    """Open a plan, and compare its engine with the bundle's graph.

    Args:
        data: the plan.
        manifest: the manifest of the bundle.
        name: the name of the plan in messages.
        variant: the TensorRT that built the plan.
        trt: the module of that TensorRT.
        cuda: the GPU.
        num_layers: number of layers of the encoder; 0 if it is not known.

    Raises:
        ExportError: TensorRT refuses the plan, or its engine does not fit the graph.
    """
    graph, title = manifest.graphs["tensorrt"], f"{VARIANTS[variant].title} {trt.__version__}"
    log = MessageLog(trt)
    with cuda.use():
        engine = trt.Runtime(log.logger).deserialize_cuda_engine(data)
    if engine is None:
        raise ExportError(
            f"{title} refuses {name}: {log.last_errors()}. A plan runs only on the kind of GPU that it was built for, "
            "with the version that built it."
        )
    layout = layout_of(graph.inputs)
    inputs, outputs = _tensors(engine, trt, graph, name)
    profiles = _profiles(engine, inputs, layout, manifest.spec, name)
    layers = parse_layers(inspector_lines(trt, engine))
    compared = compare_layers(layers, _expected(graph, manifest.spec, layout, len(profiles), num_layers))
    if compared.wrong:
        raise ExportError(
            f"{name} would be slow: {'; '.join(compared.wrong)}. Build it with all flags of the trtexec line of the "
            "export, or with another version of TensorRT."
        )
    if overflows := overflowing_sums(layers):
        raise ExportError(
            f"{name} would give wrong answers: {overflow_line(overflows)}. Build it with another version of TensorRT, "
            "or from a graph of another --precision."
        )
    return PlanEntry(
        path=PLAN_PATH,
        variant=variant,
        version=str(trt.__version__),
        compute_capabilities=(cuda.capability(),),
        profiles=profiles,
        inputs=inputs,
        outputs=outputs,
        layers=compared.counts,
        caveats=(
            "The engine was built elsewhere and added with gte-export adopt. The export compared only the graph in the "
            "bundle with PyTorch; nothing shows that the engine comes from this graph or computes the same.",
            *listing_caveats(compared),
        ),
    )


def _open(folder: Path, *, force: bool) -> Manifest:
    """Read the manifest, without its old engine, and verify the other files."""
    manifest = read_manifest(folder)
    if manifest.plan is not None and not force:
        raise OutputExistsError(
            f"{folder} holds an engine already, {manifest.plan.path}.", advice="Replace it with --force."
        )
    old = () if manifest.plan is None else (manifest.plan.path, manifest.plan.timing_cache)
    files = {name: entry for name, entry in manifest.files.items() if name not in old}
    manifest = dataclasses.replace(manifest, plan=None, files=files)
    if "tensorrt" not in manifest.graphs:
        raise ExportError(
            f"{folder} holds no graph for TensorRT to compare the engine with. Write the bundle with gte-export "
            "--format trt --onnx-only (or --keep-onnx), and build the engine from its graph."
        )
    verify_bundle(folder, manifest)
    check_graphs(folder, manifest)
    return manifest


def _module_for(header: PlanHeader, name: str) -> Any:
    """The module of the TensorRT that built the plan.

    Raises:
        MissingDependencyError: it is not installed.
        ExportError: another version is installed.
    """
    variant = VARIANTS[header.variant]
    built = f"{name} was built with {variant.title}{'' if header.version is None else f' {header.version}'}"
    trt = import_tensorrt(header.variant)
    if trt is None:
        advice = f"{built}. On a Jetson it is part of JetPack: use a virtual environment with --system-site-packages."
        raise MissingDependencyError(variant.module, variant.extra, advice)
    # Some builds of TensorRT have a fifth number, or a word, in their version.
    if header.version is not None and str(trt.__version__).split(".")[:3] != header.version.split(".")[:3]:
        raise ExportError(
            f"{built}, and version {trt.__version__} is installed here. A plan runs only with the version that built "
            "it: adopt it on the machine that built it, or build it again with this version."
        )
    return trt


def _tensors(
    engine: Any, trt: Any, graph: GraphEntry, name: str
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The inputs and outputs of the engine, in the order of the graph, with the graph's names for dynamic axes."""
    found = engine_tensors(engine)
    is_input = {tensor: engine.get_tensor_mode(tensor) == trt.TensorIOMode.INPUT for tensor in found}
    problems: list[str] = []
    sides: list[tuple[TensorSpec, ...]] = []
    for side, tensors, wanted in (("inputs", graph.inputs, True), ("outputs", graph.outputs, False)):
        have, need = {tensor for tensor in found if is_input[tensor] is wanted}, {tensor.name for tensor in tensors}
        if have != need:
            problems.append(f"it has the {side} {_names(have)}, and the graph has {_names(need)}")
        specs = []
        for tensor in tensors:
            if tensor.name in have:
                dtype, shape = found[tensor.name]
                problems += _differences(tensor, dtype, shape)
                specs.append(TensorSpec(tensor.name, dtype or "", tensor.shape))
        sides.append(tuple(specs))
    if problems:
        raise ExportError(f"{name} does not fit the bundle's graph {graph.path}: {'; '.join(problems)}.")
    return sides[0], sides[1]


def _names(tensors: set[str]) -> str:
    return ", ".join(sorted(tensors)) or "none"


def _differences(tensor: TensorSpec, dtype: str | None, shape: Sequence[int]) -> list[str]:
    """Differences between a tensor of the graph and that of the engine. An engine may have other widths of types."""
    problems = []
    if dtype is None or dtype.startswith("int") != tensor.dtype.startswith("int"):
        problems.append(f"{tensor.name} is {dtype or 'of an unknown type'}, and in the graph {tensor.dtype}")
    wanted = tuple(-1 if isinstance(size, str) else size for size in tensor.shape)
    if tuple(shape) != wanted:
        problems.append(f"{tensor.name} has the shape {tuple(shape)}, and in the graph {wanted}")
    return problems


def _profiles(
    engine: Any, inputs: Sequence[TensorSpec], layout: TextLayout, spec: ModelSpec, name: str
) -> tuple[Profile, ...]:
    """The profiles of the engine.

    Raises:
        ExportError: the inputs have profiles that do not belong together, or no profile takes the longest input.
    """
    profiles = []
    for index, sizes in enumerate(engine_profiles(engine, padding_free=layout.has_attention_operator)):
        low, opt, high = ((int(rows), int(tokens)) for rows, tokens in sizes)
        try:
            profile = Profile(low, opt, high)
        except ValueError as error:
            raise ExportError(f"{name} has the profile {sizes} ({error}).") from error
        wanted = layout.shapes(profile)
        for tensor in inputs:
            found = [tuple(shape) for shape in engine.get_tensor_profile_shape(tensor.name, index)]
            fits = found == wanted[tensor.name]
            if tensor.name == "mask_positions":
                least, most = wanted[tensor.name][0][0], wanted[tensor.name][2][0]
                fits = found[0][0] <= least and found[2][0] >= most
            if not fits:
                raise ExportError(
                    f"in profile {index} of {name}, {tensor.name} has the shapes {found} (min, opt, max), and for the "
                    f"shapes of input_ids it needs {wanted[tensor.name]}. Build it with the trtexec line of the export."
                )
        profiles.append(profile)
    if not profiles:
        raise ExportError(f"{name} has no profile. Build it with the trtexec line of the export.")
    try:
        return layout.profiles(profiles, (), spec.max_length)
    except InputError as error:
        raise ExportError(f"{name} does not take the inputs of the bundle: {error}") from error


def _expected(graph: GraphEntry, spec: ModelSpec, layout: TextLayout, num_profiles: int, num_layers: int) -> Expected:
    fusions = graph.fusions
    return Expected(
        # TensorRT has no kernel but a fused one for its operator of attention.
        attentions=0 if layout.has_attention_operator else num_layers,
        profiles=num_profiles,
        quantized={kind: fusions[f"{kind}_linears"] for kind in ("int8", "fp8") if f"{kind}_linears" in fusions},
        half=sum(fusions.get(f"{kind}_linears", 0) for kind in ("fp16", "bf16")),
        fp32=int(TASKS[spec.task].pools),  # pooling
    )


def _num_layers(config: Mapping[str, Any]) -> int:
    found = config.get("num_hidden_layers")
    return found if type(found) is int and found > 0 else 0


def _write(folder: Path, manifest: Manifest, entry: PlanEntry, data: bytes) -> None:
    """Write the plan, the card and the manifest; a kill in between leaves a valid bundle without an engine.

    Signatures are removed: they are of the old manifest.
    """
    (folder / SIGNATURE_NAME).unlink(missing_ok=True)
    adopted = dataclasses.replace(manifest, plan=entry)
    changed = {PLAN_PATH: data}
    from gte_deploy.exporters.bundle.card import CARD, REPORT, adopted_card

    if {CARD, REPORT} <= manifest.files.keys():  # older bundles have no card
        mask_token = load_tokenizer(folder).mask_token
        changed[CARD] = adopted_card(folder, adopted, mask_token).encode()
    kept = {name: file for name, file in manifest.files.items() if name not in changed}
    # What changes is not listed while it changes, so that the manifest holds at any moment.
    _write_manifest(folder, dataclasses.replace(manifest, files=kept))
    files = dict(kept)
    for name, content in changed.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_bytes(folder / name, content)
        files[name] = FileEntry(len(content), sha256_file(folder / name))
    _write_manifest(folder, dataclasses.replace(adopted, files=dict(sorted(files.items()))))
    verify_bundle(folder, read_manifest(folder))


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    write_text(folder / MANIFEST_NAME, json.dumps(manifest.to_json(), indent=2) + "\n")
