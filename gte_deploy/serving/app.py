"""The ASGI application of the server."""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from gte_deploy._version import __version__
from gte_deploy.backends.joining import JoiningBackend
from gte_deploy.core.calls import Call
from gte_deploy.core.errors import CancelledCallError, DeadlineError, GteDeployError, OverloadedError
from gte_deploy.model import Model
from gte_deploy.serving.document import openapi_document
from gte_deploy.serving.facts import FACTS, Facts
from gte_deploy.serving.failures import (
    CLIENT_GONE,
    RequestError,
    as_request_error,
    failure_response,
    overloaded,
)
from gte_deploy.serving.handlers import Work
from gte_deploy.serving.json_body import parse_json
from gte_deploy.serving.metrics import Metrics
from gte_deploy.serving.observing import BearerToken, Observed
from gte_deploy.serving.options import ServerOptions
from gte_deploy.serving.page import page_routes
from gte_deploy.serving.registry import Registry, ServedModel, describe
from gte_deploy.serving.requests import validated
from gte_deploy.serving.routes import MODEL_ROUTES, ModelRoute, own_route
from gte_deploy.serving.running import ClientGoneError, Runner, read_body, seconds_allowed, too_late
from gte_deploy.serving.tracing import Tracing

logger = logging.getLogger(__name__)

# The state of the queue of each model, as gauges.
_OF_QUEUES: tuple[tuple[str, str, Callable[[JoiningBackend], float]], ...] = (
    ("gte_deploy_queue_rows", "Rows that wait for a batch.", lambda queue: queue.queued_rows),
    ("gte_deploy_queue_tokens", "Tokens that wait for a batch.", lambda queue: queue.queued_tokens),
    ("gte_deploy_queue_seconds", "Estimated wait for a batch.", lambda queue: queue.estimated_wait_s),
    ("gte_deploy_batches_in_work", "Batches that are computed now.", lambda queue: queue.running),
)
_LOADING_SECONDS = 5  # that the end waits for a model that still loads
_PROBES = ("/health", "/ready", "/ping", "/metrics")


