"""The target "executorch": a program for phones and other devices without ONNX Runtime, as ExecuTorch runs it."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from gte_deploy.core.errors import InputError, require_modules
from gte_deploy.core.files import write_bytes
from gte_deploy.core.options import option
from gte_deploy.core.spec import Engine, Precision
from gte_deploy.exporters.job import Built, Job
from gte_deploy.exporters.targets.base import Candidates, Target, closing

if TYPE_CHECKING:
    from gte_deploy.backends.base import Backend
    from gte_deploy.exporters.graph.build import Graph
    from gte_deploy.exporters.verification.accuracy import Runs
    from gte_deploy.models.description import Description

_ENGINE: Engine = "executorch"


@dataclass(frozen=True)
class ExecuTorchOptions:
    """Upper bounds of a program's inputs, beside the longest text. The device reserves memory for all of them.

    Args:
        program_batch: texts of one run; the runtime splits larger batches.
        program_masks: masks of one run, for fill-mask; the runtime makes several runs for more.
    """

    program_batch: int = option(1, "most texts of one run", metavar="N", parse=int)
    program_masks: int = option(32, "most masks of one run, for fill-mask", metavar="N", parse=int)


class ExecuTorchTarget(Target):
    """See the module."""

    name: ClassVar[str] = "executorch"
    format: ClassVar[str] = "executorch"
    title: ClassVar[str] = "ExecuTorch (--format executorch)"
    engines: ClassVar[tuple[Engine, ...]] = (_ENGINE,)
    precisions: ClassVar[tuple[Precision, ...]] = ("fp32", "int8")
    Options: ClassVar[type] = ExecuTorchOptions
    options: ExecuTorchOptions

    def check(self, precision: Precision) -> None:
        """Check that the bounds are positive."""
        super().check(precision)
        for field in dataclasses.fields(self.options):
            value = getattr(self.options, field.name)
            if type(value) is not int or value < 1:
                raise InputError(f"{field.name} must be a positive integer, not {value!r}")

    def check_model(self, checkpoint: "Description", precision: Precision) -> None:
        """Require executorch."""
        require_modules("executorch", extra="executorch")

    def build(self, graphs: "Mapping[Engine, Graph]", job: Job) -> Built:
        """Write the program. Its inputs and outputs are those of the graph of standard operators."""
        from gte_deploy.exporters.graph.program import ProgramLimits, build_program

        limits = ProgramLimits(self.options.program_batch, job.spec.max_length, self.options.program_masks)
        with job.steps("lower to XNNPACK, which takes minutes"):
            program = build_program(job.model, job.spec, limits, job.precision)
        file = job.graph_file(_ENGINE)
        file.parent.mkdir(exist_ok=True)
        write_bytes(file, program)
        return Built({_ENGINE: dataclasses.replace(graphs["openvino"], opset=0)})

    @contextlib.contextmanager
    def candidates(self, built: Built, job: Job) -> Iterator[Candidates]:
        """ExecuTorch's own runtime, on this CPU."""
        opened: dict[tuple[Engine, Precision], Runs] = {(_ENGINE, "fp32"): self.open_engine(built, job)}
        with closing(opened):
            yield Candidates(opened)

    def open_engine(self, built: Built, job: Job) -> "Backend":
        """Open the program."""
        from gte_deploy.backends.executorch import ExecuTorchBackend

        graph = built.graphs[_ENGINE]
        return ExecuTorchBackend(job.graph_file(_ENGINE), job.spec, inputs=graph.inputs, outputs=graph.outputs)
