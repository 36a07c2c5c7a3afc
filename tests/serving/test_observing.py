"""Metrics as Prometheus reads them, spans as OpenTelemetry's SDK keeps them, and the log."""

from __future__ import annotations

import json
import logging
from contextlib import contextmanager

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gte_deploy.core.errors import InputError
from gte_deploy.serving import tracing
from gte_deploy.serving.options import ServerOptions
from gte_deploy.serving.server import read_token


def samples(client):
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {(sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples}


def test_metrics(client_of, served):
    with client_of({"mine": served["embed"]}) as client:
        client.post("/embed", json={"inputs": ["the king", "the old city of the queen"]})
        client.post("/embed", json={"inputs": 1})
        client.post("/v1/embeddings", json={"input": "a", "model": "nothing"})
        client.get("/no/such/route")
        found = samples(client)
        tokens = sum(len(served["embed"].tokenizer.encode(text)) for text in ("the king", "the old city of the queen"))
    assert found["gte_deploy_requests_total", "/embed", "200"] == 1
    assert found["gte_deploy_requests_total", "/embed", "422"] == 1
    assert found["gte_deploy_requests_total", "/v1/embeddings", "404"] == 1
    assert found["gte_deploy_requests_total", "other", "404"] == 1
    assert found["gte_deploy_inputs_total", "mine", "/embed"] == 2
    assert found["gte_deploy_request_seconds_count", "/embed"] == 2
    for stage in ("read", "parse", "compute", "write", "queue", "engine"):
        assert found["gte_deploy_stage_seconds_count", "/embed", stage] >= 1
    assert found["gte_deploy_tokens_total", "mine"] == tokens
    assert found["gte_deploy_batch_rows_sum", "mine"] == 2
    assert found["gte_deploy_batch_tokens_sum", "mine"] == tokens + found["gte_deploy_padding_tokens_total", "mine"]
    assert found["gte_deploy_queue_tokens", "mine"] == found["gte_deploy_requests_in_work",] == 0


def test_metrics_in_the_form_of_openmetrics(client):
    accept = {"accept": "application/openmetrics-text; version=1.0.0"}
    response = client.get("/metrics", headers=accept)
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert response.text.endswith("# EOF\n")


@pytest.fixture
def spans(monkeypatch):
    """The finished spans, in an SDK of this test."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr("opentelemetry.trace.get_tracer", provider.get_tracer)
    return exporter


def test_a_request_is_a_span_of_the_callers_trace_with_its_stages(client_of, served, spans):
    trace_id, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    with client_of({"mine": served["embed"]}) as client:
        spans.clear()
        headers = {"traceparent": f"00-{trace_id}-{parent}-01"}
        client.post("/embed", json={"inputs": ["the king", "a city"]}, headers=headers)
        found = {span.name: span for span in spans.get_finished_spans()}
        spans.clear()
        client.post("/rerank", json={"query": "a", "texts": ["b"]})
        (failed,) = [span for span in spans.get_finished_spans() if span.name == "POST /rerank"]
    whole = found["POST /embed"]
    assert format(whole.context.trace_id, "032x") == trace_id and format(whole.parent.span_id, "016x") == parent
    assert whole.attributes["http.response.status_code"] == 200 and whole.attributes["http.route"] == "/embed"
    assert whole.attributes["gte_deploy.model"] == "mine" and whole.attributes["gte_deploy.inputs"] == 2
    assert whole.attributes["gte_deploy.tokens"] > 4
    for stage in ("read", "parse", "compute", "write"):
        inner = found[stage]
        assert inner.parent.span_id == whole.context.span_id
        assert whole.start_time <= inner.start_time <= inner.end_time <= whole.end_time
    assert failed.attributes["http.response.status_code"] == 424 and failed.parent is None


def test_without_opentelemetry_there_are_no_spans(client_of, served, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(tracing.importlib, "import_module", missing)
    with client_of({"mine": served["embed"]}) as client:
        assert client.post("/embed", json={"inputs": "a"}).status_code == 200


@contextmanager
def lines_of(logger):
    lines: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record):
            lines.append(record.getMessage())

    handler, level = Kept(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_the_log_in_both_forms(client_of, served):
    logger = logging.getLogger("gte_deploy.serving.access")
    for form in ("json", "text", "off"):
        with lines_of(logger) as lines, client_of({"mine": served["embed"]}, access_log=form) as client:
            lines.clear()
            client.post("/embed", json={"inputs": "a secret"}, headers={"x-request-id": "one"})
            client.get("/a%0Ab")
        assert not any("secret" in line or "\n" in line for line in lines)
        if form == "json":
            first, second = map(json.loads, lines)
            assert first["request_id"] == "one" and first["status"] == 200 and first["inputs"] == 1
            assert second["path"] == "/a\nb" and second["status"] == 404
        elif form == "text":
            assert 'POST "/embed" 200' in lines[0] and "model=mine" in lines[0] and r'"/a\nb" 404' in lines[1]
        else:
            assert lines == []


def test_the_token_is_read_strictly(tmp_path):
    file = tmp_path / "token"
    assert read_token(None, {}) is None
    assert read_token(None, {"GTE_DEPLOY_TOKEN": " a-b \n"}) == "a-b"
    for content in ("", "  \n", "a b", "a\nb", "ü"):
        file.write_text(content, encoding="utf-8")
        with pytest.raises(InputError):
            read_token(file, {})
    with pytest.raises(InputError, match="leave one out"):
        read_token(file, {"GTE_DEPLOY_TOKEN": "a"})
    with pytest.raises(InputError, match="cannot be read"):
        read_token(tmp_path / "nothing", {})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", 70_000),
        ("max_concurrent_requests", 0),
        ("max_body_bytes", 0),
        ("timeout", 0.0),
        ("timeout", float("nan")),
        ("drain_seconds", -1.0),
        ("access_log", "xml"),
    ],
)
def test_options_out_of_range(name, value):
    with pytest.raises(InputError, match=name):
        ServerOptions(**{name: value})
