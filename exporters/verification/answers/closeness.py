"""Compares two answers to one text within the bounds of the precision, and describes their differences."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gte_deploy.core.spec import Precision
from gte_deploy.exporters.verification.accuracy import ACCURACY_BOUNDS

Numbers = NDArray[np.floating[Any]]
_SHOWN = 60


def _nothing() -> float:
    return 0.0


@dataclass(frozen=True)
class Question:
    """One question to both sides.

    Args:
        what: the name of the method, with its special options.
        inputs: texts or pairs.
        ours: calls this package.
        theirs: calls the library.
        form: the form of both answers. "vectors" and "scores" are arrays whose first axis is the inputs; "masks" and
            "tags" are a pipeline's answers to one input.
        scale: returns the largest logit behind the scores, after `theirs` was called; rounding is relative to it.
    """

    what: str
    inputs: Sequence[Any]
    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    form: Literal["vectors", "scores", "masks", "tags"] = "vectors"
    scale: Callable[[], float] = _nothing

    def named(self, index: int = 0) -> str:
        """Describe the question for one of its inputs."""
        return named(self.what, self.inputs[index])


@dataclass(frozen=True)
class Closeness:
    """Bounds on the difference of two answers.

    Args:
        relative: bound on |ours - theirs| over |theirs|: of the largest values if `each`, else of root mean squares.
        cosine: lower bound on the cosine of two vectors if `each`, else on the mean cosine.
        each: whether every answer must keep the bounds, as in float32; in a lower precision only the averages must.
    """

    relative: float
    cosine: float
    each: bool

    @classmethod
    def of(cls, precision: Precision) -> "Closeness":
        """Return bounds as tight as float32 sums allow, or the bounds of the precision on text."""
        if precision == "fp32":
            return cls(relative=1e-4, cosine=0.99999, each=True)
        cosine = ACCURACY_BOUNDS[precision].cosine_mean
        # Vectors of equal length at this cosine differ by sqrt(2 (1 - cosine)); single scores scatter more.
        return cls(relative=4 * math.sqrt(2 * (1 - cosine)), cosine=cosine, each=False)

    def differences(self, question: Question, ours: Any, theirs: Any) -> list[str]:
        """Return one line for each answer that differs."""
        if question.form == "masks":
            return self._masks(question, ours, theirs)
        if question.form == "tags":
            return self._tags(question, ours, theirs)
        found, wanted = (np.asarray(side, dtype=np.float64) for side in (ours, theirs))
        if found.shape != wanted.shape:
            return [f"{question.what}: shape {list(found.shape)} here, {list(wanted.shape)} from the library"]
        return (self._each if self.each else self._on_average)(question, found, wanted)

    def _each(self, question: Question, found: Numbers, wanted: Numbers) -> list[str]:
        scale = max(_scale(question, wanted), question.scale())
        lines = []
        for index, (a, b) in enumerate(zip(found, wanted, strict=True)):
            apart = float(np.abs(a - b).max()) / scale
            cosine = float(_cosines(a, b).min()) if question.form == "vectors" else 1.0
            if not (apart <= self.relative and cosine >= self.cosine):
                lines.append(f"{question.named(index)}: {_apart(a, b, apart, cosine)}")
        return lines

    def _on_average(self, question: Question, found: Numbers, wanted: Numbers) -> list[str]:
        unit = question.form == "scores" and _scale(question, wanted) == 1
        size = 1.0 if unit else float(np.sqrt(np.mean(wanted**2))) or 1.0
        apart = float(np.sqrt(np.mean((found - wanted) ** 2))) / size
        cosine = float(_cosines(found, wanted).mean()) if question.form == "vectors" else 1.0
        if apart <= self.relative and cosine >= self.cosine:
            return []
        worst = int(np.argmax(np.abs(found - wanted).reshape(len(found), -1).max(axis=1)))
        shown = _apart(found[worst], wanted[worst], apart, cosine)
        return [f"{question.named(worst)}, the worst of {len(found)}: {shown}"]

    def _masks(self, question: Question, ours: Any, theirs: Any) -> list[str]:
        """Compare words for masks. `theirs` has more words: equal scores may come in another order."""
        found, wanted = ([side] if isinstance(side[0], Mapping) else side for side in (ours, theirs))
        if len(found) != len(wanted):
            return [f"{question.named()}: {len(found)} masks here, {len(wanted)} in the library"]
        for a, b in zip(found, wanted, strict=True):
            if difference := self._mask(a, b, self._allowed(question.scale(), b[0]["score"])):
                return [f"{question.named()}: {difference}"]
        return []

    def _allowed(self, scale: float, best: float) -> float:
        """Return the bound on a probability p: a small error e of a logit changes p by about e × p."""
        if self.each:
            return self.relative * max(1.0, scale) * best
        # The largest logit is about four times a typical one; the worst of many answers is off by more than most.
        return min(self.relative, 2 * self.relative * max(1.0, scale / 4) * best)

    def _mask(self, ours: Sequence[Any], theirs: Sequence[Any], allowed: float) -> str | None:
        by_token = {answer["token"]: answer for answer in theirs}
        for rank, (a, b) in enumerate(zip(ours, theirs, strict=False)):
            # Among very many equal scores, a lower precision may list a word that the library does not.
            same = by_token.get(a["token"], b if self.each else a)
            if any(not abs(a["score"] - other["score"]) <= allowed for other in (b, same)):
                return (
                    f"answer {rank + 1} is {a['token_str']!a} with {a['score']:.6f} here, {b['token_str']!a} with "
                    f"{b['score']:.6f} from the library"
                )
            for key in ("token_str", "sequence"):
                if a["token"] in by_token and a[key] != same[key]:
                    return f"{key} is {quoted(a[key])} here, {quoted(same[key])} from the library"
        return None

    def _tags(self, question: Question, ours: Any, theirs: Any) -> list[str]:
        """Compare tags in float32 only: a lower precision may change tags, and its logits are compared instead."""
        allowed = self.relative * max(1.0, question.scale())
        nothing: dict[str, Any] = {}
        for a, b in zip_longest(ours, theirs, fillvalue=nothing) if self.each else ():
            facts = [{key: value for key, value in side.items() if key != "score"} for side in (a, b)]
            if facts[0] != facts[1] or not abs(a["score"] - b["score"]) <= allowed:
                return [f"{question.named()}: {a} here, {b} from the library"]
        return []


def named(what: str, given: Any) -> str:
    """Describe the question `what` for a text or a pair of texts."""
    texts = given if isinstance(given, tuple) else (given,)
    return f"{what} of {', '.join(map(quoted, texts))}"


def quoted(text: str) -> str:
    """Return a text as a literal of ASCII characters; of a long text, only the beginning."""
    whole = ascii(text)
    return whole if len(whole) <= _SHOWN else f"{whole[:_SHOWN]}…{whole[0]} ({len(text):,} characters)"


def _scale(question: Question, wanted: Numbers) -> float:
    """Return the divisor of a difference: 1 for probabilities, else the largest absolute value."""
    if question.form == "scores" and wanted.min() >= 0 and wanted.max() <= 1:
        return 1.0
    return float(np.abs(wanted).max()) or 1.0


def _cosines(ours: Numbers, theirs: Numbers) -> Numbers:
    """Return cosines along the last axis; 1 if both vectors are zero."""
    a, b = ours.reshape(-1, ours.shape[-1]), theirs.reshape(-1, ours.shape[-1])
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    both_zero = (norms == 0) & np.all(a == b, axis=1)
    return np.where(both_zero, 1.0, np.einsum("ij,ij->i", a, b) / np.where(norms == 0, 1.0, norms))


def _apart(ours: Numbers, theirs: Numbers, apart: float, cosine: float) -> str:
    at = np.unravel_index(int(np.argmax(np.abs(ours - theirs))), ours.shape) if ours.ndim else ()
    position = f" at {[int(i) for i in at]}" if at else ""
    vector = f", cosine {cosine:.6f}" if cosine < 1 else ""
    return f"{ours[at]:.6f} here, {theirs[at]:.6f} from the library{position}; relative difference {apart:.1e}{vector}"
