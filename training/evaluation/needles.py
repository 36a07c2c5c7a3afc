"""Whether a model finds a sentence in long documents: the accuracy of retrieval by the documents' length.

A question has one right document among many of the same length, so the accuracy is nDCG@1 and recall@1, as in LongEmbed
(arXiv 2404.12096).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Any

import numpy as np

from gte_deploy.core.errors import InputError
from gte_deploy.core.files import write_with
from gte_deploy.training.data.vocabulary import read_tokenizer
from gte_deploy.training.evaluation.haystacks import (
    Filler,
    Haystacks,
    Needle,
    generate_needles,
    make_haystacks,
)
from gte_deploy.training.evaluation.retrieval import (
    OpenModel,
    Ranking,
    open_to_rank,
    query_metrics,
    rank_by_model,
    rank_by_words,
)
from gte_deploy.training.evaluation.retrieval_sets import RetrievalSet, read_long_embed, retrieval_folder
from gte_deploy.training.figures import new_figure
from gte_deploy.training.finetune.options import RetrievalOptions
from gte_deploy.training.needle_options import NeedleOptions

_CONFIDENCE = 0.95
_BASELINE = "bm25"
DEPTHS = ("first third", "middle", "last third")


@dataclass(frozen=True)
class LengthScore:
    """What a model found in the documents of one length.

    Args:
        test: name of the test.
        length: tokens of each document.
        documents: number of documents.
        queries: number of questions.
        accuracy: share of the questions whose document is ranked first.
        low: lower bound of its interval at 95 % (Wilson).
        high: upper bound.
        by_depth: where the sentence lies -> accuracy; empty for tests that do not say where it lies.
        is_cut: whether the model cuts documents of this length, so that what follows is out of its sight.
    """

    test: str
    length: int
    documents: int
    queries: int
    accuracy: float
    low: float
    high: float
    by_depth: Mapping[str, float]
    is_cut: bool


@dataclass(frozen=True)
class NeedleRow:
    """The scores of one model, by test and length."""

    model: str
    kind: str
    scores: tuple[LengthScore, ...]

    def mean(self, test: str) -> float:
        """Return the mean of a test's accuracies over the lengths."""
        return fmean(score.accuracy for score in self.scores if score.test == test)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        tests = dict.fromkeys(score.test for score in self.scores)
        return {**asdict(self), "mean": {test: self.mean(test) for test in tests}}


def hide_needles(
    texts: Iterable[str], tokenizer: Path, *, options: NeedleOptions, needles: Sequence[Needle] | None = None
) -> dict[tuple[str, int], Haystacks]:
    """Make the documents of every test and length.

    Args:
        texts: texts around the hidden sentences.
        tokenizer: the tokenizer.json that counts the tokens.
        options: tests, lengths, sizes and seed.
        needles: sentences to hide, at least one for each document; None generates those of each test. With sentences of
            one's own there is one test, "needle".

    Returns:
        test and length -> documents.

    Raises:
        InputError: there are too few texts, sentences or names.
    """
    longest = max(options.lengths)
    filler = Filler(texts, read_tokenizer(tokenizer), most=options.documents * longest)
    if needles is not None and len(needles) < options.documents:
        raise InputError(f"{len(needles)} needles for {options.documents} documents: give more, or lower --documents")
    tests = options.tests if needles is None else ("needle",)
    made: dict[tuple[str, int], Haystacks] = {}
    for test in tests:
        hidden = needles or generate_needles(test, options.documents, seed=options.seed)
        for length in sorted(set(options.lengths)):
            made[test, length] = make_haystacks(
                hidden[: options.documents], filler, length=length, queries=options.queries, seed=options.seed
            )
    return made


def published_needles(source: str, *, options: NeedleOptions) -> dict[tuple[str, int], Haystacks]:
    """Read the tests and lengths of LongEmbed that the options name, with all of their documents and questions.

    Args:
        source: folder of LongEmbed, with a folder for each task, or hf:NAME[@REVISION].
        options: tests and lengths.

    Raises:
        InputError: a test or length is missing, or a file cannot be read.
    """
    made: dict[tuple[str, int], Haystacks] = {}
    for test in options.tests:
        is_folder = Path(source).is_dir()
        sets = read_long_embed(Path(source) / test if is_folder else retrieval_folder(f"{source}:{test}"))
        for length in sorted(set(options.lengths)):
            if length not in sets:
                raise InputError(
                    f"{source}: {test} has no documents of {length} tokens, but of {', '.join(map(str, sets))}"
                )
            made[test, length] = Haystacks(sets[length], {})
    return made


def find_needles(
    models: Sequence[str],
    haystacks: Mapping[tuple[str, int], Haystacks],
    *,
    options: NeedleOptions,
    progress: bool = False,
    open_model: OpenModel | None = None,
) -> list[NeedleRow]:
    """Measure BM25 and models.

    Args:
        models: folders or hub ids of checkpoints, or whatever `open_model` opens.
        haystacks: test and length -> documents.
        options: batches, limit of the texts, and device.
        progress: whether lines on stderr tell what is computed.
        open_model: opens a model by its name; None is `open_to_rank`.

    Returns:
        a row for BM25, and one for each model.

    Raises:
        CheckpointError: a model cannot be loaded.
        ConfigError: a model is for another task.
    """
    asking = {place: _asking(options, *place[1:], len(each.data.corpus)) for place, each in haystacks.items()}
    by_words = {place: rank_by_words(each.data, len(each.data.corpus)) for place, each in haystacks.items()}
    rows = [NeedleRow(_BASELINE, _BASELINE, _scores(haystacks, by_words.__getitem__, asking, limit=None))]
    for name in dict.fromkeys(models):
        with (open_model or open_to_rank)(name, options) as (kind, model):

            def ranked(place: tuple[str, int], kind: Any = kind, model: Any = model, name: str = name) -> Ranking:
                if progress:
                    print(f"{name}: {place[0]}, {place[1]:,} tokens", file=sys.stderr, flush=True)
                data = haystacks[place].data
                return rank_by_model(kind, model, data, asking[place], first=_with_rest(by_words[place], data))

            rows.append(NeedleRow(name, kind, _scores(haystacks, ranked, asking, limit=_limit(model))))
    return rows


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """Return the bounds of Wilson's score interval at 95 % of a share (Wilson 1927, JASA 22: 209)."""
    z = NormalDist().inv_cdf((1 + _CONFIDENCE) / 2)
    share, scale = successes / trials, 1 + z * z / trials
    middle = (share + z * z / (2 * trials)) / scale
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


