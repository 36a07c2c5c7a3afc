"""The ten tasks of XTREME-R and the models that are fine-tuned for them, with the protocol of the published table.

XTREME-R is Ruder et al. 2021, arXiv 2104.07412. The protocol is that of mGTE (arXiv 2407.19669, appendix C), whose
scripts are published (github.com/izhx/nlu-evals, at b8193bae): every model is fine-tuned on English alone and tested in
all languages without further training. It differs from the scripts of XTREME-R in some places, which docs/evaluation.md
lists. The values below are its own; it leaves the rest to transformers' Trainer: AdamW
without weight decay unless stated, a linear decay without warm-up, and gradients clipped at a norm of 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from gte_deploy.core.errors import InputError
from gte_deploy.training.options import Protocol

HeadKind = Literal["classify", "choose", "tag", "answer", "embed"]


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """One model that is fine-tuned on English.

    Args:
        name: its name in the folder of the results.
        head: kind of its head.
        protocol: how it is fine-tuned. `max_length` of an "embed" is that of a passage.
        starts_from: the tuning from whose weights it starts.
        query_length: longest query of an "embed" in tokens.
        stride: tokens that two parts of a long context share in an "answer".
    """

    name: str
    head: HeadKind
    protocol: Protocol
    starts_from: str | None = None
    query_length: int = 0
    stride: int = 0


@dataclass(frozen=True, kw_only=True)
class CrossLingualTask:
    """One task of XTREME-R.

    Args:
        name: its name on the command line.
        title: its name in the table.
        kind: the group of tasks that the table puts it into.
        metric: the metric's name in the table.
        tuning: name of the model that it tests.
        languages: codes of the languages over which the published score is averaged.
    """

    name: str
    title: str
    kind: str
    metric: str
    tuning: str
    languages: tuple[str, ...]


def _protocol(max_length: int, learning_rate: float, epochs: int, **rest: float) -> Protocol:
    values = {"batch_size": 32, "warmup_ratio": 0.0, **rest}
    return Protocol(max_length=max_length, learning_rate=learning_rate, epochs=epochs, **values)  # type: ignore[arg-type]


_ANSWERS = _protocol(384, 3e-5, 3, weight_decay=1e-4)

TUNINGS = {
    tuning.name: tuning
    for tuning in (
        Tuning(name="mnli", head="classify", protocol=Protocol()),  # GLUE's MNLI, with the protocol of GLUE
        Tuning(name="siqa", head="choose", protocol=_protocol(128, 2e-5, 5)),
        Tuning(name="copa", head="choose", protocol=_protocol(128, 2e-5, 5), starts_from="siqa"),
        Tuning(name="udpos", head="tag", protocol=_protocol(128, 2e-5, 10)),
        Tuning(name="wikiann", head="tag", protocol=_protocol(128, 2e-5, 10)),
        Tuning(name="squad", head="answer", protocol=_ANSWERS, stride=128),
        Tuning(name="tydiqa", head="answer", protocol=_ANSWERS, stride=128),
        Tuning(name="mewslix", head="embed", protocol=_protocol(64, 2e-5, 2, batch_size=64), query_length=64),
        Tuning(name="squad-retrieval", head="embed", protocol=_protocol(256, 2e-5, 3, batch_size=16), query_length=96),
    )
}

_UDPOS = (
    "af ar bg de el en es et eu fa fi fr he hi hu id it ja kk ko lt mr nl pl pt ro ru ta te th tl tr uk ur vi wo yo zh"
)
_WIKIANN = (
    "ar he vi id jv ms tl eu ml ta te af nl en de el bn hi mr ur fa fr it pt es bg ru ja ka ko th sw yo my zh kk tr et "
    "fi hu qu pl uk az lt pa gu ro"
)
_TATOEBA = (
    "ar he vi id jv tl eu ml ta te af nl de el bn hi mr ur fr it pt es bg ru ja ka ko th sw zh kk tr et fi hu fa az lt "
    "pl uk ro"
)


def _task(name: str, title: str, kind: str, metric: str, tuning: str, languages: str) -> CrossLingualTask:
    return CrossLingualTask(
        name=name, title=title, kind=kind, metric=metric, tuning=tuning, languages=tuple(languages.split())
    )


XTREME_TASKS = {
    task.name: task
    for task in (
        _task("xnli", "XNLI", "classification", "accuracy", "mnli", "ar bg de el en es fr hi ru sw th tr ur vi zh"),
        _task("xcopa", "XCOPA", "classification", "accuracy", "copa", "et ht id it qu sw ta th tr vi zh"),
        _task("udpos", "UD-POS", "tags", "F1", "udpos", _UDPOS),
        _task("wikiann", "WikiANN", "tags", "F1", "wikiann", _WIKIANN),
        _task("xquad", "XQuAD", "answers", "F1", "squad", "ar de el en es ru th tr vi zh ro"),
        _task("mlqa", "MLQA", "answers", "F1", "squad", "ar de en es hi vi zh"),
        _task("tydiqa", "TyDiQA-GoldP", "answers", "F1", "tydiqa", "en ar bn fi id ko ru sw te"),
        _task("mewslix", "Mewsli-X", "retrieval", "mAP@20", "mewslix", "ar de en es fa ja pl ro ta tr uk"),
        _task("lareqa", "LAReQA", "retrieval", "mAP@20", "squad-retrieval", "ar de el en es hi ru th tr vi zh"),
        _task("tatoeba", "Tatoeba", "retrieval", "accuracy", "squad-retrieval", _TATOEBA),
    )
}


def choose_tasks(names: Iterable[str]) -> list[CrossLingualTask]:
    """Return the named tasks in the order of the published table.

    Raises:
        InputError: a name is unknown.
    """
    wanted = set(names)
    if unknown := sorted(wanted - XTREME_TASKS.keys()):
        raise InputError(f"unknown tasks {', '.join(unknown)}; there are {', '.join(XTREME_TASKS)}")
    return [task for task in XTREME_TASKS.values() if task.name in wanted]


def choose_languages(task: CrossLingualTask, languages: Iterable[str] | None) -> tuple[str, ...]:
    """Return those of the languages that a task has; all of the task's if `languages` is None.

    Raises:
        InputError: the task has none of them.
    """
    if languages is None:
        return task.languages
    wanted = set(languages)
    chosen = tuple(language for language in task.languages if language in wanted)
    if not chosen:
        raise InputError(
            f"{task.title} has none of the languages {', '.join(sorted(wanted))}; it has {', '.join(task.languages)}"
        )
    return chosen
