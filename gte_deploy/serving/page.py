"""What `GET /` shows."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gte_deploy._version import __version__


async def page(request: Request) -> Response:
    """Name the server, and where its routes are described."""
    return JSONResponse({"gte_deploy": __version__, "routes": "/openapi.json", "models": "/v1/models"})
