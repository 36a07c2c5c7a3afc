"""From an error to the status and the body of an answer: in the form of TEI, or of OpenAI on /v1 and /v2."""

import json
import math
from collections.abc import Mapping
from typing import Literal

from starlette.responses import Response
from starlette.types import Scope

from gte_deploy.core.errors import (
    BackendError,
    GteDeployError,
    InputError,
    MissingDependencyError,
    UnavailableError,
)
from gte_deploy.serving.facts import path_of

FailureType = Literal["Unhealthy", "Backend", "Overloaded", "Validation", "Tokenizer", "Empty", "Timeout"]
"""The `error_type` of an answer: those of text-embeddings-inference, and "Timeout"."""

CLIENT_GONE = 499
"""The status, in logs and metrics, of a request whose client went away; nobody receives it."""


class RequestError(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP status.
        message: says what came, what was expected, and what to do.
        kind: the `error_type` of TEI's form.
        field: the field of the request that is at fault, for OpenAI's form.
        headers: more headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: FailureType = "Validation",
        *,
        field: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.field = field
        self.headers = dict(headers or {})


def overloaded(message: str, retry_after_s: float) -> RequestError:
    """The refusal of a request for which there is no room now."""
    return RequestError(429, message, "Overloaded", headers={"Retry-After": str(max(1, math.ceil(retry_after_s)))})


def unhealthy(message: str) -> RequestError:
    """The refusal of a request while the server starts or ends."""
    return RequestError(503, message, "Unhealthy", headers={"Retry-After": "1"})


def as_request_error(error: GteDeployError) -> RequestError:
    """The answer to an error of the package itself."""
    if isinstance(error, InputError):
        return RequestError(422, str(error).replace("Pass truncation=True", 'Send "truncate": true'))
    if isinstance(error, UnavailableError):
        return unhealthy(str(error))
    if isinstance(error, BackendError | MissingDependencyError):
        return RequestError(424, str(error), "Backend")
    return RequestError(500, str(error), "Backend")


def failure_response(error: RequestError, scope: Scope) -> Response:
    """The answer to the request of an ASGI scope.

    The messages may hold anything that a client sent, so they are written as ASCII: a lone surrogate has no UTF-8.
    """
    if path_of(scope).startswith(("/v1/", "/v2/")):
        body: object = {
            "error": {
                "message": error.message,
                "type": _openai_type(error.status),
                "param": error.field,
                "code": _OPENAI_CODES.get(error.status),
            }
        }
    else:
        body = {"error": error.message, "error_type": error.kind}
    return Response(
        json.dumps(body).encode("ascii"), error.status, headers=error.headers, media_type="application/json"
    )


_OPENAI_CODES = {401: "invalid_api_key", 404: "not_found", 429: "rate_limit_exceeded", 504: "timeout"}


def _openai_type(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 and status != 424 else "server_error"
