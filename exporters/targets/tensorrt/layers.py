"""Parses TensorRT's listing of an engine's layers, and compares it with the graph that the engine was compiled from.

The forms that it knows: the inspector's ONELINE format and the builder's log, from TensorRT 10.x, 11.x and TensorRT-RTX
1.7. They list the same kernels under different types. A GEMM is a `gemm` everywhere; with fused elementwise operators
it is a `runtime_fusion` in TensorRT-RTX, and a `fusion` with the name of a GEMM kernel as its tactic in TensorRT. The
suffix `_myl2_7` is number 7 in compiled partition 2. A profile has one or more partitions, and layers outside of all
partitions, such as reformats. The layers and tensors of profile 1 and above carry its number as "[profile 1]".
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_LINE = re.compile(r"Name: (?P<name>.*?), LayerType: (?P<kind>[^,]+)(?:, (?P<rest>.*))?$")
_SECTIONS = re.compile(r"(?:^|, )(Inputs|Constants|Outputs|TacticName|StreamId|Metadata): ")
_TENSOR = re.compile(
    r"\{ Name: (?P<name>.*?),(?: Location: \w+,)? Dimensions: \[(?P<shape>[-\d, ]*)\][^{}]*?Datatype: (?P<dtype>[^,}]+)"
)
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_PROFILE = re.compile(r"\[profile (\d+)\]")
_PARTITION = re.compile(r"_myl(\d+)_\d+\b")
_COMPILED = re.compile(r"__myl_(\w+?)(?:_myl\d+_\d+)?\b")
_FUSED_ATTENTION = re.compile(r"(?:^|_)f?mha(?:_|$)")
_SOFTMAX = re.compile(r"SoftMax|SubExpSum")
_OPERATION = re.compile(r"[A-Z][a-z0-9]*")
# Words for a data type, in lower case. Old versions print "Row major linear FP16 format" instead of "Half".
_DTYPES: Mapping[str, str] = {
    **{"float": "fp32", "fp32": "fp32", "half": "fp16", "fp16": "fp16", "bfloat16": "bf16", "bf16": "bf16"},
    **{"int8": "int8", "fp8": "fp8", "e4m3": "fp8"},
}
_NARROWEST_FIRST = ("int8", "fp8", "fp16", "bf16", "fp32")
# The first letters of operations that move values without changing them. The name of a compiled kernel joins its
# operations, each cut to four letters, in old versions to three.
_MOVES = frozenset(("Cas", "Con", "Mov", "Rep", "Res", "Sli", "Tra"))
_LARGEST = {"int8": 127.0, "fp8": 448.0}
_LARGEST_FP16 = 65504.0
_NAMED = 3


@dataclass(frozen=True)
class Tensor:
    """An input, constant or output of a layer.

    Args:
        name: TensorRT's name.
        shape: the sizes of the axes; -1 for a size that depends on the batch.
        dtype: "fp32", "fp16", "bf16", "int8", "fp8", or "" for another type.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Layer:
    """A layer of an engine.

    Args:
        name: TensorRT's name.
        kind: TensorRT's type of layer, such as "gemm"; "" if the listing has names alone.
        inputs: the inputs; TensorRT 10.x lists constants among them.
        constants: the constants.
        outputs: the outputs.
        tactic: the name of the kernel, if the listing has one.
        nodes: names of the ONNX nodes that the layer computes, if the listing has them.
        profile: the number of the profile in the line; None if there is none, as for all layers of profile 0.
    """

    name: str
    kind: str = ""
    inputs: tuple[Tensor, ...] = ()
    constants: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    tactic: str = ""
    nodes: tuple[str, ...] = ()
    profile: int | None = None

    @property
    def is_fused_attention(self) -> bool:
        """Whether one kernel computes scores, softmax and weighted sum."""
        # A name without a leading underscore comes from the graph, where "mha" may be the name of a module.
        names = (self.tactic, self.name if self.name.startswith("_") else "")
        return any(_FUSED_ATTENTION.search(name) for name in names)

    @property
    def is_softmax(self) -> bool:
        """Whether it computes a softmax in a kernel of its own."""
        if self.is_fused_attention:
            return False
        return any(_SOFTMAX.search(text) for text in (self.kind, self.tactic, self.name))

    @property
    def gemms(self) -> int:
        """The number of matrix products of the graph in this layer; 0 if it is no GEMM."""
        kind = self.kind.lower()
        is_gemm = "gemm" in kind or "matrixmultiply" in kind
        if not is_gemm and "fusion" in kind:
            is_gemm = "gemm" in self.tactic or "Fc" in _operations(self.name)
        if not is_gemm or self.is_fused_attention:
            return 0
        # A GEMM that joins several products has all their names: a+b+c.
        products = [node for node in self.nodes if node.rpartition("/")[2].startswith(("MatMul", "Gemm"))]
        return max(1 + self.name.count("+"), len(products))

    @property
    def computes_layers(self) -> bool:
        """Whether it computes attention or a GEMM, as opposed to a reformat or an elementwise kernel."""
        return self.is_fused_attention or self.is_softmax or self.gemms > 0

    @property
    def operand_dtype(self) -> str:
        """The data type of a GEMM's two factors; "" if the listing does not give it.

        A mixed product counts as the wider type: 8-bit weights and 16-bit inputs are a 16-bit GEMM.
        """
        factors = Counter(tensor.dtype for tensor in (*self.inputs, *self.constants) if len(tensor.shape) > 1)
        known = [dtype for dtype in _NARROWEST_FIRST if factors[dtype]]
        equal = [dtype for dtype in known if factors[dtype] > 1]
        return equal[0] if equal else known[-1] if len(known) > 1 else ""


