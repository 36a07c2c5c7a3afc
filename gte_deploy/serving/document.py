"""/openapi.json, from the table of routes."""

from collections.abc import Iterable
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from gte_deploy._version import __version__
from gte_deploy.serving.answers import ErrorResponse, OpenAIErrorResponse
from gte_deploy.serving.routes import MODEL_ROUTES, ModelRoute

_REFERENCE = "#/components/schemas/{model}"
_FAILURES = {
    "400": "The body is not JSON, or a list is empty.",
    "401": "The bearer token is missing or wrong.",
    "404": "There is no model of that name.",
    "408": "The body did not arrive in time.",
    "413": "The body, its number of texts or the answer is too large.",
    "415": "The body is not declared as JSON.",
    "422": "A field is not known, or its value is not acceptable.",
    "424": "The model cannot answer this route, or it failed.",
    "429": "The server is overloaded; Retry-After says when to come again.",
    "503": "The server starts or shuts down.",
    "504": "The deadline of the request passed.",
}
# GET -> summary, statuses, and the type of the body.
_PLAIN_ROUTES = {
    "/info": ("Describe the models and the limits of the server.", ("200", "401", "404", "503"), "application/json"),
    "/v1/models": ("List the models, in the form of OpenAI.", ("200", "401", "503"), "application/json"),
    "/health": ("Say that the process lives.", ("200", "401"), "application/json"),
    "/ready": ("Say whether the models are loaded.", ("200", "401", "503"), "application/json"),
    "/ping": ("Say whether the models are loaded, for SageMaker.", ("200", "401", "503"), "application/json"),
    "/metrics": ("Give Prometheus' metrics.", ("200", "401"), "text/plain"),
}


def openapi_document(routes: Iterable[ModelRoute] = MODEL_ROUTES) -> dict[str, Any]:
    """Return the description of the server's routes in OpenAPI 3.1."""
    schemas: dict[str, Any] = {}
    errors = {False: _schema(ErrorResponse, schemas), True: _schema(OpenAIErrorResponse, schemas)}
    paths: dict[str, Any] = {}
    for route in routes:
        error = errors[route.path.startswith("/v1/")]
        responses = {"200": _content("The answer.", _schema(route.answer, schemas))}
        responses |= {status: _content(text, error) for status, text in _FAILURES.items()}
        body = _content("", _schema(route.request, schemas))["content"]
        paths[route.path] = {
            "post": {
                "operationId": route.path.strip("/").replace("/", "_").replace("-", "_"),
                "summary": route.summary,
                "description": f"For models made for {', '.join(route.tasks)}.",
                "requestBody": {"required": True, "content": body},
                "responses": responses,
            }
        }
    for path, (summary, statuses, kind) in _PLAIN_ROUTES.items():
        error = errors[path.startswith("/v1/")]
        ok: dict[str, Any] = {"description": "The answer.", "content": {kind: {"schema": {}}}}
        failures = {status: _content(_FAILURES[status], error) for status in statuses if status != "200"}
        name = path.strip("/").replace("/", "_")
        paths[path] = {"get": {"operationId": name, "summary": summary, "responses": {"200": ok, **failures}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "gte-deploy", "version": __version__, "summary": "Text encoders over HTTP"},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"token": []}],
    }


def _schema(kind: Any, schemas: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a type, and move the schemas that it refers to into `schemas`."""
    found = TypeAdapter(kind).json_schema(ref_template=_REFERENCE, schema_generator=GenerateJsonSchema)
    schemas.update(found.pop("$defs", {}))
    if "title" in found and found.get("type") == "object":
        schemas[found["title"]] = found
        return {"$ref": _REFERENCE.format(model=found["title"])}
    return found


def _content(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}
