"""Writes a model in OpenVINO's own format (IR) beside the graphs of a bundle, for libraries that open nothing else.

optimum-intel, sentence-transformers with backend="openvino" and OpenVINO GenAI look for openvino_model.xml. GenAI takes
a model with a single output and pools it by itself; the other two read an output by its name. So the IR has only the
first output of the graph, which they all take: hidden states for embeddings, logits for the other tasks. GenAI also
needs the tokenizer as an OpenVINO model. The .bin file is a second copy of the weights, so an IR is written on request.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from gte_deploy.core.errors import InputError, require_modules
from gte_deploy.core.quiet import import_openvino
from gte_deploy.core.spec import ModelSpec
from gte_deploy.exporters.job import GRAPH_PATHS, Job
from gte_deploy.exporters.verification.checks import Check

OpenVinoIr = Literal["model", "genai"]

IR_PATH = "openvino/openvino_model.xml"
"""Path of the model in a bundle; its weights lie beside it in a .bin file."""
TOKENIZER_PATH = "openvino/openvino_tokenizer.xml"
"""Path of the tokenizer as an OpenVINO model."""

# The same engine runs the same operators, only without those behind other outputs.
_MAX_RELATIVE = 1e-5
_CASES = ((1, 1), (17, 3), (128, 2))
_MOST_TEXTS = 100


def check_ir(kind: OpenVinoIr | None, spec: ModelSpec) -> None:
    """Refuse an IR that no library could use, or that this environment cannot make.

    Raises:
        InputError: the task is sparse.
        MissingDependencyError: openvino, or for "genai" openvino-tokenizers, is not installed.
    """
    if kind is None:
        return
    if spec.task == "sparse":
        raise InputError(
            "openvino_ir is not for task sparse: no library opens a pooled sparse model in this format. SparseEncoder "
            "pools the logits of the masked-LM head by itself: export with --task fill-mask"
        )
    require_modules("openvino", extra="openvino")
    if kind == "genai":
        require_modules("openvino_tokenizers", extra="genai")


def write_ir(job: Job, kind: OpenVinoIr | None) -> tuple[Check, ...]:
    """Write the IR, for "genai" also the tokenizer, and compare both with what they were made from.

    Args:
        job: the export; its folder has OpenVINO's graphs and the tokenizer's files.
        kind: what to write; None for nothing.
    """
    if kind is None:
        return ()
    with job.steps("write OpenVINO's own format"):
        return (_write(job, kind),)


def _write(job: Job, kind: OpenVinoIr) -> Check:
    from gte_deploy.exporters.verification.texts import builtin_texts

    openvino = import_openvino()
    graph, file = job.folder / GRAPH_PATHS["openvino"], job.folder / IR_PATH
    file.parent.mkdir()
    model = openvino.Core().read_model(graph)
    openvino.save_model(openvino.Model([model.outputs[0]], model.get_parameters()), file, compress_to_fp16=False)
    output = model.outputs[0].any_name
    failures = list(_differences(job, output))
    compared: dict[str, Any] = {"output": output, "batches": len(_CASES)}
    if kind == "genai":
        texts = [*builtin_texts("evaluation")[:_MOST_TEXTS], "a " * job.spec.max_length]  # the last is cut
        failures += _write_tokenizer(job, texts)
        compared["texts tokenised"] = len(texts)
    return Check("openvino ir", failures=tuple(failures), compared=compared)


def _differences(job: Job, output: str) -> Iterator[str]:
    """Yield one sentence for each batch on which the IR and the ONNX graph give different numbers."""
    import numpy as np

    from gte_deploy.backends.openvino import OpenVinoBackend
    from gte_deploy.exporters.verification.cases import Case, TokenSource, make_batch
    from gte_deploy.exporters.verification.differences import compare

    spec = dataclasses.replace(job.spec, logits="all") if job.spec.task == "fill-mask" else job.spec
    onnx, ir = (OpenVinoBackend(job.folder / path, spec) for path in (GRAPH_PATHS["openvino"], IR_PATH))
    tokens, rng = TokenSource.from_tokenizer(job.tokenizer), np.random.default_rng(0)
    for length, rows in _CASES:
        case = Case(min(length, spec.max_length), rows, ragged=rows > 1)
        batch = make_batch(case, spec, tokens, rng, text_first=True)
        expected, found = (backend.run(batch, [output])[output] for backend in (onnx, ir))
        relative = compare(expected, found).max_rel
        if not relative <= _MAX_RELATIVE:
            yield f"{output} of a batch [{rows}, {case.length}] differs by {relative:.1e} from the ONNX graph"
    onnx.close()
    ir.close()


def _write_tokenizer(job: Job, texts: Sequence[str]) -> list[str]:
    """Write the bundle's tokenizer as an OpenVINO model; return a sentence for the first texts with other token ids."""
    openvino = import_openvino()
    import openvino_tokenizers
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(str(job.folder), local_files_only=True)
    limit = job.spec.max_length
    # By default it would not truncate; GenAI passes no limit unless its user does.
    converted = openvino_tokenizers.convert_tokenizer(theirs, max_length=limit, truncation=True)
    openvino.save_model(converted, job.folder / TOKENIZER_PATH)
    compiled = openvino.compile_model(job.folder / TOKENIZER_PATH, "CPU")
    found = compiled(texts)
    rows = [ids[mask == 1].tolist() for ids, mask in zip(found["input_ids"], found["attention_mask"], strict=True)]
    expected = job.tokenizer.encode_texts(texts, max_length=limit, truncation=True)
    wrong = [text for text, row, ids in zip(texts, rows, expected, strict=True) if row != list(ids)]
    return [f"the tokenizer gives other token ids for {text[:40]!r}" for text in wrong[:3]]
