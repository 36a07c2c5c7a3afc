"""The data of one export: the checkpoint, the progress, and the built graphs and engine."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from gte_deploy.bundle.manifest import PlanEntry, TextsEntry
from gte_deploy.core.errors import ParityError
from gte_deploy.core.spec import DeviceType, Engine, ModelSpec, Precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from gte_deploy.backends.graphs import GraphFiles
    from gte_deploy.exporters.graph.build import Graph
    from gte_deploy.exporters.verification.bounds import Bounds
    from gte_deploy.exporters.verification.texts import ChosenTexts
    from gte_deploy.models.description import Description
    from gte_deploy.text.tokenization import TextTokenizer

Progress = Callable[[str], None]

GRAPH_PATHS: Mapping[Engine, str] = {
    "onnxruntime": "onnx/model.onnx",
    "openvino": "onnx/model_openvino.onnx",
    "tensorrt": "onnx/model_tensorrt.onnx",
    "executorch": "executorch/model.pte",
}
"""Engine -> path of its graph in a bundle."""
WEIGHTS_PATH = "onnx/model.onnx_data"
"""Path of the weights that several graphs share; transformers.js asks for the name of a graph and `_data`."""

EVALUATION_TOKENS = 6000
"""Number of English words for measuring the accuracy of a lower precision: once as single texts, once in windows."""


def part_path(engine: Engine, name: str) -> str:
    """Return the path of a part of an engine's graph in a bundle; see `gte_deploy.exporters.graph.parts`."""
    return f"{GRAPH_PATHS[engine].removesuffix('.onnx')}_{name}.onnx"


def by_outputs(graphs: "Mapping[Path, Graph]") -> "GraphFiles":
    """Return the names of each graph's outputs -> its file, as the runtime takes a graph and its parts."""
    return {tuple(output.name for output in graph.outputs): path for path, graph in graphs.items()}


@dataclass
class Steps:
    """Reports each step as it starts and records how many seconds it took; a step may run several times."""

    report: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.report(name)
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


@dataclass(frozen=True)
class Job:
    """One export, with everything that a target needs.

    Args:
        checkpoint: the description of the checkpoint, with the limits of this export in its spec.
        folder: the folder of the bundle, filled step by step.
        precision: the precision of the bundle.
        opset: the ONNX opset of the graphs.
        model: the PyTorch model, float32.
        tokenizer: the checkpoint's tokenizer.
        texts: the texts for calibration and for measuring the accuracy.
        steps: reports progress.
        bounds: whether a bundle that misses its bounds is refused.
    """

    checkpoint: "Description"
    folder: Path
    precision: Precision
    opset: int
    model: "PreTrainedModel"
    tokenizer: "TextTokenizer"
    texts: "ChosenTexts"
    steps: Steps
    bounds: "Bounds" = "strict"

    @property
    def spec(self) -> ModelSpec:
        """The facts about the model, with the limits of this export."""
        return self.checkpoint.spec

    @property
    def sites(self) -> Mapping[str, int]:
        """The number of times that each fusion pass must fire on a graph of the model."""
        return self.checkpoint.sites

    @property
    def num_layers(self) -> int:
        """Number of layers of the encoder."""
        return int(self.model.config.num_hidden_layers)

    def graph_file(self, engine: Engine) -> Path:
        """Return the path for the graph of an engine."""
        return self.folder / GRAPH_PATHS[engine]

    def graph_files(self, built: "Built", engine: Engine) -> "GraphFiles":
        """Return the files of an engine's graph and of its parts, by the names of their outputs."""
        return by_outputs(self.saved_graphs(built, engine))

    def saved_graphs(self, built: "Built", engine: Engine) -> "dict[Path, Graph]":
        """Return the files of an engine's graph and of its parts, with the graph in each."""
        parts = {part_path(engine, name): part for name, part in built.parts.get(engine, {}).items()}
        return {
            self.folder / path: graph for path, graph in {built.path(engine): built.graphs[engine], **parts}.items()
        }

    def require_kept_bounds(self, failure: str) -> None:
        """Refuse graphs that cannot keep their bounds, before they are written or compiled.

        Raises:
            ParityError: `failure` is not empty, and `bounds` is "strict".
        """
        if failure and self.bounds == "strict":
            raise ParityError(failure)


@dataclass(frozen=True)
class Built:
    """The graphs and the engine that a target wrote to the folder of the bundle.

    Args:
        graphs: engine -> the graph that the runtime opens, saved at `path`.
        sensitivity: group of layers -> its loss in low precision, first the one that uses up most of a bound; empty
            unless a sweep was needed.
        kept_groups: those of `sensitivity` that stay in a higher precision.
        plan: the TensorRT engine, if there is one.
        keeps_graphs: whether the graphs stay in the bundle.
        made_for: the device that ONNX Runtime's graph is for.
        caveats: one sentence for each thing that this machine could not verify.
        whole: the graph of every output, if `graphs` holds the part of it that computes only the answer.
        finer: builds again with more layers in a higher precision, for graphs that missed their bounds; None if the
            target cannot.
        parts: engine -> the parts of its graph by name, saved at `part_path`.
        all_logits: engine -> the graph with the logits of every token, saved at `GRAPH_PATHS`, which other libraries
            open; empty unless the runtime's graph computes only masked tokens.
        calibration: the calibration texts, where ranges were measured.
    """

    graphs: Mapping[Engine, "Graph"]
    sensitivity: Mapping[str, float] = field(default_factory=dict)
    kept_groups: Sequence[str] = ()
    plan: PlanEntry | None = None
    keeps_graphs: bool = True
    made_for: DeviceType = "cpu"
    caveats: Sequence[str] = ()
    whole: "Graph | None" = None
    finer: "Callable[[], Built] | None" = None
    parts: Mapping[Engine, Mapping[str, "Graph"]] = field(default_factory=dict)
    all_logits: Mapping[Engine, "Graph"] = field(default_factory=dict)
    calibration: TextsEntry | None = None

    def path(self, engine: Engine) -> str:
        """Return the path of an engine's graph in the bundle."""
        return part_path(engine, "masked") if engine in self.all_logits else GRAPH_PATHS[engine]
