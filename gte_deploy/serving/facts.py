"""What is known about one request, for its line in the log, its metrics, its span and its headers."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from starlette.types import Scope

from gte_deploy.core.calls import Call

FACTS = "gte_deploy.facts"
"""The key of the facts in an ASGI scope."""


def path_of(scope: Scope) -> str:
    """The path of a request below the place where the application is mounted: what its routes are matched with."""
    path, root = str(scope["path"]), str(scope.get("root_path", ""))
    below = path.removeprefix(root)
    return below if below.startswith("/") or not below else path


@dataclass
class Facts:
    """What is known about one request so far.

    Args:
        request_id: the id that the client sent, or a new one.
        route: path of the route, without parameters; "other" if there is none.
        model: name of the model that answers.
        inputs: number of texts or pairs.
        characters: characters of the texts.
        call: deadline and cost of the computation.
        stages: name of a stage -> its beginning and end as `now_ns` told them.
        clock_offset_ns: from the monotonic clock to the time since 1970, when the request began.
    """

    request_id: str
    route: str = "other"
    model: str = ""
    inputs: int = 0
    characters: int = 0
    call: Call | None = None
    stages: dict[str, tuple[int, int]] = field(default_factory=dict)
    clock_offset_ns: int = field(default_factory=lambda: time.time_ns() - time.perf_counter_ns())

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Take the time of a stage."""
        begun = self.now_ns()
        try:
            yield
        finally:
            self.stages[name] = begun, self.now_ns()

    def now_ns(self) -> int:
        """The time in nanoseconds since 1970: as the clock said when the request began, and what has passed since."""
        return self.clock_offset_ns + time.perf_counter_ns()

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each stage; those of `compute` in the queue and in the engine, too."""
        found = {name: (end - begun) / 1e9 for name, (begun, end) in self.stages.items()}
        if self.call is not None and self.call.usage.batches:
            found |= {"queue": self.call.usage.queued_s, "engine": self.call.usage.computed_s}
        return found
