"""A check of an export beyond the comparison of its graphs: what it found counts like a missed bound."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Check:
    """What came of one check. `ParityReport` takes any number of them, counts them, reports them and stamps misses.

    Args:
        name: in a word or two, as it stands in the report, such as "answers".
        failures: what is not as it should be, one sentence each; empty where the check passed.
        compared: what was compared, as plain JSON data, such as {"texts": 40, "library": "transformers 5.24"}.
        skipped: what could not be compared here, one sentence each; skipping fails nothing.
        broken: what no bundle may do, whatever bounds were asked for: numbers that are not finite, other shapes.
    """

    name: str
    failures: tuple[str, ...] = ()
    compared: Mapping[str, Any] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not self.failures and not self.broken

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data."""
        return {**dataclasses.asdict(self), "passed": self.passed}
