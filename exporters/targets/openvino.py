"""The target "openvino": a bundle with only OpenVINO's graph, without a second graph for ONNX Runtime."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from gte_deploy.core.spec import Engine, Precision
from gte_deploy.exporters.job import Built, Job
from gte_deploy.exporters.targets.base import Candidates, Target
from gte_deploy.exporters.targets.cpu import (
    KEPT_IN_FP32,
    OpenVinoOptions,
    for_openvino,
    openvino_candidates,
    quantized_graphs,
    require_openvino,
    save,
    save_quantized,
)
from gte_deploy.exporters.targets.openvino_ir import check_ir, write_ir

if TYPE_CHECKING:
    from gte_deploy.backends.base import Backend
    from gte_deploy.exporters.graph.build import Graph
    from gte_deploy.exporters.verification.checks import Check
    from gte_deploy.models.description import Description


class OpenVinoTarget(Target):
    """See the module."""

    name: ClassVar[str] = "openvino"
    format: ClassVar[str] = "onnx"
    title: ClassVar[str] = "only OpenVINO (--target openvino)"
    engines: ClassVar[tuple[Engine, ...]] = ("openvino",)
    precisions: ClassVar[tuple[Precision, ...]] = ("fp32", "bf16", "int8")
    Options: ClassVar[type] = OpenVinoOptions
    options: OpenVinoOptions

    def check_model(self, checkpoint: "Description", precision: Precision) -> None:
        """Require openvino, without which nothing could be verified."""
        require_openvino()
        check_ir(self.options.openvino_ir, checkpoint.spec)

    def build(self, graphs: "Mapping[Engine, Graph]", job: Job) -> Built:
        """Quantize the graphs if requested, and save the one of standard operators."""
        graphs = for_openvino(graphs, job)
        if job.precision not in KEPT_IN_FP32:
            return save_quantized(quantized_graphs(graphs, job, self.options), ["openvino"], job)
        kept: dict[Engine, Graph] = {"openvino": graphs["openvino"]}
        return save(kept, job, with_all_logits=True)

    @contextlib.contextmanager
    def candidates(self, built: Built, job: Job) -> Iterator[Candidates]:
        """OpenVINO in every precision that this CPU computes in."""
        with openvino_candidates(built, job) as opened:
            yield opened

    def finish(self, job: Job) -> "Sequence[Check]":
        """Write the model in OpenVINO's own format, if the options ask for it."""
        return write_ir(job, self.options.openvino_ir)

    def open_engine(self, built: Built, job: Job) -> "Backend":
        """Open OpenVINO in FP32, the default precision."""
        from gte_deploy.backends.openvino import OpenVinoBackend

        return OpenVinoBackend(job.graph_files(built, "openvino"), job.spec, precision="fp32")
