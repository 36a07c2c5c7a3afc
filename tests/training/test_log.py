"""The log holds steps and events, each read by its kind; a resumed run drops what a killed one left behind."""

import pytest

from gte_deploy.training.log import RunLog, StepRecord, _draw, read_log


def step(number: int, **changes: object) -> StepRecord:
    facts = {
        "stage": "a",
        "stage_index": 0,
        "step": number,
        "total_step": number,
        "loss": 5.0 - number / 10,
        "learning_rate": 1e-3,
        "gradient_norm": 1.0,
        "tokens": 10,
        "masked_tokens": 3,
        "total_tokens": 10 * number,
        "tokens_per_second": 100.0,
        "peak_share": None,
        "seconds": float(number),
    }
    return StepRecord(**{**facts, **changes})


def test_events_are_read_by_their_kind_and_steps_without_one(tmp_path):
    with RunLog(tmp_path, tensorboard=False) as log:
        log.start(total_step=0)
        log.write([step(1), step(2)])
        log.write_event("change", total_step=2, facts={"key": "seed"})
        log.write([step(3)])
    assert [record["step"] for record in read_log(tmp_path / "log.jsonl")] == [1, 2, 3]
    assert read_log(tmp_path / "log.jsonl", kind="change") == [{"kind": "change", "total_step": 2, "key": "seed"}]
    assert read_log(tmp_path / "log.jsonl", kind="alarm") == []


@pytest.mark.parametrize(("start", "steps", "events"), [(1, [1], 0), (2, [1, 2], 1), (9, [1, 2, 3], 1)])
def test_what_a_killed_run_did_after_its_checkpoint_is_dropped(tmp_path, start, steps, events):
    with RunLog(tmp_path, tensorboard=False) as log:
        log.start(total_step=0)
        log.write([step(1), step(2)])
        log.write_event("change", total_step=2, facts={})
        log.write([step(3)])
    with RunLog(tmp_path, tensorboard=False) as log:
        log.start(total_step=start)
    assert [record["step"] for record in read_log(tmp_path / "log.jsonl")] == steps
    assert len(read_log(tmp_path / "log.jsonl", kind="change")) == events


def test_tensorboard_shows_events_as_text(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunLog(tmp_path) as log:
        log.start(total_step=0)
        log.write_event("change", total_step=4, facts={"key": "clip_norm"})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (told,) = events.Tensors("change/text_summary")
    assert told.step == 4 and b"clip_norm" in told.tensor_proto.string_val[0]


def test_the_plot_marks_changes_and_alarms(tmp_path):
    from matplotlib.figure import Figure

    with RunLog(tmp_path, tensorboard=False) as log:
        log.start(total_step=0)
        log.write([step(1), step(2), step(3)])
        log.write_event("alarm", total_step=3, facts={"quantity": "loss"})
        log.write_event("change", total_step=2, facts={})
    figure = Figure()
    _draw(figure, tmp_path / "log.jsonl")
    loss, rate, _ = figure.axes
    lines = {line.get_label(): line for line in loss.get_lines()}
    assert set(lines) == {"a", "change", "alarm"}
    assert list(lines["alarm"].get_xdata()) == [3] and list(lines["alarm"].get_ydata()) == [step(3).loss]
    assert list(lines["change"].get_xdata()) == [2, 2]
    assert len(rate.get_lines()) == 2
