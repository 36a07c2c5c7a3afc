"""A model beside the checkpoint that it came from, and the list of the differences between them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from gte_deploy.exporters.verification.answers.closeness import Closeness
from gte_deploy.exporters.verification.answers.source_view import SourceFiles
from gte_deploy.exporters.verification.checks import Check
from gte_deploy.model import Model

NAME = "answers"
"""Name of the check in a bundle's report."""
_MAX_SHOWN = 3


@dataclass(frozen=True)
class Asked:
    """The options of an export that replace what the checkpoint says.

    Args:
        pooling: "mean" or "cls", or "auto".
        limit: the source of the bundle's limit: the checkpoint's "own"; one that was "asked" for; or, for a bundle
            without this information, one that may be "shorter" than the checkpoint's.
    """

    pooling: str = "auto"
    limit: Literal["own", "asked", "shorter"] = "own"


@dataclass(frozen=True)
class Subject:
    """The two sides of a comparison.

    Args:
        model: a model of this package, opened from a bundle or a checkpoint.
        files: the checkpoint's JSON files, read without the rest of this package.
        tokenizer: the checkpoint's tokenizer as AutoTokenizer makes it.
        tokenizer_class: name of the class that AutoTokenizer chose. It depends on the model type, so the same files
            under the native model type may give another one.
        close: the bounds on the differences of answers.
        asked: the options of the export that change answers.
    """

    model: Model
    files: SourceFiles
    tokenizer: Any
    tokenizer_class: str
    close: Closeness
    asked: Asked

    @property
    def has_token_types(self) -> bool:
        """Whether the checkpoint's own library feeds token types to the model."""
        has_several = (self.files.config.get("type_vocab_size") or 0) > 1
        return has_several and "token_type_ids" in self.tokenizer.model_input_names


@dataclass
class Findings:
    """The results of the checks, collected while they run; failures are grouped by question."""

    failures: dict[str, list[str]] = field(default_factory=dict)
    compared: dict[str, Any] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    def count(self, what: str, number: int = 1) -> None:
        """Add to the number of comparisons of a kind."""
        self.compared[what] = self.compared.get(what, 0) + number

    def fail(self, what: str, *lines: str) -> None:
        """Record differences, one line each."""
        self.failures.setdefault(what, []).extend(lines)

    def check(self) -> Check:
        """Return the result, with the first few lines of each group of failures."""
        failures = []
        for what, lines in self.failures.items():
            more = [f"and {len(lines) - _MAX_SHOWN:,} more of {what}"] if len(lines) > _MAX_SHOWN else []
            failures += [*lines[:_MAX_SHOWN], *more]
        return Check(NAME, tuple(failures), self.compared, tuple(dict.fromkeys(self.skipped)))


AnswerCheck = Callable[[Subject, Findings], None]
"""Compares one aspect of the two sides. It records differences and skipped comparisons and raises no error."""
