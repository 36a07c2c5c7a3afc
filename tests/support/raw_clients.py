"""Many HTTP clients in one process, on plain sockets: what each request came to, and nothing is tried again.

HTTP libraries open connections anew and repeat requests on their own, so that a lost answer cannot be told from a good
one.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


@dataclass
class Outcomes:
    """What became of the requests: how many got each status, and why others got nothing at all."""

    statuses: Counter[int] = field(default_factory=Counter)
    unanswered: list[str] = field(default_factory=list)


Check = Callable[[int, int, dict[str, str], Any], None]
"""Takes the number of a body, and the status, headers (lower case) and JSON of its answer; raises if it is wrong."""


async def ask(url: str, path: str, bodies: Sequence[bytes], clients: int, check: Check) -> Outcomes:
    """Send each body once; so many clients, each on one connection, take turns. All are connected before the first.

    Args:
        url: of the server, without a path.
        path: to which each body is posted.
        bodies: JSON.
        clients: connections at once.
        check: is called for each answer.

    Raises:
        AssertionError: an answer is cut; or that of `check`.
    """
    outcomes, parts = Outcomes(), urlsplit(url)
    all_there = asyncio.Barrier(clients)

    async def client(number: int) -> None:
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        await all_there.wait()
        for index in range(number, len(bodies), clients):
            try:
                if writer.is_closing():
                    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
                writer.write(_request(parts.netloc, path, bodies[index]))
                await writer.drain()
                status, headers, answer = await _answer(reader)
            except (OSError, asyncio.IncompleteReadError) as error:
                outcomes.unanswered.append(repr(error))
                break
            check(index, status, headers, json.loads(answer))
            outcomes.statuses[status] += 1
            if headers.get("connection") == "close":
                writer.close()
        writer.close()

    await asyncio.gather(*map(client, range(clients)))
    return outcomes


def _request(host: str, path: str, body: bytes) -> bytes:
    lines = (f"POST {path} HTTP/1.1", f"Host: {host}", "Content-Type: application/json", f"Content-Length: {len(body)}")
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode() + body


async def _answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    except asyncio.IncompleteReadError as error:
        assert not error.partial, f"an answer ends within its headers: {error.partial!r}"
        raise
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
    try:
        body = await reader.readexactly(int(headers["content-length"]))
    except (OSError, asyncio.IncompleteReadError) as error:
        raise AssertionError(f"an answer ends within its body: {error!r}") from error
    return int(head[0].split()[1]), headers, body