@dataclass(frozen=True)
class Expected:
    """The kernels that the graph needs in each profile.

    Args:
        attentions: number of attention layers.
        profiles: number of profiles.
        quantized: "int8" or "fp8" -> number of GEMMs.
        half: number of 16-bit GEMMs beside the quantized ones; of no interest in a graph without these.
        fp32: number of FP32 GEMMs.
    """

    attentions: int
    profiles: int
    quantized: Mapping[str, int]
    half: int
    fp32: int


@dataclass(frozen=True)
class LayerComparison:
    """The result of comparing a listing with its graph.

    Args:
        counts: kind -> number of layers in each profile: "fused_attention", and GEMMs such as "fp16_gemm". If profiles
            differ, the least number counts. A listing that does not name profiles counts as one profile.
        wrong: one line for each fault that the listing shows with certainty.
        unsure: one line for each thing that the listing does not show.
    """

    counts: Mapping[str, int]
    wrong: tuple[str, ...] = ()
    unsure: tuple[str, ...] = ()


def inspector_lines(trt: Any, engine: Any) -> list[str]:
    """The listing of an engine that is open on its GPU; `trt` is the module of TensorRT."""
    inspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.ONELINE)).splitlines()


def listing_caveats(compared: LayerComparison) -> tuple[str, ...]:
    """A sentence about everything that the listing does not show; none if there is no such thing."""
    if not compared.unsure:
        return ()
    unsure = "; ".join(compared.unsure)
    return (f"TensorRT's listing of the engine does not show whether every layer has a fast kernel: {unsure}.",)


def parse_layers(lines: Iterable[str]) -> list[Layer]:
    """Parse the lines of a listing, in order; other lines of a log are skipped.

    An engine that was built with the profiling verbosity "layer names only" lists one name per line between "Layers:"
    and "Bindings:".
    """
    detailed: list[Layer] = []
    names: list[Layer] = []
    in_names = False
    for line in lines:
        text = line.strip()
        if (found := _LINE.match(text)) is not None:
            detailed.append(_layer(found["name"], found["kind"], found["rest"] or ""))
        elif text == "Layers:":
            in_names = True
        elif not text or text.startswith(("Bindings:", "I/O Tensors:")):
            in_names = False
        elif in_names:
            names.append(Layer(text, profile=_profile(text)))
    return detailed or names


