"""The target "cuda": one graph for ONNX Runtime's CUDA provider, built by the module `graph`."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from gte_deploy.core.errors import InputError
from gte_deploy.core.options import option
from gte_deploy.core.spec import Engine, Precision
from gte_deploy.exporters.job import Built, Job
from gte_deploy.exporters.targets.base import (
    Candidates,
    Target,
    has_padding_free,
    refuse_token_weights,
    require_padding_free,
)
from gte_deploy.exporters.targets.cpu import save

if TYPE_CHECKING:
    from gte_deploy.backends.base import Backend
    from gte_deploy.exporters.graph.build import Graph
    from gte_deploy.models.description import Description

Padding = Literal["auto", "keep", "remove"]


@dataclass(frozen=True)
class CudaOptions:
    """Options for padding.

    Args:
        padding: "remove" for a graph whose kernels see no padding token; "keep" for a graph that masks padding; "auto"
            removes padding in fp16, for which ONNX Runtime has the kernels, if the model's family has padding-free
            attention.
    """

    padding: Padding = option(
        "auto", "whether kernels see padding tokens (default: removed in fp16)", choices=get_args(Padding)
    )


class CudaTarget(Target):
    """Builds the graph for ONNX Runtime's CUDA provider, and opens it."""

    name: ClassVar[str] = "cuda"
    format: ClassVar[str] = "onnx"
    title: ClassVar[str] = "ONNX Runtime on an NVIDIA GPU (--target cuda)"
    engines: ClassVar[tuple[Engine, ...]] = ("onnxruntime",)
    precisions: ClassVar[tuple[Precision, ...]] = ("fp16", "bf16", "fp32")
    Options: ClassVar[type] = CudaOptions
    options: CudaOptions

    def check(self, precision: Precision) -> None:
        """Refuse padding-free BF16: ONNX Runtime removes padding only in FP16 and FP32."""
        super().check(precision)
        if precision == "bf16" and self.options.padding == "remove":
            raise InputError("ONNX Runtime removes padding in fp16 and fp32 only; take one of them, or padding 'keep'")

    def check_model(self, checkpoint: "Description", precision: Precision) -> None:
        """Refuse sparse heads of token weights, and to remove padding from a family without padding-free attention.

        Not every CUDA provider has the operator that pools token weights.
        """
        refuse_token_weights(checkpoint.spec)
        if self.options.padding == "remove":
            require_padding_free(checkpoint)

    def build(self, graphs: "Mapping[Engine, Graph]", job: Job) -> Built:
        """Fuse the graph of standard operators for CUDA, and save it."""
        from gte_deploy.exporters.targets.cuda.graph import cuda_graph

        with job.steps(f"fuse for CUDA in {job.precision}"):
            graph = cuda_graph(
                graphs["openvino"],
                sites=job.sites,
                precision=job.precision,
                removes_padding=self.removes_padding(job.precision) and has_padding_free(job.checkpoint),
            )
        made: dict[Engine, Graph] = {"onnxruntime": graph}
        return dataclasses.replace(save(made, job), made_for="cuda")

    @contextlib.contextmanager
    def candidates(self, built: Built, job: Job) -> Iterator[Candidates]:
        """The graph on a GPU, or its emulation on the CPU if there is no GPU."""
        from gte_deploy.exporters.targets.cuda.graph import has_cuda, opened_for_comparison

        key: tuple[Engine, Precision] = ("onnxruntime", job.precision)
        with opened_for_comparison(job.saved_graphs(built, "onnxruntime"), job.spec) as (backend, caveats):
            yield Candidates({key: backend}, caveats, emulated=[] if has_cuda() else [key])

    def open_engine(self, built: Built, job: Job) -> "Backend | None":
        """Open ONNX Runtime on the GPU; None without a GPU."""
        from gte_deploy.backends.onnxruntime import OnnxBackend
        from gte_deploy.exporters.targets.cuda.graph import has_cuda

        files = job.graph_files(built, "onnxruntime")
        return OnnxBackend(files, job.spec, device="cuda") if has_cuda() else None

    def removes_padding(self, precision: Precision) -> bool:
        """Whether the options ask for a padding-free graph in this precision."""
        return self.options.padding == "remove" or (self.options.padding == "auto" and precision == "fp16")
