"""Tracing is nine tenths of a tiny export's time; a test that is about something else takes a graph traced before."""

from collections.abc import Callable
from typing import Any

import pytest

_traced: dict[tuple[Any, ...], Any] = {}


@pytest.fixture
def trace_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `export` reuse the graphs of an earlier test with the same weights and options."""
    pytest.importorskip("torch")
    pytest.importorskip("onnx")
    from gte_deploy.exporters import graph

    build: Callable[..., Any] = graph.build_graphs

    def build_once(model: Any, **options: Any) -> Any:
        weights = tuple(float(value.double().sum()) for value in model.state_dict().values())
        key = (type(model), weights, tuple(sorted(options.items())))
        if key not in _traced:
            _traced[key] = build(model, **options)
        return dict(_traced[key])

    monkeypatch.setattr(graph, "build_graphs", build_once)
