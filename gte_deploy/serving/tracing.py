"""Spans of OpenTelemetry, where its API is installed; without an SDK they cost little and go nowhere.

Nothing here chooses an exporter: `opentelemetry-instrument` does, from the variables OTEL_*.
"""

import importlib
from collections.abc import Mapping
from typing import Any

from gte_deploy.serving.facts import Facts


class Tracing:
    """Makes a span for each request, with a span in it for each stage."""

    def __init__(self) -> None:
        """Look for the API."""
        try:
            self._trace: Any = importlib.import_module("opentelemetry.trace")
            self._propagate: Any = importlib.import_module("opentelemetry.propagate")
        except ModuleNotFoundError:
            self._trace = None
            return
        self._tracer = self._trace.get_tracer("gte_deploy.serving")

    def begin(self, method: str, path: str, headers: Mapping[str, str], facts: Facts) -> Any:
        """Return the span of a request, a child of the caller's if its headers name one; None without the API."""
        if self._trace is None:
            return None
        return self._tracer.start_span(
            method,
            context=self._propagate.extract(headers),
            kind=self._trace.SpanKind.SERVER,
            start_time=facts.now_ns(),
            attributes={"http.request.method": method, "url.path": path},
        )

    def end(self, span: Any, method: str, facts: Facts, status: int) -> None:
        """End the span of a request."""
        if span is None:
            return
        if span.is_recording():
            span.update_name(f"{method} {facts.route}")
            span.set_attribute("http.route", facts.route)
            span.set_attribute("http.response.status_code", status)
            if facts.model:
                span.set_attribute("gte_deploy.model", facts.model)
                span.set_attribute("gte_deploy.inputs", facts.inputs)
            if facts.call is not None:
                usage = facts.call.usage
                span.set_attribute("gte_deploy.tokens", usage.tokens)
                span.set_attribute("gte_deploy.queue_seconds", usage.queued_s)
                span.set_attribute("gte_deploy.engine_seconds", usage.computed_s)
            if status >= 500:
                span.set_status(self._trace.StatusCode.ERROR)
            inside = self._trace.set_span_in_context(span)
            for stage, (begun, ended) in facts.stages.items():
                self._tracer.start_span(stage, context=inside, start_time=begun).end(end_time=ended)
        span.end(end_time=facts.now_ns())

    def trace_id(self, span: Any) -> str | None:
        """The id of the trace that a span belongs to, in hexadecimal digits; None if it belongs to none."""
        if span is None or not (context := span.get_span_context()).is_valid:
            return None
        return format(context.trace_id, "032x")
