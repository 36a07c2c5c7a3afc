"""Tracing is nine tenths of a tiny export's time; a test that is about something else takes a graph traced before."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_traced: dict[tuple[Any, ...], Any] = {}


@pytest.fixture
def trace_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `export` reuse the graphs of an earlier test with the same weights and options."""
    pytest.importorskip("torch")
    pytest.importorskip("onnx")
    from gte_deploy.exporters.graph import build as graph

    build: Callable[..., Any] = graph.build_graphs

    def build_once(model: Any, **options: Any) -> Any:
        weights = tuple(float(value.double().sum()) for value in model.state_dict().values())
        key = (type(model), weights, tuple(sorted(options.items())))
        if key not in _traced:
            _traced[key] = build(model, **options)
        return dict(_traced[key])

    monkeypatch.setattr(graph, "build_graphs", build_once)


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`spoil(engine, change, part)`: let this engine's graph, or a part, be saved with its largest weight changed.

    The part "all_logits" is the graph for other libraries.
    """
    onnx = pytest.importorskip("onnx")
    from gte_deploy.exporters.graph import build as graph
    from gte_deploy.exporters.job import GRAPH_PATHS, part_path

    save: Callable[..., Any] = graph.save_graphs

    def spoil_graph(engine: Any, change: Callable[[Any], Any], part: str | None = None) -> None:
        def save_wrong(graphs: Any, data: Path) -> Any:
            files = save(graphs, data)
            whole = part_path(engine, "masked")
            names = {None: whole if data.parent / Path(whole).name in graphs else GRAPH_PATHS[engine]}
            names["all_logits"] = GRAPH_PATHS[engine]
            path = data.parent / Path(names.get(part) or part_path(engine, part)).name
            model = onnx.load(path)
            weight = max(model.graph.initializer, key=lambda tensor: tensor.ByteSize())
            values = onnx.numpy_helper.to_array(weight)
            weight.CopyFrom(onnx.numpy_helper.from_array(change(values).astype(values.dtype), weight.name))
            onnx.save(model, path)
            return files

        monkeypatch.setattr(graph, "save_graphs", save_wrong)

    return spoil_graph