class Server:
    """The parts of a server, and the routes that do not ask a model.

    Args:
        registry: the models.
        options: limits and rules.
        token: the bearer token that requests must carry; None for none.
        on_failure: called with the error if a model cannot be loaded.
        on_ready: called once, in a thread of its own, when every model answers requests.
    """

    def __init__(
        self,
        registry: Registry,
        options: ServerOptions,
        *,
        token: str | None = None,
        on_failure: Callable[[Exception], None] = lambda error: None,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        self.registry = registry
        self.options = options
        self.metrics = Metrics()
        self._token = token
        self._on_failure = on_failure
        self._on_ready = on_ready
        self._runner = Runner(options.max_concurrent_requests)
        self.metrics.in_work.set_function(lambda: self._runner.in_work)
        registry.on_load = self._observe
        self._queues: dict[str, JoiningBackend] = {}
        for name, help, read in _OF_QUEUES:
            self.metrics.watch(name, help, partial(self._read_queues, read))

    def app(self) -> ASGIApp:
        """Return the ASGI application."""
        pages = page_routes() if self.options.page else []
        routes = [
            *pages,
            Route("/", self._dispatch, methods=["POST"]),
            Route("/invocations", self._dispatch, methods=["POST"]),
            Route("/health", self._health, methods=["GET"]),
            Route("/ready", self._ready, methods=["GET"]),
            Route("/ping", self._ready, methods=["GET"]),
            Route("/metrics", self._metrics, methods=["GET"]),
            Route("/info", self._info, methods=["GET"]),
            Route("/v1/models", self._models, methods=["GET"]),
            Route("/v1/models/{name:path}", self._model, methods=["GET"]),
            Route("/openapi.json", self._openapi, methods=["GET"]),
        ]
        for route in MODEL_ROUTES:
            for path in (route.path, *route.aliases):
                routes.append(Route(path, self._endpoint(route), methods=["POST"]))
        inner = Starlette(
            routes=[*routes],
            exception_handlers={HTTPException: _no_route, Exception: _server_failed},
            lifespan=self._lifespan,
        )
        open_paths = () if self.options.protect_all else _PROBES
        observed = Observed(
            inner,
            token=BearerToken(self._token, open_paths=(*open_paths, *(route.path for route in pages))),
            metrics=self.metrics,
            tracing=Tracing(),
            access_log=self.options.access_log,
        )
        if not self.options.cors_origins:
            return observed
        # Around all else: a browser asks without the token whether it may send one, and a page reads refusals, too.
        return CORSMiddleware(
            observed,
            allow_origins=self.options.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("authorization", "content-type", "x-request-id", "x-request-timeout"),
            expose_headers=("x-request-id", "retry-after"),
        )

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        # A daemon, so that the process can end while a large model loads.
        loading = threading.Thread(target=self._load, args=(asyncio.get_running_loop(),), daemon=True)
        loading.start()
        yield
        self.registry.end()
        await self._runner.close()
        await asyncio.to_thread(loading.join, _LOADING_SECONDS)
        await asyncio.to_thread(self.registry.close)

    def _load(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            self.registry.load()
            if self.registry.is_ready:
                self._on_ready()
        except Exception as error:
            # The command line shows an error of the package itself, as for any command.
            if not isinstance(error, GteDeployError):
                logger.exception("a model cannot be loaded")
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._on_failure, error)

    def _observe(self, served: ServedModel) -> None:
        """Count the batches of a model, and what waits for it."""
        queue = served.model.joining
        if queue is not None:
            queue.observe(self.metrics.batches_of(served.name))
            self._queues[served.name] = queue

    def _read_queues(self, read: Callable[[JoiningBackend], float]) -> dict[str, float]:
        return {name: read(queue) for name, queue in self._queues.items()}

    def _endpoint(self, route: ModelRoute) -> Callable[[Request], Any]:
        async def endpoint(request: Request) -> Response:
            return await self._ask(request, route)

        return endpoint

    async def _dispatch(self, request: Request) -> Response:
        """Answer `POST /`, which stands for the route of the first model."""
        try:
            spec = self.registry.all()[0].model.spec
        except RequestError as error:
            return failure_response(error, request.scope)
        return await self._ask(request, own_route(spec.task, spec.num_labels))

    async def _ask(self, request: Request, route: ModelRoute) -> Response:
        """Answer a request that asks a model."""
        facts: Facts = request.scope[FACTS]
        facts.route = route.path
        try:
            return await self._answer(request, route, facts)
        except RequestError as error:
            return failure_response(error, request.scope)
        except ClientGoneError:
            return Response(status_code=CLIENT_GONE)

    async def _answer(self, request: Request, route: ModelRoute, facts: Facts) -> Response:
        self.registry.all()
        deadline = time.monotonic() + seconds_allowed(request, self.options.timeout)
        _check_content_type(request)
        self._runner.enter()
        try:
            with facts.stage("read"):
                body = await read_body(request, self.options.max_body_bytes, deadline)
        except BaseException:
            self._runner.leave()
            raise
        call = facts.call = Call(deadline=deadline)
        content = await self._runner.run(request, call, lambda: self._content(route, facts, body))
        return Response(content, media_type="application/json")

    def _content(self, route: ModelRoute, facts: Facts, body: bytes) -> bytes:
        """Return the body of the answer; runs in a thread."""
        try:
            with facts.stage("parse"):
                asked = validated(route.request, parse_json(body))
                served = self.registry.choose(asked.model, route.suits, route.needs)
            facts.model = served.name
            with facts.stage("compute"):
                answer = route.handle(Work(served, self.options), asked)
            facts.inputs, facts.characters = answer.inputs, answer.characters
            with facts.stage("write"):
                return orjson.dumps(answer.content, option=orjson.OPT_SERIALIZE_NUMPY)
        except OverloadedError as error:
            raise overloaded(str(error), error.retry_after_s) from error
        except DeadlineError as error:
            raise too_late() from error
        except CancelledCallError as error:
            raise ClientGoneError from error
        except GteDeployError as error:
            failure = as_request_error(error)
            if failure.status != 422:
                logger.warning("%s of the request %s failed: %s", route.path, facts.request_id, error)
            raise failure from error

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def _ready(self, request: Request) -> Response:
        try:
            self.registry.all()
        except RequestError as error:
            return failure_response(error, request.scope)
        return JSONResponse({"status": "ready"})

    async def _metrics(self, request: Request) -> Response:
        text, content_type = self.metrics.text(request.headers.get("accept", ""))
        return Response(text, headers={"Content-Type": content_type})

    async def _openapi(self, request: Request) -> Response:
        return JSONResponse(openapi_document())

    async def _info(self, request: Request) -> Response:
        """Describe the server as text-embeddings-inference does, and every model."""
        try:
            models = self.registry.all()
            name = request.query_params.get("model")
            first = models[0] if name is None else self.registry.named(name)
        except RequestError as error:
            return failure_response(error, request.scope)
        return JSONResponse(
            {
                **_tei_info(first),
                "max_concurrent_requests": self.options.max_concurrent_requests,
                "max_client_batch_size": self.options.max_client_batch_size,
                "auto_truncate": self.options.auto_truncate,
                "models": [describe(served, _routes_of(served)) for served in models],
            }
        )

    async def _models(self, request: Request) -> Response:
        try:
            data = [_openai_model(served) for served in self.registry.all()]
        except RequestError as error:
            return failure_response(error, request.scope)
        return JSONResponse({"object": "list", "data": data})

    async def _model(self, request: Request) -> Response:
        try:
            return JSONResponse(_openai_model(self.registry.named(request.path_params["name"])))
        except RequestError as error:
            return failure_response(error, request.scope)


def create_app(
    models: Mapping[str, Model], options: ServerOptions | None = None, *, token: str | None = None
) -> ASGIApp:
    """Return an ASGI application that serves loaded models, for a server of your own; see `gte-deploy serve`.

    Load the models with `join_calls=True`, so that requests share batches. The application closes them when it ends. An
    application that is mounted in another one is not told when that one ends: close the models yourself then.

    Args:
        models: name -> model.
        options: limits and rules; those of sockets and of logs have no effect.
        token: the bearer token that requests must carry; None for none.
    """
    registry = Registry({name: partial(_same, model) for name, model in models.items()}, warm_up=False)
    server = Server(registry, options or ServerOptions(access_log="off"), token=token)
    registry.load()  # now, as the lifespan of a mounted application is never run
    return server.app()


def _same(model: Model) -> Model:
    return model


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    messages = {
        404: f"there is no route {request.url.path!a}; /openapi.json lists the routes",
        405: f"{request.url.path} does not take {request.method}; /openapi.json says what it takes",
    }
    message = messages.get(error.status_code, error.detail)
    return failure_response(RequestError(error.status_code, message, headers=error.headers), request.scope)


async def _server_failed(request: Request, error: Exception) -> Response:
    message = f"the server failed; its log has the request {request.scope[FACTS].request_id}"
    return failure_response(RequestError(500, message, "Backend"), request.scope)


def _check_content_type(request: Request) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(
            415, f"the Content-Type is {kind[:80]!a}; send JSON with the header Content-Type: application/json"
        )
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise RequestError(415, f"the Content-Encoding is {encoding[:80]!a}; send the body without compression")


def _routes_of(served: ServedModel) -> list[str]:
    return [route.path for route in MODEL_ROUTES if route.suits(served)]


def _openai_model(served: ServedModel) -> dict[str, Any]:
    facts = describe(served, _routes_of(served))
    return {"id": served.name, "object": "model", "created": served.loaded_at, "owned_by": "gte-deploy", **facts}


def _tei_info(served: ServedModel) -> dict[str, Any]:
    """The facts about one model, under the names of text-embeddings-inference."""
    model, spec = served.model, served.model.spec
    facts = served.info
    labels = {
        "id2label": {str(number): label for number, label in spec.id2label.items()},
        "label2id": {label: number for number, label in spec.id2label.items()},
    }
    if spec.task == "classify":
        kind: dict[str, Any] = {"reranker" if spec.num_labels == 1 else "classifier": labels}
    else:
        kind = {"embedding": {"pooling": "splade" if spec.task == "sparse" else spec.pooling}}
    return {
        "model_id": served.name,
        "model_sha": model.checksum,
        "model_dtype": facts["precision"],
        "model_type": kind,
        "max_input_length": model.max_seq_length,
        "max_batch_tokens": facts["max_batch_tokens"],
        "max_batch_requests": None,
        "tokenization_workers": facts["num_threads"],
        "version": __version__,
        "sha": None,
        "docker_label": None,
    }
