"""The page at `/`: the files beside this module, which ask no other host and run no script but their own."""

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_FOLDER = Path(__file__).parent
_TYPES = {".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".svg": "image/svg+xml"}

# 'self' for every kind of thing that the page loads, and nothing else. Scripts cannot turn text into HTML.
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "connect-src 'self'",
        "img-src 'self'",
        "script-src 'self'",
        "style-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    "Cache-Control": "no-cache",  # a browser asks whether its copy is current, so that a new version is seen at once
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def page_routes() -> list[Route]:
    """Return the routes of the page: `/`, and `/page/…` for its style, scripts and icon. They need no token."""
    files = sorted(file for file in _FOLDER.iterdir() if file.suffix in _TYPES)
    return [Route(_path_of(file), _answer_with(file), methods=["GET"]) for file in files]


def _path_of(file: Path) -> str:
    return "/" if file.suffix == ".html" else f"/page/{file.name}"


def _answer_with(file: Path) -> Callable[[Request], Awaitable[Response]]:
    content, kind = file.read_bytes(), _TYPES[file.suffix]
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**_HEADERS, "ETag": tag}

    async def answer(request: Request) -> Response:
        known = {each.strip().removeprefix("W/") for each in request.headers.get("if-none-match", "").split(",")}
        if tag in known:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=kind)

    return answer
