"""The result of a check beyond the comparison of graphs; its failures count like missed bounds."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Check:
    """The result of one check. `ParityReport` takes any number of checks and counts their failures as missed bounds.

    Args:
        name: one or two words for the report, such as "answers".
        failures: one sentence for each failure; empty if the check passed.
        compared: the facts of the comparison as plain JSON data, such as {"texts": 40, "library": "transformers 5.24"}.
        skipped: one sentence for each comparison that was not possible here; none of them is a failure.
        broken: one sentence for each defect that no bundle may have, whatever the bounds of the export: numbers that
            are not finite, other shapes.
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

    @property
    def line(self) -> str:
        """One sentence: passed or failed, the facts of the comparison, failures and skipped comparisons."""
        compared = ", ".join(f"{name} {value}" for name, value in self.compared.items())
        parts = [f"{self.name}: {'passed' if self.passed else 'FAILED'}{f', {compared}' if compared else ''}"]
        return "; ".join([*parts, *self.broken, *self.failures, *(f"skipped: {reason}" for reason in self.skipped)])

    def to_json(self) -> dict[str, Any]:
        """Return the check as plain JSON data."""
        return {**dataclasses.asdict(self), "passed": self.passed}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Check":
        """Read a check that `to_json` wrote."""
        sentences = {name: tuple(data[name]) for name in ("failures", "skipped", "broken")}
        return cls(data["name"], compared=data["compared"], **sentences)
