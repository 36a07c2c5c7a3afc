"""The table of tasks, and a task that is defined in this file alone and answered by `Model`."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from gte_deploy.core.spec import TASK_NAMES as NAMES
from gte_deploy.core.spec import ModelSpec
from gte_deploy.model import Model
from gte_deploy.models.config import task_of
from gte_deploy.models.heads import HEADS, HeadOptions
from gte_deploy.tasks import TASKS
from gte_deploy.tasks.base import HIDDEN, Task
from gte_deploy.tasks.interface import in_order
from gte_deploy.text.inputs import distinct
from gte_deploy.text.tokenization import load_tokenizer

WIDTH = 4


@dataclass(frozen=True)
class CountRequest:
    """Asks how many tokens each text has, times a factor."""

    spec: ModelSpec
    factor: int = 1

    def graph_outputs(self, offered):
        return tuple(name for name in TASKS["count"].answers if name in offered)

    def answer(self, batch, outputs):
        return [int(count) * self.factor for count in outputs["count"][:, 0]]


COUNT = Task("count", (HIDDEN, "count"), CountRequest, architecture="ForCounting")


class CountingBackend:
    """Counts tokens in place of an engine."""

    name, device, num_threads, precision = "counting", "cpu", 1, "fp32"
    outputs = COUNT.outputs

    def __init__(self):
        self.asked = []

    def run(self, batch, outputs):
        self.asked.append(tuple(outputs))
        return {name: batch.attention_mask.sum(axis=1, keepdims=True).astype(np.float32) for name in outputs}

    def close(self):
        pass


@pytest.fixture
def counting(monkeypatch):
    monkeypatch.setitem(TASKS, "count", COUNT)


def test_the_names_that_type_checkers_know_are_those_of_the_table():
    assert tuple(TASKS) == NAMES and all(task.name == name for name, task in TASKS.items())


def test_a_task_of_one_file_is_answered_by_the_model(counting, word_checkpoints):
    folder = word_checkpoints["embed"]
    backend = CountingBackend()
    spec = ModelSpec("count", 32, 128, WIDTH, 0)
    model = Model(
        backend, load_tokenizer(folder), spec, max_batch_tokens=64, path=Path("count"), backend_reason="a test"
    )
    task = TASKS[model.spec.task]
    assert task.can_run_on(spec) and not TASKS["embed"].can_run_on(spec)
    texts = ["the king", "a", "the old man and the sea", "a king", "an old man"] * 5
    options = model._batch_options(4, None, True, None)
    batches = model._answers(task.request(spec, factor=10), model._token_ids(distinct(texts), options))
    answers = in_order(batches, texts)
    rows = model.tokenize(texts)["attention_mask"].sum(axis=1)
    assert answers == (10 * rows).tolist()
    assert len(backend.asked) > 1 and set(backend.asked) == {("count",)}


def test_a_checkpoint_of_a_new_task_is_known_by_its_architecture(counting, word_checkpoints, tmp_path):
    text = (word_checkpoints["fill-mask"] / "config.json").read_text(encoding="utf-8")
    (tmp_path / "config.json").write_text(text.replace("ForMaskedLM", "ForCounting"), encoding="utf-8")
    assert task_of(tmp_path) == "count"


def test_only_one_label_gives_sparse_weights_of_tokens():
    one, two = (ModelSpec("token-classify", 8, 16, WIDTH, 0, num_labels=count) for count in (1, 2))
    assert TASKS["sparse"].can_run_on(one) and not TASKS["sparse"].can_run_on(two)


@pytest.mark.parametrize("name", NAMES)
def test_heads_compute_the_outputs_of_their_tasks(name):
    outputs = tuple(getattr(make, "__self__", make).output for make in HEADS[name])
    assert set(TASKS[name].outputs) == {HIDDEN, *outputs} and TASKS[name].answers == outputs
    states_first = TASKS[name].pools or name == "multi-vector"
    assert TASKS[name].outputs[0] == (HIDDEN if states_first else outputs[0])
    assert HeadOptions(name).task == name
