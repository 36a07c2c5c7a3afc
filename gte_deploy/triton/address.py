"""Reads the URL and the headers that a caller gives for a server, and keeps their secrets out of every message."""

import base64
import ipaddress
import re
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gte_deploy.core.errors import InputError

_SCHEMES = ("http", "https", "grpc", "grpcs")
_HOST = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_.])?", re.IGNORECASE)
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")  # a token of RFC 9110
_GRPC_KEY = re.compile(r"[a-z0-9_.-]+")
_AUTHORIZATION = "authorization"


@dataclass(frozen=True)
class Address:
    """A server's address.

    Args:
        scheme: "http", "https", "grpc" or "grpcs".
        host: host name or IP address, and the port if one is given; an IPv6 address is in brackets.
        path: the path in front of Triton's own, without a slash at its end; empty for gRPC.
        authorization: the value of the header Authorization for the user and password of the URL; None without them.
    """

    scheme: str
    host: str
    path: str = ""
    authorization: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        """The URL without user and password."""
        return f"{self.scheme}://{self.host}{self.path}"

    @property
    def is_grpc(self) -> bool:
        """Whether the protocol is gRPC."""
        return self.scheme.startswith("grpc")

    @property
    def has_tls(self) -> bool:
        """Whether the connection is encrypted."""
        return self.scheme.endswith("s")


def parse_address(url: Any) -> Address:
    """Parse http://HOST:PORT, https://, grpc:// or grpcs://, with USER:PASSWORD@ and for HTTP with a path, too.

    Raises:
        InputError: the URL has another form. The message has no user and no password.
    """
    if not isinstance(url, str):
        raise InputError(f"url must be a text such as http://HOST:PORT, not {type(url).__name__}")
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname or "", parts.port
        credentials = None if parts.username is None else f"{parts.username}:{parts.password or ''}"
    except ValueError as error:
        raise _bad_url(url, _without_secret(str(error), url)) from None
    if parts.scheme not in _SCHEMES or not host:
        raise _bad_url(url)
    if any(not char.isprintable() or char.isspace() for char in url):
        raise _bad_url(url, "it has a space or a control character")
    if parts.query or parts.fragment or url.endswith(("?", "#")):
        raise _bad_url(url, "a query or a fragment has no meaning here; send a key in headers")
    if parts.scheme.startswith("grpc") and parts.path not in ("", "/"):
        raise _bad_url(url, "gRPC has no path")
    host = _checked_host(host, url)
    return Address(
        scheme=parts.scheme,
        host=host if port is None else f"{host}:{_checked_port(port, url)}",
        path=parts.path.rstrip("/"),
        authorization=None if credentials is None else _basic(credentials),
    )


def checked_headers(headers: Mapping[str, str] | None, address: Address) -> dict[str, str]:
    """Return the headers for every request, with the Authorization of the address. For gRPC, names are in lower case.

    Raises:
        InputError: a name or value cannot be sent, or there are two Authorizations. The message has no value.
    """
    if headers is not None and not isinstance(headers, Mapping):
        raise InputError(f"headers must be a mapping of names to values, not {type(headers).__name__}")
    checked = dict(_checked_header(*item, is_grpc=address.is_grpc) for item in (headers or {}).items())
    if address.authorization is not None:
        if any(name.lower() == _AUTHORIZATION for name in checked):
            raise InputError("the URL has a user, and headers have an Authorization; give one of the two")
        checked[_AUTHORIZATION] = address.authorization
    return checked


def _checked_header(name: Any, value: Any, *, is_grpc: bool) -> tuple[str, str]:
    if not isinstance(name, str) or not isinstance(value, str):
        raise InputError("names and values of headers must be texts (str)")
    own = name.lower() if is_grpc else name
    if not (_GRPC_KEY if is_grpc else _HEADER_NAME).fullmatch(own):
        raise InputError(f"{name!r} is no name of a header")
    if not value.isascii() or not (value.isprintable() or not value):
        raise InputError(f"the value of the header {name} must have printable ASCII characters only")
    return own, value


def _checked_host(host: str, url: str) -> str:
    try:
        if ":" in host:
            return f"[{ipaddress.IPv6Address(host)}]"
        name = host.encode("idna").decode("ascii")
    except ValueError:
        raise _bad_url(url, "its host is no name and no address") from None
    if not _HOST.fullmatch(name):
        raise _bad_url(url, "its host is no name and no address")
    return name


def _checked_port(port: int, url: str) -> int:
    if port == 0:
        raise _bad_url(url, "its port is 0")
    return port


def _basic(credentials: str) -> str:
    return "Basic " + base64.b64encode(urllib.parse.unquote(credentials).encode()).decode("ascii")


def _bad_url(url: str, reason: str = "") -> InputError:
    shown = url if "@" not in url else f"…@{url.rpartition('@')[2]}"
    return InputError(
        f"url must be http://HOST:PORT or grpc://HOST:PORT (with TLS https:// or grpcs://), not {shown[:200]!r}"
        + (f": {reason}" if reason else "")
    )


def _without_secret(reason: str, url: str) -> str:
    """The reason of Python's own error; none where a URL with a user could be quoted in it."""
    return "" if "@" in url else reason
