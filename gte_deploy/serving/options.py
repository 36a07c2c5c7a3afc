"""The options of the server. Importing this module loads no web framework, so that `--help` is quick."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gte_deploy.core.errors import InputError
from gte_deploy.core.options import check_choices, option

AccessLog = Literal["text", "json", "off"]
ACCESS_LOGS: tuple[AccessLog, ...] = ("text", "json", "off")

TOKEN_VARIABLE = "GTE_DEPLOY_TOKEN"
"""The environment variable with the bearer token that requests must carry."""


@dataclass(frozen=True)
class ServerOptions:
    """Options of the server, the same for all of its models."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 for every address of the machine", metavar="HOST")
    port: int = option(8080, "port to listen on; 0 for any that is free", metavar="PORT", parse=int)
    max_concurrent_requests: int = option(
        512, "requests in work at once; more are refused with status 429", metavar="N", parse=int
    )
    max_queue_tokens: int = option(
        1 << 18,
        "tokens that may wait for each model; requests that would wait behind more are refused with status 429",
        metavar="TOKENS",
        parse=int,
    )
    max_client_batch_size: int = option(
        2048, "texts in one request; more are refused with status 413", metavar="N", parse=int
    )
    max_body_bytes: int = option(
        8 << 20, "size of a request; a larger one is refused with status 413", metavar="BYTES", parse=int
    )
    timeout: float = option(
        60.0,
        "seconds until a request is given up with status 504; a request can ask for less in its header "
        "X-Request-Timeout",
        metavar="SECONDS",
        parse=float,
    )
    drain_seconds: float = option(
        30.0, "seconds that requests in work have left after SIGTERM", metavar="SECONDS", parse=float
    )
    auto_truncate: bool = option(
        False, "cut a text that is too long where a request does not say, instead of refusing it"
    )
    warm_up: bool = option(True, "be ready without a run of typical batches", flags=("--no-warm-up",))
    page: bool = option(True, "leave out the page at / on which the models can be tried", flags=("--no-page",))
    token_file: Path | None = option(
        None,
        f"file with the bearer token that requests must carry (default: the variable {TOKEN_VARIABLE}, else no token)",
        metavar="FILE",
        parse=Path,
    )
    protect_all: bool = option(False, "ask for the token at /health, /ready, /ping and /metrics, too")
    cors_origins: tuple[str, ...] = option(
        (),
        "origin whose web pages may call the server, such as https://example.org, or * for all; may be given several "
        "times (default: none)",
        flags=("--cors-origin",),
        repeated=True,
        metavar="ORIGIN",
    )
    access_log: AccessLog = option("text", "form of the line on stderr for each request", choices=ACCESS_LOGS)

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            InputError: a value is out of range.
        """
        check_choices(self)
        for name in ("max_concurrent_requests", "max_queue_tokens", "max_client_batch_size", "max_body_bytes"):
            _check_range(name, getattr(self, name), 1, math.inf)
        _check_range("port", self.port, 0, 65_535)
        _check_range("drain_seconds", self.drain_seconds, 0, 86_400)
        if not 0 < self.timeout <= 86_400:
            raise InputError(f"timeout is {self.timeout}; expected seconds above 0, at most 86,400")


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise InputError(f"{name} is {value}; expected a number from {low:,}" + f" to {high:,}" * (high < math.inf))
