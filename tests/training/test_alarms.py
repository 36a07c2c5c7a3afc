"""Spikes are far above the steps before them, as scipy measures it; trends and noise are none."""

import numpy as np
import pytest
from scipy.stats import median_abs_deviation

from gte_deploy.core.errors import ConfigError, SpikeError
from gte_deploy.training import train as train_module
from gte_deploy.training.alarms import SpikeDetector
from gte_deploy.training.log import read_log
from gte_deploy.training.recipe import Alarms, recipe_from_dict
from gte_deploy.training.state import find_checkpoint
from gte_deploy.training.train import train


def judged(values, settings=None, **rest):
    detector = SpikeDetector(settings or Alarms(), **rest)
    return [detector.judge(loss=value, gradient_norm=1.0) for value in values]


def test_the_score_is_that_of_scipy():
    values = np.random.default_rng(0).normal(5.0, 0.2, 60).tolist()
    (alarm,) = judged([*values, 9.0])[-1]
    expected = (9.0 - np.median(values)) / median_abs_deviation(values, scale="normal")
    assert alarm.quantity == "loss" and alarm.score == pytest.approx(expected, rel=1e-4)
    assert alarm.median == np.median(values)
    assert "loss 9 against a median of 5" in str(alarm)


def test_noise_and_a_falling_loss_raise_none():
    rng = np.random.default_rng(1)
    losses = 2 + 8 * np.exp(-np.arange(3000) / 400) + rng.normal(0, 0.15, 3000)
    assert not any(judged(losses))


def test_gradient_norms_have_an_alarm_of_their_own():
    detector = SpikeDetector(Alarms())
    for _ in range(30):
        assert detector.judge(loss=2.0, gradient_norm=1.0) == []
    assert [alarm.quantity for alarm in detector.judge(loss=2.0, gradient_norm=3.5)] == ["gradient_norm"]
    assert detector.judge(loss=2.0, gradient_norm=2.5) == []  # 15 deviations: common


def test_a_spike_does_not_hide_the_next_and_a_constant_loss_has_a_margin():
    found = judged([*[3.0] * 40, 4.0, 4.0, 3.2, 2.0])
    assert [len(alarms) for alarms in found[40:]] == [1, 1, 0, 0]


def test_the_first_steps_raise_none_and_a_resumed_run_remembers():
    assert not any(judged([3.0] * 19 + [99.0]))
    detector = SpikeDetector(Alarms())
    for _ in range(25):
        detector.judge(loss=3.0, gradient_norm=1.0)
    assert len(judged([99.0], recent=detector.recent())[0]) == 1
    detector.restart()
    assert detector.judge(loss=99.0, gradient_norm=1.0) == []


def test_null_raises_none_and_bad_settings_are_refused():
    assert not any(judged([*[3.0] * 40, 99.0], Alarms(loss=None)))
    for changes in ({"window": 5}, {"loss": 0.0}, {"gradient_norm": -1.0}):
        with pytest.raises(ConfigError, match="expected"):
            Alarms(**changes)


@pytest.fixture
def spiking(monkeypatch):
    """The loss of step 23 is three times what it is."""
    monkeypatch.setattr(train_module, "plot_run", lambda folder: None)
    original = train_module._compute_gradients

    def spike(run, module, step, **rest):
        size, loss = original(run, module, step, **rest)
        return size, loss * 3 if step.number == 22 else loss

    monkeypatch.setattr(train_module, "_compute_gradients", spike)


@pytest.mark.parametrize("action", ["warn", "stop"])
def test_a_spike_is_logged_or_ends_the_run(spiking, make_recipe, corpus_folder, tmp_path, caplog, action):
    recipe = recipe_from_dict(
        make_recipe(steps=(24,), checkpoint_every=23, log_every=4, alarms={"action": action}, stage={"batch_size": 2})
    )

    def go():
        return train(recipe, data=corpus_folder, output=tmp_path, tensorboard=False)

    if action == "stop":
        for _ in range(2):
            with pytest.raises(SpikeError, match=r"step 23: loss .* --from CHECKPOINT"):
                go()
        assert not (tmp_path / "checkpoints").exists()  # the spike is in the step of the first checkpoint
    else:
        assert go().finished
        assert find_checkpoint(tmp_path).state.step == 24
        assert "stage mlm-32 step 23: loss" in caplog.text and "--change" in caplog.text
    (event,) = read_log(tmp_path / "log.jsonl", kind="alarm")
    assert (event["quantity"], event["step"], event["total_step"], event["stage"]) == ("loss", 23, 23, "mlm-32")
    assert event["value"] > 2 * event["median"]