def compare_layers(layers: Sequence[Layer], expected: Expected) -> LayerComparison:
    """Compare the layers of an engine with the kernels that its graph needs."""
    listed = _by_profile(layers).values()
    used = [_count(found) for found in listed if any(layer.computes_layers for layer in found)]
    kinds = sorted({kind for counts in used for kind in counts})
    least = {kind: min(counts[kind] for counts in used) for kind in kinds}
    if not layers:
        return LayerComparison(least, unsure=("TensorRT lists no layers",))
    if not any(layer.kind for layer in layers):
        line = f"TensorRT lists {len(layers)} layers by name alone, so the data types of GEMMs are unknown"
        findings = [_Finding(line, False), *_check_attention(layers, least, expected)]
    else:
        # A listing that does not name its profiles may show the layers of one profile, or of all.
        repeats = 1 if len(used) == expected.profiles else expected.profiles
        findings = [
            *_check_attention(layers, least, expected),
            *_check_quantized(least, expected, repeats),
            *_check_fp32(least, expected, repeats),
        ]
        if repeats > 1 and least.get("fused_attention", 0) != expected.attentions * repeats:
            findings.append(_Finding(f"the layers of {len(used)} of {expected.profiles} profiles are listed", False))
    return LayerComparison(
        least,
        wrong=tuple(finding.line for finding in findings if finding.is_certain),
        unsure=tuple(finding.line for finding in findings if not finding.is_certain),
    )


def overflowing_sums(layers: Sequence[Layer]) -> list[str]:
    """Names of the 8-bit GEMMs that store their unscaled sums as FP16, which goes to 65,504.

    Such a GEMM multiplies by an alpha of 1 and has an FP16 output, and the next kernel multiplies by the scales. A sum
    over K products of INT8 numbers reaches K * 127 * 127, of FP8 numbers K * 448 * 448.
    """
    found = []
    for layer in layers:
        largest = _LARGEST.get(layer.operand_dtype)
        tensors = (*layer.inputs, *layer.constants)
        if not layer.gemms or largest is None or {tensor.dtype for tensor in layer.outputs} != {"fp16"}:
            continue
        # TensorRT names the constant 1 after the GEMM, and a scale in its place differently.
        is_alpha_one = any(re.search(r"_alpha(?:_myl\d+)?(?: \[profile \d+\])?$", tensor.name) for tensor in tensors)
        if is_alpha_one and _inner_size(layer) * largest**2 > _LARGEST_FP16 and _is_scaled_later(layer, layers):
            found.append(layer.name)
    return found


def overflow_line(names: Sequence[str]) -> str:
    """A clause about the GEMMs from `overflowing_sums`, with the names of the first."""
    named = ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")
    return f"{len(names)} 8-bit GEMMs store unscaled sums as FP16, where sums can overflow ({named})"


def _layer(name: str, kind: str, rest: str) -> Layer:
    parts = _SECTIONS.split(rest)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    return Layer(
        name=name,
        kind=kind.strip(),
        inputs=_tensors(sections.get("Inputs", "")),
        constants=_tensors(sections.get("Constants", "")),
        outputs=_tensors(sections.get("Outputs", "")),
        tactic=sections.get("TacticName", "").strip(),
        nodes=tuple(_NODE.findall(sections.get("Metadata", ""))),
        profile=_profile(f"{name} {rest}"),
    )


def _tensors(text: str) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(
            found["name"],
            tuple(int(size) for size in found["shape"].split(",") if size.strip()),
            next((_DTYPES[word] for word in found["dtype"].lower().split() if word in _DTYPES), ""),
        )
        for found in _TENSOR.finditer(text)
    )


