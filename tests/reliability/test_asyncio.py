"""asyncio: methods in threads answer as serially, the event loop goes on, and a cancelled task harms no other."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import numpy as np
import pytest

import gte_deploy
from battery import Attempts
from runtime_models import make_texts

TASKS = 200


@pytest.fixture
def model(models: dict[str, Any]) -> Any:
    return models["embed"]


async def encode(model: Any, texts: list[str], call: gte_deploy.Call, **options: Any) -> np.ndarray:
    """As docs/processes.md shows it: a task that is cancelled cancels what its thread does."""
    try:
        with call:
            return await asyncio.to_thread(model.encode, texts, **options)
    except asyncio.CancelledError:
        call.cancel()
        raise


def test_tasks_at_once_answer_as_serial_calls(
    model: Any, repeat_tolerance: float, backend: str, attempts: Attempts
) -> None:
    lists = [make_texts(1 + number % 4, seed=number) for number in range(TASKS)]
    serial = [model.encode(texts) for texts in lists]

    async def all_at_once() -> list[np.ndarray]:
        return await asyncio.gather(*(encode(model, texts, gte_deploy.Call()) for texts in lists))

    for one, other in zip(serial, asyncio.run(all_at_once()), strict=True):
        np.testing.assert_allclose(one, other, atol=max(1e-6, repeat_tolerance))
    attempts(f"asyncio tasks at once: {backend}", TASKS)


def test_the_loop_goes_on_while_a_list_is_computed(model: Any) -> None:
    async def beside() -> list[float]:
        work = asyncio.create_task(asyncio.to_thread(model.encode, make_texts(2000), batch_size=8))
        turns = [time.monotonic()]
        while not work.done():
            await asyncio.sleep(0.001)
            turns.append(time.monotonic())
        await work
        return turns

    turns = asyncio.run(beside())
    # Whoever holds the loop, or the interpreter's lock, for the whole computation leaves one or two turns.
    assert len(turns) > 10 and max(np.diff(turns)) < 0.8 * (turns[-1] - turns[0])


def test_cancelled_tasks_leave_others_their_answers(model: Any, repeat_tolerance: float, attempts: Attempts) -> None:
    rng = random.Random(0)
    lists = [make_texts(1 + number % 4, seed=number) for number in range(TASKS)]
    serial = [model.encode(texts) for texts in lists]

    async def some_cancelled() -> list[Any]:
        tasks = [asyncio.create_task(encode(model, texts, gte_deploy.Call())) for texts in lists]
        for task in reversed(tasks[1::2]):  # the last ones still wait for a thread
            await asyncio.sleep(rng.random() * 0.002)
            task.cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(some_cancelled())
    for number, (one, other) in enumerate(zip(serial, found, strict=True)):
        if isinstance(other, asyncio.CancelledError):
            assert number % 2
            continue
        np.testing.assert_allclose(one, other, atol=max(1e-6, repeat_tolerance))
    assert any(isinstance(answer, asyncio.CancelledError) for answer in found)
    attempts("asyncio tasks of which every other one is cancelled", TASKS)


@pytest.mark.parametrize("how", ["cancelled", "timeout"])
def test_the_thread_of_a_cancelled_task_ends_soon(model: Any, how: str) -> None:
    texts, call = make_texts(5000), gte_deploy.Call()

    async def given_up() -> None:
        task = asyncio.create_task(encode(model, texts, call, batch_size=4))
        while call.usage.rows == 0:
            await asyncio.sleep(0.001)
        if how == "cancelled":
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(task, 0.01)

    asyncio.run(given_up())  # it waits for the threads of `to_thread`
    assert 0 < call.usage.rows < len(set(texts)) / 2
    assert np.isfinite(model.encode("the king")).all()
