"""/openapi.json: every route is in it, and the server answers as it says, judged by schemathesis."""

from __future__ import annotations

import json

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.openapi.checks import *  # noqa: F403  registers the checks

from gte_deploy.serving.document import openapi_document
from gte_deploy.serving.routes import MODEL_ROUTES
from http_server import ServerProcess, serve_command

pytestmark = pytest.mark.reliability
load_all_checks()
KEPT = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
)


def test_it_has_every_route_and_its_references_lead_somewhere(client):
    document = client.get("/openapi.json").json()
    assert document == openapi_document()
    assert {route.path for route in MODEL_ROUTES} < set(document["paths"])
    schemas = document["components"]["schemas"]
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    text = client.get("/openapi.json").text
    assert all(f'"#/components/schemas/{name}"' in text for name in schemas), "a schema that nothing refers to"


@pytest.fixture(scope="module")
def url(tmp_path_factory, task_bundles):
    bundles = [f"{name}={bundle}" for name, bundle in task_bundles.items()]
    server = ServerProcess(serve_command(*bundles, "--access-log", "off"), cwd=tmp_path_factory.mktemp("server"))
    server.wait_until_ready()
    yield server.url
    assert server.end() == 0 and "Traceback" not in server.log, server.log


def check(url, path, mode, examples):
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    method = "POST" if path in {route.path for route in MODEL_ROUTES} else "GET"
    checks = [check for check in CHECKS.get_all() if check.__name__ in KEPT]
    assert len(checks) == len(KEPT)

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(case=schema[path][method].as_strategy(generation_mode=mode))
    def answers_as_described(case):
        case.call_and_validate(checks=checks)

    answers_as_described()


PATHS = [*sorted(openapi_document()["paths"])]


@pytest.mark.parametrize("path", PATHS)
def test_it_answers_as_the_document_says(url, path, attempts):
    check(url, path, GenerationMode.POSITIVE, 10)
    attempts(f"requests that schemathesis made of the document: {GenerationMode.POSITIVE.value}", 10)


@pytest.mark.parametrize("path", [route.path for route in MODEL_ROUTES])
def test_it_refuses_as_the_document_says(url, path, attempts):
    check(url, path, GenerationMode.NEGATIVE, 10)
    attempts(f"requests that schemathesis made of the document: {GenerationMode.NEGATIVE.value}", 10)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", [route.path for route in MODEL_ROUTES])
def test_it_answers_as_the_document_says_at_length(url, path, mode, attempts):
    check(url, path, mode, 300)
    attempts(f"requests that schemathesis made of the document: {mode.value}", 300)


# The fields of text-embeddings-inference 1.7.1, from its docs/openapi.json.
_CUT = {"truncate", "truncation_direction"}
TEI = {
    "/embed": {"inputs", "normalize", "prompt_name", *_CUT},
    "/embed_all": {"inputs", "prompt_name", *_CUT},
    "/embed_sparse": {"inputs", "prompt_name", *_CUT},
    "/rerank": {"query", "texts", "raw_scores", "return_text", *_CUT},
    "/predict": {"inputs", "raw_scores", *_CUT},
    "/similarity": {"inputs", "parameters"},
    "/tokenize": {"inputs", "add_special_tokens", "prompt_name"},
    "/decode": {"ids", "skip_special_tokens"},
    "/v1/embeddings": {"input", "encoding_format", "model", "user"},
}
TEI_INFO = {
    *("model_id", "model_dtype", "model_type", "max_concurrent_requests", "max_input_length", "max_batch_tokens"),
    *("max_client_batch_size", "auto_truncate", "tokenization_workers", "version"),
}


def test_it_names_the_bundles_that_were_loaded(client, task_bundles):
    sums = {name: json.loads((path / "manifest.json").read_text())["checksum"] for name, path in task_bundles.items()}
    assert len(set(sums.values())) == len(sums)
    assert {name: client.get(f"/info?model={name}").json()["model_sha"] for name in sums} == sums
    models = client.get("/v1/models").json()["data"]
    assert {model["name"]: model["checksum"] for model in models} == sums


def test_it_has_the_fields_of_text_embeddings_inference(client):
    known = {route.path: set(route.request.model_fields) for route in MODEL_ROUTES}
    assert {path: fields - known[path] for path, fields in TEI.items() if fields - known[path]} == {}
    assert set(client.get("/info").json()) >= TEI_INFO
    kinds = [client.get(f"/info?model={name}").json()["model_type"] for name in ("embed", "rank", "labels", "sparse")]
    assert [*map(list, kinds)] == [["embedding"], ["reranker"], ["classifier"], ["embedding"]]
    assert kinds[3] == {"embedding": {"pooling": "splade"}}
    assert kinds[2]["classifier"]["id2label"]["1"] == "LABEL_1"