def table(rows: Sequence[NeedleRow]) -> str:
    """Format the accuracies by length for people: one part for each test, one line for each model."""
    width = max(len(row.model) for row in rows)
    lines: list[str] = []
    for test in dict.fromkeys(score.test for score in rows[0].scores):
        first = [score for score in rows[0].scores if score.test == test]
        sizes = f"{first[0].queries} questions, {first[0].documents} documents of each length"
        lines += [f"{test}: accuracy in percent by the documents' length in tokens; {sizes}"]
        lines.append(f"{'model':{width}}  {'kind':6}" + "".join(f"{s.length:>9,}" for s in first) + f"{'mean':>9}")
        for row in rows:
            mine = [score for score in row.scores if score.test == test]
            cells = "".join(f"{100 * s.accuracy:>8.1f}{'*' if s.is_cut else ' '}" for s in mine)
            lines.append(f"{row.model:{width}}  {row.kind:6}{cells}{100 * row.mean(test):>8.1f}".rstrip())
        lines.append("")
    if any(score.is_cut for row in rows for score in row.scores):
        lines.append("* the model cuts documents of this length: it cannot see what lies behind")
    return "\n".join(lines).rstrip()


def plot_needles(rows: Sequence[NeedleRow], path: Path) -> None:
    """Plot the accuracies by length with their intervals, one panel for each test, into a .png or .svg.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    tests = list(dict.fromkeys(score.test for score in rows[0].scores))
    figure = new_figure(5.0 * len(tests), 4.0)
    panels = np.ravel(figure.subplots(1, len(tests), squeeze=False, sharey=True))
    for axes, test in zip(panels, tests, strict=True):
        for row in rows:
            mine = [score for score in row.scores if score.test == test]
            # The bounds of Wilson's interval are on both sides of the share, up to rounding.
            below = [max(0.0, 100 * (score.accuracy - score.low)) for score in mine]
            above = [max(0.0, 100 * (score.high - score.accuracy)) for score in mine]
            style = "--" if row.kind == _BASELINE else "-"
            lengths, shares = [score.length for score in mine], [100 * score.accuracy for score in mine]
            axes.errorbar(lengths, shares, [below, above], marker="o", capsize=2, linestyle=style, label=row.model)
        axes.set_xscale("log", base=2)
        lengths = sorted({score.length for score in rows[0].scores if score.test == test})
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.set(title=test, xlabel="tokens of a document", ylim=(-3, 103))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("found, percent")
    panels[-1].legend(fontsize=8)
    kind = path.suffix.removeprefix(".") or "png"
    write_with(path, partial(figure.savefig, format=kind, dpi=120))


def _scores(
    haystacks: Mapping[tuple[str, int], Haystacks],
    ranked: Callable[[tuple[str, int]], Ranking],
    asking: Mapping[tuple[str, int], RetrievalOptions],
    *,
    limit: int | None,
) -> tuple[LengthScore, ...]:
    return tuple(
        _score(place, each, ranked(place), asking[place], is_cut=limit is not None and limit < place[1])
        for place, each in haystacks.items()
    )


def _score(
    place: tuple[str, int], haystacks: Haystacks, ranking: Ranking, options: RetrievalOptions, *, is_cut: bool
) -> LengthScore:
    data = haystacks.data
    found = query_metrics(ranking, data, options)["recall@1"] > 0
    groups: dict[str, list[bool]] = {}
    for query, is_found in zip(data.judged, found.tolist(), strict=True):
        if query in haystacks.depths:
            third = min(int(haystacks.depths[query] * len(DEPTHS)), len(DEPTHS) - 1)
            groups.setdefault(DEPTHS[third], []).append(is_found)
    low, high = wilson_interval(int(found.sum()), len(found))
    return LengthScore(
        test=place[0],
        length=place[1],
        documents=len(data.corpus),
        queries=len(found),
        accuracy=float(found.mean()),
        low=low,
        high=high,
        by_depth={name: fmean(groups[name]) for name in DEPTHS if name in groups},
        is_cut=is_cut,
    )


def _with_rest(ranking: Ranking, data: RetrievalSet) -> Ranking:
    """Add the documents that share no word with a query: a reranker orders all of them."""
    return {
        query: [*found, *((document, 0.0) for document in data.corpus.keys() - dict(found).keys())]
        for query, found in ranking.items()
    }


def _asking(options: NeedleOptions, length: int, documents: int) -> RetrievalOptions:
    return RetrievalOptions(
        top_k=1,
        recall_at=(1,),
        rerank_depth=documents,
        batch_size=max(1, options.batch_tokens // length),
        device=options.device,
    )


def _limit(model: Any) -> int | None:
    """Tokens at which a model cuts texts."""
    found = getattr(model, "max_seq_length", None) or getattr(model, "max_length", None)
    return found if isinstance(found, int) else None