def _profile(text: str) -> int | None:
    numbers = [int(number) for number in _PROFILE.findall(text)]
    return max(numbers) if numbers else None


def _by_profile(layers: Sequence[Layer]) -> dict[int, list[Layer]]:
    """Profile -> its layers. All layers of a partition belong to the profile that one of them names."""
    profiles: dict[str, int] = {}
    for layer in layers:
        if layer.profile is not None and (found := _PARTITION.search(layer.name)):
            profiles[found[1]] = layer.profile
    result: dict[int, list[Layer]] = {}
    for layer in layers:
        found = _PARTITION.search(layer.name)
        profile = profiles.get(found[1], layer.profile) if found else layer.profile
        result.setdefault(profile or 0, []).append(layer)
    return result


def _count(layers: Sequence[Layer]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for layer in layers:
        if layer.is_fused_attention:
            counts["fused_attention"] += 1
        elif layer.gemms:
            counts[f"{layer.operand_dtype or 'other'}_gemm"] += layer.gemms
    return counts


@dataclass(frozen=True)
class _Finding:
    """A difference between an engine and its graph; if it is not certain, the listing may only look like it."""

    line: str
    is_certain: bool


def _check_attention(layers: Sequence[Layer], least: Mapping[str, int], expected: Expected) -> Iterator[_Finding]:
    fused = least.get("fused_attention", 0)
    softmaxes = sum(layer.is_softmax for layer in layers)
    if fused < expected.attentions or softmaxes:
        line = f"{fused} fused attention layers where the graph has {expected.attentions}"
        kernels = f"{softmaxes} kernels compute a softmax alone" if softmaxes else "and no other kernel for attention"
        yield _Finding(f"{line} ({kernels})", softmaxes > 0)


def _check_quantized(least: Mapping[str, int], expected: Expected, repeats: int) -> Iterator[_Finding]:
    wider = sum(least.get(f"{kind}_gemm", 0) for kind in ("fp16", "bf16", "fp32"))
    excess = wider - (expected.half + expected.fp32) * repeats
    for kind, count in expected.quantized.items():
        if (missing := count - least.get(f"{kind}_gemm", 0)) > 0:
            line = f"{count - missing} {kind} gemm layers where the graph has {count}"
            yield _Finding(line, excess >= missing)


def _check_fp32(least: Mapping[str, int], expected: Expected, repeats: int) -> Iterator[_Finding]:
    if (found := least.get("fp32_gemm", 0)) > expected.fp32 * repeats:
        yield _Finding(f"{found} GEMMs in FP32 where the graph has {expected.fp32}", True)
    if unknown := least.get("other_gemm", 0):
        yield _Finding(f"{unknown} GEMMs have a data type that is not known", False)


def _operations(name: str) -> list[str]:
    """The operations in the name of a compiled kernel: ["Fc", "Add"] for "__myl_FcAdd_myl0_12"."""
    found = _COMPILED.match(name)
    return [] if found is None else _OPERATION.findall(found[1])


def _inner_size(layer: Layer) -> int:
    """The number of products in a sum: the last axis of the first factor, and the last but one of the second."""
    tensors = (*layer.inputs, *layer.constants)
    factors = [tensor for tensor in tensors if tensor.dtype == layer.operand_dtype and len(tensor.shape) > 1]
    return max(factors[0].shape[-1], factors[1].shape[-2], 1)


def _is_scaled_later(layer: Layer, layers: Sequence[Layer]) -> bool:
    """Whether a kernel that reads the output multiplies it before all else."""
    outputs = {tensor.name for tensor in layer.outputs}
    for reader in layers:
        if outputs & {tensor.name for tensor in reader.inputs}:
            changes = [word for word in _operations(reader.name) if word[:3] not in _MOVES]
            if changes[:1] == ["Mul"]:
                return True
    return False
